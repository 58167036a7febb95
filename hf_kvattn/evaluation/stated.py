"""What is said of attention and KV caches: each stated figure, judged by what `claims.py` measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

NEAR = 0.2  # a measured figure this near to a stated one agrees with it, relatively

FLASH, FLASH_2 = "FlashAttention's README", "FlashAttention-2, arXiv:2307.08691"
LONGFORMER, MISTRAL = "Longformer, arXiv:2004.05150", "Mistral 7B, arXiv:2310.06825"
GQA, MQA = "GQA, arXiv:2305.13245", "MQA, arXiv:1911.02150"
SAID, FOLLOWS = "often said of KV caches", "follows, if reading the cache is all that a step does"


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each stated figure beside the measured one, whether they agree, and why not."""
    return [*_judge_attention(results), *_judge_decoding(results), *_judge_caches(results)]


def disagreements(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims that were not confirmed."""
    return [row for row in results["claims"] if not row["agrees"]]


def _judged(
    claim: str,
    source: str,
    measured: float,
    stated: tuple[float, float | None],
    below: str,
    above: str = "",
) -> dict[str, Any]:
    """One row; `stated` is a range, its end None where more is welcome; the reasons are for a figure below or above."""
    low, high = stated
    reason = None
    if measured < low * (1 - NEAR):
        reason = below
    elif high is not None and measured > high * (1 + NEAR):
        reason = above
    return {
        "claim": claim,
        "source": source,
        "stated": list(stated),
        "measured": measured,
        "agrees": reason is None,
        "why": reason,
    }


def _growth(rows: list[dict[str, Any]], method: str, value: Callable[[dict[str, Any]], float]) -> float | None:
    """The power of the length that a method's figure grows with, between the two largest lengths it was measured at."""
    points = [(row["tokens"], value(row["methods"][method])) for row in rows if method in row["methods"]][-2:]
    if len(points) < 2 or min(figure for _, figure in points) <= 0:
        return None
    (small, low), (large, high) = points
    return math.log(high / low) / math.log(large / small)


def _judge_attention(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows, window = results["attention"], results["settings"]["window"]
    judged = []
    for row in rows:
        if "standard" not in row["methods"]:
            continue
        length, (standard, tiled) = row["tokens"], (row["methods"][name] for name in ("standard", "tiled"))
        judged.append(
            _judged(
                f"tiled attention is 2 to 4 times faster than standard attention ({length} tokens)",
                FLASH_2,
                row["speedup"]["tiled"]["of_medians"],
                (2.0, 4.0),
                "stated for GPUs; here the scores of so short a sequence stay in the CPU's caches, or arithmetic is "
                "the larger part",
                "scores and mask of this length go through this machine's memory several times, and the causal half "
                "that tiles leave out is computed in full",
            )
        )
        stated = {2048: 10.0, 4096: 20.0}.get(length)
        if stated and tiled["extra_bytes"] > 0:
            judged.append(
                _judged(
                    f"tiled attention takes {stated:.0f} times less memory ({length} tokens)",
                    FLASH,
                    standard["extra_bytes"] / tiled["extra_bytes"],
                    (stated, None),
                    "with so few heads the scores are small beside what each thread's tiles and the result take",
                )
            )
    memory = "the power of the length that {}'s memory grows with (1: linear, 2: quadratic)"
    for method, power in (("standard", 2.0), ("tiled", 1.0)):
        figure = _growth(rows, method, lambda found: found["extra_bytes"])
        if figure is not None:
            below = "a fixed part, each thread's tiles, does not grow" if power == 1 else "other memory is a large part"
            above = "resident memory was reused at the shorter length, so that its rise was smaller than its use"
            judged.append(_judged(memory.format(f"{method} attention"), FLASH, figure, (power, power), below, above))
    figure = _growth([row for row in rows if row["tokens"] >= window], "windowed", lambda found: found["ms"]["median"])
    if figure is not None:
        below = "this machine was faster at the longer length"
        above = "the first window's tokens see less than a window, so that the shorter sequence is cheaper a token"
        name = f"the power of the length that time grows with in a window of {window} (1: linear)"
        judged.append(_judged(name, LONGFORMER, figure, (1.0, 1.0), below, above))
    for row in rows:
        if row["tokens"] == 16384 and window == 4096:
            below = (
                "PyTorch's attention computes what the mask of a chunk hides, so that up to a fourth more is computed "
                "than is seen, and causal attention without a window leaves its hidden half out"
            )
            name = "a window of 4096 makes attention over 16384 tokens 2 times faster"
            judged.append(_judged(name, MISTRAL, row["speedup"]["windowed"]["of_medians"], (2.0, None), below))
    return judged


def _judge_decoding(results: dict[str, Any]) -> list[dict[str, Any]]:
    judged = []
    for cell in results["decoding"]:
        for row in cell["rows"]:
            if row["variant"] != "none" and row["speedup"] is not None:
                below = (
                    f"a step with a cache still reads all weights, and without one only {cell['context']} tokens are "
                    "computed again: there is too little to save"
                )
                above = "what is saved grows with the length, and this one is longer than the figure was meant for"
                name = f"decoding with a cache is 10 to 100 times faster ({row['variant']}, {cell['context']} tokens)"
                speedup = row["speedup"]["of_medians"]
                judged.append(_judged(name, SAID, speedup, (10.0, 100.0), below, above))
    return judged


def _judge_caches(results: dict[str, Any]) -> list[dict[str, Any]]:
    cell, window, heads = results["caches"][-1], results["settings"]["window"], results["settings"]["cache_heads"]
    length, layouts = cell["tokens"], cell["layouts"]
    judged = []
    for name, source in (("GQA", GQA), ("MQA", MQA)):
        kv_heads = layouts[name]["kv_heads"]
        stated, share = heads / kv_heads, f"{name} with {kv_heads} of {heads} KV heads"
        smaller = layouts["MHA"]["cache_bytes"] / layouts[name]["cache_bytes"]
        faster = layouts[name]["faster_than_mha"]["of_medians"]
        reason = "not the layout but the cache's own overhead is measured"
        judged.append(
            _judged(
                f"{share}: the cache is {stated:.0f} times smaller", source, smaller, (stated, stated), reason, reason
            )
        )
        below = "reads are fewer, but the arithmetic of all query heads stays, and is what limits a step then"
        above = "so much smaller a cache is served by the CPU's own caches"
        claim = f"{share}: a decode step's attention is {stated:.0f} times faster ({length} tokens)"
        judged.append(_judged(claim, FOLLOWS, faster, (stated, stated), below, above))
    if length <= window:
        return judged
    full, windowed, stated = layouts["GQA"], layouts["GQA, window"], length / window
    below = "the cache still stores tokens that the window no longer shows"
    name = f"a window of {window}: the cache of {length} tokens is {stated:.3g} times smaller"
    judged.append(
        _judged(name, MISTRAL, full["cache_bytes"] / windowed["cache_bytes"], (stated, stated), below, "it stores less")
    )
    below = "a step has a fixed part besides the tokens it reads"
    above = "a window's tokens are served by the CPU's own caches"
    name = f"a window of {window}: a decode step's attention over {length} tokens is {stated:.3g} times faster"
    faster = full["step_ms"]["median"] / windowed["step_ms"]["median"]
    judged.append(_judged(name, FOLLOWS, faster, (stated, stated), below, above))
    return judged
