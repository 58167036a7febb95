"""The command `serve`: an OpenAI-compatible server, transformers' own, with an enabled model in it."""

from __future__ import annotations

import argparse
import socket

from transformers.utils.import_utils import is_serve_available

from hf_kvattn.caches.registry import COMPLETE
from hf_kvattn.integrations.prefixes import PrefixStore
from hf_kvattn.plugin import enable
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, device, positive_int
from hf_kvattn.tools.planning import gib

HELP = """A server for clients of OpenAI's API, which computes what a chat has in common with an earlier one only once.

    hf-kvattn serve ./my-model --cache int4
    hf-kvattn serve ./my-model --cache int8 --prefix-folder prefixes --prefix-limit-gib 20
    hf-kvattn serve ./my-model --continuous-batching --host 0.0.0.0 --port 8080
"""
DEFAULT_LIMIT_BYTES = 4 << 30


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--host", default="localhost", help="address to listen on")
    parser.add_argument("--port", type=positive_int, default=8000, help="port to listen on")
    parser.add_argument("--prefix-folder", metavar="DIR", help="keeps caches of prompts there; None: in memory alone")
    parser.add_argument("--prefix-limit-gib", type=gib, metavar="GIB", dest="prefix_limit_bytes",
                        help="for them, in memory and in the folder; None: 4")  # fmt: skip
    parser.add_argument("--continuous-batching", action="store_true", help="requests run together, in pages of their "
                        "own: without --cache, --compile and --prefix-*")  # fmt: skip


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model answers, and how it runs: of `serve` and `chat`."""
    parser.add_argument("model", help=f"hub id, folder, .gguf file or {inputs.SMOLLM2}")
    parser.add_argument("--cache", choices=COMPLETE, help="of each answer; None: int4")
    parser.add_argument("--compile", action="store_true", help="compile the steps of one token")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of weights and exact tokens")
    parser.add_argument("--device", type=device, default="cpu", help="torch device")


def _main(args: argparse.Namespace) -> int:
    if not is_serve_available():
        raise ImportError('serve needs more packages: pip install "hf_kvattn[serve]"')
    import uvicorn

    from hf_kvattn.integrations.server import build_app

    batched, prefixes = args.continuous_batching, None
    flags = {"--cache": args.cache, "--compile": args.compile}
    flags |= {"--prefix-folder": args.prefix_folder, "--prefix-limit-gib": args.prefix_limit_bytes}
    if batched and (given := [flag for flag, value in flags.items() if value]):
        raise ValueError(f"--continuous-batching keeps pages of its own, and takes no {given[0]}")
    if not batched:
        prefixes = PrefixStore(args.prefix_folder, args.prefix_limit_bytes or DEFAULT_LIMIT_BYTES)
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((args.host, args.port))  # first: a port that is taken is found before the model is loaded
        model, tokenizer = inputs.load_model(args.model, inputs.DTYPES[args.dtype], args.device)
        enable(model, None if batched else args.cache or "int4", args.compile)
        app = build_app(model, tokenizer, args.model, prefixes, batched)
        print(f"{args.model} answers at http://{args.host}:{args.port}/v1", flush=True)
        try:
            uvicorn.Server(uvicorn.Config(app)).run(sockets=[bound])
        finally:
            app.state.generation.shutdown()
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
