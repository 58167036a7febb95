"""Decode attention against the memory's speed."""

from __future__ import annotations

import pytest
import torch
from command_lines import run

from hf_kvattn.evaluation import bandwidth
from hf_kvattn.evaluation.common import report


@pytest.mark.slow
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


def test_read_bandwidth_is_a_plausible_number():
    assert 1e8 < bandwidth.read_bandwidth_bytes_s(torch.ones(4 << 20), seconds=0.05) < 1e13


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
