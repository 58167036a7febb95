"""Finished windows of a long measurement, in files: what a run that goes on need not do again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_kvattn.tools.files import read_json, replace, replace_text


class Scored(NamedTuple):
    """What one window gave, by the names of variants: scores of its tokens, and sizes of the cache."""

    scores: dict[str, torch.Tensor]
    sizes: dict[str, dict[str, Any]]


class FinishedWindows:
    """The folder `perplexity-windows` in `out_dir`: a file for each finished window, and the settings of their run.

    Args:
        out_dir: where the results will be; None keeps nothing.
        settings: all that windows depend on; what JSON can hold.
    """

    def __init__(self, out_dir: str | Path | None, settings: dict[str, Any]):
        self._folder = None if out_dir is None else Path(out_dir, "perplexity-windows")
        self._settings = json.loads(json.dumps(settings))

    def load(self, windows: int) -> dict[int, Scored]:
        """The windows that are there, by number, of `windows` in all; ValueError where they have other settings."""
        if self._folder is None:
            raise ValueError("windows of an earlier run are read from the output folder, and none was given")
        if not self._settings_file.exists():
            return {}
        told = read_json(self._settings_file)
        for name, ours in self._settings.items():
            theirs = told.get(name) if isinstance(told, dict) else None
            if theirs != ours:
                begun = f"{self._folder} was begun with {name}={theirs!r}"
                raise ValueError(f"{begun}, and this run has {ours!r}: without resuming it begins anew")
        return {i: self._read(i) for i in range(windows) if self._file(i).exists()}

    def keep(self, number: int, window: Scored) -> None:
        """Writes a window: it is there whole or not at all."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if not self._settings_file.exists():
            replace_text(self._settings_file, json.dumps(self._settings))
        told = {"sizes": json.dumps(window.sizes)}
        replace(self._file(number), lambda path: save_file(window.scores, path, told))

    def remove(self) -> None:
        """Removes what `keep` wrote, the folder too where nothing else is in it."""
        if self._folder is None or not self._folder.is_dir():
            return
        for file in (self._settings_file, *self._folder.glob("*.safetensors")):  # first what says they belong together
            file.unlink(missing_ok=True)
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    @property
    def _settings_file(self) -> Path:
        assert self._folder is not None
        return self._folder / "settings.json"

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number}.safetensors"

    def _read(self, number: int) -> Scored:
        with safe_open(self._file(number), "pt") as file:
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            return Scored(scores, json.loads(file.metadata()["sizes"]))
