"""The stand-ins of a rehearsal: every stage's code runs on a CPU, and no number means anything.

Triton's kernels run in its interpreter, or PyTorch takes their place. flash-attn is replaced by the formula. Codes lie
as on a GPU, and the CPU's own kernels are out of the way, which read another order. What `torch.cuda` has of times,
graphs, streams and memory does nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from hf_kvattn.evaluation.gpu_check.judging import formula
from hf_kvattn.evaluation.gpu_check.running import Machine
from hf_kvattn.kernels import dispatch, flash_libraries, native
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant import layout

CPU = torch.device("cpu")
# float16: Triton's interpreter keeps bfloat16 as whole numbers, and computes with those.
MACHINE = Machine(CPU, CPU, torch.float16, rehearsed=True)


def not_interpreted() -> str | None:
    """Why Triton's kernels do not run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 was not set"
    version = importlib.import_module("triton").__version__
    if tuple(map(int, version.split(".")[:2])) < (3, 7):
        return f"the interpreter of triton {version} fails with NumPy of today"
    return None


class _Event:
    """A time of the host."""

    def __init__(self, enable_timing: bool = False):
        self.time_s = 0.0

    def record(self, stream: Any = None) -> None:
        self.time_s = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return max(1e-6, 1e3 * (other.time_s - self.time_s))


class _Backend:
    """A backend for GPUs in the table of backends, which serves calls on the CPU."""

    def __init__(self, attend: Any, attend_lengths: Any = None):
        self.attend = attend
        if attend_lengths is not None:
            self.attend_lengths = attend_lengths

    def unavailable(self) -> None:
        return None

    def unsupported(self, call: AttendCall) -> str | None:
        return "no dense mask" if call.mask is not None else None

    def cannot_quantize(self, *given: Any) -> str:
        return "a stand-in quantizes nothing"


def _by_formula(call: AttendCall) -> torch.Tensor:
    return formula(call, torch.float64).to(call.q.dtype)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, cache_leftpad=None, softmax_scale, causal=True, **ignored
):
    """flash-attn's function, as far as it is called here: `(B, Tq, Hq, D)` over `(B, T, Hkv, D)`."""
    lengths = cache_seqlens if isinstance(cache_seqlens, torch.Tensor) else torch.tensor([cache_seqlens] * len(q))
    out = torch.empty_like(q)
    for i, length in enumerate(lengths.tolist()):
        if k is not None:
            k_cache[i, length], v_cache[i, length] = k[i, 0], v[i, 0]
            length += 1
        first = 0 if cache_leftpad is None else int(cache_leftpad[i])
        a, b, c = (t[i : i + 1].transpose(1, 2) for t in (q, k_cache[:, first:length], v_cache[:, first:length]))
        out[i] = 0 if first == length else _by_formula(AttendCall(a, b, c, softmax_scale, causal=causal))[0]
    return out


def _load(name: str) -> tuple[Any, str]:
    """In the place of `flash_libraries.load`: flash-attn, and no other library."""
    return (flash_attn_with_kvcache, "a stand-in") if name == "flash_attn" else (None, f"the library {name}")


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """A GPU that is none, for the body of a `with`."""
    properties = SimpleNamespace(
        multi_processor_count=2, total_memory=2**30, L2_cache_size=2**16, name="no GPU", major=9, minor=0
    )
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    answers = {
        "Event": _Event,
        "synchronize": lambda device=None: None,
        "Stream": lambda device=None: stream,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: contextlib.nullcontext(),
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: defaultdict(int),
        "mem_get_info": lambda device=None: (2**30, 2**30),
        "reset_peak_memory_stats": lambda device=None: None,
        "set_sync_debug_mode": lambda mode: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
    }
    real: Any = dispatch.BACKENDS["triton"]
    triton = _Backend(real.attend, real.attend_lengths) if not_interpreted() is None else _Backend(_by_formula)
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.dict(dispatch.BACKENDS, triton=triton, flash=_Backend(_by_formula)))
        stack.enter_context(mock.patch.object(flash_libraries, "load", _load))
        stack.enter_context(mock.patch.object(layout, "in_words", lambda device: True))
        stack.enter_context(mock.patch.object(native, "unavailable", lambda: "a GPU has none"))
        yield
