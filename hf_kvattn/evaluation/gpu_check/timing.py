"""Times of the GPU by its own events, what it launches, and how far its memory rises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from hf_kvattn.evaluation.gpu_check.running import Machine, plain

ACTIVE = "active_bytes.all."  # also what is free again, but not before a stream that used it is done


class Clock:
    """Marks on the GPU's stream, and the milliseconds between them; nothing waits before `between_ms`."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        self.marks.append(torch.cuda.Event(enable_timing=True))
        self.marks[-1].record()

    def between_ms(self) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def time_ms(actions: Sequence[Callable[[], Any]], repeats: int = 1) -> list[float]:
    """Milliseconds of one of `actions`, which are queued one after the other, for each of `repeats`."""
    clock = Clock()
    clock.mark()
    for _ in range(repeats):
        for action in actions:
            action()
        clock.mark()
    return [each / len(actions) for each in clock.between_ms()]


def captured(actions: Sequence[Callable[[], Any]]) -> Callable[[], None]:
    """All `actions` as one CUDA graph: no time of the host is in its time. Each has run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for action in actions:
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [action() for action in actions]

    def replay(held: Any = kept) -> None:  # its results live in the graph's memory as long as it does
        graph.replay()

    return replay


def kernels_of(machine: Machine, action: Callable[[], Any]) -> list[str]:
    """Names of the kernels that `action` launches, copies among them, in order."""
    action()  # what is compiled or chosen at the first call is not what it launches
    torch.cuda.synchronize()
    with profile(
        activities=machine.pick([ProfilerActivity.CPU, ProfilerActivity.CUDA], [ProfilerActivity.CPU])
    ) as found:
        action()
        torch.cuda.synchronize()
    kind = machine.pick(DeviceType.CUDA, DeviceType.CPU)
    events = [each.name for each in found.events() or () if each.device_type == kind]
    names = [name.removeprefix("void ").replace("(anonymous namespace)::", "") for name in events]
    return [plain(name.split("<")[0].split("(")[0]) for name in names]


def active_bytes() -> int:
    return torch.cuda.memory_stats()[ACTIVE + "current"]


def peak_bytes(action: Callable[[], Any]) -> int:
    """The most bytes that were in use while `action` ran and the GPU worked on it, all of them counted."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()[ACTIVE + "peak"]
