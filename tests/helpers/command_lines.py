"""The command lines, run inside the tests' process."""

import runpy
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(name: str, *arguments: object) -> int:
    """The exit status of `python scripts/NAME.py ARGUMENTS`."""
    saved = sys.argv
    sys.argv = [str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = saved
    raise AssertionError(f"{name}.py does not end with sys.exit")


def refused(capsys, folder: Path, before: set[Path], *arguments: object) -> str:
    """The one line with which a command line refuses, after checking that it wrote nothing."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "error: " in lines[-1] and not [line for line in lines if "Traceback" in line]
    assert set(folder.iterdir()) == before
    return lines[-1]
