"""Builds that take minutes, once for all processes of a run of tests."""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from pytest import TempPathFactory


def built_once(temporary: TempPathFactory, name: str, build: Callable[[Path], Path]) -> Path:
    """What `build` returned for the folder `name`: the first process builds there, and the others wait for it."""
    base = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # which the processes share
    folder = base / name
    folder.mkdir(exist_ok=True)
    built = folder / "built"  # holds the path, once there is one
    with FileLock(folder / "lock"):
        if not built.exists():
            path = build(folder)
            built.write_text(str(path))
    return Path(built.read_text())
