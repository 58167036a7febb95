"""Requests of many lengths in a continuous batch: tokens a second of an enabled model and of a stock one."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

import hf_kvattn
from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common.measurement import Figure, Measurement
from hf_kvattn.evaluation.common.running import add_model_arguments, run_on_model
from hf_kvattn.evaluation.common.timing import in_turns, ratio, spread_of
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.tables import Column, digits, joined, show_spread, speedup, table_of

STOCK, OURS = "stock", "kvattn"
WAYS = (STOCK, OURS)
BATCH_TOKENS = 8192  # of a forward: transformers' own default


def lengths_of(requests: int, shortest: int, longest: int) -> list[int]:
    """Lengths of prompts, in tokens, each longer than the one before by the same factor."""
    steps = max(1, requests - 1)
    return [round(shortest * (longest / shortest) ** (i / steps)) for i in range(requests)]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    requests: int = 16,
    shortest: int = 128,
    longest: int = 4096,
    new_tokens: int = 32,
    batch_tokens: int = BATCH_TOKENS,
    rounds: int = 3,
    progress: bool = False,
) -> dict[str, Any]:
    """Requests of `shortest` to `longest` tokens, generated in one continuous batch in turns; what JSON can hold.

    `token_ids`, 1-D, are the prompts, one after the other. A forward takes up to `batch_tokens` of them. A step is one
    forward after the last prompt was taken, with one token of each request.
    """
    if min(requests, shortest, longest - shortest + 1, batch_tokens, rounds) < 1 or new_tokens < 4:
        raise ValueError(
            f"impossible sizes: {requests=}, {shortest=}, {longest=}, {new_tokens=} (4 at least), {batch_tokens=}, "
            f"{rounds=}"
        )
    lengths = lengths_of(requests, shortest, longest)
    if len(token_ids) < sum(lengths):
        raise ValueError(f"{requests} prompts are {sum(lengths)} tokens, the text has {len(token_ids)}")
    prompts = [ids.tolist() for ids in token_ids[: sum(lengths)].split(lengths)]
    tokens: dict[str, list[list[int]]] = {}
    whole_ms: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    steps_ms: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    turns = tqdm(in_turns(WAYS, range(rounds)), total=len(WAYS) * rounds, desc="batches", disable=not progress)
    for way in turns:
        if way == OURS:
            with hf_kvattn.enabled(model):
                tokens[way], lap_ms, laps_ms = _batch(model, prompts, new_tokens, batch_tokens)
        else:
            tokens[way], lap_ms, laps_ms = _batch(model, prompts, new_tokens, batch_tokens)
        whole_ms[way].append([lap_ms])
        steps_ms[way].append(laps_ms)
    rows = []
    for way in WAYS:
        whole, step = spread_of(whole_ms[way]), spread_of(steps_ms[way])
        rows.append(
            {
                "variant": way,
                "whole_ms": whole,
                "whole_tok_s": 1e3 * requests * new_tokens / whole["median"],
                "whole_faster": ratio(whole_ms[STOCK], whole_ms[way]),
                "step_ms": step,
                "step_tok_s": 1e3 * requests / step["median"],
                "step_faster": ratio(steps_ms[STOCK], steps_ms[way]),
                "same_tokens": sum(a == b for a, b in zip(tokens[way], tokens[STOCK], strict=True)) / requests,
            }
        )
    settings = {"requests": requests, "shortest": shortest, "longest": longest, "prompt_tokens": sum(lengths)}
    settings |= {"new_tokens": new_tokens, "batch_tokens": batch_tokens, "rounds": rounds}
    return {"kind": "batching", "settings": settings, "rows": rows}


def _batch(
    model: Any, prompts: list[list[int]], new_tokens: int, batch_tokens: int
) -> tuple[list[list[int]], float, list[float]]:
    """The tokens of each request, the milliseconds of all, and those of each step.

    Raises:
        RuntimeError: a request that transformers could not serve.
    """
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    pages = sum(-(-(len(ids) + new_tokens) // 256) for ids in prompts)
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=pages + len(prompts), max_batch_tokens=batch_tokens)
    start_s = time.perf_counter()
    results = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching, record_timestamps=True
    )
    whole_ms = (time.perf_counter() - start_s) * 1e3
    failed = [result.error for result in results.values() if result.error is not None]
    if failed or len(results) < len(prompts):
        raise RuntimeError(f"{len(prompts) - len(results) + len(failed)} requests failed: {failed[:1]}")
    # The last request to be taken has all others beside it until one of them is done.
    latest = max((result.timestamps for result in results.values()), key=lambda stamps: stamps[0])
    first_done_s = min(result.timestamps[-1] for result in results.values())
    steps_s = [stamp for stamp in latest if stamp <= first_done_s]
    laps_ms = [(b - a) * 1e3 for a, b in zip(steps_s, steps_s[1:], strict=False)]
    if not laps_ms:
        raise RuntimeError(f"a request was done before the last one was taken: {new_tokens=} are too few")
    return [result.generated_tokens for result in results.values()], whole_ms, laps_ms


NOTES = (
    "{requests} requests of {shortest} to {longest} tokens ({prompt_tokens} in all), {new_tokens} new ones each, in "
    "one continuous batch; forwards of up to {batch_tokens} tokens. All: prompts and new tokens, new ones a second. A "
    "step: one new token of each request. Medians (p20 to p80) of {rounds} rounds, in turns; how many times faster "
    "than stock, of medians, then paired within each round. Same: requests with stock's tokens.\n"
)
COLUMNS: list[Column] = [
    ("attention", "variant", str),
    ("all, ms", "whole_ms", show_spread),
    ("tok/s", "whole_tok_s", digits(".1f")),
    ("faster", "whole_faster", speedup),
    ("a step, ms", "step_ms", show_spread),
    ("steps, tok/s", "step_tok_s", digits(".1f")),
    ("steps faster", "step_faster", speedup),
    ("same", "same_tokens", digits(".0%")),
]


def _tables(results: dict[str, Any]) -> str:
    return joined(NOTES.format(**results["settings"]), table_of(COLUMNS, results["rows"]))


def _draw(results: dict[str, Any]) -> Any:
    """New tokens a second, over everything and in steps."""
    rows, settings = results["rows"], results["settings"]
    title = (
        f"Continuous batch: {settings['requests']} requests of {settings['shortest']} to {settings['longest']} tokens"
    )
    figure = drawing.new_figure(7.2, 2.6, title, results["conditions"])
    for axes, part, label in zip(
        figure.subplots(1, 2, sharey=True), ("whole", "step"), ("prompts and new tokens", "steps alone"), strict=True
    ):
        found = [row[f"{part}_tok_s"] for row in rows]
        bars = axes.barh(range(len(rows)), found, 0.6, color=["#7d7468", drawing.OURS[0]])
        drawing.label_bars(axes, bars, [f"{value:.3g}" for value in found])
        drawing.name_rows(axes, rows, f"new tokens a second, {label}")
    return figure


def _limits(results: dict[str, Any]) -> list[str]:
    lines = ["Prompts are mostly matrix products, which both do alike."]
    return lines + [
        f"{row['variant']}: other tokens than stock's in {1 - row['same_tokens']:.0%} of the requests."
        for row in results["rows"]
        if row["same_tokens"] < 1
    ]


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    part = "a continuous batch of {requests} requests".format(**results["settings"])
    for row in results["rows"]:
        for which in ("whole", "step"):
            name = f"new tokens a second, {'all' if which == 'whole' else 'steps'}: {row['variant']}"
            yield Figure(part, f"batch_{which}_tok_s", name, row[f"{which}_tok_s"], results["settings"])


MEASUREMENT = Measurement("batching", "A continuous batch", _tables, "batching.png", _draw, _limits, _figures)

HELP = """Tokens a second of a continuous batch (generate_batch) of many lengths, with and without this package.

    hf-kvattn batching
    hf-kvattn batching --requests 16 --shortest 128 --longest 4096 --threads 2 --output results
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--requests", type=positive_int, default=16, help="in one batch")
    parser.add_argument("--shortest", type=positive_int, default=128, help="tokens of the shortest prompt")
    parser.add_argument("--longest", type=positive_int, default=4096, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=positive_int, default=32, help="of each request")
    parser.add_argument("--batch-tokens", type=positive_int, default=BATCH_TOKENS, help="most tokens of a forward")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of both, in turns")


def _main(args: argparse.Namespace) -> int:
    run_on_model(args, measure, args.requests * args.longest)
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
