"""CUDA streams and events that do what was asked of them and nothing else: work runs as late or as early as it may.

    with streams("side late") as machine:  # inside of fake_cuda()
        ...                                # copies are queued, and what `machine.queue` is given
        machine.run()

Whatever a missing wait allows to go wrong goes wrong in one of the `ORDERS`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from unittest import mock

import torch

ORDERS = ("side late", "side early", "random")


class _Stream:
    """Operations in their order: functions, and waits for another stream to have run so many."""

    def __init__(self, machine: Machine):
        self.machine, self.queue, self.ran = machine, [], 0
        machine.streams.append(self)

    def wait_event(self, event: _Event) -> None:
        self.queue.append((event.stream, event.until))

    def step(self) -> bool:
        """Runs the next operation, unless there is none or it has to wait."""
        if self.ran == len(self.queue):
            return False
        operation = self.queue[self.ran]
        if isinstance(operation, tuple):
            stream, until = operation
            if stream.ran < until:
                return False
        else:
            with torch._C.DisableTorchFunction():  # or a copy would be queued again
                operation()
        self.ran += 1
        return True


class _Event:
    def __init__(self, machine: Machine):
        self.machine = machine

    def record(self, stream: _Stream) -> None:
        self.stream, self.until = stream, len(stream.queue)

    def synchronize(self) -> None:
        self.machine.run(lambda: self.stream.ran >= self.until)


class Machine:
    """The first stream is the one that computes."""

    def __init__(self, order: str):
        self.order, self.random = order, random.Random(3)
        self.streams: list[_Stream] = []
        self.current = [_Stream(self)]

    def queue(self, work: Callable) -> None:
        """Has the current stream do `work`."""
        self.current[-1].queue.append(work)

    def run(self, done: Callable[[], bool] = lambda: False) -> None:
        """Runs what is queued, in the machine's order, until `done` or to the end."""
        while not done():
            tried = self.streams[:]
            if self.order == "side early":
                tried.reverse()
            elif self.order == "random":
                self.random.shuffle(tried)
            if not any(stream.step() for stream in tried):
                assert all(stream.ran == len(stream.queue) for stream in self.streams), "streams wait for each other"
                break


@contextlib.contextmanager
def streams(order: str) -> Iterator[Machine]:
    """A GPU whose streams run in that order of `ORDERS`, for the body of a `with`; inside of `fake_cuda`."""
    machine = Machine(order)

    @contextlib.contextmanager
    def stream(entered):
        machine.current.append(entered)
        yield
        machine.current.pop()

    answers = {
        "Stream": lambda device=None: _Stream(machine),
        "current_stream": lambda device=None: machine.current[-1],
        "stream": stream,
        "Event": lambda: _Event(machine),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield machine
