"""Tensors that say they are on a CUDA GPU and compute on the CPU, so that the code for GPUs runs without one.

    with fake_cuda((9, 0)) as reads:
        model = on_gpu(model)
        model.generate(...)
    reads  # the operations that brought numbers back to the host

They carry real numbers through model, cache and attention, and an operation that mixes them with CPU tensors raises as
on a GPU (zero-dimensional CPU tensors may join, as there). They say nothing of speed, of CUDA's own kernels, or of what
runs in parallel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from hf_kvattn.compiling.append_attend import OPS
from hf_kvattn.kernels import flash_libraries

aten = torch.ops.aten
_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
# These ask for a device guard, which a PyTorch without CUDA has not, before they dispatch.
_GUARDED = ("__getitem__", "__setitem__", "__invert__", "__int__", "contiguous", "copy_", "nonzero")


class Impostor(torch.Tensor):
    """A tensor on `device` by its own account; `.data_on_cpu` holds the numbers."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=device,
            requires_grad=data.requires_grad,
        )
        made.data_on_cpu = data.detach()
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"Impostor({self.data_on_cpu}, device={self.device})"

    def record_stream(self, stream) -> None:
        """For the allocator of a real GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a GPU that is there only inside fake_cuda()")


class _Arriving:
    """Copies to the host that nobody waits for: until an event after them is waited for, their memory holds others."""

    def __init__(self):
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def promise(self, numbers: torch.Tensor) -> torch.Tensor:
        self.copies.append((torch.zeros_like(numbers), numbers))
        return self.copies[-1][0]


class _Event:
    """Happens when it is waited for, or between the first time that somebody asks for it and the second."""

    def __init__(self, arriving: _Arriving):
        self.arriving, self.asked = arriving, False

    def record(self, stream) -> None:
        self.before, self.stream = list(self.arriving.copies), stream
        self.until = stream.ran + len(stream.queue or ())

    def synchronize(self) -> None:
        self.stream.run(self.until)
        for target, numbers in self.before:
            target.copy_(numbers)

    def query(self) -> bool:
        if self.asked:
            self.synchronize()
        self.asked = not self.asked
        return not self.asked


class _Ops(TorchDispatchMode):
    """Runs operations on the CPU; results are on the device of the arguments, or on the one that is asked for."""

    def __init__(self, reads: list[str], arriving: _Arriving):
        super().__init__()
        self.reads, self.arriving = reads, arriving

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = set()
        tree_map_only(
            torch.Tensor, lambda t: devices.add(t.device) if isinstance(t, Impostor) or t.ndim else None, args
        )
        asked = kwargs.get("device")
        gpus = {device for device in (*devices, _cuda_device(asked)) if device is not None and device.type == "cuda"}
        if not gpus:
            return func(*args, **kwargs)
        copies = func in (aten.copy_.default, aten._to_copy.default)
        if len(devices) > 1 and not copies:
            raise RuntimeError(f"Expected all tensors to be on the same device, found {devices} in {func}")
        here = args[0].device if copies and asked is None else gpus.pop() if asked is None else torch.device(asked)
        late = func is aten._to_copy.default and here.type == "cpu" and kwargs.get("non_blocking")
        if func in _READS or here.type == "cpu" and not late:
            self.reads.append(str(func))
        if asked is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        wrapped = {id(t.data_on_cpu): t for t in args if isinstance(t, Impostor)}
        out = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        if late:
            return self.arriving.promise(out)
        if here.type == "cpu":
            return out
        return tree_map_only(torch.Tensor, lambda t: wrapped[id(t)] if id(t) in wrapped else Impostor(t, here), out)


def _unwrap(t):
    if isinstance(t, slice):  # numbers in it may be tensors
        return slice(*map(_unwrap, (t.start, t.stop, t.step)))
    return t.data_on_cpu if isinstance(t, Impostor) else t


def _cuda_device(value) -> torch.device | None:
    if isinstance(value, (str, torch.device)):
        with contextlib.suppress(RuntimeError):  # a string that names no device
            device = torch.device(value)
            return torch.device("cuda", device.index or 0) if device.type == "cuda" else None
    return None


class _Calls(TorchFunctionMode):
    """Serves calls that name a CUDA device, factories and `.to(...)`, and those that ask for a device guard."""

    def __init__(self, reads: list[str]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "copy_" and (queue := torch.cuda.current_stream().queue) is not None:
            queue.append(functools.partial(func, *map(_unwrap, args), **kwargs))
            return args[0]
        if name in OPS:  # what is in it runs as on the GPU
            with self:
                return OPS[name][1](*args, **kwargs)
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if name in _GUARDED and isinstance(args[0], Impostor):
            if name in ("nonzero", "__int__") or any(
                isinstance(i, Impostor) and i.dtype == torch.bool for i in args[1:2]
            ):
                self.reads.append(name)
            here = args[0]
            out = func(*tree_map(_unwrap, args), **kwargs)
            if out is here.data_on_cpu:
                return here
            return tree_map_only(torch.Tensor, lambda t: Impostor(t, here.device), out)
        asked = [device for value in (*args, *kwargs.values()) if (device := _cuda_device(value)) is not None]
        if not asked or func in (torch.device, torch.Tensor._make_wrapper_subclass):
            return func(*args, **kwargs)

        def to_cpu(value):
            return torch.device("cpu") if _cuda_device(value) is not None else _unwrap(value)

        out = func(*map(to_cpu, args), **{name: to_cpu(value) for name, value in kwargs.items()})
        moved = args[0] if args and isinstance(args[0], Impostor) else None
        if moved is not None and out is moved.data_on_cpu and moved.device == asked[0]:
            return moved  # `.to` of what is there already
        return Impostor(out, asked[0]) if isinstance(out, torch.Tensor) else out


class _Stream:
    """A stream beside the default one does its copies when somebody waits for it, and not earlier."""

    def __init__(self, queue: list | None = None):
        self.queue, self.ran = queue, 0

    def wait_event(self, event: _Event) -> None:
        event.stream.run(event.until)

    def wait_stream(self, other: _Stream) -> None:
        other.run(other.ran + len(other.queue or ()))

    def run(self, until: int) -> None:
        while self.queue and self.ran < until:
            self.queue.pop(0)()
            self.ran += 1


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int] = (8, 0), devices: int = 1) -> Iterator[list[str]]:
    """A machine with `devices` GPUs of that compute capability, for the body of a `with`: what the host reads back."""
    reads: list[str] = []
    streams = [_Stream()]  # the current one is the last
    arriving = _Arriving()

    @contextlib.contextmanager
    def stream(entered):
        streams.append(entered)
        yield
        streams.pop()

    answers = {
        "Stream": lambda device=None: _Stream(queue=[]),
        "current_stream": lambda device=None: streams[-1],
        "stream": stream,
        "Event": lambda: _Event(arriving),
        "device": lambda device: contextlib.nullcontext(),
        "is_available": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: capability,
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(_Ops(reads, arriving))
        stack.enter_context(_Calls(reads))
        flash_libraries.candidates.cache_clear()
        stack.callback(flash_libraries.candidates.cache_clear)
        yield reads


def on_gpu(value, device: str = "cuda:0"):
    """A tensor, a dict of tensors (other values stay) or a module (in place), moved to a GPU that is none."""
    gpu = torch.device(device)
    if not isinstance(value, torch.nn.Module):
        return tree_map_only(torch.Tensor, lambda t: Impostor(_unwrap(t), gpu), value)
    for module in value.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = Impostor(_unwrap(parameter.data), gpu)
                module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = Impostor(_unwrap(buffer), gpu)
    return value
