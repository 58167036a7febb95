"""The tests of the native kernels run here on an emulated Arm CPU."""

import fcntl
import os
import sys
from pathlib import Path

import problems
import pytest

from hf_kvattn.kernels import native

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))  # whose tests this job imports
import arm_library  # noqa: E402

# Before they are imported. The portable one, which no CPU chooses, is tested on other machines.
problems.VARIANTS[:] = arm_library.CPUS["max"][:-1]


@pytest.fixture(scope="session")
def runner(tmp_path_factory, worker_id) -> Path:
    """Built once for all processes of the job."""
    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent  # which they share
    folder = folder / "arm"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return (
            folder / "runner"
            if (folder / "runner").exists()
            else arm_library.build(folder, os.environ.get("HF_KVATTN_JOB_FLAGS", "-O1"))
        )


@pytest.fixture(scope="session", autouse=True)
def arm(runner):
    """The CPU with all features takes the place of this one."""
    library = arm_library.ArmLibrary(runner, "max")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", lambda: (library, None))
        yield library
    assert library.close() == 0
