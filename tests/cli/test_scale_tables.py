"""The command `scale`: its bytes are those of the models and caches, and docs/scale.md has its tables."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from hf_kvattn.caches.registry import CACHES
from hf_kvattn.planning import cache_bytes
from hf_kvattn.tools import scale
from hf_kvattn.tools.commands import main

ROOT = Path(__file__).parent.parent.parent
PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}  # as their model cards say


def test_the_page_has_the_tables_that_the_command_prints(capsys):
    assert main(["scale"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    page = (ROOT / "docs/scale.md").read_text()
    assert len(tables) == 4 and all(table.strip() in page for table in tables)


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_are_the_models_and_all_but_the_embeddings_are_read(name):
    model = scale.shape(name)
    assert model.weights_bytes == pytest.approx(2 * PARAMETERS[name], rel=1e-6)
    assert model.weights_bytes - model.read_bytes == 2 * 128256 * model.config.hidden_size


def test_a_tokens_bytes_are_those_of_the_whole_models_cache():
    config = LlamaConfig(**scale.COMMON, **scale.LLAMA_3_1["8B"])
    model = scale.Shape(config, 0, 0)
    for name in scale.NAMES:
        assert scale.kv_bytes(model, 1, 3, 100, name) == cache_bytes(CACHES[name], config, 3, scale.DTYPE, 100)
    assert scale.kv_bytes(model, 1, 1, scale.LONG, "static") == scale.LONG * 2 * 8 * 128 * 2 * 32


def test_kv_heads_are_split_until_each_gpu_has_one():
    model = scale.Shape(LlamaConfig(**scale.COMMON, **scale.LLAMA_3_1["8B"]), 0, 0)
    one, four, eight, sixteen = (scale.kv_bytes(model, n, 1, 4096, "static") for n in (1, 4, 8, 16))
    assert one == 4 * four == 8 * eight == 8 * sixteen


def test_another_gpu_has_other_tables(capsys, monkeypatch):
    monkeypatch.setattr(scale, "LLAMA_3_1", {"8B": scale.LLAMA_3_1["8B"]})
    assert main(["scale", "--gpu-gib", "141", "--gpu-tb-s", "4.8"]) == 0
    *_, room, step = capsys.readouterr().out.split("\n\n")
    first = [cell.strip() for cell in room.splitlines()[2].split("|")[1:4]]
    weights_bytes = scale.shape("8B").weights_bytes
    assert first == ["8B on 1", "15.0", f"{((141 << 30) - weights_bytes) / (128 << 10):,.0f}"]
    ms = 1000 * (scale.shape("8B").read_bytes + (128 << 10) * 131072) / 4.8e12
    assert step.splitlines()[2].split("|")[2].strip().startswith(f"{ms:.1f} (")


@pytest.mark.parametrize("text", ["0", "nan", "inf", "fast"])
def test_a_speed_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["scale", "--gpu-tb-s", text])
    assert text in capsys.readouterr().err
