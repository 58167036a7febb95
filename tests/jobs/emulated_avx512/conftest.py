"""The tests of the native kernels run here on a library whose AVX-512 variants are emulated."""

import os
import sys
from pathlib import Path

import emulated_avx512
import problems
import pytest
from built_once import built_once

from hf_kvattn.kernels import native

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))  # whose tests this job imports
problems.VARIANTS[:] = emulated_avx512.VARIANTS  # before they are imported


@pytest.fixture(scope="session", autouse=True)
def emulated_library(tmp_path_factory):
    flags = os.environ.get("HF_KVATTN_JOB_FLAGS", "-O1")
    library = built_once(tmp_path_factory, "emulated_avx512", lambda folder: emulated_avx512.build(folder, flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_candidates", lambda: [library])
        native._load.cache_clear()
        yield library
        native._load.cache_clear()
