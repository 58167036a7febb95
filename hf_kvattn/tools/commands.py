"""The command line: `hf-kvattn COMMAND ...`, which is `python -m hf_kvattn COMMAND ...`.

`COMMANDS` is the table of commands. A command's module is imported when the command is chosen, and not before.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import NamedTuple

import hf_kvattn
from hf_kvattn.evaluation import MEASUREMENTS
from hf_kvattn.tools import command_line


class Row(NamedTuple):
    """One command: the module that has it as `COMMAND`, and one line of help."""

    module: str
    help: str


COMMANDS: dict[str, Row] = {
    "describe": Row("hf_kvattn.tools.describing", "what works here, and which backend each case takes (the default)"),
    "doctor": Row("hf_kvattn.evaluation.doctor", "what to load on this machine and how, measured"),
    "plan": Row("hf_kvattn.tools.planning", "bytes of each cache, and the longest context that fits"),
    "scale": Row("hf_kvattn.tools.scale", "what a step reads of large models on many GPUs, on paper"),
    **{row.command: Row(row.module, row.help) for row in MEASUREMENTS.values()},
    "serve": Row("hf_kvattn.integrations.serving", "an OpenAI-compatible server with an enabled model"),
    "chat": Row("hf_kvattn.integrations.chat", "a chat in the terminal"),
    "convert-gguf": Row("hf_kvattn.convert.gguf", "a GGUF file to a safetensors folder with equal logits"),
    "train-tiny": Row("hf_kvattn.convert.train_tiny", "a small model to try conversions on"),
    "card": Row("hf_kvattn.evaluation.cards", "the model card of a results folder"),
    "last-word": Row("hf_kvattn.integrations.last_word", "what caches score in lm-evaluation-harness"),
    "hub-kernel": Row("hf_kvattn.integrations.hub.build", "a folder that the kernels package loads"),
    "triton-resources": Row("hf_kvattn.evaluation.triton_resources", "what the Triton kernels compile to"),
}

EXAMPLES = """Caches and attention for long contexts: what works here, what fits, and measurements.

    hf-kvattn
    hf-kvattn plan ./my-model --context 32768 --gpu-gib 24
    hf-kvattn throughput --model ./my-model --out results
    hf-kvattn COMMAND --help
"""


def _overview() -> argparse.ArgumentParser:
    """The parser of everything before the command's own arguments."""
    table = "\n".join(f"  {name:<{max(map(len, COMMANDS))}}  {row.help}" for name, row in COMMANDS.items())
    parser = argparse.ArgumentParser(command_line.program(), description=EXAMPLES, epilog=f"commands:\n{table}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--version", action="version", version=f"hf_kvattn {hf_kvattn.__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="describe", metavar="COMMAND", help="see below")
    return parser


def run(name: str, arguments: list[str], prog: str) -> int:
    """The exit status of a command; usage errors end the process with 2, as bad input gives 2."""
    command: command_line.Command = importlib.import_module(COMMANDS[name].module).COMMAND
    formatter = command_line.HelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=command.description, formatter_class=formatter)
    command.add_arguments(parser)
    args = parser.parse_args(arguments)
    return command_line.reported(lambda: command.main(args))


def script(name: str) -> int:
    """The same for a script in `scripts/`, which is one command."""
    return run(name, sys.argv[1:], command_line.program())


def main(arguments: list[str] | None = None) -> int:
    """The exit status of the command line; `arguments` are those of this process unless given."""
    first, *others = (sys.argv[1:] if arguments is None else arguments) or ["describe"]
    if first not in COMMANDS:
        first, others = _overview().parse_args([first, *others]).command, []  # ends with help, the version or an error
    return run(first, others, f"{command_line.program()} {first}")
