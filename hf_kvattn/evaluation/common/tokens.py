"""Whether two caches give the same greedy tokens, and where they do not, whether that was a near tie.

Two exact backends in a 16-bit dtype may part at a near tie: where a row first differs, the stock model decides that
step again, and its logits tell how near the two tokens were.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from hf_kvattn.evaluation.common.variants import Variant

# Two exact bf16 backends moved the margin of the top two logits by up to 3 units in the last place of a 135M model.
NEAR_TIE_ULPS = 3
NEAR_TIE_FP32 = 1e-4


@dataclass
class Lane:
    """One variant on its way through one context and batch size."""

    variant: Variant
    cache: Cache | None
    ids: torch.Tensor  # (batch, prompt + tokens decoded so far)
    ttft_s: list[float] = field(default_factory=list)  # of each prompt
    prompt_peak_bytes: list[int] = field(default_factory=list)  # of each prompt
    rounds_s: list[list[float]] = field(default_factory=list)  # the timed steps of each round
    bytes: int = 0
    extra_bytes: int = 0


def _stock_logits(model: PreTrainedModel, lane: Lane, position: int) -> torch.Tensor:
    """The logits from which the stock model chose the token at `position`, (batch, vocabulary).

    The cache is cropped to the step, so that it is computed as it was then; call with falling positions. Where a cache
    cannot be cropped (sliding windows), the whole prefix runs again.
    """
    if isinstance(lane.cache, DynamicCache) and not any(lane.cache.is_sliding):
        lane.cache.crop(position - 1 - lane.cache.get_seq_length())
        output = model(lane.ids[:, position - 1 : position], past_key_values=lane.cache, use_cache=True)
    else:
        output = model(lane.ids[:, :position], use_cache=False, logits_to_keep=1)
    return output.logits[:, -1].float()


def near_tie_tolerance(dtype: torch.dtype, logit: float) -> float:
    """The largest margin between two logits of this size that two exact backends may decide differently."""
    if dtype == torch.float32:
        return NEAR_TIE_FP32
    return NEAR_TIE_ULPS * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(abs(logit), 1e-30)))


def compare_tokens(model: PreTrainedModel, stock: Lane, lanes: list[Lane], context: int) -> list[dict[str, Any]]:
    """For each lane: how many of its tokens were compared, where rows first differ, and whether that is a near tie."""
    found: list[dict[str, Any]] = []
    undecided: list[dict[str, Any]] = []
    for lane in lanes:
        length = min(lane.ids.shape[1], stock.ids.shape[1])
        unequal = lane.ids[:, context:length] != stock.ids[:, context:length]
        differences = []
        for row in unequal.any(dim=1).nonzero().flatten().tolist():
            new_token = int(unequal[row].nonzero()[0])
            stock_id, variant_id = (int(each.ids[row, context + new_token]) for each in (stock, lane))
            differences.append({"row": row, "new_token": new_token, "stock_id": stock_id, "variant_id": variant_id})
        found.append({"compared": length - context, "differences": differences})
        undecided += differences if lane.variant.exact else []
    position = itemgetter("new_token")
    for new_token, group in groupby(sorted(undecided, key=position, reverse=True), position):
        logits = _stock_logits(model, stock, context + new_token)
        for difference in group:
            pair = logits[difference["row"], [difference["stock_id"], difference["variant_id"]]].tolist()
            tolerance = near_tie_tolerance(model.dtype, max(map(abs, pair)))
            difference |= {"margin": abs(pair[0] - pair[1]), "tolerance": tolerance}
    for lane, item in zip(lanes, found, strict=True):
        item["verdict"] = _verdict(lane.variant, item["differences"])
    return found


def _verdict(variant: Variant, differences: list[dict[str, Any]]) -> str:
    if not differences:
        return "same"
    if not variant.exact:
        return "differs"  # lossy by design
    near = all(difference["margin"] <= difference["tolerance"] for difference in differences)
    return "near_tie" if near else "MISMATCH"
