"""Files and folders that appear whole or not at all, and JSON that says which file it is not in."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def replace(path: Path, write_to: Callable[[Path], Any]) -> Path:
    """Write a file under a temporary name beside `path`, then rename it: it is there whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write_to(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def replace_text(path: Path, text: str) -> Path:
    """`replace` with a text, in UTF-8."""
    return replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError that names the file where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{path} is not JSON ({error}): move it away or choose another folder") from error


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block succeeds, and is removed when it fails.

    It lies in a folder beside `path` that nobody else may enter. `path` itself gets the usual rights.

    Raises ValueError when `path` exists or the folder that it should be in does not, before anything else is done.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: move it away or choose another output folder")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the output {path.name}")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as private:
        folder = Path(private, path.name)
        folder.mkdir()
        yield folder
        os.rename(folder, path)
