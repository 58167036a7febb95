"""How fast is a decode step inside the real `model.generate()`, and what does its memory cost.

For every context length and batch size, each variant gets its own cache and is prefilled with the same prompt. Then
the variants decode in turns, a short block of steps each, round after round, so that a slow minute of the machine hits
all of them. Two numbers compare a variant with a stock cache: the ratio of the median step times, and the median of
the ratios within each round, where the noise of the machine cancels.

A step is the time from one chosen token to the next, taken inside generate() by a stopping criterion. The first steps
of a block carry generate()'s own set-up and caches gone cold while the others ran, so they are dropped.

Greedy tokens are compared with those of the stock cache, see `tokens.py`.

Memory: `variants.PeakMemory` watches the prompt and its first token, the filling of the cache included, and, after the
timing, a few more untimed steps, where transient copies of the past show up, and the growth of a cache too. The same
prompt can peak at twice its usual memory: the more large tensors are freed, the larger are those that glibc puts on its
heap, where what is freed between tensors that stay is not used again at once. So a prompt is measured several times, in
turns, into fresh caches; it costs as much as the prompt, so `prompts_s` limits it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_kvattn.evaluation import variants as caches
from hf_kvattn.evaluation.tokens import NEAR_TIE_FP32, NEAR_TIE_ULPS, Lane, compare_tokens
from hf_kvattn.evaluation.variants import BASELINE, STATIC_BASELINE, Variant

DROPPED_STEPS = 1  # of every block
WARM_UP_STEPS = 2  # decoded after the prefill and thrown away: a compiling cache does it here
MEMORY_STEPS = 3  # of the untimed memory pass
WARM_UP_CONTEXT = 32
STOCK = (BASELINE, STATIC_BASELINE)


class _StepClock(StoppingCriteria):
    """Never stops; notes the time at which each token was chosen."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times_s.append(time.perf_counter())
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return done  # type: ignore[return-value]  # a class that torch's functions are not declared to return


@contextmanager
def _plain_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Only greedy search: none of the sampling, penalties or cache that the model's own defaults may ask for."""
    saved = model.generation_config
    end = saved.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    padding = next((i for i in (saved.pad_token_id, tokenizer.pad_token_id, first_end) if i is not None), 0)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=padding)
    try:
        yield
    finally:
        model.generation_config = saved


def _decode(model: PreTrainedModel, lane: Lane, steps: int) -> list[float]:
    """Decode `steps` tokens, and give the seconds from the call to each of them."""
    clock = _StepClock(lane.ids.device)
    generator: Any = caches.generator(model, lane.variant)  # a model; its methods are typed as tensors
    with caches.running(model, lane.variant):
        start_s = time.perf_counter()
        lane.ids = generator.generate(
            input_ids=lane.ids,
            attention_mask=torch.ones_like(lane.ids),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **({"use_cache": False} if lane.cache is None else {"past_key_values": lane.cache}),
        )
    return [time_s - start_s for time_s in clock.times_s]


def _block_steps(lane: Lane, steps: int) -> int:
    """Without a cache every step is a whole prefill, so one timed step a round must do."""
    return steps if lane.cache is not None else DROPPED_STEPS + 1


def _time_round(model: PreTrainedModel, lane: Lane, steps: int) -> None:
    times_s = _decode(model, lane, _block_steps(lane, steps))
    # times_s[0] ends the first step, so step i lasts from times_s[i - 1] to times_s[i].
    lane.rounds_s.append([b - a for a, b in zip(times_s[DROPPED_STEPS - 1 :], times_s[DROPPED_STEPS:], strict=False)])
    lane.dropped += DROPPED_STEPS


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    ordered = torch.tensor(values, dtype=torch.float64)
    p20, median, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def _median_ms(lane: Lane) -> float:
    return 1e3 * statistics.median(step_s for steps_s in lane.rounds_s for step_s in steps_s)


def ratio(other: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times longer the other's times are, both by round: of medians, and paired within each round."""
    paired = spread([statistics.median(a) / statistics.median(b) for a, b in zip(other, own, strict=True)])
    medians = [statistics.median(time for times in rounds for time in times) for rounds in (other, own)]
    return {"of_medians": medians[0] / medians[1]} | {f"paired_{key}": paired[key] for key in paired}


def _speedup(lane: Lane, stock: Lane | None) -> dict[str, float] | None:
    """How many times faster than the stock lane."""
    return None if stock is None else ratio(stock.rounds_s, lane.rounds_s)


def _row(lane: Lane, stock: dict[str, Lane], tokens: dict[str, Any], context: int) -> dict[str, Any]:
    batch_size = lane.ids.shape[0]
    steps_s, ttft_s = [step_s for round_s in lane.rounds_s for step_s in round_s], statistics.median(lane.ttft_s)
    return {
        "variant": lane.variant.name,
        "hooked": lane.variant.hooked,
        "ttft_ms": 1e3 * ttft_s,
        "prefill_tok_s": batch_size * context / ttft_s,
        "step_ms": spread([1e3 * step_s for step_s in steps_s]),
        "round_median_ms": [1e3 * statistics.median(round_s) for round_s in lane.rounds_s],
        "decode_tok_s": 1e3 * batch_size / _median_ms(lane),
        "steps_timed": len(steps_s),
        "steps_dropped": lane.dropped,
        "cache_bytes": lane.bytes,
        "decode_extra_bytes": lane.extra_bytes,
        "prompt_peak_bytes": spread(lane.prompt_peak_bytes),
        "speedup": {name: _speedup(lane, stock.get(name)) for name in STOCK},
        "tokens": tokens,
    }


def _price_of_context(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the largest context costs a step over the smallest one, for each batch size and variant."""
    prices: list[dict[str, Any]] = []
    for batch_size in sorted({cell["batch"] for cell in cells}):
        ordered = sorted((cell for cell in cells if cell["batch"] == batch_size), key=lambda cell: cell["context"])
        small, large = ordered[0], ordered[-1]
        if small is large:
            continue
        small_ms = {row["variant"]: row["step_ms"]["median"] for row in small["rows"]}
        large_ms = {row["variant"]: row["step_ms"]["median"] for row in large["rows"]}
        extra_ms = {name: large_ms[name] - small_ms[name] for name in large_ms if name in small_ms}
        for name, extra in extra_ms.items():
            prices.append(
                {
                    "batch": batch_size,
                    "contexts": [small["context"], large["context"]],
                    "variant": name,
                    "extra_ms": extra,
                    "growth": large_ms[name] / small_ms[name],
                    "share_of": {s: extra / extra_ms[s] if extra_ms.get(s, 0.0) > 0 else None for s in STOCK},
                }
            )
    return prices


@dataclass(frozen=True)
class _Settings:
    block: int
    rounds: int
    none_limit_s: float
    prompts_s: float
    progress: bool

    def capacity(self, context: int) -> int:
        return context + 1 + WARM_UP_STEPS + self.rounds * self.block + MEMORY_STEPS

    def prompts(self, ttft_s: float) -> int:
        """How many prompts are measured, where one takes `ttft_s`: one a round at most, and one at least."""
        return int(max(1, min(self.rounds, self.prompts_s / ttft_s)))


def _warm_up(model: PreTrainedModel, token_ids: torch.Tensor, variants: list[Variant]) -> None:
    """Run every variant once, unmeasured: imports, extensions that compile and thread pools happen here."""
    prompt = token_ids[None, :WARM_UP_CONTEXT].to(model.device)
    for variant in variants:
        cache, reason = caches.try_make(variant, model.config, prompt.shape[1] + 1 + WARM_UP_STEPS)
        if reason is None:
            lane = Lane(variant, cache, prompt)
            _decode(model, lane, 1)
            _decode(model, lane, WARM_UP_STEPS)


def _measure_prompt(model: PreTrainedModel, lane: Lane, measured: Lane, memory: caches.PeakMemory) -> None:
    """Runs the prompt of `lane` to its first token, and notes time and memory with `measured`."""
    memory.start()
    measured.ttft_s.append(_decode(model, lane, 1)[0])
    measured.prompt_peak_bytes.append(memory.stop())


def _prefill(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    variants: list[Variant],
    settings: _Settings,
    memory: caches.PeakMemory,
) -> tuple[list[Lane], list[dict[str, Any]]]:
    """A prefilled lane for each variant that can run here, the stock one first, and the others with the reason."""
    batch_size, context = prompt.shape
    lanes: list[Lane] = []
    skipped: list[dict[str, Any]] = []
    for variant in variants:
        cache, reason = caches.try_make(variant, model.config, settings.capacity(context))
        # A step without cache is a forward over the whole prompt, which the stock prefill has just timed.
        if reason is None and cache is None and lanes[0].ttft_s[0] > settings.none_limit_s:
            reason = f"a step would take about {lanes[0].ttft_s[0]:.1f} s, the limit is {settings.none_limit_s:g} s"
        if reason is not None:
            skipped.append({"variant": variant.name, "context": context, "batch": batch_size, "reason": reason})
            continue
        lane = Lane(variant, cache, prompt)
        _measure_prompt(model, lane, lane, memory)
        if cache is not None:
            _decode(model, lane, WARM_UP_STEPS)
        lanes.append(lane)
    return lanes, skipped


def _in_turns(lanes: list[Lane], turns: Iterable[int]) -> Iterator[Lane]:
    """All lanes in every turn; every turn starts with another one."""
    return (lanes[(turn + i) % len(lanes)] for turn in turns for i in range(len(lanes)))


def _measure_cell(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    variants: list[Variant],
    settings: _Settings,
    memory: caches.PeakMemory,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    batch_size, context = prompt.shape
    lanes, skipped = _prefill(model, prompt, variants, settings, memory)
    prompts = settings.prompts(lanes[0].ttft_s[0])
    for lane in _in_turns(lanes, range(1, prompts)):
        cache = lane.variant.make(model.config, settings.capacity(context))
        _measure_prompt(model, Lane(lane.variant, cache, prompt), lane, memory)
        del cache  # before the next is measured, and the steps
    label = f"context {context}, batch {batch_size}"
    rounds = tqdm(range(settings.rounds), desc=label, unit="round", disable=not settings.progress)
    for lane in _in_turns(lanes, rounds):
        _time_round(model, lane, settings.block)
    for lane in lanes:
        lane.bytes = caches.cache_bytes(lane.cache)
        memory.start()
        _decode(model, lane, MEMORY_STEPS if lane.cache is not None else 1)
        lane.extra_bytes = memory.stop()
    tokens = compare_tokens(model, lanes[0], lanes, context)
    stock = {lane.variant.name: lane for lane in lanes if lane.variant.name in STOCK}
    rows = [_row(lane, stock, found, context) for lane, found in zip(lanes, tokens, strict=True)]
    return {"context": context, "batch": batch_size, "prompts": prompts, "rows": rows}, skipped


def _prompt(token_ids: torch.Tensor, context: int, batch_size: int) -> torch.Tensor:
    """Consecutive pieces of the text, one a row."""
    if len(token_ids) < batch_size * context:
        raise ValueError(
            f"context {context} x batch {batch_size} = {context * batch_size} tokens, the text has {len(token_ids)}"
        )
    return token_ids[: batch_size * context].view(batch_size, context)


def _over_limit(context: int, batch_size: int, max_batch_tokens: int) -> bool:
    """The limit is there to leave out large batches of long prompts; single rows may be as long as asked."""
    return batch_size > 1 and batch_size * context > max_batch_tokens


def tokens_needed(contexts: Sequence[int], batch_sizes: Sequence[int], max_batch_tokens: int) -> int:
    """How much text `measure` reads."""
    sizes = [(context, batch_size) for context in contexts for batch_size in batch_sizes]
    return max((c * b for c, b in sizes if not _over_limit(c, b, max_batch_tokens)), default=0)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    new_tokens: int = 45,
    rounds: int = 5,
    none_limit_s: float = 4.0,
    prompts_s: float = 10.0,
    max_batch_tokens: int = 16384,
    progress: bool = False,
) -> dict[str, Any]:
    """Time the variants against each other on one model, and give everything as a dict that JSON can hold.

    Args:
        token_ids: the text as a 1-D tensor; see `tokens_needed`.
        variants: what to compare; the stock baseline is added in front when it is not among them.
        contexts: prompt lengths.
        batch_sizes: rows decoded together.
        new_tokens: tokens decoded in the timed rounds together, a multiple of `rounds`.
        rounds: turns that each variant gets; `new_tokens / rounds` steps are one block.
        none_limit_s: decoding without a cache is skipped when a step would take longer.
        prompts_s: seconds for the prompts of one cache, of one context and batch size: their memory and first token are
            measured as often as prompts of the stock baseline fit in, once a round at most, and once at least.
        max_batch_tokens: batches of two rows and more with more prompt tokens together are skipped.
        progress: show bars on stderr.
    """
    if not variants or not contexts or not batch_sizes:
        raise ValueError(f"nothing to measure: {len(variants)} variants, {contexts=}, {batch_sizes=}")
    if tokens_needed(contexts, batch_sizes, max_batch_tokens) == 0:
        raise ValueError(f"{contexts=} x {batch_sizes=} are all over {max_batch_tokens=}")
    if min(contexts) < 2 or min(batch_sizes) < 1 or rounds < 1:
        raise ValueError(f"contexts start at 2, batch sizes and rounds at 1: {contexts=}, {batch_sizes=}, {rounds=}")
    if not prompts_s >= 0:
        raise ValueError(f"prompts_s must be a number of seconds from 0 on, got {prompts_s!r}")
    if new_tokens % rounds or new_tokens // rounds <= DROPPED_STEPS:
        raise ValueError(f"{new_tokens=} is not {rounds=} times at least {DROPPED_STEPS + 1} steps")
    stock = caches.VARIANTS[BASELINE]
    ordered = [stock] + [variant for variant in variants if variant.name != BASELINE]
    settings = _Settings(new_tokens // rounds, rounds, none_limit_s, prompts_s, progress)
    memory = caches.PeakMemory(model.device)
    cells: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with _plain_greedy(model, tokenizer):
        _warm_up(model, token_ids, ordered)
        for batch_size in sorted(set(batch_sizes)):
            for context in sorted(set(contexts)):
                if _over_limit(context, batch_size, max_batch_tokens):
                    reason = f"{batch_size * context} prompt tokens are over the limit of {max_batch_tokens}"
                    skipped.append({"variant": "all", "context": context, "batch": batch_size, "reason": reason})
                    continue
                prompt = _prompt(token_ids, context, batch_size).to(model.device)
                cell, left_out = _measure_cell(model, prompt, ordered, settings, memory)
                cells.append(cell)
                skipped += left_out
    return {
        "kind": "throughput",
        "settings": {
            "new_tokens": new_tokens,
            "rounds": rounds,
            "block_steps": settings.block,
            "dropped_steps_per_block": DROPPED_STEPS,
            "warm_up_steps": WARM_UP_STEPS,
            "none_limit_s": none_limit_s,
            "prompts_s": prompts_s,
            "max_batch_tokens": max_batch_tokens,
            "memory_method": memory.method,
            "near_tie": f"within {NEAR_TIE_FP32:g} of each other in float32, within {NEAR_TIE_ULPS} units in the last "
            "place of the larger logit in 16-bit dtypes",
        },
        "cells": cells,
        "price_of_context": _price_of_context(cells),
        "skipped": skipped,
        "mismatches": sum(row["tokens"]["verdict"] == "MISMATCH" for cell in cells for row in cell["rows"]),
    }
