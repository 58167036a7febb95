"""Reports: made again from their JSON, and never over a foreign file."""

from __future__ import annotations

import json

import pytest
from stand_ins import CONDITIONS, measured

from hf_kvattn.evaluation import perplexity
from hf_kvattn.evaluation.common import drawing, report, variants

pytestmark = pytest.mark.usefixtures("one_thread")


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
