"""The command line of a measurement on a model: common arguments, and the course from them to results."""

from __future__ import annotations

import argparse
import datetime
import inspect
from collections.abc import Callable
from typing import Any

import torch

from hf_kvattn.evaluation.common import report, variants
from hf_kvattn.evaluation.common.measurement import Results
from hf_kvattn.kernels import dispatch
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, device, positive_int
from hf_kvattn.tools.conditions import conditions


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--out", "--output", metavar="DIR", help="write results.json, report.md and plots there")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line of stdout")


def add_model_arguments(parser: argparse.ArgumentParser, names: list[str] | None = None) -> None:
    """What all measurements on a model take; `names`: the caches compared when none are given, None: no choice."""
    parser.add_argument("--model", default=inputs.SMOLLM2, help=f"hub id, folder, .gguf file or {inputs.SMOLLM2}")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of weights and cache")
    parser.add_argument("--weights", choices=inputs.WEIGHTS, help="quantize them first, by torchao; None keeps them")
    parser.add_argument("--device", type=device, default="cpu", help="torch device")
    parser.add_argument("--text", default="auto", help="a file, wikitext, pydoc, or auto: wikitext if it can be had")
    if names is not None:
        parser.add_argument("--variants", nargs="+", default=names, metavar="NAME", help="caches to compare")
    parser.add_argument("--backend", default="auto", help="attention backend of hf_kvattn")
    add_output_arguments(parser)


def run_on_model(args: argparse.Namespace, measure: Callable[..., Results], tokens: int, **more: Any) -> Results | None:
    """Load the model and the text, measure, and print and write the results with their conditions.

    Of several processes that accelerate launched the first prints and writes. It also measures alone, since others
    would disturb what it times, unless `measure` takes their `state`. None where this process has no results.

    Args:
        args: those of `add_model_arguments` and of the measurement.
        measure: takes the model, `tokens` tokens of the text as `token_ids`, the tokenizer if it asks for one, and
            everything else from the argument, or the entry of `more`, of the parameter's name.
    """
    from accelerate import PartialState  # needed here alone

    report.check_out_dir(args.out)
    # Who is done first waits for the others: hours, not the minutes after which PyTorch takes them for lost.
    state = PartialState(cpu=torch.device(args.device).type == "cpu", timeout=datetime.timedelta(days=7))
    parameters = inspect.signature(measure).parameters
    if not state.is_main_process and "state" not in parameters:
        return None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.text == "auto":
        args.text = inputs.auto_source()
    text = inputs.load_text(args.text)  # first: a missing text is found before the model is loaded
    model, tokenizer = inputs.load_model(args.model, inputs.DTYPES[args.dtype], args.device)
    if args.weights is not None:
        inputs.quantize_weights(model, args.weights)
    given = vars(args) | {"model": model, "tokenizer": tokenizer, "progress": state.is_main_process}
    given |= {"state": state} | more
    with dispatch.backend(args.backend):
        given["token_ids"] = inputs.load_tokens(tokenizer, text, tokens)
        results = measure(**{name: given[name] for name in parameters})
        results["conditions"] = conditions(model, args)
    if state.is_main_process:
        report.finish(results, args.out, args.json)
    return results


def model_command(
    description: str,
    names: list[str],
    add_options: Callable[[argparse.ArgumentParser], None],
    measure: Callable[..., Results],
    tokens_needed: Callable[[argparse.Namespace], int],
    failed: Callable[[Results], bool] = lambda results: False,
) -> Command:
    """The command of a measurement that compares caches on a model, those of `names` when none are given.

    `add_options` adds the arguments that are parameters of `measure`, by the same names, for `run_on_model`; `variants`
    are the chosen rows. `tokens_needed` says how much text it reads, `failed` whether results make the exit status 1.
    """

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser, names)
        add_options(parser)

    def main(args: argparse.Namespace) -> int:
        chosen = variants.select(args.variants)
        results = run_on_model(args, measure, tokens_needed(args), variants=chosen)
        return int(results is not None and failed(results))

    return Command(description, add_arguments, main)
