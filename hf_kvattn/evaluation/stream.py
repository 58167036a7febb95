"""Endless streams: perplexity against position, memory, the step far out, and what a long prompt costs.

A stream is one text, fed through one cache in chunks that are never reset. Compared are a window with sinks, the same
at positions that begin far out, the window alone, and a cache that keeps everything until it breaks. The yardstick is
the sliding recomputation of StreamingLLM (arXiv:2309.17453): the end of the stream again, every stride of tokens
predicted from a fresh window of the text before it, without any cache.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_kvattn
from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.sliding import SlidingWindowKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common.measurement import Figure, Measurement
from hf_kvattn.evaluation.common.running import add_model_arguments, run_on_model
from hf_kvattn.evaluation.common.timing import ratio, spread_of
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.tables import Column, digits, joined, show_spread, speedup, table_of

SCORED_ROWS = 128  # predictions scored at once: bounds the fp32 copies of their logits


@dataclass(frozen=True)
class Plan:
    """What is measured. Raises ValueError for sizes that do not go together."""

    tokens: int = 65_536  # length of the stream
    window: int = 1024  # of the cache
    sinks: int = 4  # of the cache
    chunk: int = 512  # tokens fed at once
    bucket: int = 1024  # tokens that one point of the curve averages; a multiple of `chunk`
    full_tokens: int = 16_384  # where the cache that keeps everything stops
    far: int = 4_000_000  # the first position of the stream that begins far out; 0 leaves it out
    last: int = 8192  # tokens at the end that are compared with the recomputation
    stride: int = 64  # tokens that the recomputation predicts from one window
    steps_at: tuple[int, int] = (2000, 60_000)  # positions at which decode steps are timed against each other
    steps: int = 20  # timed at each of them, in each round
    prompts: tuple[int, ...] = (4096, 8192, 16_384)  # lengths of prompts that are timed with the window and without
    rounds: int = 3  # turns of everything that is timed

    def __post_init__(self) -> None:
        sizes = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < (name not in ("sinks", "far"))]
        if self.bucket % self.chunk:
            wrong.append("bucket={bucket} is no multiple of chunk={chunk}")
        if self.tokens % self.bucket or self.full_tokens > self.tokens or self.last + self.window > self.tokens:
            wrong.append("tokens={tokens} must be a multiple of bucket={bucket}, at least full_tokens={full_tokens}, "
                         "and hold window={window} and last={last}")  # fmt: skip
        if self.last % self.stride or self.last % self.bucket or self.stride >= self.window:
            wrong.append("last={last} must be a multiple of stride={stride}, itself below window={window}, and of "
                         "bucket={bucket}")  # fmt: skip
        if not self.steps_at[0] < self.steps_at[1] <= self.tokens or max(self.prompts) > self.tokens:
            wrong.append("steps_at={steps_at} and prompts={prompts} must lie within tokens={tokens}")
        if wrong:
            raise ValueError("impossible stream: " + "; ".join(wrong).format(**vars(self)))


@torch.no_grad()
def measure(model: PreTrainedModel, token_ids: torch.Tensor, plan: Plan, *, progress: bool = False) -> dict[str, Any]:
    """Runs the streams, enabled, and times the rest; a dict that JSON can hold. `token_ids` is the text, 1-D."""
    if len(token_ids) <= plan.tokens:
        raise ValueError(f"a stream of {plan.tokens} needs {plan.tokens + 1} tokens, the text has {len(token_ids)}")
    ids = token_ids[None, : plan.tokens + 1].to(model.device)
    show = partial(tqdm, disable=not progress)
    with hf_kvattn.enabled(model):
        found, copies = _streams(model, ids, plan, show)
        recomputed = _recompute(model, ids[0], plan, show)
        times = _times(model, ids, copies, plan, show)
    return {
        "kind": "stream",
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in vars(plan).items()}
        | {"trained_positions": model.config.get_text_config(decoder=True).max_position_embeddings},
        "rows": [_row(name, nll, sizes, recomputed, plan) for name, (nll, sizes) in found.items()],
        "recomputed_perplexity": math.exp(recomputed),
        **times,
    }


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """-log p of each target `(T,)` under `logits` `(T, vocabulary)`, in nats; some rows at a time."""
    parts = zip(logits.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts]).tolist()


def _streams(
    model: PreTrainedModel, ids: torch.Tensor, plan: Plan, show: Callable[..., tqdm]
) -> tuple[dict[str, tuple[list[float], list[int]]], dict[int, KVCache]]:
    """For each stream, -log p of each token and the cache's bytes after each chunk; the first cache at `steps_at`."""
    config, named, sliding = model.config, f"window {plan.window} + {plan.sinks} sinks", SlidingWindowKVCache
    # Name to cache and position of the first token.
    caches: dict[str, tuple[KVCache, int]] = {named: (sliding(config, plan.window, plan.sinks), 0)}
    if plan.far:
        caches[f"{named}, from {plan.far:,}"] = sliding(config, plan.window, plan.sinks), plan.far
    if plan.sinks:
        caches[f"window {plan.window} alone"] = sliding(config, plan.window), 0
    caches["everything kept"] = StaticKVCache(config, plan.full_tokens), 0
    found: dict[str, tuple[list[float], list[int]]] = {}
    copies: dict[int, KVCache] = {}
    for name, (cache, first) in caches.items():
        nll, sizes = found[name] = [], []
        tokens = plan.full_tokens if isinstance(cache, StaticKVCache) else plan.tokens
        for start in show(range(0, tokens, plan.chunk), desc=name, unit="token", unit_scale=plan.chunk):
            stop = min(start + plan.chunk, tokens)
            positions = torch.arange(start, stop, device=ids.device)[None] + first
            logits = model(ids[:, start:stop], past_key_values=cache, position_ids=positions).logits[0]
            nll += _nll(logits, ids[0, start + 1 : stop + 1])
            sizes.append(cache.nbytes)
            if name == named:
                copies |= {at: copy.deepcopy(cache) for at in plan.steps_at if start < at <= stop}
    return found, copies


def _recompute(model: PreTrainedModel, ids: torch.Tensor, plan: Plan, show: Callable[..., tqdm]) -> float:
    """Mean -log p of the last tokens, each predicted from the `window` (less up to a stride) tokens before it."""
    nll: list[float] = []
    stops = range(plan.tokens - plan.last + plan.stride, plan.tokens + 1, plan.stride)
    for stop in show(stops, desc="recomputation", unit="token", unit_scale=plan.stride):
        window = ids[None, stop - plan.window : stop]
        logits = model(window, use_cache=False, logits_to_keep=plan.stride).logits[0]
        nll += _nll(logits, ids[stop - plan.stride + 1 : stop + 1])
    return statistics.fmean(nll)


def _row(name: str, nll: list[float], sizes: list[int], recomputed: float, plan: Plan) -> dict[str, Any]:
    full = min(math.ceil(plan.window / plan.chunk), len(sizes) - 1)
    last = None if len(nll) < plan.tokens else statistics.fmean(nll[-plan.last :])
    return {
        "variant": name,
        "tokens": len(nll),
        "perplexity": math.exp(statistics.fmean(nll)),
        "last_perplexity": None if last is None else math.exp(last),
        "last_over_recomputed_pct": None if last is None else 100 * math.expm1(last - recomputed),
        "points": [
            {"position": at + plan.bucket, "perplexity": math.exp(statistics.fmean(nll[at : at + plan.bucket]))}
            for at in range(0, len(nll), plan.bucket)
        ],
        "bytes_when_full": sizes[full],
        "bytes_peak": max(sizes[full:]),
        "bytes_at_the_end": sizes[-1],
    }


def _in_turns(runs: Mapping[Any, Callable[[], Any]], times: int, rounds: Iterable[int]) -> dict[Any, list[list[float]]]:
    """The milliseconds of each run by round: `times` in a row, then the next one's."""
    found: dict[Any, list[list[float]]] = {name: [] for name in runs}
    for _ in rounds:
        for name, run in runs.items():
            marks_s = [time.perf_counter()]
            for _ in range(times):
                run()
                marks_s.append(time.perf_counter())
            found[name].append([(end - start) * 1e3 for start, end in pairwise(marks_s)])
    return found


def _times(
    model: PreTrainedModel, ids: torch.Tensor, copies: dict[int, KVCache], plan: Plan, show: Callable[..., tqdm]
) -> dict[str, Any]:
    """One-token steps at two places of the stream; then a whole prompt at once, in the window and in full."""

    def prefill(tokens: int, make: Callable[[], KVCache]) -> None:
        model(ids[:, :tokens], past_key_values=make(), logits_to_keep=1)

    steps = {at: partial(model, ids[:, :1], past_key_values=copies[at]) for at in plan.steps_at}
    step_ms = _in_turns(steps, plan.steps, show(range(plan.rounds + 1), desc="steps", unit="round"))
    step_ms = {at: laps[1:] for at, laps in step_ms.items()}  # the first round warms up
    early, late = step_ms.values()
    window = partial(SlidingWindowKVCache, model.config, plan.window, plan.sinks)
    prompts = {}
    for tokens in plan.prompts:
        prompts[tokens, "windowed"] = partial(prefill, tokens, window)
        prompts[tokens, "full"] = partial(prefill, tokens, partial(StaticKVCache, model.config, tokens))
    prompt_ms = _in_turns(prompts, 1, show(range(plan.rounds), desc="prompts", unit="round"))
    rows = []
    for tokens in dict.fromkeys(plan.prompts):
        windowed, full = prompt_ms[tokens, "windowed"], prompt_ms[tokens, "full"]
        half = prompt_ms.get((tokens / 2, "windowed"))
        row = {"tokens": tokens, "windowed_ms": spread_of(windowed), "full_ms": spread_of(full)}
        row |= {"windowed_faster": ratio(full, windowed)}
        rows.append(row | {"windowed_over_half": None if half is None else ratio(windowed, half)})
    spreads = {str(at): spread_of(laps) for at, laps in step_ms.items()}
    return {"steps": {"step_ms": spreads, "late_over_early": ratio(late, early)}, "prompts": rows}


STEP_COLUMNS: list[Column] = [
    ("position", "position", str),
    ("step ms (p20 to p80)", "step_ms", show_spread),
    ("times the first", "late_over_early", speedup),
]
PROMPT_COLUMNS: list[Column] = [
    ("tokens", "tokens", str),
    ("in the window, ms", "windowed_ms", show_spread),
    ("in full, ms", "full_ms", show_spread),
    ("windowed faster", "windowed_faster", speedup),
    ("windowed, times half the tokens", "windowed_over_half", speedup),
]


def _tables(results: dict[str, Any]) -> str:
    settings, steps = results["settings"], results["steps"]
    notes = (
        f"One text of {settings['tokens']} tokens through one cache, {settings['chunk']} at a time; the model was "
        f"trained on {settings['trained_positions']} positions. The last {settings['last']} tokens are compared with a "
        f"recomputation without a cache, each predicted from a fresh window of "
        f"{settings['window'] - settings['stride'] + 1} to {settings['window']} tokens: perplexity "
        f"{results['recomputed_perplexity']:.3f}. Cache bytes: when the window is full, at their highest after that, "
        "at the end.\n"
    )
    columns: list[Column] = [
        ("cache", "variant", str),
        ("tokens", "tokens", str),
        ("perplexity", "perplexity", digits(".3f")),
        (f"of the last {settings['last']}", "last_perplexity", digits(".3f")),
        ("against recomputed %", "last_over_recomputed_pct", digits("+.2f")),
        ("bytes when full", "bytes_when_full", str),
        ("highest", "bytes_peak", str),
        ("at the end", "bytes_at_the_end", str),
    ]
    times = zip(settings["steps_at"], (None, steps["late_over_early"]), strict=True)
    step_rows = [{"position": at, "step_ms": steps["step_ms"][str(at)], "late_over_early": late} for at, late in times]
    return joined(
        notes,
        table_of(columns, results["rows"]),
        "### A decode step along the stream\n",
        table_of(STEP_COLUMNS, step_rows),
        "### A prompt at once\n",
        table_of(PROMPT_COLUMNS, results["prompts"]),
    )


def _draw(results: dict[str, Any]) -> Any:
    """Perplexity along the stream by cache, and what a prompt costs with the window and without."""
    settings, rows, full, ours = results["settings"], results["rows"], "#444444", drawing.OURS
    figure = drawing.new_figure(10.0, 4.6, "A stream far past what the model was trained on", results["conditions"])
    panels = figure.subplot_mosaic([["stream", "stream", "prompts"]])
    axes = panels["stream"]
    styles = [(ours[0], 2.6, "-"), (ours[4], 1.2, (0, (4, 3))), (ours[1], 1.4, "-"), (full, 1.4, "-")]
    for row, (color, width, line) in zip(rows, [styles[0], *styles[1 - len(rows) :]], strict=True):
        x, y = ([point[key] for point in row["points"]] for key in ("position", "perplexity"))
        axes.plot(x, y, color=color, linewidth=width, linestyle=line, label=row["variant"])
    x = [settings["tokens"] - settings["last"], settings["tokens"]]
    axes.plot(x, [results["recomputed_perplexity"]] * 2, color=ours[2], linewidth=3, label="recomputed")
    drawing.mark(axes, settings["trained_positions"], " trained on", (2, 3))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    drawing.caption(axes, x="position in the stream", title=f"perplexity of each {settings['bucket']} tokens")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    drawing.plain(axes)
    colors = {"full": full, "windowed": ours[0]}
    lines = {name: [(row["tokens"], row[f"{name}_ms"]["median"] / 1e3) for row in results["prompts"]]
             for name in colors}  # fmt: skip
    drawing.plot_lines(panels["prompts"], lines, colors, "a prompt at once: s")
    drawing.caption(panels["prompts"], x="tokens")
    return figure


def _limits(results: dict[str, Any]) -> list[str]:
    lines = ["One text was streamed: others may need more of what a window has left behind."]
    for row in results["rows"]:
        change = row["last_over_recomputed_pct"]
        if change is not None and change > 5:
            lines.append(f"{row['variant']}: perplexity at the end {change:+.0f} % against a recomputation.")
    return lines


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    settings = results["settings"]
    part = "the last {last} of a stream of {tokens} tokens".format(**settings)
    for row in (row for row in results["rows"] if row["last_perplexity"] is not None):
        name = f"perplexity of the last tokens: {row['variant']}"
        yield Figure(part, "perplexity", name, row["last_perplexity"], settings)


MEASUREMENT = Measurement("stream", "An endless stream", _tables, "stream.png", _draw, _limits, _figures)

HELP = """Feed one text through one cache, far past what the model was trained on.

    hf-kvattn stream --text book.txt
    hf-kvattn stream --tokens 32768 --text book.txt --window 512 --out results

Compared are a window with sinks, at positions from 0 and from 4,000,000, the window alone, and everything kept; then
decode steps and prompts are timed with the same window.
"""


def add_options(parser: argparse.ArgumentParser, prefix: str = "--") -> None:
    """The arguments of a stream but its length; `prefix` begins the names of those that are the stream's alone."""
    for name, default, kind, help in (
        ("window", Plan.window, positive_int, "the stream's window"),
        ("sinks", Plan.sinks, int, "the window's sinks"),
        ("full", Plan.full_tokens, positive_int, "where keeping everything ends"),
        ("prompts", list(Plan.prompts), positive_int, "lengths timed"),
    ):
        nargs = "+" if isinstance(default, list) else None
        parser.add_argument(prefix + name, dest=f"stream_{name}", default=default, type=kind, nargs=nargs, help=help)
    parser.add_argument("--rounds", type=positive_int, default=Plan.rounds, help="turns of what is timed")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    help = "length of the stream"
    parser.add_argument("--tokens", type=positive_int, default=Plan.tokens, dest="stream_tokens", help=help)
    add_options(parser)


def main(args: argparse.Namespace) -> int:
    """Measures the stream that the arguments of `add_options`, and `stream_tokens`, ask for."""
    tokens = args.stream_tokens
    sizes: dict[str, Any] = {"window": args.stream_window, "sinks": args.stream_sinks, "full_tokens": args.stream_full}
    if tokens < Plan.steps_at[1]:  # too short for the usual places: looked at where it has got to
        last = tokens // 4 // Plan.bucket * Plan.bucket
        sizes |= {"last": last, "steps_at": (tokens // 32, tokens * 15 // 16)}
    plan = Plan(tokens=tokens, prompts=tuple(args.stream_prompts), rounds=args.rounds, **sizes)
    run_on_model(args, measure, tokens + 1, plan=plan)
    return 0


COMMAND = Command(HELP, _add_arguments, main)
