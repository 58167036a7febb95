"""What is said of attention and KV caches: each stated figure, judged by what `claims.py` measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

NEAR = 0.2  # a measured figure this near to a stated one agrees with it, relatively

FLASH, FLASH_2 = "FlashAttention's README", "FlashAttention-2, arXiv:2307.08691"
LONGFORMER, MISTRAL = "Longformer, arXiv:2004.05150", "Mistral 7B, arXiv:2310.06825"
GQA, MQA = "GQA, arXiv:2305.13245", "MQA, arXiv:1911.02150"
SAID, FOLLOWS = "often said of KV caches", "follows, if reading the cache is all that a step does"


class _Claim(NamedTuple):
    """A figure stated from `low` to `high` (None: more is welcome), and the reasons why one is below or above it."""

    claim: str
    source: str
    measured: float
    low: float
    high: float | None
    below: str
    above: str = ""


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each stated figure beside the measured one, whether they agree, and why not."""
    return [_judged(found) for part in (_of_attention, _of_decoding, _of_caches) for found in part(results)]


def disagreements(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims that were not confirmed."""
    return [row for row in results["claims"] if not row["agrees"]]


def _judged(found: _Claim) -> dict[str, Any]:
    why = None
    if found.measured < found.low * (1 - NEAR):
        why = found.below
    elif found.high is not None and found.measured > found.high * (1 + NEAR):
        why = found.above
    row = {"claim": found.claim, "source": found.source, "stated": [found.low, found.high], "measured": found.measured}
    return row | {"agrees": why is None, "why": why}


def _power(points: list[tuple[int, float]]) -> float | None:
    """The power of x that y grows with, between the last two points; None where they do not tell it."""
    if len(points) < 2 or min(y for _, y in points[-2:]) <= 0:
        return None
    (small, low), (large, high) = points[-2:]
    return math.log(high / low) / math.log(large / small)


def _of_attention(results: dict[str, Any]) -> Iterator[_Claim]:
    rows, window = results["attention"], results["settings"]["window"]
    for row in (row for row in rows if "standard" in row["methods"]):
        length = row["tokens"]
        name = f"tiled attention is 2 to 4 times faster than standard attention ({length} tokens)"
        below = (
            "stated for GPUs; here the scores of so short a sequence stay in the CPU's caches, or arithmetic is "
            "the larger part"
        )
        above = (
            "scores and mask of this length go through this machine's memory several times, and the causal half that "
            "tiles leave out is computed in full"
        )
        yield _Claim(name, FLASH_2, row["speedup"]["tiled"]["of_medians"], 2.0, 4.0, below, above)
        standard, tiled = (row["methods"][method]["extra_bytes"] for method in ("standard", "tiled"))
        if length in (2048, 4096) and tiled > 0:
            times = {2048: 10.0, 4096: 20.0}[length]
            name = f"tiled attention takes {times:.0f} times less memory ({length} tokens)"
            below = "with so few heads the scores are small beside what each thread's tiles and the result take"
            yield _Claim(name, FLASH, standard / tiled, times, None, below)
    for method, power, below in (
        ("standard", 2.0, "other memory is a large part"),
        ("tiled", 1.0, "a fixed part, each thread's tiles, does not grow"),
    ):
        points = [(row["tokens"], row["methods"][method]["extra_bytes"]) for row in rows if method in row["methods"]]
        if (figure := _power(points)) is not None:
            name = f"the power of the length that {method} attention's memory grows with (1: linear, 2: quadratic)"
            above = "resident memory was reused at the shorter length, so that its rise was smaller than its use"
            yield _Claim(name, FLASH, figure, power, power, below, above)
    points = [(row["tokens"], row["methods"]["windowed"]["ms"]["median"]) for row in rows if row["tokens"] >= window]
    if (figure := _power(points)) is not None:
        name = f"the power of the length that time grows with in a window of {window} (1: linear)"
        above = "the first window's tokens see less than a window, so that the shorter sequence is cheaper a token"
        yield _Claim(name, LONGFORMER, figure, 1.0, 1.0, "this machine was faster at the longer length", above)
    for row in (row for row in rows if (row["tokens"], window) == (16384, 4096)):
        below = (
            "PyTorch's attention computes what the mask of a chunk hides, so that up to a fourth more is computed "
            "than is seen, and causal attention without a window leaves its hidden half out"
        )
        name = "a window of 4096 makes attention over 16384 tokens 2 times faster"
        yield _Claim(name, MISTRAL, row["speedup"]["windowed"]["of_medians"], 2.0, None, below)


def _of_decoding(results: dict[str, Any]) -> Iterator[_Claim]:
    for tokens, row in ((cell["context"], row) for cell in results["decoding"] for row in cell["rows"]):
        if row["variant"] == "none" or row["speedup"] is None:
            continue
        name = f"decoding with a cache is 10 to 100 times faster ({row['variant']}, {tokens} tokens)"
        below = (
            f"a step with a cache still reads all weights, and without one only {tokens} tokens are computed again: "
            "there is too little to save"
        )
        above = "what is saved grows with the length, and this one is longer than the figure was meant for"
        yield _Claim(name, SAID, row["speedup"]["of_medians"], 10.0, 100.0, below, above)


def _of_caches(results: dict[str, Any]) -> Iterator[_Claim]:
    cell, window, heads = results["caches"][-1], results["settings"]["window"], results["settings"]["cache_heads"]
    length, layouts = cell["tokens"], cell["layouts"]
    for name, source in (("GQA", GQA), ("MQA", MQA)):
        layout = layouts[name]
        times, share = heads / layout["kv_heads"], f"{name} with {layout['kv_heads']} of {heads} KV heads"
        smaller = layouts["MHA"]["cache_bytes"] / layout["cache_bytes"]
        reason = "not the layout but the cache's own overhead is measured"
        yield _Claim(f"{share}: the cache is {times:.0f} times smaller", source, smaller, times, times, reason, reason)
        claim = f"{share}: a decode step's attention is {times:.0f} times faster ({length} tokens)"
        below = "reads are fewer, but the arithmetic of all query heads stays, and is what limits a step then"
        above = "so much smaller a cache is served by the CPU's own caches"
        yield _Claim(claim, FOLLOWS, layout["faster_than_mha"]["of_medians"], times, times, below, above)
    if length <= window:
        return
    full, windowed, times = layouts["GQA"], layouts["GQA, window"], length / window
    claim = f"a window of {window}: the cache of {length} tokens is {times:.3g} times smaller"
    below = "the cache still stores tokens that the window no longer shows"
    smaller = full["cache_bytes"] / windowed["cache_bytes"]
    yield _Claim(claim, MISTRAL, smaller, times, times, below, "it stores less")
    claim = f"a window of {window}: a decode step's attention over {length} tokens is {times:.3g} times faster"
    faster = full["step_ms"]["median"] / windowed["step_ms"]["median"]
    below = "a step has a fixed part besides the tokens it reads"
    yield _Claim(claim, FOLLOWS, faster, times, times, below, "a window's tokens are served by the CPU's own caches")
