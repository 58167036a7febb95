"""The command `gpu-check`: stages in order, each within its time, and the JSON written again after each."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_kvattn.evaluation import cards
from hf_kvattn.evaluation.common import report
from hf_kvattn.evaluation.common.measurement import Results
from hf_kvattn.evaluation.gpu_check import card, rehearsal
from hf_kvattn.evaluation.gpu_check.bars import judge
from hf_kvattn.evaluation.gpu_check.card import MEASUREMENT as MEASUREMENT
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, Run, answers, run_stage
from hf_kvattn.evaluation.gpu_check.stages import STAGES
from hf_kvattn.tools.command_line import Command
from hf_kvattn.tools.conditions import conditions

KIND = "gpu_check"


def _finite(value: Any) -> Any:
    """`value` with None in the place of numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _begin(machine: Machine, folder: Path, args: argparse.Namespace) -> Results:
    """The results that this run goes on from; ValueError where the folder holds others, or a card of somebody's."""
    readme = folder / "README.md"
    if not machine.rehearsed and readme.exists() and cards.MARK not in readme.read_text(errors="replace"):
        raise ValueError(f"{readme} was not made by hf-kvattn card: choose another --output")
    before = report.read(folder).get(KIND)
    if before is None:
        args.model, args.text, args.backend = "random weights", "random tokens", "auto"
        args.dtype = str(machine.dtype).removeprefix("torch.")
        found = conditions(None, args) | ({} if machine.rehearsed else {"device": torch.cuda.get_device_name()})
        plotted = importlib.util.find_spec("matplotlib") is not None and not machine.rehearsed
        capability = list(torch.cuda.get_device_capability(machine.device))
        about = {"kind": KIND, "rehearsed": machine.rehearsed, "plotted": plotted, "conditions": found}
        return about | {"capability": capability, "minutes": args.minutes, "running": None, "stages": {}, "bars": []}
    if not args.resume:
        raise ValueError(
            f"{folder / 'results.json'} holds a check: --resume goes on with it, or choose another --output"
        )
    if before["rehearsed"] != machine.rehearsed:
        raise ValueError(f"{folder / 'results.json'}: a rehearsal and a check do not go on from each other")
    if (died := before["running"]) is not None:
        lost: Found = {"status": "failed", "seconds": 0.0, "cases": [], "left_out": ["all that was not over"]}
        before["stages"][died] = lost | {"raised": "the process ended, or the GPU was lost, in this stage"}
    return before


def check(machine: Machine, args: argparse.Namespace, progress: bool = True) -> Results:
    """Runs the stages of `args.stages` one after the other; its folder's `results.json` is written after each."""
    folder = Path(args.output)
    results = _begin(machine, folder, args)
    before = results["stages"]
    wanted = [name for name in args.stages if before.get(name, {}).get("status", "left out") == "left out"]
    start_s, total_s = time.monotonic(), 60 * args.minutes
    scale = total_s / sum(STAGES[name].budget_s for name in wanted) if wanted else 0.0
    due_s = start_s
    for name in wanted:
        stage, own_s = STAGES[name], scale * STAGES[name].budget_s
        due_s += own_s  # with what earlier stages left; what they took too much costs it half of its own at most
        end_s = min(start_s + total_s, max(due_s, time.monotonic() + own_s / 2))
        results["running"] = name
        report.write_json(results, folder)
        run = Run(machine, results["stages"], end_s, stage.title, progress)
        found = results["stages"][name] = _finite(run_stage(stage, run))
        results["bars"] = _finite(judge(results["stages"], results["capability"], machine.rehearsed))
        results["running"] = None
        report.write_json(results, folder)
        print(f"{name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
        if not answers():
            left = max(0.0, args.minutes - (time.monotonic() - start_s) / 60)
            print("the GPU does not answer this process any more: another one goes on", flush=True)
            _start_again(argparse.Namespace(**{**vars(args), "minutes": left, "resume": True}))
    results["bars"] = _finite(judge(results["stages"], results["capability"], machine.rehearsed))
    report.write_json(results, folder)
    return results


def _typed(args: argparse.Namespace) -> list[str]:
    """A command line of this command that is `args`."""
    flags = [f"--{name}" for name in ("resume", "rehearse") if getattr(args, name)]
    options = ["--minutes", str(args.minutes), "--stages", ",".join(args.stages), "--output", args.output]
    return [sys.executable, "-m", "hf_kvattn", "gpu-check", *options, *flags]


def _start_again(args: argparse.Namespace) -> None:
    """Replaces this process by a fresh one: nothing else brings a GPU back after an illegal access."""
    command = _typed(args)
    os.execv(command[0], command)


def ended(results: Results) -> int:
    """The exit status: 1 where something is wrong, did not come to its end, or missed a bar; and says which."""
    stages, bars = results["stages"], results["bars"]
    kinds = {
        "wrong": [name for name, found in stages.items() if found["status"] == "wrong"],
        "failed": [name for name, found in stages.items() if found["status"] == "failed"],
        "not finished": [name for name, found in stages.items() if found["status"] in ("unfinished", "left out")],
        "bars missed": [bar["bar"] for bar in bars if bar["state"] == "missed"],
    }
    for kind, names in kinds.items():
        if names:
            print(f"{kind}: {'; '.join(names)}")
    return int(any(kinds.values()))


def _stages(text: str) -> list[str]:
    """An argparse type: names of stages."""
    names = text.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: the stages are {', '.join(STAGES)}, each once at most")
    return [name for name in STAGES if name in names]


def _minutes(text: str) -> float:
    """An argparse type: minutes from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} is not a number of minutes from 0 on")
    return value


HELP = """All there is to know of a GPU, in ten minutes: is everything right on it, and how fast is it.

    hf-kvattn gpu-check
    hf-kvattn gpu-check --minutes 10 --output results
    hf-kvattn gpu-check --stages versions,kernels
    hf-kvattn gpu-check --rehearse

It needs neither a network nor data: weights are random, and logits are compared. Each stage has its share of the time
and says what it left out; results.json is written after each, and --resume goes on from there. At the end stand the
bars that figures are held against, and a card. Exits with status 1 when something is wrong, is not finished, or missed
a bar. --rehearse runs all stages on a CPU, with stand-ins and tiny sizes.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=_minutes, default=10.0, help="for all stages together")
    names = ",".join(STAGES)
    parser.add_argument("--stages", type=_stages, default=names, metavar="A,B", help="which ones, in their own order")
    parser.add_argument("--output", default="gpu_check", metavar="DIR", help="where the results go, stage by stage")
    parser.add_argument("--resume", action="store_true", help="go on in a folder: stages that ran are not run again")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with stand-ins for the GPU")


def _main(args: argparse.Namespace) -> int:
    if args.rehearse:
        if os.environ.get("TRITON_INTERPRET") != "1":
            # Triton looks for it when it is imported, which transformers has done by now.
            return subprocess.run(_typed(args), env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
        if reason := rehearsal.not_interpreted():
            print(f"rehearsed with PyTorch in Triton's place: {reason}")
        machine = rehearsal.MACHINE
    elif torch.cuda.is_available():
        other = torch.device("cuda", 1) if torch.cuda.device_count() > 1 else None
        machine = Machine(torch.device("cuda", 0), other)
    else:
        raise ValueError(f"PyTorch {torch.__version__} sees no GPU: --rehearse runs all of this on a CPU")
    with rehearsal.stand_ins() if args.rehearse else contextlib.nullcontext(), torch.no_grad():
        results = check(machine, args)
    print(card.tables(results))
    if not machine.rehearsed:
        written = [*report.write(results, args.output), cards.write(args.output)]
        print("written: " + ", ".join(map(str, written)))
    return ended(results)


COMMAND = Command(HELP, _add_arguments, _main)
