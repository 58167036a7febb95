"""The measurements' command lines on a model in a folder, and what they refuse."""

from __future__ import annotations

import json

import pytest
from command_lines import run
from stand_ins import CharTokenizer, NanValues, ScaledValues, planted

from hf_kvattn.evaluation.common import report, variants
from hf_kvattn.tools import inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scripts_measure_a_local_model(tiny_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    common = ["--model", str(tiny_folder), "--dtype", "float32", "--text", str(tmp_path / "text.txt"), "--json"]
    common += ["--out", str(tmp_path / "out")]
    fast = ["--contexts", "12", "24", "--batch-sizes", "1", "--new-tokens", "8", "--rounds", "2"]
    assert run("throughput", *common, *fast, "--variants", "kvattn-static", "none") == 0
    timed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["variant"] for row in timed["cells"][0]["rows"]] == ["stock-dynamic", "kvattn-static", "none"]
    small = ["--window", "30", "--prefill", "10", "--stride", "6", "--windows", "2", "--variants", "kvattn-static"]
    assert run("perplexity", *common, *small) == 0
    scored = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.read(tmp_path / "out") == {"throughput": timed, "perplexity": scored}
    assert {"cpu", "threads", "torch", "transformers", "commit", "command", "date"} <= set(timed["conditions"])
    monkeypatch.setitem(variants.VARIANTS, "wrong", planted("wrong", ScaledValues))
    assert run("throughput", *common[:-2], *fast, "--variants", "wrong") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("throughput", ["--variants", "no-such-cache"], "no-such-cache"),
        ("throughput", ["--text", "no-such-text"], "no-such-text"),
        ("throughput", ["--contexts", 1], "contexts=[1]"),
        ("throughput", ["--contexts", 999999, "--batch-sizes", 1], "and 999999 are needed"),
        ("throughput", ["--backend", "no-such-backend"], "no-such-backend"),
        ("throughput", ["--device", "no-such-device"], "'no-such-device' cannot be used"),
        ("throughput", ["--device", "xpu"], "'xpu' cannot be used"),
        ("throughput", ["--rounds", 0], "0 is not a positive number"),
        ("throughput", ["--llama-cpp", "llama.gguf"], "llama"),  # the package or the file
        ("perplexity", ["--model", "no-such-model.gguf"], "no-such-model.gguf"),
        ("perplexity", ["--prefill", 2048], "prefill=2048, window=2048"),
        ("perplexity", ["--variants", "planted-nan"], "planted-nan gives NaN"),
        ("bandwidth", ["--heads", 9, 2, 64], "q_heads=9, kv_heads=2"),
        ("bandwidth", ["--threads", "many"], "many"),
        ("bandwidth", ["--native-variant", "neon512"], "'neon512' is not usable"),
    ],
)
def test_scripts_refuse_bad_input_with_one_line(name, arguments, said, model, tokens, tmp_path, monkeypatch, capsys):
    if "--model" not in arguments:
        monkeypatch.setattr(inputs, "load_model", lambda *arguments: (model, CharTokenizer()))
        monkeypatch.setitem(variants.VARIANTS, "planted-nan", planted("planted-nan", NanValues))
    common = [] if name == "bandwidth" else ["--text", "pydoc"]
    assert run(name, *common, *arguments, "--output", tmp_path / "out") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"{name}.py: error: ") and said in lines[-1]
    assert not any("Traceback" in line for line in lines) and not (tmp_path / "out").exists()
