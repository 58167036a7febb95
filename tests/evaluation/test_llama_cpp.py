"""llama.cpp in the turns of `throughput`, with a stand-in for llama-cpp-python."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
import types

import pytest
from stand_ins import CONDITIONS, measured

from hf_kvattn.evaluation import llama_cpp
from hf_kvattn.evaluation.common import report, variants

pytestmark = pytest.mark.usefixtures("one_thread")

METADATA = {
    **{"general.architecture": "llama", "llama.block_count": "2", "llama.attention.head_count": "4"},
    **{"llama.embedding_length": "64", "llama.attention.head_count_kv": "2"},
}


class Llama:
    """Counts tokens; the one after token t is t + 1."""

    made: list[dict] = []

    def __init__(self, path: str, **arguments):
        if path.endswith("broken.gguf"):
            raise ValueError("Failed to load model from file")
        self.made.append(arguments | {"path": path})
        self.metadata, self.n_tokens, self.ctx, self.evaluated = METADATA, 0, self, []
        self._n_ctx = arguments["n_ctx"]

    def n_ctx(self) -> int:
        return self._n_ctx

    def n_vocab(self) -> int:
        return 128

    def eval(self, tokens: list[int]) -> None:
        assert tokens
        self.n_tokens += len(tokens)
        assert self.n_tokens <= self._n_ctx
        self.evaluated += tokens


def logits_of(context: Llama, row: int):
    assert row == -1
    values = (ctypes.c_float * 128)()
    values[(context.evaluated[-1] + 1) % 128] = 1.0
    return ctypes.cast(values, ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The path of a file that the stand-in for llama-cpp-python takes."""
    types_of = {f"GGML_TYPE_{name}": i for i, name in enumerate(("F16", "Q8_0", "Q4_0"), 1)}
    module = types.SimpleNamespace(Llama=Llama, llama_get_logits_ith=logits_of, **types_of)
    module.__spec__ = types.SimpleNamespace(name="llama_cpp")
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(Llama, "made", [])
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return str(path)


def test_rows_of_each_type_are_measured_in_turns(stub, model, tokens, tmp_path):
    results = measured(model, tokens, variants.select(["kvattn-static"]), contexts=[12, 24], batch_sizes=[1, 2],
                       llama_cpp=stub)  # fmt: skip
    names = [f"llama.cpp-{kind}" for kind in ("f16", "q8_0", "q4_0")]
    for cell in results["cells"]:
        rows = {row["variant"]: row for row in cell["rows"]}
        assert list(rows) == ["stock-dynamic", "kvattn-static", *(names if cell["batch"] == 1 else [])]
        for name in names if cell["batch"] == 1 else []:
            row, ours = rows[name], rows["kvattn-static"]
            assert row["steps_timed"] == ours["steps_timed"] and row["tokens"]["verdict"] in ("differs", "same")
            assert row["tokens"]["compared"] == ours["tokens"]["compared"] and not row["hooked"]
            assert row["speedup"]["stock-dynamic"]["of_medians"] > 0 and row["ttft_ms"] > 0
    skipped = [item for item in results["skipped"] if item["batch"] == 2]
    assert [item["variant"] for item in skipped] == names * 2 and "one row" in skipped[0]["reason"]
    made = Llama.made[0]
    assert made["flash_attn"] and made["n_threads"] == made["n_threads_batch"] == 1 and made["path"] == stub
    assert {(each["type_k"], each["type_v"]) for each in Llama.made} == {(1, 1), (2, 2), (3, 3)}
    report.write(results | {"conditions": CONDITIONS}, tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "| llama.cpp-q8_0 |" in text and "weights of model.gguf" in text
    assert (tmp_path / "out/step_ms.png").stat().st_size > 0
    json.dumps(results, allow_nan=False)


def test_it_goes_on_from_what_its_cache_holds(stub, tokens):
    [f16, q8, q4] = (variant.make(None, 40) for variant in llama_cpp.variants(stub))
    ids, times_s = f16.decode(tokens[None, :10] * 0 + 5, 1)
    assert ids[0].tolist() == [5] * 10 + [6] and len(times_s) == 1
    ids, times_s = f16.decode(ids, 3)
    assert ids[0, 10:].tolist() == [6, 7, 8, 9] and times_s == sorted(times_s)
    assert f16._model.evaluated == ids[0, :-1].tolist()  # each once
    assert f16.nbytes == 2 * 2 * 2 * 16 * 40 * 2
    assert q8.nbytes * 32 == f16.nbytes * 17 and q4.nbytes * 32 == f16.nbytes * 9
    with pytest.raises(ValueError, match="token 500 is beyond the .gguf file's vocabulary of 128"):
        q8.decode(tokens[None, :3] * 0 + 500, 1)


def test_what_is_missing_is_named(stub, model, tokens, monkeypatch):
    with pytest.raises(ValueError, match="no such model file: 'nowhere.gguf'"):
        measured(model, tokens, variants.select(["stock-static"]), llama_cpp="nowhere.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    with pytest.raises(ValueError, match="llama-cpp-python, which is not installed: pip install"):
        measured(model, tokens, variants.select(["stock-static"]), llama_cpp=stub)


def test_a_file_that_cannot_be_loaded_is_skipped_with_the_reason(stub, model, tokens, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"")
    results = measured(model, tokens, variants.select(["stock-static"]), llama_cpp=str(tmp_path / "broken.gguf"))
    assert {item["variant"] for item in results["skipped"]} == {f"llama.cpp-{kind}" for kind in llama_cpp.KV_TYPES}
    assert "Failed to load" in results["skipped"][0]["reason"]
