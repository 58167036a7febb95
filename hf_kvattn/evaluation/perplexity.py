"""What a cache does to the predictions: perplexity, KL divergence and same-top-1 against the stock run.

Everything is measured through the cache. A window of text starts with one prefill, and then goes on in strides that
attend to the stored past, as decoding does; a stride of 1 is exact decoding. Only the predictions after the prefill are
scored. The stock cache runs the same schedule first, so what is left between the two is the cache.

KL(stock || variant) is the expected extra surprise of a reader who trusts the variant, in nats a token. It notices
changes that perplexity averages away. Two exact backends in bf16 differ a little as well: the row `none`, one forward
pass without any cache, shows how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel

from hf_kvattn.evaluation import variants as caches
from hf_kvattn.evaluation.variants import BASELINE, Variant

SCORED_ROWS = 128  # predictions scored at once: bounds the fp32 copies of their logits


@dataclass
class _Score:
    """What is collected of one variant, over all windows."""

    variant: Variant
    nll: list[torch.Tensor] = field(default_factory=list)
    kld: list[torch.Tensor] = field(default_factory=list)
    same_top: list[torch.Tensor] = field(default_factory=list)
    bits: float | None = None
    bytes: int = 0


def schedule(window: int, prefill: int, stride: int) -> list[tuple[int, int]]:
    """The pieces of a window, as (start, end) of their input tokens. Nothing is predicted from the last token."""
    starts = range(prefill, window - 1, stride)
    return [(0, prefill)] + [(start, min(start + stride, window - 1)) for start in starts]


def _predictions(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache | None, pieces: list[tuple[int, int]]
) -> Iterator[torch.Tensor]:
    """The logits of the scored predictions, (tokens, vocabulary), piece by piece: one of the prefill, then all."""
    if cache is None:
        scored = pieces[-1][1] - pieces[0][1] + 1
        yield model(ids[:, : pieces[-1][1]], use_cache=False, logits_to_keep=scored).logits[0]
        return
    for start, end in pieces:
        keep = 1 if start == 0 else 0  # 0 keeps all
        yield model(ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=keep).logits[0]


def _checked(logits: torch.Tensor, variant: Variant, window: int) -> torch.Tensor:
    if torch.isnan(logits).any():
        raise FloatingPointError(f"{variant.name} gives NaN logits in window {window}")
    return logits


def _score_piece(score: _Score, logits: torch.Tensor, targets: torch.Tensor, stock: torch.Tensor | None) -> None:
    """Add the predictions of one piece. Without stock logits it is the stock run itself."""
    for start in range(0, len(targets), SCORED_ROWS):
        rows = slice(start, start + SCORED_ROWS)
        own = torch.log_softmax(logits[rows].float(), dim=-1)
        score.nll.append(-own.gather(1, targets[rows, None])[:, 0].cpu())
        if stock is not None:
            reference = torch.log_softmax(stock[rows].float(), dim=-1)
            score.kld.append((reference.exp() * (reference - own)).sum(dim=-1).cpu())
            score.same_top.append((reference.argmax(dim=-1) == own.argmax(dim=-1)).cpu())


def _run_window(
    model: PreTrainedModel,
    ids: torch.Tensor,
    score: _Score,
    pieces: list[tuple[int, int]],
    window: int,
    stock: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Score one variant on one window, and give back its logits when it is the stock run that others need."""
    cache, reason = caches.try_make(score.variant, model.config, ids.shape[1])
    if reason is not None:
        raise ValueError(f"{score.variant.name}: {reason}")
    kept: list[torch.Tensor] = []
    targets = ids[0, pieces[0][1] :]
    done = 0
    with caches.running(model, score.variant):
        for logits in _predictions(model, ids, cache, pieces):
            part = slice(done, done + len(logits))
            _score_piece(score, _checked(logits, score.variant, window), targets[part], _part(stock, part))
            done += len(logits)
            if stock is None:
                kept.append(logits)
    score.bits = caches.bits_per_element(cache, model.config)
    score.bytes = caches.cache_bytes(cache)
    return kept


def _part(stock: torch.Tensor | None, part: slice) -> torch.Tensor | None:
    return None if stock is None else stock[part]


def _row(score: _Score, stock: _Score) -> dict[str, Any]:
    nll = torch.cat(score.nll).double().mean().item()
    stock_nll = torch.cat(stock.nll).double().mean().item()
    row = {
        "variant": score.variant.name,
        "hooked": score.variant.hooked,
        "perplexity": math.exp(nll),
        "perplexity_change_pct": 100 * math.expm1(nll - stock_nll),
        "kld_mean": 0.0,
        "kld_p99": 0.0,
        "same_top1_pct": 100.0,
        "bits_per_element": score.bits,
        "cache_bytes": score.bytes,
    }
    if score is stock:  # compared with itself
        return row
    kld = torch.cat(score.kld).double()
    same_top = torch.cat(score.same_top).double()
    return row | {
        "kld_mean": kld.mean().item(),
        "kld_p99": torch.quantile(kld, 0.99).item(),
        "same_top1_pct": 100 * same_top.mean().item(),
    }


def _usable(model: PreTrainedModel, variants: Sequence[Variant], window: int) -> tuple[list[Variant], list[dict]]:
    usable: list[Variant] = []
    skipped: list[dict[str, Any]] = []
    for variant in variants:
        if variant.name == BASELINE:
            continue  # always there, as the first row
        reason = caches.try_make(variant, model.config, window)[1]
        if reason is None:
            usable.append(variant)
        else:
            skipped.append({"variant": variant.name, "context": window, "batch": 1, "reason": reason})
    return usable, skipped


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    window: int = 2048,
    prefill: int = 1024,
    stride: int = 32,
    windows: int = 4,
    progress: bool = False,
) -> dict[str, Any]:
    """Score the variants on the first `windows` windows of the text, and give a dict that JSON can hold.

    Args:
        token_ids: the text as a 1-D tensor of at least `windows * window` tokens.
        variants: what to compare; the stock baseline is always the first row.
        window: tokens of one independent piece of text.
        prefill: tokens processed at once at its start, unscored.
        stride: tokens processed at once after that; 1 is exact decoding.
        windows: how many pieces.
        progress: show a bar on stderr.
    """
    if not 1 <= prefill < window or stride < 1 or windows < 1:
        raise ValueError(
            f"not 1 <= prefill < window, 1 <= stride, 1 <= windows: {prefill=}, {window=}, {stride=}, {windows=}"
        )
    if len(token_ids) < windows * window:
        raise ValueError(f"{windows} windows of {window} need {windows * window} tokens, the text has {len(token_ids)}")
    pieces = schedule(window, prefill, stride)
    stock_score = _Score(caches.VARIANTS[BASELINE])
    usable, skipped = _usable(model, variants, window)
    scores = [_Score(variant) for variant in usable]
    with tqdm(total=windows * (1 + len(scores)), unit="run", disable=not progress) as bar:
        for i in range(windows):  # all variants on one window, so that only its stock logits are held
            ids = token_ids[None, i * window : (i + 1) * window].to(model.device)
            bar.set_description(f"window {i + 1} of {windows}, {BASELINE}")
            stock = torch.cat(_run_window(model, ids, stock_score, pieces, i, None))
            bar.update()
            for score in scores:
                bar.set_description(f"window {i + 1} of {windows}, {score.variant.name}")
                _run_window(model, ids, score, pieces, i, stock)
                bar.update()
    return {
        "kind": "perplexity",
        "settings": {
            "window": window,
            "prefill": prefill,
            "stride": stride,
            "windows": windows,
            "scored_tokens": windows * (window - prefill),
        },
        "rows": [_row(score, stock_score) for score in [stock_score, *scores]],
        "skipped": skipped,
    }
