"""The tests of the native kernels run here on an emulated Arm CPU."""

import os
import sys
from pathlib import Path

import problems
import pytest
from built_once import built_once

from hf_kvattn.kernels import native

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))  # whose tests this job imports
import arm_library  # noqa: E402

# Before they are imported. The portable one, which no CPU chooses, is tested on other machines.
problems.VARIANTS[:] = arm_library.CPUS["max"][:-1]


@pytest.fixture(scope="session")
def runner(tmp_path_factory) -> Path:
    flags = os.environ.get("HF_KVATTN_JOB_FLAGS", "-O1")
    return built_once(tmp_path_factory, "arm", lambda folder: arm_library.build(folder, flags))


@pytest.fixture(scope="session", autouse=True)
def arm(runner):
    """The CPU with all features takes the place of this one."""
    library = arm_library.ArmLibrary(runner, "max")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", lambda: (library, None))
        yield library
    assert library.close() == 0
