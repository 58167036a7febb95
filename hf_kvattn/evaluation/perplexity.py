"""What a cache does to the predictions: perplexity, KL divergence and same-top-1 against the stock run.

Everything is measured through the cache. A window of text starts with one prefill, and then goes on in strides that
attend to the stored past, as decoding does; a stride of 1 is exact decoding. Only the predictions after the prefill are
scored. The stock cache runs the same schedule first, so what is left between the two is the cache.

KL(stock || variant) is the expected extra surprise of a reader who trusts the variant, in nats a token. It notices
changes that perplexity averages away. Two exact backends in bf16 differ a little as well: the row `none`, one forward
pass without any cache, shows how much.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_kvattn
from hf_kvattn.caches.base import hash_ids
from hf_kvattn.evaluation import stream
from hf_kvattn.evaluation.common import drawing
from hf_kvattn.evaluation.common import variants as caches
from hf_kvattn.evaluation.common.finished import FinishedWindows, Scored
from hf_kvattn.evaluation.common.measurement import Figure, Measurement, Results, skipped_limits, skipped_list
from hf_kvattn.evaluation.common.memory import bits_per_element, cache_bytes
from hf_kvattn.evaluation.common.running import model_command
from hf_kvattn.evaluation.common.variants import BASELINE, Variant
from hf_kvattn.evaluation.stream import SCORED_ROWS
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.conditions import source_name
from hf_kvattn.tools.tables import Column, digits, joined, mib, table_of

if TYPE_CHECKING:
    from accelerate import PartialState


def schedule(window: int, prefill: int, stride: int) -> list[tuple[int, int]]:
    """The pieces of a window, as (start, end) of their input tokens. Nothing is predicted from the last token."""
    starts = range(prefill, window - 1, stride)
    return [(0, prefill)] + [(start, min(start + stride, window - 1)) for start in starts]


def _check_schedule(window: int, prefill: int, stride: int, windows: int) -> None:
    if not 1 <= prefill < window or stride < 1 or windows < 1:
        sizes = f"{prefill=}, {window=}, {stride=}, {windows=}"
        raise ValueError(f"not 1 <= prefill < window, 1 <= stride, 1 <= windows: {sizes}")


def _score(logits: torch.Tensor, targets: torch.Tensor, stock: torch.Tensor) -> torch.Tensor:
    """-log p of the targets, KL(stock || own), whether the top token is the same: (3, tokens), some rows at a time."""
    parts = []
    for own, target, reference in zip(*(each.split(SCORED_ROWS) for each in (logits, targets, stock)), strict=True):
        own, reference = (torch.log_softmax(each.float(), dim=-1) for each in (own, reference))
        nll = -own.gather(1, target[:, None])[:, 0]
        kld = (reference.exp() * (reference - own)).sum(dim=-1)
        parts.append(torch.stack([nll, kld, reference.argmax(dim=-1) == own.argmax(dim=-1)]))
    return torch.cat(parts, dim=1).cpu()


def _run_window(
    model: PreTrainedModel,
    ids: torch.Tensor,
    variant: Variant,
    pieces: list[tuple[int, int]],
    window: int,
    stock: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """The scores of one variant on one window, the stock logits (its own, where none are given), and its sizes."""
    cache = variant.make(model.config, ids.shape[1])
    prefill, end = pieces[0][1], pieces[-1][1]
    targets, done = ids[0, prefill:], 0
    scores: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    with caches.running(model, variant):
        for start, stop in pieces if cache is not None else [(0, end)]:  # without a cache, all in one forward pass
            keep = stop - prefill + 1 if start == 0 else 0  # of the prefill one prediction is scored; 0 keeps all
            past = {"past_key_values": cache, "use_cache": cache is not None}
            logits = model(ids[:, start:stop], logits_to_keep=keep, **past).logits[0]  # (tokens, vocabulary)
            if torch.isnan(logits).any():
                raise FloatingPointError(f"{variant.name} gives NaN logits in window {window}")
            part = slice(done, done + len(logits))
            scores.append(_score(logits, targets[part], logits if stock is None else stock[part]))
            done += len(logits)
            if stock is None:
                kept.append(logits)
    sizes = {"bits_per_element": bits_per_element(cache, model.config), "cache_bytes": cache_bytes(cache)}
    return torch.cat(scores, dim=1), torch.cat(kept) if stock is None else stock, sizes


def _greedy(model: PreTrainedModel, prompt: torch.Tensor, variant: Variant, tokens: int) -> list[int]:
    """The most likely `tokens` after `prompt` `(1, T)`, one after the other, through a fresh cache."""
    cache, chosen, ids = variant.make(model.config, prompt.shape[1] + tokens), [], prompt
    with caches.running(model, variant):
        for _ in range(tokens):
            ids = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)[:, None]
            chosen.append(int(ids))
    return chosen


def _agreed(ours: list[int], stock: list[int]) -> int:
    """How many of the first tokens are the same."""
    return next((i for i, pair in enumerate(zip(ours, stock, strict=True)) if pair[0] != pair[1]), len(stock))


def _finished(
    model: PreTrainedModel, ids: torch.Tensor, out: str | None, chosen: Sequence[Variant], settings: dict[str, Any]
) -> FinishedWindows:
    """The files of finished windows of `ids` `(windows, window)`, with all that decides what is in them."""
    starts = torch.cat([weights.detach().flatten()[:16].float().cpu() for weights in model.parameters()])
    told = {
        "variants": [variant.name for variant in chosen],
        "text_sha256": hash_ids(ids, *ids.shape),
        "model": source_name(model.name_or_path or ""),
        "weights_sha256": hashlib.sha256(starts.numpy().tobytes()).hexdigest(),  # names may stand for other models
        "dtype": str(model.dtype),
        "device": model.device.type,
        "versions": [hf_kvattn.__version__, transformers.__version__, torch.__version__],
    }
    return FinishedWindows(out, settings | told)


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
    greedy: int = 0,
    progress: bool = False,
    backend: str = "auto",
    out: str | None = None,
    resume: bool = False,
    state: PartialState | None = None,
) -> Results:
    """Score the variants on the first `windows` windows of the text.

    Args:
        token_ids: the text as a 1-D tensor of at least `windows * window` tokens.
        variants: what to compare; the stock baseline is always the first row.
        window: tokens of one independent piece of text.
        prefill: tokens processed at once at its start, unscored.
        stride: tokens processed at once after that; 1 is exact decoding.
        windows: how many pieces.
        greedy: tokens generated after each prefill, to count how many are those of the stock cache before the first
            other one; 0 generates none.
        progress: show a bar on stderr.
        backend: the attention backend in force, for `resume` to compare.
        out: a folder in which each finished window is kept, until `FinishedWindows.remove`; None keeps nothing.
        resume: take the windows that an earlier run with the same settings finished from `out`, else begin anew.
        state: accelerate's, where its processes share out the windows: all of them call this, and get all results.
    """
    _check_schedule(window, prefill, stride, windows)
    if len(token_ids) < windows * window:
        raise ValueError(f"{windows} windows of {window} need {windows * window} tokens, the text has {len(token_ids)}")
    chosen, skipped = [caches.VARIANTS[BASELINE]], []
    for variant in (variant for variant in variants if variant.name != BASELINE):
        reason = caches.try_make(variant, model.config, window)[1]
        if reason is None:
            chosen.append(variant)
        else:
            skipped.append({"variant": variant.name, "context": window, "batch": 1, "reason": reason})
    settings = {"window": window, "prefill": prefill, "stride": stride, "windows": windows, "greedy": greedy}
    pieces, ids = schedule(window, prefill, stride), token_ids[: windows * window].view(windows, window)
    finished = _finished(model, ids, out, chosen, settings | {"backend": backend})
    found = finished.load(windows) if resume else {}
    if not resume and (state is None or state.is_main_process):
        finished.remove()
    if state is not None:
        state.wait_for_everyone()  # until all have seen the same files, and old ones are gone
    todo = [i for i in range(windows) if i not in found]
    with nullcontext(todo) if state is None else state.split_between_processes(todo) as mine:
        new = {}
        with tqdm(total=len(mine) * len(chosen), unit="run", disable=not progress) as bar:
            for i in mine:
                new[i], stock = Scored({}, {}), None  # one window at a time, so that only its stock logits are held
                stock_tokens: list[int] = []
                for variant in chosen:
                    bar.set_description(f"window {i + 1} of {windows}, {variant.name}")
                    one = ids[i : i + 1].to(model.device)
                    score, stock, sizes = _run_window(model, one, variant, pieces, i, stock)
                    agreed = None
                    if greedy and sizes["bits_per_element"] is not None:  # else there is no cache
                        found_tokens = _greedy(model, one[:, :prefill], variant, greedy)
                        stock_tokens = stock_tokens or found_tokens
                        agreed = _agreed(found_tokens, stock_tokens)
                    new[i].scores[variant.name] = score
                    new[i].sizes[variant.name] = sizes | {"greedy_agreed": agreed}
                    bar.update()
                finished.keep(i, new[i])
    if state is not None:
        from accelerate.utils import gather_object  # needed here alone

        new = dict(gather_object(list(new.items())))
    found |= new
    scores = {variant.name: [found[i].scores[variant.name] for i in range(windows)] for variant in chosen}
    return {
        "kind": "perplexity",
        "settings": settings | {"scored_tokens": windows * (window - prefill)},
        "rows": [_row(variant, scores, [found[i].sizes[variant.name] for i in range(windows)]) for variant in chosen],
        "skipped": skipped,
    }


def _row(variant: Variant, scores: dict[str, list[torch.Tensor]], sizes: list[dict[str, Any]]) -> dict[str, Any]:
    nll, kld, same_top = torch.cat(scores[variant.name], dim=1).double()
    loss, stock_loss = nll.mean().item(), torch.cat(scores[BASELINE], dim=1)[0].double().mean().item()
    agreed = [each["greedy_agreed"] for each in sizes]
    return {
        "variant": variant.name,
        "hooked": variant.hooked,
        "perplexity": math.exp(loss),
        "perplexity_change_pct": 100 * math.expm1(loss - stock_loss),
        "kld_mean": kld.mean().item(),
        "kld_p99": torch.quantile(kld, 0.99).item(),
        "same_top1_pct": 100 * same_top.mean().item(),
        **sizes[-1],
        "greedy_agreed": None if None in agreed else sum(agreed) / len(agreed),
    }


CACHE_COLUMN: Column = ("cache", "variant", str)
BITS_COLUMN: Column = ("bits a number", "bits_per_element", digits(".2f"))
AGAINST_STOCK: list[Column] = [
    ("perplexity", "perplexity", digits(".3f")),
    ("change %", "perplexity_change_pct", digits("+.2f")),
    ("KLD", "kld_mean", digits(".5f")),
]
WORST: list[Column] = [("KLD p99", "kld_p99", digits(".4f")), ("same top-1 %", "same_top1_pct", digits(".2f"))]
COLUMNS: list[Column] = [CACHE_COLUMN, *AGAINST_STOCK, *WORST, BITS_COLUMN, ("cache MiB", "cache_bytes", mib)]
GREEDY_COLUMN: Column = ("same greedy tokens", "greedy_agreed", digits(".0f"))


def how(settings: dict[str, Any]) -> str:
    """How a window was gone through, and what is compared, for the notes of a report."""
    return (
        f"a prefill of {settings['prefill']}, then strides of {settings['stride']} through the cache; "
        f"{settings['scored_tokens']} predictions scored. KLD is KL({BASELINE} || variant) in nats a token."
    )


def _tables(results: Results) -> str:
    settings = results["settings"]
    notes = (
        f"{settings['windows']} windows of {settings['window']} tokens: {how(settings)} `none` is one forward "
        "pass without a cache: what it differs by is noise of the arithmetic, not of a cache.\n"
    )
    columns = COLUMNS
    if settings.get("greedy"):
        notes += (
            f"\nAfter each prefill {settings['greedy']} tokens were generated: so many of the first ones are those of "
            f"{BASELINE}, on average.\n"
        )
        columns = [*COLUMNS, GREEDY_COLUMN]
    if any(row["variant"].startswith("fake-") for row in results["rows"]):
        notes += "\n`fake-` rows have the rounding errors of a published scheme, and the bytes that it would take.\n"
    return joined(notes, table_of(columns, results["rows"]), skipped_list(results))


def _draw(results: Results) -> Any:
    """KL divergence against bits a cached number: lower and further left is better."""
    figure = drawing.new_figure(7.0, 4.8, "What a cache does to the predictions", results["conditions"])
    axes = figure.subplots()
    colors = drawing.colors_of(results["rows"])
    klds = {row["variant"]: max(row["kld_mean"], drawing.LOWEST_KLD) for row in results["rows"]}
    points = [row for row in results["rows"] if row["bits_per_element"] is not None and row["variant"] != BASELINE]
    if "none" in klds:
        axes.axhline(klds["none"], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.text(0.005, klds["none"], "no cache: noise of the arithmetic", fontsize=7.5, color="#777777", va="bottom",
                  transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yscale("log")
    for row in points:
        size, front = (60, 3) if row["hooked"] else (34, 2)
        color, kld = colors[row["variant"]], klds[row["variant"]]
        axes.scatter(row["bits_per_element"], kld, s=size, color=color, zorder=front)
    bits = [4.0, 16.0, *(row["bits_per_element"] for row in points)]
    found = [kld for name, kld in klds.items() if name != BASELINE] or [1.0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(bits) / 1.4, max(bits) * 1.9)
    axes.set_ylim(10 ** math.floor(math.log10(min(found) / 1.5)), 10 ** math.ceil(math.log10(max(found) * 1.5)))
    ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 12, 16, 32) if min(bits) / 1.4 < tick <= max(bits)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    x, y = "bits a cached number, scales and residuals included", f"KL divergence from {BASELINE}, nats a token"
    drawing.caption(axes, x=x, y=y)
    drawing.plain(axes)
    drawing.label_points(axes, points, colors)
    return figure


def limits(results: Results) -> list[str]:
    scored = results["settings"]["scored_tokens"]
    changed = [
        "{variant} changes perplexity by {perplexity_change_pct:+.2f} %, and agrees with {stock} on "
        "{same_top1_pct:.1f} % of the tokens.".format(stock=BASELINE, **row)
        for row in results["rows"]
        if row["hooked"] and row["perplexity_change_pct"] > 0.5
    ]
    first = f"{scored} predictions of one text were scored: small differences are noise."
    return [first, *changed, *skipped_limits(results)]


def figures(results: Results) -> Iterator[Figure]:
    part, settings = "windows of {window} tokens".format(**results["settings"]), results["settings"]
    kld = f"KL divergence from {BASELINE}, nats a token"
    for row in results["rows"]:
        yield Figure(part, "perplexity", f"perplexity: {row['variant']}", row["perplexity"], settings)
        yield Figure(part, "kl_divergence", f"{kld}: {row['variant']}", row["kld_mean"], settings)


MEASUREMENT = Measurement("perplexity", "Perplexity", _tables, "kld_bits.png", _draw, limits, figures)

HELP = """Compare what caches do to the predictions of your model: perplexity, KL divergence, same top-1.

    hf-kvattn perplexity
    hf-kvattn perplexity --out results --windows 2 --stride 128
    hf-kvattn perplexity --model ./my-model --text book.txt --stride 1 --variants none kvattn-static
    hf-kvattn perplexity --out results --windows 100 --resume
    hf-kvattn perplexity --out results --prefill 64 --greedy 256
    torchrun --nproc-per-node 2 scripts/perplexity.py --out results
    hf-kvattn perplexity --stream 65536 --text book.txt --out results

The stock cache of generate() is always the first row, and what the others are compared with.
Each window is written to the --out folder as it ends, until all are: --resume goes on from there. Processes that
torchrun or accelerate launched share the windows out.
With --stream, one text is fed through one cache instead, as `hf-kvattn stream --tokens` does.
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", type=positive_int, default=2048, help="tokens of one piece of text")
    parser.add_argument("--prefill", type=positive_int, default=1024, help="its first tokens, not scored")
    parser.add_argument("--stride", type=positive_int, default=32, help="tokens at once; 1 is exact decoding")
    parser.add_argument("--windows", type=positive_int, default=4, help="how many pieces of text")
    help = "tokens to generate after each prefill, and to compare"
    parser.add_argument("--greedy", type=positive_int, default=0, metavar="TOKENS", help=help)
    help = "go on from the windows that an earlier run with the same --out and settings finished"
    parser.add_argument("--resume", action="store_true", help=help)
    help = "measure a stream of this length"
    parser.add_argument("--stream", type=positive_int, metavar="TOKENS", dest="stream_tokens", help=help)
    stream.add_options(parser, "--stream-")


_OF_WINDOWS = model_command(
    HELP, caches.default_names(fakes=True), _add_options, measure, lambda args: args.windows * args.window
)


def _main(args: argparse.Namespace) -> int:
    if args.resume and (args.out is None or args.stream_tokens is not None):
        raise ValueError(f"--resume goes on from windows in a folder: not with out={args.out}, {args.stream_tokens=}")
    if args.stream_tokens is not None:
        return stream.main(args)
    _check_schedule(args.window, args.prefill, args.stride, args.windows)  # before the model is loaded
    status = _OF_WINDOWS.main(args)
    from accelerate import PartialState  # needed here alone

    if PartialState().is_main_process:  # the results are written
        FinishedWindows(args.out, {}).remove()
    return status


COMMAND = Command(HELP, _OF_WINDOWS.add_arguments, _main)
