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
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """What is measured.

    Attributes:
        tokens: length of the stream.
        window, sinks: of the cache.
        chunk: tokens fed at once.
        bucket: tokens that one point of the curve averages; a multiple of `chunk`.
        full_tokens: where the cache that keeps everything stops.
        far: the first position of the stream that begins far out; 0 leaves it out.
        last: tokens at the end that are compared with the recomputation.
        stride: tokens that the recomputation predicts from one window.
        steps_at: stream positions at which decode steps are timed against each other.
        steps: timed at each of them, in each round.
        prompts: lengths of prompts that are timed with the window and without.
        rounds: turns of everything that is timed.
    """

    tokens: int = 65_536
    window: int = 1024
    sinks: int = 4
    chunk: int = 512
    bucket: int = 1024
    full_tokens: int = 16_384
    far: int = 4_000_000
    last: int = 8192
    stride: int = 64
    steps_at: tuple[int, int] = (2000, 60_000)
    steps: int = 20
    prompts: tuple[int, ...] = (4096, 8192, 16_384)
    rounds: int = 3

    @classmethod
    def of_length(cls, tokens: int, **others: Any) -> Plan:
        """A plan for a stream of `tokens`: one too short for the usual places is looked at where it has got to."""
        if tokens < cls.steps_at[1]:
            others = {
                "last": tokens // 4 // cls.bucket * cls.bucket,
                "steps_at": (tokens // 32, tokens * 15 // 16),
            } | others
        return cls(tokens=tokens, **others)

    def check(self) -> None:
        """Raises ValueError for sizes that do not go together."""
        sizes = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < (name not in ("sinks", "far"))]
        if self.bucket % self.chunk:
            wrong.append(f"bucket={self.bucket} is no multiple of chunk={self.chunk}")
        if self.tokens % self.bucket or self.full_tokens > self.tokens or self.last + self.window > self.tokens:
            wrong.append(
                f"tokens={self.tokens} must be a multiple of bucket={self.bucket}, at least full_tokens="
                f"{self.full_tokens}, and hold window={self.window} and last={self.last}"
            )
        if self.last % self.stride or self.last % self.bucket or self.stride >= self.window:
            wrong.append(
                f"last={self.last} must be a multiple of stride={self.stride}, itself below window={self.window}, and "
                f"of bucket={self.bucket}"
            )
        if not self.steps_at[0] < self.steps_at[1] <= self.tokens or max(self.prompts) > self.tokens:
            wrong.append(f"steps_at={self.steps_at} and prompts={self.prompts} must lie within tokens={self.tokens}")
        if wrong:
            raise ValueError("impossible stream: " + "; ".join(wrong))


@dataclass
class _Run:
    """One stream through one cache."""

    name: str
    cache: KVCache
    tokens: int
    far: int = 0
    nll: list[float] = field(default_factory=list)  # of each predicted token
    bytes: list[int] = field(default_factory=list)  # after each chunk
    copies: dict[int, KVCache] = field(default_factory=dict)  # of the cache, at the positions asked for


@torch.no_grad()
def measure(model: PreTrainedModel, token_ids: torch.Tensor, plan: Plan, *, progress: bool = False) -> dict[str, Any]:
    """Runs the streams and times the rest; a dict that JSON can hold.

    Args:
        model: enabled while this runs.
        token_ids: the text, 1-D, at least `plan.tokens + 1`.
        plan: what to measure.
        progress: show a bar on stderr.

    Raises:
        ValueError: an impossible plan, or too few tokens.
    """
    plan.check()
    if len(token_ids) <= plan.tokens:
        raise ValueError(f"a stream of {plan.tokens} needs {plan.tokens + 1} tokens, the text has {len(token_ids)}")
    config, sliding = model.config, SlidingWindowKVCache
    named = f"window {plan.window}"
    runs = [_Run(f"{named} + {plan.sinks} sinks", sliding(config, plan.window, plan.sinks), plan.tokens)]
    if plan.far:
        far = sliding(config, plan.window, plan.sinks)
        runs.append(_Run(f"{named} + {plan.sinks} sinks, from {plan.far:,}", far, plan.tokens, plan.far))
    if plan.sinks:
        runs.append(_Run(f"{named} alone", sliding(config, plan.window), plan.tokens))
    runs.append(_Run("everything kept", StaticKVCache(config, plan.full_tokens), plan.full_tokens))
    ids = token_ids[None, : plan.tokens + 1].to(model.device)
    with hf_kvattn.enabled(model):
        total = sum(run.tokens for run in runs) + plan.last
        with tqdm(total=total, unit="token", disable=not progress) as bar:
            for i, run in enumerate(runs):
                bar.set_description(run.name)
                _stream(model, ids, run, plan, bar, plan.steps_at if i == 0 else ())
            bar.set_description("recomputation")
            recomputed = _recompute(model, ids[0], plan, bar)
        steps = _time_steps(model, ids, runs[0].copies, plan, progress)
        prompts = _time_prompts(model, ids, plan, progress)
    return {
        "kind": "stream",
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in vars(plan).items()}
        | {"trained_positions": config.get_text_config(decoder=True).max_position_embeddings},
        "rows": [_row(run, recomputed, plan) for run in runs],
        "recomputed_perplexity": math.exp(recomputed),
        "steps": steps,
        "prompts": prompts,
    }


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """-log p of each target `(T,)` under `logits` `(T, vocabulary)`, in nats; some rows at a time."""
    parts = zip(logits.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts]).tolist()


def _stream(model: PreTrainedModel, ids: torch.Tensor, run: _Run, plan: Plan, bar: tqdm, copies_at: tuple) -> None:
    for start in range(0, run.tokens, plan.chunk):
        stop = min(start + plan.chunk, run.tokens)
        positions = torch.arange(start, stop, device=ids.device)[None] + run.far
        logits = model(ids[:, start:stop], past_key_values=run.cache, position_ids=positions).logits[0]
        run.nll += _nll(logits, ids[0, start + 1 : stop + 1])
        run.bytes.append(run.cache.nbytes)
        for position in copies_at:
            if start < position <= stop:
                run.copies[position] = copy.deepcopy(run.cache)
        bar.update(stop - start)


def _recompute(model: PreTrainedModel, ids: torch.Tensor, plan: Plan, bar: tqdm) -> float:
    """Mean -log p of the last tokens, each predicted from the `window` (less up to a stride) tokens before it."""
    nll: list[float] = []
    for stop in range(plan.tokens - plan.last + plan.stride, plan.tokens + 1, plan.stride):
        window = ids[None, stop - plan.window : stop]
        logits = model(window, use_cache=False, logits_to_keep=plan.stride).logits[0]
        nll += _nll(logits, ids[stop - plan.stride + 1 : stop + 1])
        bar.update(plan.stride)
    return statistics.fmean(nll)


def _row(run: _Run, recomputed: float, plan: Plan) -> dict[str, Any]:
    buckets = range(0, run.tokens, plan.bucket)
    full = next(
        i for i, size in enumerate(run.bytes) if (i + 1) * plan.chunk >= min(plan.window + plan.chunk, run.tokens)
    )
    last = None if run.tokens < plan.tokens else statistics.fmean(run.nll[-plan.last :])
    return {
        "variant": run.name,
        "tokens": run.tokens,
        "perplexity": math.exp(statistics.fmean(run.nll)),
        "last_perplexity": None if last is None else math.exp(last),
        "last_over_recomputed_pct": None if last is None else 100 * math.expm1(last - recomputed),
        "points": [
            {
                "position": start + plan.bucket,
                "perplexity": math.exp(statistics.fmean(run.nll[start : start + plan.bucket])),
            }
            for start in buckets
        ],
        "bytes_when_full": run.bytes[full],
        "bytes_peak": max(run.bytes[full:]),
        "bytes_at_the_end": run.bytes[-1],
    }


def _time_steps(
    model: PreTrainedModel, ids: torch.Tensor, copies: dict[int, KVCache], plan: Plan, progress: bool
) -> dict[str, Any]:
    """One-token steps at two places of the stream, in turns."""
    times_ms: dict[int, list[list[float]]] = {position: [] for position in plan.steps_at}
    token = ids[:, :1]
    for turn in tqdm(range(plan.rounds + 1), desc="steps", unit="round", disable=not progress):
        for position in plan.steps_at:
            lap_ms = []
            for _ in range(plan.steps):
                start = time.perf_counter()
                model(token, past_key_values=copies[position])
                lap_ms.append((time.perf_counter() - start) * 1e3)
            if turn:  # the first one warms up
                times_ms[position].append(lap_ms)
    early, late = plan.steps_at
    return {
        "step_ms": {str(at): spread_of(laps) for at, laps in times_ms.items()},
        "late_over_early": ratio(times_ms[late], times_ms[early]),
    }


def _time_prompts(model: PreTrainedModel, ids: torch.Tensor, plan: Plan, progress: bool) -> list[dict[str, Any]]:
    """A whole prompt at once, in a window and in full, in turns."""
    makes = {
        "windowed": lambda tokens: SlidingWindowKVCache(model.config, plan.window, plan.sinks),
        "full": lambda tokens: StaticKVCache(model.config, tokens),
    }
    found: dict[int, dict[str, list[list[float]]]] = {n: {name: [] for name in makes} for n in plan.prompts}
    for _ in tqdm(range(plan.rounds), desc="prompts", unit="round", disable=not progress):
        for tokens in plan.prompts:
            for name, make in makes.items():
                start = time.perf_counter()
                model(ids[:, :tokens], past_key_values=make(tokens), logits_to_keep=1)
                found[tokens][name].append([(time.perf_counter() - start) * 1e3])
    rows: list[dict[str, Any]] = []
    for tokens, laps in found.items():
        half = found.get(tokens // 2) if tokens % 2 == 0 else None
        rows.append(
            {"tokens": tokens}
            | {f"{name}_ms": spread_of(laps[name]) for name in makes}
            | {"windowed_faster": ratio(laps["full"], laps["windowed"])}
            | {"windowed_over_half": None if half is None else ratio(laps["windowed"], half["windowed"])}
        )
    return rows


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
    step_columns: list[Column] = [
        ("position", "position", str),
        ("step ms (p20 to p80)", "step_ms", show_spread),
        ("times the first", "late_over_early", speedup),
    ]
    prompt_columns: list[Column] = [
        ("tokens", "tokens", str),
        ("in the window, ms", "windowed_ms", show_spread),
        ("in full, ms", "full_ms", show_spread),
        ("windowed faster", "windowed_faster", speedup),
        ("windowed, times half the tokens", "windowed_over_half", speedup),
    ]
    times = zip(settings["steps_at"], (None, steps["late_over_early"]), strict=True)
    step_rows = [{"position": at, "step_ms": steps["step_ms"][str(at)], "late_over_early": late} for at, late in times]
    return joined(
        notes,
        table_of(columns, results["rows"]),
        "### A decode step along the stream\n",
        table_of(step_columns, step_rows),
        "### A prompt at once\n",
        table_of(prompt_columns, results["prompts"]),
    )


def _draw(results: dict[str, Any]) -> Any:
    """Perplexity along the stream by cache, and what a prompt costs with the window and without."""
    settings, ours = results["settings"], drawing.OURS
    figure = drawing.new_figure(10.0, 4.6, "A stream far past what the model was trained on", results["conditions"])
    panels = figure.subplot_mosaic([["stream", "stream", "prompts"]])
    axes = panels["stream"]
    styles = [(ours[0], 2.6, "-"), (ours[4], 1.2, (0, (4, 3))), (ours[1], 1.4, "-"), ("#444444", 1.4, "-")]
    if len(results["rows"]) < len(styles):
        styles = [styles[0], *styles[-len(results["rows"]) + 1 :]]
    for row, (color, width, line) in zip(results["rows"], styles, strict=True):
        x, y = ([point[key] for point in row["points"]] for key in ("position", "perplexity"))
        axes.plot(x, y, color=color, linewidth=width, linestyle=line, label=row["variant"])
    x, y = [settings["tokens"] - settings["last"], settings["tokens"]], [results["recomputed_perplexity"]] * 2
    axes.plot(x, y, color=ours[2], linewidth=3, label="recomputed")
    axes.axvline(settings["trained_positions"], color=drawing.INK, linewidth=1, linestyle=(0, (2, 3)))
    axes.text(settings["trained_positions"], 1.0, " trained on", fontsize=8, va="top", color=drawing.INK,
              transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    drawing.caption(axes, x="position in the stream", title=f"perplexity of each {settings['bucket']} tokens")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    drawing.plain(axes)
    colors = {"full": "#444444", "windowed": ours[0]}
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
    usual = Plan()
    for name, kind, default, help in (
        ("window", positive_int, usual.window, "the stream's window"),
        ("sinks", int, usual.sinks, "the window's sinks"),
        ("full", positive_int, usual.full_tokens, "where keeping everything ends"),
    ):
        parser.add_argument(prefix + name, type=kind, default=default, dest=f"stream_{name}", help=help)
    parser.add_argument(f"{prefix}prompts", type=positive_int, nargs="+", default=list(usual.prompts),
                        dest="stream_prompts", help="lengths timed")  # fmt: skip
    parser.add_argument("--rounds", type=positive_int, default=usual.rounds, help="turns of what is timed")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    help = "length of the stream"
    parser.add_argument("--tokens", type=positive_int, default=Plan().tokens, dest="stream_tokens", help=help)
    add_options(parser)


def main(args: argparse.Namespace) -> int:
    """Measures the stream that the arguments of `add_options`, and `stream_tokens`, ask for."""
    plan = Plan.of_length(
        args.stream_tokens,
        window=args.stream_window,
        sinks=args.stream_sinks,
        full_tokens=args.stream_full,
        prompts=tuple(args.stream_prompts),
        rounds=args.rounds,
    )
    plan.check()
    run_on_model(args, measure, plan.tokens + 1, plan=plan)
    return 0


COMMAND = Command(HELP, _add_arguments, main)
