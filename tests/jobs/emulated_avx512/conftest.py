"""The tests of the native kernels run here on a library whose AVX-512 variants are emulated."""

import fcntl
import os
import sys
from pathlib import Path

import emulated_avx512
import problems
import pytest

from hf_kvattn.kernels import native

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))  # whose tests this job imports
problems.VARIANTS[:] = emulated_avx512.VARIANTS  # before they are imported


@pytest.fixture(scope="session", autouse=True)
def emulated_library(tmp_path_factory, worker_id):
    """Built once for all processes of the job."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # which they share
    folder = folder / "emulated_avx512"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "libkvattn.so"
        if not library.exists():
            library = emulated_avx512.build(folder, os.environ.get("HF_KVATTN_JOB_FLAGS", "-O1"))
        fcntl.flock(lock, fcntl.LOCK_UN)
        patch.setattr(native, "_candidates", lambda: [library])
        native._load.cache_clear()
        yield library
        native._load.cache_clear()
