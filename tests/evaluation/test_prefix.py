"""The measurement of a prefix that is computed, saved and loaded."""

from types import SimpleNamespace

import pytest
from models import prompt, tiny_model

from hf_kvattn import load_cache
from hf_kvattn.evaluation import cards, prefix
from hf_kvattn.evaluation.common import report, variants
from hf_kvattn.tools.conditions import conditions


def test_the_measurement_of_a_prefix(tmp_path, monkeypatch):
    model, ids = tiny_model(), prompt(70, batch=1)["input_ids"][0]
    chosen = variants.select(["kvattn-static", "kvattn-static-fit"])
    found = prefix.measure(model, ids, variants=chosen, rounds=2)
    assert found["settings"] == {"context": 69, "rounds": 2, "new_tokens": 16}
    for row in found["rows"]:
        assert row["same_tokens"] and 0 < row["load_ms"]["p20"] <= row["load_ms"]["p80"]
        assert row["speedup"]["of_medians"] == pytest.approx(row["prefill_ms"]["median"] / row["load_ms"]["median"])
        assert 0 < row["file_bytes"] - 3 * 2 * 2 * 69 * 16 * 4 < 4096 and row["cache_bytes"] >= 3 * 2 * 2 * 86 * 16 * 4
    given = conditions(model, SimpleNamespace(model="tiny", text="x", backend="auto"))
    report.write({"kind": "prefix", "conditions": given} | found, tmp_path)
    assert "| kvattn-static-fit | " in (tmp_path / "report.md").read_text() and (tmp_path / "prefix.png").is_file()
    assert "times faster to load than to compute: kvattn-static" in cards.render(tmp_path)

    for wrong, message in (
        (
            {"variants": variants.select(["stock-static"])},
            r"only caches of hf_kvattn .* got \['stock-static'\]",
        ),
        ({"variants": []}, "can be saved, got"),
        ({"variants": chosen, "rounds": 0}, "70 tokens, rounds=0"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix.measure(model, ids, **wrong)

    def lossy(path, config, token_ids):
        cache = load_cache(path, config, token_ids)
        cache.layers[0]._v.neg_()
        return cache

    monkeypatch.setattr(prefix, "load_cache", lossy)
    assert not any(row["same_tokens"] for row in prefix.measure(model, ids, variants=chosen, rounds=1)["rows"])
