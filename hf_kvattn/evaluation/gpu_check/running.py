"""How a stage runs: case by case, while there is time; what a case raises is noted, and the next one runs."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from hf_kvattn.evaluation.common.timing import in_turns

T = TypeVar("T")
Found = dict[str, Any]  # of a case or a stage: what JSON can hold


class NotHere(Exception):
    """Something that this machine lacks, by its message: a library, a tool, a second GPU, memory."""


@dataclass(frozen=True)
class Machine:
    """What is checked.

    Attributes:
        device: the GPU; of a rehearsal the CPU.
        other: a second GPU, or None.
        dtype: of attention that is checked by itself and of all that is timed.
        rehearsed: whether nothing here is a GPU.
    """

    device: torch.device
    other: torch.device | None
    dtype: torch.dtype = torch.bfloat16
    rehearsed: bool = False

    def pick(self, real: T, rehearsed: T) -> T:
        """A size or a table for the GPU, or the small one of a rehearsal."""
        return rehearsed if self.rehearsed else real

    # No default device is set: it would also be that of what the package makes for the host.
    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def numbers(self, values: list[int]) -> torch.Tensor:
        """As lengths and paddings are: int32 on the device."""
        return torch.tensor(values, dtype=torch.int32, device=self.device)


class Stage(NamedTuple):
    """One row of the table of stages."""

    title: str
    budget_s: float  # of a run of ten minutes
    function: Callable[[Run], Found | None]  # what it returns is noted beside the cases
    checks: bool = True  # whether it says what is right and wrong; else it only measures


@dataclass
class Run:
    """One stage on its way.

    Attributes:
        stages: what earlier stages found, by name.
        end_s: when it has to stop, on the clock of `time.monotonic`.
        cases: what was found so far; each has its name as `case`, and `ok` if it is right or wrong.
        left_out: names of cases for which no time was left.
    """

    machine: Machine
    stages: dict[str, Found]
    end_s: float
    title: str = ""
    progress: bool = False
    cases: list[Found] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def late(self) -> bool:
        return time.monotonic() >= self.end_s

    def over(self, tasks: Mapping[str, Callable[[], Found]]) -> dict[str, Found]:
        """Runs named tasks as long as there is time and a GPU that answers; what each of them found."""
        found: dict[str, Found] = {}
        lost = False
        for name, task in tqdm(tasks.items(), desc=self.title, unit="case", leave=False, disable=not self.progress):
            if self.late() or lost:
                self.left_out.append(name)
                continue
            found[name] = {"case": name, **attempt(task)}
            self.cases.append(found[name])
            lost = "raised" in found[name] and not answers()
        return found

    def in_rounds(self, found: dict[str, Found], lanes: Mapping[str, Callable[[], list[float]]], rounds: int) -> None:
        """Times lanes in turns, round after round, and notes `ms`, those of each round, in what was `found` of each.

        A lane that raises drops out. At least one round is made; others are left out when it is late.
        """
        lost: set[str] = set()
        times_ms: dict[str, list[list[float]]] = {name: [] for name in lanes}
        for turn in range(rounds if lanes else 0):
            if turn and self.late():
                break
            for name in in_turns(list(lanes), [turn]):
                timed = {} if name in lost else attempt(partial(_times, lanes[name]))
                if "ms" in timed:
                    times_ms[name].append(timed["ms"])
                else:
                    found[name] |= timed
                    lost.add(name)
        for name in set(lanes) - lost:
            found[name]["ms"] = times_ms[name]


def _times(lane: Callable[[], list[float]]) -> Found:
    return {"ms": lane()}


def attempt(task: Callable[[], Found]) -> Found:
    """What `task` finds; where it raises, why and where."""
    try:
        return task()
    except NotHere as reason:
        return {"not_here": plain(reason)}
    except torch.OutOfMemoryError as error:
        found = {"not_here": plain(error)}
    # Everything else, whatever it is, is a finding: an hour with a GPU is rare, and the other cases must have it.
    except Exception as error:
        found = {"raised": f"{type(error).__name__}: {plain(error)}", "traceback": traceback.format_exc()}
    release()
    return found


def plain(message: object) -> str:
    """The first line of a message without what would be markup in a card, or a path of this machine."""
    lines = str(message).strip().splitlines() or [""]
    return lines[0].translate(str.maketrans("|`<>[]/\\", "      ::")).strip()[:300]


def answers() -> bool:
    """Whether the GPU still works: after an illegal access it does nothing for this process any more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def release() -> None:
    """Frees what nobody holds any more, on the GPU too."""
    gc.collect()
    torch.cuda.empty_cache()


def run_stage(stage: Stage, run: Run) -> Found:
    """What a stage found, with its `status`: clean, done, wrong, failed, unfinished, left out, not here."""
    start_s = time.monotonic()
    if run.late():
        return {"status": "left out", "seconds": 0.0, "cases": [], "left_out": ["all"]}
    extra = attempt(lambda: stage.function(run) or {})
    release()
    ended = {"seconds": time.monotonic() - start_s, "cases": run.cases, "left_out": run.left_out}
    return {"status": _status(stage, run, extra), **ended, **extra}


def _status(stage: Stage, run: Run, extra: Found) -> str:
    if any(case.get("ok") is False for case in (*run.cases, extra)):
        return "wrong"
    if any("raised" in case for case in (*run.cases, extra)):
        return "failed"
    if run.left_out:
        return "unfinished"
    if "not_here" in extra:
        return "not here"
    return "clean" if stage.checks else "done"
