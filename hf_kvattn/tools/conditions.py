"""The conditions of a measurement: machine, versions, commit, and the command that was typed."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import hf_kvattn
from hf_kvattn.tools.command_line import typed


def cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name[ \t]*:(.+)", path.read_text(), re.MULTILINE) if path.exists() else None
    return (found[1].strip() if found else platform.processor()) or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this file, or else the running script, is tracked in; `-dirty` when changed."""
    for path in (Path(__file__).resolve(), Path(sys.argv[0]).resolve()):
        git = ["git", "-C", str(path.parent)]
        try:
            subprocess.run([*git, "ls-files", "--error-unmatch", path.name], capture_output=True, check=True)
            command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def _portable(argument: str) -> str:
    """An argument of a command line; an absolute path in it as one below the current folder, or else its last part."""
    option, equals, path = argument.rpartition("=")
    if not os.path.isabs(path):
        return argument
    relative = os.path.relpath(path)
    return option + equals + (os.path.basename(os.path.normpath(path)) if relative.startswith("..") else relative)


def source_name(source: str) -> str:
    """What a model or text is called: a hub id or a keyword as it is, a local file or folder by its own name."""
    return os.path.basename(os.path.abspath(source)) if os.path.exists(source) else source


def conditions(model: PreTrainedModel | None, args: argparse.Namespace) -> dict[str, Any]:
    """Everything needed to judge or repeat a measurement that the command line `args` asked for.

    Without a model, `args` says what was measured in its place, on the CPU. No absolute path of this machine is
    recorded; a command that was given relative ones can be repeated as it stands.
    """
    device = torch.device("cpu") if model is None else model.device
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(map(_portable, typed())),
        "model": source_name(args.model),
        "text": source_name(args.text),
        "backend": args.backend,
        "dtype": args.dtype if model is None else str(model.dtype).removeprefix("torch."),
        **({"weights": args.weights} if getattr(args, "weights", None) else {}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_kvattn": hf_kvattn.__version__,
        "commit": _commit(),
        "describe": str(hf_kvattn.describe(model)),
    }
