"""Claims on a tiny model, judged by hand-made figures."""

from __future__ import annotations

import json

import pytest
import torch
from command_lines import run
from models import tiny_model
from stand_ins import CharTokenizer, ScaledValues, planted

from hf_kvattn.evaluation import claims, stated
from hf_kvattn.evaluation.common import report, variants
from hf_kvattn.kernels import reference
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.tools import inputs

SETTINGS = {
    "variants": variants.select(["none", "stock-dynamic", "kvattn-static"]),
    "contexts": [8, 16],
    "lengths": [16, 8, 40],
    "cache_lengths": [64, 24],
    "heads": (4, 2, 8),
    "window": 24,
    "standard_bytes": claims._standard_bytes((4, 2, 8), 16, torch.float32),
    "rounds": 2,
    "new_tokens": 4,
}
TOKENS = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def small():
    """One thread, one cache and one call a turn: nothing here is about the figures themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "TURN_S", 0.0)
        patch.setattr(claims, "LAYERS_BYTES", 0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured(small):
    return claims.measure(tiny_model(), CharTokenizer(), TOKENS, **SETTINGS)


def test_everything_is_measured_and_counted(measured):
    assert [row["tokens"] for row in measured["attention"]] == [8, 16, 40]
    assert ["standard" in row["methods"] for row in measured["attention"]] == [True, True, False]
    assert measured["skipped"][0]["variant"] == "standard attention" and measured["skipped"][0]["context"] == 40
    for row in measured["attention"]:
        for found in row["methods"].values():
            assert 0 < found["ms"]["p20"] <= found["ms"]["median"] <= found["ms"]["p80"] and found["extra_bytes"] >= 0
        assert (row["speedup"]["tiled"] is None) == (row["max_difference"] is None) == (row["tokens"] == 40)
        assert row["max_difference"] is None or row["max_difference"] < 1e-5
    for cell in measured["caches"]:
        token_bytes = 2 * claims.CACHE_DIM * 4 * cell["tokens"]
        sizes = {name: layout["cache_bytes"] / token_bytes for name, layout in cell["layouts"].items()}
        assert [sizes[name] for name in ("MHA", "GQA", "MQA")] == [32, 8, 1] and sizes["GQA, window"] <= 8
    assert [cell["tokens"] for cell in measured["caches"]] == [24, 64]
    for cell in measured["decoding"]:
        speedups = {row["variant"]: row["speedup"] for row in cell["rows"]}
        assert set(speedups) == {"none", "stock-dynamic", "kvattn-static"} and speedups["none"]["of_medians"] == 1
        assert all(row["verdict"] == "same" for row in cell["rows"])
    assert measured["mismatches"] == 0
    json.dumps(measured, allow_nan=False)


def test_windowed_chunks_are_windowed_attention(monkeypatch):
    monkeypatch.setattr(claims, "CHUNK", 7)
    q, k, v = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    for window in (1, 5, 7, 20, 100):
        expected = reference.attend(AttendCall(q, k, v, 8**-0.5, window=window))
        torch.testing.assert_close(claims._windowed(q, k, v, window), expected)
        wrong = reference.attend(AttendCall(q, k, v, 8**-0.5, window=window + 1))
        assert window == 100 or (claims._windowed(q, k, v, window) - wrong).abs().max() > 1e-3
    torch.testing.assert_close(claims._standard(q, k, v), reference.attend(AttendCall(q, k, v, 8**-0.5)))


def spread(value: float) -> dict[str, float]:
    return {"median": value, "p20": value, "p80": value}


def made_up() -> dict:
    """Results in which every stated figure is met exactly."""

    def method(ms, size):
        return {"ms": spread(ms), "extra_bytes": size}

    def attention(tokens):
        scale = tokens / 2048
        methods = {"standard": method(90 * scale**2, 1000 * scale**2), "tiled": method(30 * scale**2, 50 * scale)}
        methods["windowed"] = method(15 * scale, 50)
        return {
            "tokens": tokens,
            "methods": methods,
            "speedup": {"tiled": {"of_medians": 3.0}, "windowed": {"of_medians": 2.0 * scale}},
            "max_difference": 0.0,
        }

    def layout(kv_heads, size, step_ms):
        faster = {"of_medians": 32 / step_ms}
        return {"kv_heads": kv_heads, "cache_bytes": size, "step_ms": spread(step_ms), "faster_than_mha": faster}

    caches = {"MHA": layout(32, 3200, 32.0), "GQA": layout(8, 800, 8.0), "MQA": layout(1, 100, 1.0)}
    caches["GQA, window"] = layout(8, 100, 1.0)
    decoding = [{"variant": "none", "speedup": None}, {"variant": "ours", "speedup": {"of_medians": 50.0}}]
    return {
        "settings": {"window": 4096, "cache_heads": 32},
        "attention": [attention(tokens) for tokens in (2048, 4096, 8192, 16384)],
        "decoding": [{"context": 2048, "rows": decoding}],
        "caches": [{"tokens": 32768, "layouts": caches}],
    }


def test_figures_that_are_as_stated_agree():
    judged = stated.judge(made_up())
    assert [row["claim"] for row in judged if not row["agrees"]] == [] and len(judged) == 17
    assert all(row["why"] is None and row["source"] for row in judged)
    linear = next(row for row in judged if "time grows" in row["claim"])
    assert linear["measured"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "claim", "measured", "why"),
    [
        (
            lambda r: r["decoding"][0]["rows"][1]["speedup"].update(of_medians=3.0),
            "10 to 100 times",
            3.0,
            "all weights",
        ),
        (lambda r: r["decoding"][0]["rows"][1]["speedup"].update(of_medians=300), "10 to 100 times", 300, "longer"),
        (lambda r: r["caches"][0]["layouts"]["MQA"].update(cache_bytes=200), "cache is 32 times", 16, "overhead"),
        (lambda r: r["caches"][0]["layouts"]["GQA, window"].update(cache_bytes=800), "8 times smaller", 1, "no longer"),
        (
            lambda r: r["attention"][1]["speedup"]["tiled"].update(of_medians=0.5),
            r"standard attention \(4096",
            0.5,
            "GPU",
        ),
        (lambda r: r["attention"][0]["methods"]["tiled"].update(extra_bytes=500), r"10 times less", 2.0, "few heads"),
    ],
)
def test_a_figure_that_is_not_as_stated_is_said_with_its_reason(change, claim, measured, why):
    results = made_up()
    change(results)
    (wrong,) = [row for row in stated.judge(results) if not row["agrees"]]
    assert wrong["measured"] == pytest.approx(measured) and why in wrong["why"]
    assert claim.replace("\\", "") in wrong["claim"]
    assert stated.disagreements({"claims": stated.judge(results)}) == [wrong]


def test_memory_that_did_not_rise_gives_no_claim():
    results = made_up()
    for row in results["attention"]:
        row["methods"]["tiled"]["extra_bytes"] = 0
    judged = [row["claim"] for row in stated.judge(results)]
    assert not any("less memory" in claim or "tiled attention's memory" in claim for claim in judged)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": (4, 3, 8)}, "q_heads=4, kv_heads=3"),
        ({"lengths": []}, r"lengths=\[\]"),
        ({"window": 0}, "window=0"),
        ({"variants": variants.select(["stock-dynamic"])}, "'none' is not among"),
        ({"contexts": [17]}, "17"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        claims.measure(tiny_model(), CharTokenizer(), TOKENS, **(SETTINGS | wrong))


@pytest.mark.slow
def test_attention_claims_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "load_model", lambda *arguments: (tiny_model(), tokenizer))
    tokenizer = CharTokenizer()
    monkeypatch.setattr(inputs, "load_tokens", lambda tokenizer, text, count: TOKENS[:count])
    sizes = ["--contexts", 8, 16, "--lengths", 8, 16, "--cache-lengths", 32, "--window", 8, "--heads", 2, 1, 8]
    common = ["--text", "pydoc", "--rounds", 2, "--new-tokens", 4, *sizes, "--output", tmp_path / "out", "--json"]
    assert run("attention_claims", *common) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.read(tmp_path / "out") == {"claims": printed}
    assert run("make_model_card", tmp_path / "out") == 0
    (tmp_path / "out" / "results.json").write_text("{")
    assert run("attention_claims", *common) == 2 and "not JSON" in capsys.readouterr().err
    assert run("attention_claims", *common[:-3], "--variants", "no-such-cache") == 2
    assert run("attention_claims", *common[:-3], "--text", tmp_path / "missing.txt") == 2
    assert "missing.txt" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(variants.VARIANTS, "wrong", planted("wrong", ScaledValues))
    assert run("attention_claims", *common[:-3], "--variants", "none", "wrong") == 1
