"""What is refused in one line: before anything is loaded, and with what to do."""

from __future__ import annotations

import stat
import sys
import types

import pytest
import torch
from models import tiny_config, tiny_model

from hf_kvattn.tools import commands as command_line
from hf_kvattn.tools import inputs
from hf_kvattn.tools.files import new_folder
from hf_kvattn.tools.planning import gib


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert command_line.main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("wrong", [("--prefill", 64), ("--prefill", 65), ("--window", 32)])
def test_an_impossible_schedule_is_found_before_the_model_is_loaded(capsys, monkeypatch, wrong):
    for name in ("load_model", "load_text", "auto_source"):
        monkeypatch.setattr(inputs, name, lambda *args: pytest.fail("something was loaded"))
    line = refused(capsys, "perplexity", "--window", 64, "--prefill", 32, *wrong)
    assert "not 1 <= prefill < window" in line and f"{wrong[0][2:]}={wrong[1]}" in line


@pytest.mark.parametrize("name", ["./nope", "../nope", "/nope/at/all", "nope/", "a b", "x/y/z", "nope/config.json/"])
def test_a_path_that_is_not_there_is_no_id_of_the_hub(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "plan", name, "--context", 10, "--gpu-gib", 1)
    assert line.endswith(f"no such model: {name!r} is no folder or file here, and no id of the hub")
    with pytest.raises(ValueError, match="no such model"):
        inputs.load_model(name, torch.float32)


def test_what_the_hub_does_not_give_is_named(capsys, monkeypatch):
    monkeypatch.setattr(inputs.transformers.AutoConfig, "from_pretrained", lambda source: open("/no such file"))
    assert "cannot load the config of 'some/model': " in refused(
        capsys, "plan", "some/model", "--context", 10, "--gpu-gib", 1
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])  # of two, transformers makes an empty tokenizer
def test_a_model_without_a_tokenizer_is_refused(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer: tokenizer.save_pretrained\('.*'\) puts"):
        inputs.load_model(str(tmp_path), torch.float32)
    assert inputs.load_config(str(tmp_path)).vocab_size == tiny_config(family).vocab_size


def test_a_text_that_cannot_be_had_names_the_option(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("offline mode is enabled")

    datasets = types.ModuleType("datasets")
    datasets.exceptions = types.SimpleNamespace(DatasetsError=KeyError)
    datasets.load_dataset = unreachable
    monkeypatch.setattr(inputs, "getproxies", dict)
    for module, offline in ((None, ""), (datasets, ""), (datasets, "1")):
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises((ImportError, OSError), match="--text takes a file or 'pydoc' as well"):
            inputs.load_text("wikitext")


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999", "0", "-1", "1e-12"])
def test_memory_is_a_positive_number(capsys, text):
    with pytest.raises(SystemExit) as end:
        command_line.main(["plan", "m", "--context", "10", f"--gpu-gib={text}"])
    assert end.value.code == 2 and f"--gpu-gib: {text} is not a positive number" in capsys.readouterr().err
    assert gib("1.5") == 3 << 29


def test_a_new_folder_is_nobody_elses_until_it_has_its_name(tmp_path):
    path = tmp_path / "out"
    with new_folder(path) as folder:
        (folder / "weights").write_text("half")
        rights = [stat.S_IMODE(part.stat().st_mode) for part in (folder, *folder.parents) if tmp_path in part.parents]
        assert any(right & 0o077 == 0 for right in rights)
        assert not path.exists()
    (tmp_path / "plain").mkdir()
    usual = (tmp_path / "plain").stat().st_mode
    assert path.stat().st_mode == usual and (path / "weights").read_text() == "half"
    with pytest.raises(KeyError), new_folder(tmp_path / "failed") as folder:
        raise KeyError
    assert {each.name for each in tmp_path.iterdir()} == {"out", "plain"}
