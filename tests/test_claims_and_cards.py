"""Claims on a tiny model, judged by hand-made figures; cards that are made again byte for byte, and hostile JSON."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from command_lines import run
from hf_kvattn.evaluation.variants import Variant
from huggingface_hub import ModelCard
from models import tiny_model
from transformers import DynamicCache

from hf_kvattn.evaluation import cards, claims, inputs, limits, report, stated, variants
from hf_kvattn.kernels import reference
from hf_kvattn.kernels.call import AttendCall

ROOT = Path(__file__).parent.parent
CARDS = sorted(path.parent for path in ROOT.glob("model_cards/*/README.md"))


class CharTokenizer:
    pad_token_id = None


class ScaledValues(DynamicCache):
    """A cache that is wrong: the past comes back with larger values."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, 3 * values


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


# ---------------------------------------------------------------------------------------------- claims


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
def test_a_figure_that_is_not_as_stated_is_said_with_its_reason(change, reserve_slot, measured, why):
    results = made_up()
    change(results)
    (wrong,) = [row for row in stated.judge(results) if not row["agrees"]]
    assert wrong["measured"] == pytest.approx(measured) and why in wrong["why"]
    assert reserve_slot.replace("\\", "") in wrong["claim"]
    assert stated.disagreements({"claims": stated.judge(results)}) == [wrong]


def test_memory_that_did_not_rise_gives_no_claim():
    results = made_up()
    for row in results["attention"]:
        row["methods"]["tiled"]["extra_bytes"] = 0
    judged = [row["claim"] for row in stated.judge(results)]
    assert not any(
        "less memory" in reserve_slot or "tiled attention's memory" in reserve_slot for reserve_slot in judged
    )


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


# ---------------------------------------------------------------------------------------------- cards

CONDITIONS = {
    **{"date": "2026-01-01", "command": "python scripts/x.py --text 'a|b'", "model": "tiny", "text": "wikitext"},
    **{"backend": "auto", "dtype": "float32", "device": "cpu", "cpu": "a CPU", "cores": 2, "threads": 1},
    **{"python": "3.11", "torch": "2.13", "transformers": "5.23", "hf_kvattn": "0.1.0", "commit": "0f-dirty"},
    "describe": "| a `table` |\n",
}


def conversion(*methods: str, uptrain_steps: int = 0) -> dict:
    """Made-up results; the first method loses 0.1 nats a token, each further one 0.1 more, uptraining regains half."""

    def lost(nats):
        return {"perplexity": 20 * math.exp(nats), "loss": 20 * math.expm1(nats), "loss_nats": nats}

    rows = [{"method": name, **lost(i / 10), "share_of_mean_loss": None} for i, name in enumerate(methods, 1)]
    for row in rows if uptrain_steps else []:
        row["uptrained"] = lost(row["loss_nats"] / 2) | {"training_kl_nats": [0.5] * uptrain_steps}
    heads = {"layers": 2, "query_heads": 8, "kv_heads_before": 8, "kv_heads_after": 2}
    tokens = {"calibration_tokens": 640, "window": 64, "scored_tokens": 630, "uptrain_tokens": 64 * uptrain_steps}
    return {
        "kind": "conversion",
        "settings": heads | tokens | {"uptrain_steps": uptrain_steps, "learning_rate": 2e-4},
        "perplexity_before": 20.0,
        "rows": rows,
        "cache_bytes_per_token_before": 4096,
        "cache_bytes_per_token_after": 1024,
        "written": {"dtype": "bfloat16", "perplexity": 21.25},
    }


@pytest.fixture(scope="module")
def all_results(measured, tmp_path_factory):
    """Results of all kinds, with their plots."""
    path = tmp_path_factory.mktemp("all") / "results"
    timed = json.loads((ROOT / "model_cards/smollm2-135m-static/results.json").read_text())["throughput"]
    scored = json.loads((ROOT / "model_cards/smollm2-135m-quantized/results.json").read_text())["perplexity"]
    rates = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "bytes_s": 1e9, "share": 0.5}
    rates |= {
        "bytes": 1000,
        "faster_than_base": {"of_medians": 1, **{f"paired_{k}": 1 for k in ("median", "p20", "p80")}},
    }
    reading = {
        "kind": "bandwidth",
        "context": 64,
        "queries": 1,
        "layer_bytes": 1000,
        "read_bytes_s": 2e9,
        "base": "native",
    }
    made = conversion("activation", "mean", uptrain_steps=3)
    for results in (made, timed, scored, measured, reading | {"backends": {"native": rates, "sdpa": rates}}):
        report.write({**results, "conditions": CONDITIONS}, path)
    return path


@pytest.fixture
def folder(all_results, tmp_path):
    return Path(shutil.copytree(all_results, tmp_path / "results"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.name)
def test_committed_cards_are_what_their_json_gives(path):
    assert cards.render(path).encode() == (path / "README.md").read_bytes()


def test_every_results_folder_has_its_card():
    assert CARDS and CARDS == sorted(path.parent for path in ROOT.glob("model_cards/*/results.json"))


def test_a_card_is_valid_whole_and_made_again(folder, capsys):
    assert run("make_model_card", folder) == 0
    first = (folder / "README.md").read_bytes()
    assert run("make_model_card", folder) == 0 and (folder / "README.md").read_bytes() == first
    assert run("make_model_card", folder, "--check") == 0
    card = ModelCard.load(folder / "README.md")
    results = {(result.metric_type, result.metric_name): result for result in card.data.eval_results}
    timed = [result for result in card.data.eval_results if result.metric_type == "step_ms"]
    steps = {(result.dataset_config, result.metric_name): result.metric_value for result in timed}
    for cell in json.loads((folder / "results.json").read_text())["throughput"]["cells"]:
        for row in cell["rows"]:
            name = f"{cell['context']} tokens x {cell['batch']}", f"median decode step, ms: {row['variant']}"
            assert steps.pop(name) == pytest.approx(row["step_ms"]["median"], rel=1e-5)
    assert not steps
    section = json.loads((folder / "results.json").read_text())["perplexity"]
    row = next(row for row in section["rows"] if row["variant"] == "kvattn-int4")
    found = results["perplexity", "perplexity: kvattn-int4"]
    assert found.metric_value == pytest.approx(row["perplexity"], rel=1e-5)
    assert found.dataset_type == "Salesforce/wikitext" and found.dataset_args == section["settings"]
    assert {kind for kind, _ in results} == {
        "perplexity", "kl_divergence", "step_ms", "measured", "share_of_read_bandwidth",
        "cache_bytes_per_token"}  # fmt: skip
    assert card.data.base_model is None and card.data.model_name == "tiny with 2 KV heads, tiny"
    text = card.text
    for needed in (
        *CONDITIONS.values(),
        *(report.KINDS[kind].plot for kind in json.loads((folder / "results.json").read_text())),
        "Limits and negative results",
        "in no commit",
    ):
        assert str(needed) in text or needed == CONDITIONS["describe"]
    assert all((folder / link.split(")")[0]).is_file() for link in text.split("](")[1:])
    assert "at context 7900, batch 8: 63200 prompt tokens" in text and "figures were not confirmed" in text


def test_the_card_of_a_converted_model(tmp_path):
    made = conversion("mean", "activation", uptrain_steps=3)
    report.write(made | {"conditions": CONDITIONS | {"model": inputs.SMOLLM2}}, tmp_path)
    card = ModelCard(cards.render(tmp_path))
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"] and "conversion" in card.data.tags
    assert card.data.model_name == "smollm2-135m with 2 KV heads"
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {
        "perplexity: original": 20.0,
        "perplexity: mean": pytest.approx(20 * math.exp(0.1), rel=1e-5),
        "perplexity: mean, uptrained": pytest.approx(20 * math.exp(0.05), rel=1e-5),
        "perplexity: activation": pytest.approx(20 * math.exp(0.2), rel=1e-5),
        "perplexity: activation, uptrained": pytest.approx(20 * math.exp(0.1), rel=1e-5),
        "perplexity: as written, bfloat16": 21.25,
        "bytes of keys and values a token, before": 4096,
        "bytes of keys and values a token, after": 1024,
    }
    for needed in ("from smollm2-135m by the method `mean`: 8 to 2 KV heads", "4096 bytes", "1024 after", "21.250",
                   "- mean loses 0.100 nats a token, 0.050 after uptraining."):  # fmt: skip
        assert needed in card.text
    assert "though" not in card.text and "not trained" not in card.text
    report.write(conversion("mean", "activation") | {"conditions": CONDITIONS | {"model": "some/model"}}, tmp_path)
    card = ModelCard(cards.render(tmp_path))
    assert card.data.base_model == ["some/model"] and "not trained" in card.text and "uptrained: " not in card.text
    worst_first = conversion("mean", "activation")
    worst_first["rows"].reverse()
    assert any("made by activation, though mean loses less" in line for line in limits.of_conversion(worst_first))
    assert not any("loses" in line for line in limits.of_conversion(conversion() | {"rows": [
        {"method": "expand", "loss_nats": 1e-7}]}))  # fmt: skip


def test_no_path_of_the_machine_is_recorded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "book.txt").write_text("text")
    arguments = ["--text", str(tmp_path / "book.txt"), f"--out={tmp_path}/a/b", "/elsewhere/of/it/", "a=b", "x/y"]
    monkeypatch.setattr("sys.argv", [str(tmp_path / "scripts" / "x.py"), *arguments])
    args = argparse.Namespace(text=str(tmp_path / "book.txt"), backend="auto")
    for given, name in (("mine", "mine"), ("./mine/", "mine"), (str(tmp_path / "mine"), "mine"), ("hub/id", "hub/id")):
        args.model = given
        found = inputs.conditions(tiny_model(), args)
        assert found["model"] == name and found["text"] == "book.txt"
        assert found["command"] == "python scripts/x.py --text book.txt --out=a/b it a=b x/y"


def test_limits_are_those_of_the_figures(folder):
    results = json.loads((folder / "results.json").read_text())["throughput"]
    cell = copy.deepcopy(results["cells"][0])
    ours = next(row for row in cell["rows"] if row["variant"] == "kvattn-static")
    ours["step_ms"]["median"], ours["tokens"]["verdict"] = 4 * ours["step_ms"]["median"], "MISMATCH"
    cell["rows"].append({**cell["rows"][0], "variant": "none", "cache_bytes": 0})
    lines = limits.of_throughput(results | {"cells": [cell], "skipped": []})
    assert any(line.startswith("kvattn-static: decodes at 0.2") for line in lines)
    assert "kvattn-static: wrong tokens (context x batch: 128 x 1)." in lines
    ours["step_ms"]["median"] = 1.0
    assert not any("decodes" in line and "static:" in line for line in limits.of_throughput(
        results | {"cells": [{**cell, "rows": [row for row in cell["rows"] if row["variant"] != "kvattn-static-fit"]}],
                   "skipped": []}))  # fmt: skip


def test_every_kind_of_results_can_stand_in_a_card():
    assert set(cards.EVALUATE) == set(limits.LIMITS) == set(report.KINDS)


def test_check_says_what_differs(folder, capsys):
    assert run("make_model_card", folder, "--check") == 1
    assert not (folder / "README.md").exists() and str(folder) in capsys.readouterr().out
    cards.write(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("a CPU", "another CPU"))
    assert run("make_model_card", folder, "--check") == 1
    assert run("make_model_card", folder) == 0 and "another" not in (folder / "README.md").read_text()


def put(*keys, value):
    def change(sections):
        inner = sections
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return change


HOSTILE = {
    "NaN": put("perplexity", "rows", 0, "kld_mean", value=float("nan")),
    "infinite": put("claims", "claims", 0, "measured", value=float("inf")),
    "a number that is text": put("perplexity", "rows", 0, "perplexity", value="low"),
    "null": put("throughput", "cells", 0, "rows", 0, "step_ms", "median", value=None),
    "a list for a dict": put("throughput", "cells", value=[[]]),
    "a section that is a number": put("throughput", value=5),
    "another kind": put("throughput", "kind", value="perplexity"),
    "no rows": put("perplexity", "rows", value=None),
    "division by zero": put("throughput", "cells", 0, "rows", 3, "cache_bytes", value=0),
    "markup": put("perplexity", "rows", 0, "variant", value="<img src=x onerror=alert(1)>"),
    "a link": put("perplexity", "conditions", "model", value="[x](javascript:alert(1))"),
    "a broken table": put("perplexity", "rows", 0, "variant", value="a | b"),
    "lines": put("perplexity", "conditions", "commit", value="a\n---\nlicense: mit"),
    "a fence": put("claims", "conditions", "command", value="``` <b>"),
    "a path": put("throughput", "conditions", "command", value="python scripts/x.py --model /home/somebody/model"),
    "a path in an option": put("claims", "conditions", "command", value="python scripts/x.py --out=/root"),
    "a path on Windows": put("claims", "skipped", 0, "reason", value="no file 'C:\\secret'"),
    "an unknown section": put("surprise", value={}),
    "a missing key": lambda sections: sections["claims"].pop("settings"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_is_refused_in_one_line(name, folder, capsys):
    sections = json.loads((folder / "results.json").read_text())
    HOSTILE[name](sections)
    (folder / "results.json").write_text(json.dumps(sections))
    before = sorted(path.name for path in folder.iterdir())
    assert run("make_model_card", folder) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "results.json" in said
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    "content",
    [b"", b'{"throughput": ', b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b"null", b"{}"],
    ids=lambda c: str(c[:9]),
)
def test_a_file_that_is_not_results_is_refused_in_one_line(content, tmp_path, capsys):
    (tmp_path / "results.json").write_bytes(content)
    assert run("make_model_card", tmp_path) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "results.json" in said
        and [path.name for path in tmp_path.iterdir()] == ["results.json"]
    )


def test_bad_arguments_are_refused(folder, tmp_path, capsys):
    (folder / "README.md").write_text("# written by a person\n")
    assert run("make_model_card", folder) == 2 and "README.md was not made by" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "# written by a person\n"
    assert run("make_model_card", folder, "--output", tmp_path / "card.md") == 0
    assert run("make_model_card", folder, "--output", tmp_path / "no" / "card.md") == 2
    assert run("make_model_card", tmp_path / "nowhere") == 2
    (folder / "claims.png").unlink()
    assert run("make_model_card", folder) == 2 and "claims.png" in capsys.readouterr().err
    for wrong in (["--output", "x", "--check"], [str(folder), "--output", "x"]):
        assert run("make_model_card", folder, *wrong) == 2 and "--check" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- command lines


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
    wrong = Variant("wrong", False, lambda config, capacity: ScaledValues(config=config))
    monkeypatch.setitem(variants.VARIANTS, "wrong", wrong)
    assert run("attention_claims", *common[:-3], "--variants", "none", "wrong") == 1


def test_bandwidth_writes_its_section(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_kvattn.evaluation.bandwidth.LAYERS_BYTES", 0)
    monkeypatch.setattr("hf_kvattn.evaluation.bandwidth.READ_BYTES", 1 << 20)
    assert run("bandwidth", "--heads", 4, 2, 16, "--context", 64, "--rounds", 1, "--output", tmp_path) == 0
    assert (
        list(report.read(tmp_path)) == ["bandwidth"]
        and "share of the bandwidth" in (tmp_path / "report.md").read_text()
    )
    assert run("make_model_card", tmp_path) == 0
    assert run("bandwidth", "--heads", 5, 2, 16) == 2
