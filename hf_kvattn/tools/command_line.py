"""What every command line shares: its record, argument types, help, and one line on stderr for bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# What bad input raises on its way through the libraries.
BAD_INPUT = (ValueError, ImportError, OSError, ArithmeticError, MemoryError, SafetensorError, StrictDataclassError)


class Command(NamedTuple):
    """One command of `hf-kvattn`; a module in the table of commands has it as `COMMAND`."""

    description: str  # the help text, with examples
    add_arguments: Callable[[argparse.ArgumentParser], object]
    main: Callable[[argparse.Namespace], int]  # gives the exit status


def program() -> str:
    """What the user started: `hf-kvattn`, `python -m hf_kvattn`, or a script by its name."""
    name = Path(sys.argv[0]).name
    return "python -m hf_kvattn" if name == "__main__.py" else name


def typed() -> list[str]:
    """The command line that was typed, a script's path included."""
    path, *arguments = sys.argv
    started = ["python", path] if program().endswith(".py") else program().split()
    return started + arguments


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
