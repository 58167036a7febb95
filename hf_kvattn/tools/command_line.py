"""What every command line shares: its record, argument types, help, and one line on stderr for bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


@dataclass(frozen=True)
class Command:
    """One command of `hf-kvattn`; a module in the table of commands has it as `COMMAND`.

    Attributes:
        description: the help text, with examples.
        add_arguments: adds the command's arguments to a parser.
        main: runs the command; returns the exit status.
    """

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    main: Callable[[argparse.Namespace], int]


def _is_module(path: str) -> bool:
    return Path(path).name == "__main__.py"  # `python -m hf_kvattn`


def program() -> str:
    """What the user started: `hf-kvattn`, `python -m hf_kvattn`, or a script by its name."""
    return "python -m hf_kvattn" if _is_module(sys.argv[0]) else Path(sys.argv[0]).name


def typed() -> list[str]:
    """The command line that was typed, a script's path included."""
    path, *arguments = sys.argv
    if path.endswith(".py") and not _is_module(path):
        return ["python", path, *arguments]
    return [*program().split(), *arguments]


def device(text: str) -> str:
    """An argparse type: a torch device that is there."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such device, or a PyTorch built without its kind
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


# What bad input raises on its way through the libraries.
BAD_INPUT = (
    ValueError,
    ImportError,
    OSError,
    ArithmeticError,
    MemoryError,
    SafetensorError,
    StrictDataclassError,
)


def reported(main: Callable[[], int]) -> int:
    """The exit status of a command line: `main`'s own, or 2 after one line on stderr where the input is bad."""
    try:
        return main()
    except BAD_INPUT as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{program()}: error: {message}", file=sys.stderr)
        return 2


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of a description as they are, and shows defaults."""
