"""What a conversion costs: perplexity on other text than it was calibrated on, method by method, and after uptraining.

Perplexity is measured in float32, so that rounding the weights is no part of it; `written_perplexity` is that of the
checkpoint as it is written. A loss is perplexity after minus perplexity before; in nats, the logarithm of their ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvattn.convert import gqa, training
from hf_kvattn.evaluation import perplexity

EXPAND = "expand"
REFERENCE = "mean"  # the method whose loss the others are compared with


def perplexity_of(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Of all tokens but the first of each window; `windows` are token ids, (windows, tokens)."""
    count, window = windows.shape
    found = perplexity.measure(
        model, windows.flatten(), variants=[], window=window, prefill=1, stride=window, windows=count
    )
    return float(found["rows"][0]["perplexity"])


def _loss(after: float, before: float) -> dict[str, float]:
    return {"perplexity": after, "loss": after - before, "loss_nats": math.log(after / before)}


def compare(
    model: PreTrainedModel,
    methods: Sequence[str],
    *,
    kv_heads: int | None,
    text_windows: torch.Tensor,
    calibration_windows: int,
    heldout_windows: torch.Tensor,
    uptrain_steps: int = 0,
    learning_rate: float = 2e-4,
    batch_size: int = 4,
    progress: bool = False,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Convert a model by each method and measure; the model made by the first, and a dict that JSON can hold.

    Args:
        model: the original, in float32.
        methods: of `gqa.METHODS`, or `expand` alone.
        kv_heads: how many there shall be; None with `expand`.
        text_windows: token ids to calibrate and train on, (windows, tokens).
        calibration_windows: how many of them, evenly spread, the method `activation` sees; a text's beginning may be
            about one thing.
        heldout_windows: token ids to measure on, (windows, tokens).
        uptrain_steps: steps of distillation from the original after each conversion; 0 for none.
        learning_rate: of the distillation, at its highest.
        batch_size: windows a step.
        progress: show bars on stderr.
    """
    if (kv_heads is None) != (list(methods) == [EXPAND]) or not methods:
        raise ValueError(f"{methods=} do not go with {kv_heads=}: {EXPAND!r} alone needs none, all others do")
    if calibration_windows > len(text_windows):
        raise ValueError(f"the calibration text has {len(text_windows)} windows, not {calibration_windows}")
    gqa.check(model)
    spread = torch.arange(calibration_windows) * len(text_windows) // calibration_windows
    before = perplexity_of(model, heldout_windows)

    def converted_by(method: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        if kv_heads is None:
            converted = gqa.expand(model)
        else:
            calibration = text_windows[spread] if method == "activation" else None
            converted = gqa.convert(model, kv_heads, method, calibration, progress)
        row: dict[str, Any] = {"method": method, **_loss(perplexity_of(converted, heldout_windows), before)}
        if uptrain_steps:
            losses = training.train(
                converted,
                text_windows,
                steps=uptrain_steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                teacher=model,
                progress=progress,
            )
            row["uptrained"] = _loss(perplexity_of(converted, heldout_windows), before) | {"training_kl_nats": losses}
        return converted, row

    chosen, first = converted_by(methods[0])
    rows = [first, *(converted_by(method)[1] for method in methods[1:])]
    reference = next((row["loss"] for row in rows if row["method"] == REFERENCE), None)
    for row in rows:
        row["share_of_mean_loss"] = row["loss"] / reference if reference else None
    results = {
        "kind": "conversion",
        "settings": {
            "layers": model.config.num_hidden_layers,
            "query_heads": model.config.num_attention_heads,
            "kv_heads_before": model.config.num_key_value_heads,
            "kv_heads_after": chosen.config.num_key_value_heads,
            "calibration_tokens": text_windows[spread].numel(),
            "window": heldout_windows.shape[1],
            "scored_tokens": heldout_windows[:, 1:].numel(),
            "uptrain_steps": uptrain_steps,
            "uptrain_tokens": uptrain_steps * batch_size * text_windows.shape[1],
            "learning_rate": learning_rate,
        },
        "perplexity_before": before,
        "rows": rows,
    }
    return chosen, results


def complete(
    results: dict[str, Any], model: PreTrainedModel, written: PreTrainedModel, heldout_windows: torch.Tensor
) -> None:
    """Add to the results, in place, what is known of the checkpoint once it has its dtype."""
    for when, one in (("before", model), ("after", written)):
        results[f"cache_bytes_per_token_{when}"] = gqa.cache_bytes_per_token(one, written.dtype)
    results["written"] = {
        "dtype": str(written.dtype).removeprefix("torch."),
        "perplexity": perplexity_of(written, heldout_windows),
    }
