"""Cards that are made again byte for byte, and hostile JSON."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
from command_lines import run
from huggingface_hub import ModelCard

from hf_kvattn.convert import compare
from hf_kvattn.evaluation import MEASUREMENTS, cards, throughput
from hf_kvattn.evaluation.common import report
from hf_kvattn.evaluation.common.measurement import measurement
from hf_kvattn.tools import inputs

ROOT = Path(__file__).parent.parent.parent
CARDS = sorted(path.parent for path in ROOT.glob("model_cards/*/README.md"))
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
def all_results(tmp_path_factory):
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
    claims = json.loads((ROOT / "model_cards/kernels/results.json").read_text())["claims"]
    made = conversion("activation", "mean", uptrain_steps=3)
    for results in (made, timed, scored, claims, reading | {"backends": {"native": rates, "sdpa": rates}}):
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
        *(measurement(kind).plot for kind in json.loads((folder / "results.json").read_text())),
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
    assert any("made by activation, though mean loses less" in line for line in compare.limits(worst_first))
    assert not any("loses" in line for line in compare.limits(conversion() | {"rows": [
        {"method": "expand", "loss_nats": 1e-7}]}))  # fmt: skip


def test_limits_are_those_of_the_figures(folder):
    results = json.loads((folder / "results.json").read_text())["throughput"]
    cell = copy.deepcopy(results["cells"][0])
    ours = next(row for row in cell["rows"] if row["variant"] == "kvattn-static")
    ours["step_ms"]["median"], ours["tokens"]["verdict"] = 4 * ours["step_ms"]["median"], "MISMATCH"
    cell["rows"].append({**cell["rows"][0], "variant": "none", "cache_bytes": 0})
    lines = throughput.limits(results | {"cells": [cell], "skipped": []})
    assert any(line.startswith("kvattn-static: decodes at 0.2") for line in lines)
    assert "kvattn-static: wrong tokens (context x batch: 128 x 1)." in lines
    ours["step_ms"]["median"] = 1.0
    assert not any("decodes" in line and "static:" in line for line in throughput.limits(
        results | {"cells": [{**cell, "rows": [row for row in cell["rows"] if row["variant"] != "kvattn-static-fit"]}],
                   "skipped": []}))  # fmt: skip


def test_every_kind_of_results_is_a_whole_measurement():
    plots = {measurement(kind).plot for kind in MEASUREMENTS}
    assert len(plots) == len(MEASUREMENTS) and all(measurement(kind).kind == kind for kind in MEASUREMENTS)


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
