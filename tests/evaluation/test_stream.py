"""The measurement of streams, on a tiny model."""

import json
import math

import command_lines
import pytest
import torch
from models import tiny_model
from stand_ins import CharTokenizer

from hf_kvattn.evaluation import cards, stream
from hf_kvattn.evaluation.common import report
from hf_kvattn.tools import commands as command_line
from hf_kvattn.tools import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = stream.Plan(
    tokens=600, window=20, sinks=2, chunk=10, bucket=60, full_tokens=300, last=120, stride=5, steps_at=(100, 500),
    steps=2, prompts=(60, 120), rounds=2,
)  # fmt: skip


def text(length: int = 601) -> torch.Tensor:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(2))


def test_what_it_says_of_a_stream(tmp_path):
    model = tiny_model(max_position_embeddings=200)
    found = stream.measure(model, text(), SMALL)
    rows = {row["variant"]: row for row in found["rows"]}
    near, far, alone, everything = rows.values()
    assert list(rows) == [
        "window 20 + 2 sinks", "window 20 + 2 sinks, from 4,000,000", "window 20 alone", "everything kept"
    ]  # fmt: skip
    assert near["points"] == far["points"] != alone["points"]
    assert [p["position"] for p in near["points"]] == list(range(60, 601, 60))
    assert near["bytes_when_full"] == near["bytes_peak"] == near["bytes_at_the_end"] > alone["bytes_peak"]
    assert everything["tokens"] == 300 and everything["last_perplexity"] is None
    # A perplexity is that of its own tokens, and of the model itself while nothing has left the window.
    with torch.no_grad():
        logits = model(text()[None, :20]).logits[0]
    first = torch.nn.functional.cross_entropy(logits, text()[1:21])
    plan = stream.Plan(**{**vars(SMALL), "bucket": 20, "chunk": 20})
    assert stream.measure(model, text(), plan)["rows"][0]["points"][0]["perplexity"] == pytest.approx(math.exp(first))
    assert (
        found["prompts"][1]["windowed_over_half"]["of_medians"] > 0
        and found["prompts"][0]["windowed_over_half"] is None
    )
    assert set(found["steps"]["step_ms"]) == {"100", "500"}
    keys = ("model", "dtype", "text", "backend", *cards.HARDWARE, *cards.SOFTWARE, "date", "command", "describe")
    found["conditions"] = dict.fromkeys(keys, "tiny") | {"device": "cpu", "threads": 1}
    report.write(found, tmp_path)
    assert "window 20 alone" in (tmp_path / "report.md").read_text() and (tmp_path / "stream.png").stat().st_size > 5000
    card = cards.render(tmp_path)
    assert "window 20 alone: perplexity at the end" in card or alone["last_over_recomputed_pct"] <= 5


def test_recomputation_predicts_each_token_once_from_its_own_window():
    model, plan = tiny_model(), SMALL
    ids, nll = text(), []
    for at in range(481, 601):  # each of the last 120 targets
        stop = 480 + -(-(at - 480) // plan.stride) * plan.stride
        with torch.no_grad():
            logits = model(ids[None, stop - plan.window : at]).logits[0, -1]
        nll.append(float(torch.nn.functional.cross_entropy(logits, ids[at])))
    found = stream.measure(model, ids, plan)
    assert found["recomputed_perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk": 7}, "bucket=60 is no multiple of chunk=7"),
        ({"tokens": 610}, "tokens=610 must be"),
        ({"window": 500}, "hold window=500"),
        ({"stride": 20}, "stride=20"),
        ({"rounds": 0}, "rounds=0"),
        ({"sinks": -1}, "sinks=-1"),
        ({"steps_at": (5, 601)}, "steps_at=(5, 601)"),
        ({"prompts": (601,)}, "prompts=(601,)"),
    ],
)
def test_impossible_streams(change, said):
    with pytest.raises(ValueError, match="impossible stream") as error:
        stream.measure(tiny_model(), text(), stream.Plan(**{**vars(SMALL), **change}))
    assert said in str(error.value)


def test_too_short_a_text():
    with pytest.raises(ValueError, match="needs 601 tokens, the text has 600"):
        stream.measure(tiny_model(), text(600), SMALL)


def test_it_holds_json():
    assert json.loads(json.dumps(stream.measure(tiny_model(), text(), SMALL), allow_nan=False))["kind"] == "stream"


def test_both_command_lines_measure_a_stream(monkeypatch, capsys):
    monkeypatch.setattr(inputs, "load_model", lambda *arguments: (tiny_model(), CharTokenizer()))
    sizes = {"window": 96, "sinks": 2, "full": 1024}
    common = ["--text", "pydoc", "--rounds", 1, "--json"]
    of_stream = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    of_perplexity = [part for name, value in sizes.items() for part in (f"--stream-{name}", value)]
    arguments = ["stream", *common, "--tokens", 4096, *of_stream, "--prompts", 64, 128]
    assert command_line.main(list(map(str, arguments))) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    arguments = [*common, "--stream", 4096, *of_perplexity, "--stream-prompts", 64, 128]
    assert command_lines.run("perplexity", *arguments) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert first["kind"] == second["kind"] == "stream" and first["settings"] == second["settings"]
    assert first["rows"] == second["rows"] and first["settings"]["last"] == 1024
    arguments = ["stream", *common, "--tokens", 2000]
    assert command_line.main(list(map(str, arguments))) == 2
    assert "impossible stream: last=0; tokens=2000 must be a multiple" in capsys.readouterr().err
