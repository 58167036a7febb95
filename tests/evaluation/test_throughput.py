"""Decode steps, prompts and tokens on a tiny random model: alarms that really go off."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
from stand_ins import CharTokenizer, ScaledValues, measured, planted
from transformers import DynamicCache

from hf_kvattn.evaluation import perplexity, throughput
from hf_kvattn.evaluation.common import report, variants
from hf_kvattn.evaluation.common import tokens as token_check
from hf_kvattn.evaluation.common.variants import VARIANTS, Variant
from hf_kvattn.tools import inputs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_timing_counts_steps_and_turns(model, tokens, monkeypatch):
    """With a clock that ticks once a reading, every step lasts a second, whatever the machine does."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    turns: list[str] = []
    time_round = throughput._time_round
    monkeypatch.setattr(
        throughput,
        "_time_round",
        lambda model, lane, steps: (turns.append(lane.variant.name), time_round(model, lane, steps)),
    )
    chosen = variants.select(["none", "stock-static", "kvattn-static"])
    results = measured(
        model, tokens, chosen, contexts=[24, 12], batch_sizes=[2, 1], new_tokens=15, rounds=3, max_batch_tokens=24
    )
    assert [(cell["batch"], cell["context"]) for cell in results["cells"]] == [(1, 12), (1, 24), (2, 12)]
    assert turns[:8] == ["stock-dynamic", "none", "stock-static", "kvattn-static"] + [
        "none", "stock-static", "kvattn-static", "stock-dynamic"]  # fmt: skip
    for cell in results["cells"]:
        for row in cell["rows"]:
            block = 2 if row["variant"] == "none" else 5
            assert row["steps_timed"] == 3 * (block - 1) and row["steps_dropped"] == 3
            assert row["step_ms"] == {"median": 1000.0, "p20": 1000.0, "p80": 1000.0}
            assert row["ttft_ms"] == 1000.0 and row["prefill_tok_s"] == cell["batch"] * cell["context"]
            assert row["decode_tok_s"] == cell["batch"] and row["round_median_ms"] == [1000.0] * 3
            assert row["speedup"]["stock-static"]["paired_median"] == row["speedup"]["stock-dynamic"]["of_medians"] == 1
            assert row["tokens"]["verdict"] == "same"
            assert row["tokens"]["compared"] == (1 + 3 * 2 + 1 if block == 2 else 1 + 2 + 15 + 3)
            assert (row["cache_bytes"] > 0) == (row["variant"] != "none") and row["decode_extra_bytes"] >= 0
    assert [(price["batch"], price["contexts"]) for price in results["price_of_context"]] == [(1, [12, 24])] * 4
    assert [(item["context"], item["batch"]) for item in results["skipped"]] == [(24, 2)]
    json.dumps(results, allow_nan=False)


class PlannedMemory:
    """In the place of `PeakMemory`: whose prompt is measured, and what it peaks at."""

    method = "planned"

    def __init__(self, mib):
        self.mib, self.prompts, self.running = {name: iter(peaks) for name, peaks in mib.items()}, [], False

    def start(self):
        assert not self.running
        self.running = True

    def stop(self):
        self.running = False
        name, is_prompt = self.decoded
        if not is_prompt:
            return 5
        self.prompts.append(name)
        return next(self.mib[name]) * 2**20


@pytest.mark.parametrize(("prompts_s", "count"), [(0.0, 1), (2.5, 2), (math.inf, 5)])
def test_prompts_are_measured_in_turns_as_far_as_they_fit(model, tokens, monkeypatch, prompts_s, count):
    """A prompt lasts a second by a clock that ticks once a reading."""
    ticks, made, decode = iter(range(10**6)), [], throughput._decode
    names, peaks = ["stock-dynamic", "kvattn-static"], ([10, 70, 20, 30, 40][:count], [1, 2, 9, 8, 3][:count])
    memory = PlannedMemory(dict(zip(names, peaks, strict=True)))
    monkeypatch.setattr(throughput, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(throughput, "PeakMemory", lambda device: memory)

    def seen(model, lane, steps):
        memory.decoded = (lane.variant.name, lane.ids.shape[1] == 12)
        if memory.decoded[1] and memory.running:
            assert lane.cache.get_seq_length() == 0
            made.append(lane.cache)
        return decode(model, lane, steps)

    monkeypatch.setattr(throughput, "_decode", seen)
    results = measured(model, tokens, variants.select(names), new_tokens=10, rounds=5, prompts_s=prompts_s)
    (cell,) = results["cells"]
    assert len({id(cache) for cache in made}) == 2 * count and results["settings"]["prompts_s"] == prompts_s
    assert cell["prompts"] == count
    assert memory.prompts == (names + [names[1], names[0], names[0], names[1]] * 2)[: 2 * count]
    for row, own in zip(cell["rows"], peaks, strict=True):
        ordered = torch.tensor(own, dtype=torch.float64) * 2**20
        p20, median, p80 = (torch.quantile(ordered, share).item() for share in (0.2, 0.5, 0.8))
        assert row["prompt_peak_bytes"] == {"median": median, "p20": p20, "p80": p80}
        assert row["decode_extra_bytes"] == 5 and row["tokens"]["verdict"] == "same"
    text = report.table(results)
    assert f"Prompts of each cache: {count}." in text
    assert {1: "| 10.0 |", 2: "| 40.0 (22.0 to 58.0) |", 5: "| 30.0 (18.0 to 46.0) |"}[count] in text


def test_results_of_one_prompt_are_still_read(model, tokens):
    results = measured(model, tokens, variants.select(["stock-dynamic"]))
    (cell,) = results["cells"]
    del cell["prompts"], results["settings"]["prompts_s"]
    cell["rows"][0]["prompt_peak_bytes"] = 3 * 2**20
    text = report.table(results)
    assert "| 3.0 |" in text and "were timed once. Memory that" in text and "Prompts of each" not in text
    del cell["rows"][0]["prompt_peak_bytes"]
    assert "| 3.0 |" not in report.table(results)


def test_price_of_context_is_the_difference_and_its_share():
    def cell(context, **medians):
        rows = [{"variant": name.replace("_", "-"), "step_ms": {"median": ms}} for name, ms in medians.items()]
        return {"context": context, "batch": 1, "rows": rows}

    cells = [
        cell(128, stock_dynamic=30.0, ours=28.0),
        cell(2048, ours=99.0),
        cell(7900, stock_dynamic=180.0, ours=43.0),
    ]
    stock, ours = throughput._price_of_context(cells)
    assert ours["extra_ms"] == 15.0 and ours["contexts"] == [128, 7900]
    assert ours["share_of"] == {"stock-dynamic": pytest.approx(0.1), "stock-static": None}
    assert ours["growth"] == pytest.approx(43 / 28) and stock["share_of"]["stock-dynamic"] == 1.0


def test_a_wrong_cache_is_a_mismatch_and_a_lossy_one_differs(model, tokens):
    chosen = [planted("wrong", ScaledValues), planted("lossy", ScaledValues, exact=False), *variants.select(["none"])]
    results = measured(model, tokens, chosen, batch_sizes=[2], new_tokens=20)
    verdicts = {row["variant"]: row["tokens"] for row in results["cells"][0]["rows"]}
    assert verdicts["wrong"]["verdict"] == "MISMATCH" and results["mismatches"] == 1
    found = verdicts["wrong"]["differences"][0]
    assert found["margin"] > found["tolerance"] == token_check.NEAR_TIE_FP32
    assert verdicts["lossy"]["verdict"] == "differs" and verdicts["none"]["verdict"] == "same"


def test_the_stock_margin_decides_between_near_tie_and_mismatch(model, tokens):
    """Lanes with one token changed by hand: the recorded margin is that of a plain forward."""
    context, prompt = 10, tokens[:20].view(2, 10)
    stock = token_check.Lane(VARIANTS["stock-dynamic"], DynamicCache(config=model.config), prompt)
    throughput._decode(model, stock, 1)
    throughput._decode(model, stock, 6)
    with torch.no_grad():
        logits = model(stock.ids[:, :-1], use_cache=False).logits
    changes = [(0, 4), (1, 0), (1, 6)]
    lanes = []
    for row, new_token in changes:
        ids = stock.ids.clone()
        ids[row, context + new_token] = logits[row, context + new_token - 1].topk(2).indices[1]
        lanes.append(token_check.Lane(planted("changed", DynamicCache), None, ids))
    with torch.no_grad():
        found = token_check.compare_tokens(model, stock, lanes, context)
    for (row, new_token), item in zip(changes, found, strict=True):
        top = logits[row, context + new_token - 1].topk(2).values
        (difference,) = item["differences"]
        assert (difference["row"], difference["new_token"]) == (row, new_token)
        assert difference["margin"] == pytest.approx((top[0] - top[1]).item(), abs=1e-4)
        assert item["verdict"] == "MISMATCH" and item["compared"] == 7
        difference["margin"] = 0.5 * difference["tolerance"]
        assert token_check._verdict(lanes[0].variant, [difference]) == "near_tie"


def test_near_tie_tolerance_follows_the_dtype():
    assert token_check.near_tie_tolerance(torch.float32, 20.0) == token_check.NEAR_TIE_FP32
    one_unit = token_check.near_tie_tolerance(torch.bfloat16, 20.0) / token_check.NEAR_TIE_ULPS
    assert one_unit == torch.tensor(20.0, dtype=torch.bfloat16).nextafter(torch.tensor(99.0, dtype=torch.bfloat16)) - 20
    assert token_check.near_tie_tolerance(torch.float16, -20.0) == token_check.NEAR_TIE_ULPS * 2**-6


def test_the_models_own_generation_settings_are_left_out_and_restored(model, tokens):
    saved = model.generation_config
    model.generation_config = type(saved)(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=2)
    own = model.generation_config
    try:
        results = measured(model, tokens, variants.select(["stock-static"]))
        assert model.generation_config is own
    finally:
        model.generation_config = saved
    assert results["cells"][0]["rows"][1]["tokens"]["verdict"] == "same"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"contexts": [1]}, r"contexts=\[1\]"),
        ({"contexts": []}, r"contexts=\[\]"),
        ({"batch_sizes": [0]}, r"batch_sizes=\[0\]"),
        ({"new_tokens": 9}, "new_tokens=9"),
        ({"new_tokens": 2}, "new_tokens=2"),
        ({"contexts": [10], "batch_sizes": [4], "max_batch_tokens": 20}, "max_batch_tokens=20"),
        ({"contexts": [1500], "batch_sizes": [2]}, "3000.*2000"),
        ({"prompts_s": -1.0}, "prompts_s must be a number of seconds from 0 on, got -1.0"),
        ({"prompts_s": math.nan}, "prompts_s must be .* got nan"),
    ],
)
def test_throughput_refuses_what_it_cannot_measure(model, tokens, wrong, said):
    with pytest.raises(ValueError, match=said):
        measured(model, tokens, variants.select(["stock-dynamic"]), **wrong)


def test_tokens_needed_leaves_out_what_is_skipped():
    assert throughput.tokens_needed([128, 2048, 7900], [1, 8], 16384) == 16384
    assert throughput.tokens_needed([20000], [1, 8], 16384) == 20000


def test_skipped_variants_are_reported_with_the_reason(model, tokens):
    absent = Variant("absent", False, lambda config, capacity: None, requires=("no_such_package.inner",))
    chosen = [absent, variants.VARIANTS["none"], Variant("small", False, variants._static_of(8))]
    results = measured(model, tokens, chosen, none_limit_s=0.0)
    reasons = {item["variant"]: item["reason"] for item in results["skipped"]}
    assert (
        "no_such_package.inner" in reasons["absent"] and "limit" in reasons["none"] and "8 tokens" in reasons["small"]
    )
    assert [row["variant"] for row in results["cells"][0]["rows"]] == ["stock-dynamic"]
    assert "no_such_package.inner" in report.table(results)
    scored = perplexity.measure(model, tokens, variants=chosen, window=20, prefill=10, windows=1)
    assert [item["variant"] for item in scored["skipped"]] == ["absent", "small"]


def test_a_short_text_is_refused_with_both_numbers(model, tokens):
    assert inputs.load_tokens(CharTokenizer(), "abc", 2).tolist() == [97, 98]
    with pytest.raises(ValueError, match="3 tokens.*4"):
        inputs.load_tokens(CharTokenizer(), "abc", 4)
    with pytest.raises(ValueError, match="2010.*2000"):
        perplexity.measure(model, tokens, variants=[], window=201, prefill=100, windows=10)
