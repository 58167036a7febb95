"""What beam search makes a cache move: bytes written and time, at each step's reordering of the beams."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common import variants as caches
from hf_kvattn.evaluation.common.measurement import Figure, Measurement
from hf_kvattn.evaluation.common.running import model_command
from hf_kvattn.evaluation.common.timing import ratio, spread_of
from hf_kvattn.evaluation.common.variants import BASELINE, Variant
from hf_kvattn.tools.command_line import positive_int
from hf_kvattn.tools.tables import Column, digits, joined, same, show_spread, speedup, table_of

Call = Callable[[], None]


class WrittenBytes(TorchDispatchMode):
    """Counts, in `total`, the bytes that PyTorch operations write to memory: results and temporaries, not views."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name == "index_put_":  # `x[rows] = values`: the rows only
            self.total += args[2].nbytes
        elif isinstance(out, torch.Tensor) and not func.is_view and not name.startswith("empty"):
            self.total += out.nbytes
        return out


def _written_bytes(reorder: Call) -> float:
    with WrittenBytes() as counter:
        reorder()
    return counter.total


def _ms(reorder: Call) -> float:
    start_s = time.perf_counter()
    reorder()
    return 1e3 * (time.perf_counter() - start_s)


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    context: int,
    batch_size: int = 1,
    beams: int = 4,
    new_tokens: int = 64,
    rounds: int = 3,
    progress: bool = False,
) -> dict[str, Any]:
    """Beam search with each cache in turns; a dict that JSON can hold.

    `token_ids`, 1-D, are `batch_size` prompts of `context` tokens. generate()'s default is one of `variants`. Each of
    `new_tokens` steps reorders the beams. One round counts the bytes of that, `rounds` more are timed.
    """
    names = [variant.name for variant in variants]
    if BASELINE not in names:
        raise ValueError(f"{BASELINE} must be among the variants, got {names}")
    if len(token_ids) < batch_size * context or min(batch_size, context, new_tokens, rounds) < 1 or beams < 2:
        raise ValueError(
            f"impossible sizes: {len(token_ids)} tokens, {context=}, {batch_size=}, {beams=}, {new_tokens=}, {rounds=}"
        )
    prompt = token_ids[: batch_size * context].view(batch_size, context).to(model.device)
    # A row that is done before the others keeps its beams as they are: without an end, all go on.
    config = GenerationConfig(num_beams=beams, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)

    def generate(variant: Variant, figure_of: Callable[[Call], float]) -> tuple[torch.Tensor, list[float]]:
        """The tokens, and the figure of each reordering."""
        cache, figures = variant.make(model.config, context + new_tokens), []
        if cache is None:
            raise ValueError(f"{variant.name} is no cache: there is nothing to reorder")
        reorder = cache.reorder_cache
        cache.__dict__["reorder_cache"] = lambda rows: figures.append(figure_of(lambda: reorder(rows)))
        generator: Any = caches.generator(model, variant)  # a model; its methods are typed as tensors
        with caches.running(model, variant):
            mask = torch.ones_like(prompt)
            return generator.generate(prompt, config, attention_mask=mask, past_key_values=cache), figures

    show = partial(tqdm, disable=not progress)
    counted = {}
    for variant in show(variants, desc="bytes"):
        counted[variant.name] = generate(variant, _written_bytes)
    times_ms: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in show(range(rounds), desc="beams", unit="round"):
        for variant in variants:
            times_ms[variant.name].append(generate(variant, _ms)[1])
    written_bytes = {name: statistics.fmean(sizes) for name, (_, sizes) in counted.items()}
    return {
        "kind": "beams",
        "settings": {"context": context, "batch": batch_size, "beams": beams, "new_tokens": new_tokens}
        | {"rounds": rounds},
        "rows": [
            {
                "variant": variant.name,
                "hooked": variant.hooked,
                "written_bytes": written_bytes[variant.name],
                "fewer_bytes": written_bytes[BASELINE] / written_bytes[variant.name],
                "reorder_ms": spread_of(times_ms[variant.name]),
                "faster": ratio(times_ms[BASELINE], times_ms[variant.name]),
                "same_tokens": torch.equal(counted[variant.name][0], counted[BASELINE][0]) if variant.exact else None,
            }
            for variant in variants
        ],
    }


NOTES = (
    "{batch} prompts of {context} tokens, {beams} beams, {new_tokens} steps. Bytes are those that a step's "
    "`reorder_cache` writes, temporaries included, mean; times are medians (p20 to p80) over {rounds} rounds; how many "
    f"times less than {BASELINE}: bytes; times, of medians, then paired within each round. "
    f"Tokens: against {BASELINE}.\n"
)
COLUMNS: list[Column] = [
    ("cache", "variant", str),
    ("MiB a step", "written_bytes", lambda value: f"{value / 2**20:.2f}"),
    ("fewer bytes", "fewer_bytes", digits(".1f")),
    ("reordering ms", "reorder_ms", show_spread),
    ("faster", "faster", speedup),
    ("tokens", "same_tokens", same),
]


def _tables(results: dict[str, Any]) -> str:
    return joined(NOTES.format(**results["settings"]), table_of(COLUMNS, results["rows"]))


def _draw(results: dict[str, Any]) -> Any:
    """Bytes that a step of beam search moves, by cache."""
    rows, settings = results["rows"], results["settings"]
    title = f"Beam search: bytes moved a step, {settings['beams']} beams, {settings['context']} tokens"
    figure = drawing.new_figure(6.4, 1.3 + 0.45 * len(rows), title, results["conditions"])
    axes, colors = figure.subplots(), drawing.colors_of(rows)
    found = [row["written_bytes"] / 2**20 for row in rows]
    bars = axes.barh(range(len(rows)), found, 0.6, color=[colors[row["variant"]] for row in rows])
    drawing.label_bars(axes, bars, [f"{value:.3g}" for value in found])
    drawing.name_rows(axes, rows, "MiB a step, mean")
    return figure


def _limits(results: dict[str, Any]) -> list[str]:
    wrong = [row["variant"] for row in results["rows"] if row["same_tokens"] is False]
    lines = ["What beams have in common, and so what need not be moved, depends on the text."]
    return lines + [f"{name}: other tokens than the default cache gives." for name in wrong]


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    part = "{batch} prompts of {context} tokens, {beams} beams".format(**results["settings"])
    for row in results["rows"]:
        name = f"bytes moved at a step of beam search: {row['variant']}"
        yield Figure(part, "beam_bytes", name, row["written_bytes"], results["settings"])


MEASUREMENT = Measurement("beams", "Beam search: what is moved", _tables, "beams.png", _draw, _limits, _figures)

HELP = """What beam search makes caches move at every step: bytes and milliseconds, on your model.

    hf-kvattn beams
    hf-kvattn beams --context 1024 --beams 8 --threads 2 --output results
    hf-kvattn beams --model ./my-model --variants stock-dynamic kvattn-static-fit --json
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=positive_int, default=512, help="tokens of a prompt")
    parser.add_argument("--batch-size", type=positive_int, default=1, help="prompts")
    parser.add_argument("--beams", type=positive_int, default=4, help="for each prompt")
    parser.add_argument("--new-tokens", type=positive_int, default=64, help="steps")
    parser.add_argument("--rounds", type=positive_int, default=3, help="of timing, in turns")


CACHES = [BASELINE, "kvattn-static-fit", "kvattn-int8", "kvattn-int4"]
COMMAND = model_command(HELP, CACHES, _add_options, measure, lambda args: args.batch_size * args.context)
