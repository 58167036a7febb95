"""`BACKENDS`, and the choice of one for each attention call, with the reason why others were not taken."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers.utils import logging

from ..quant import blocks
from ..quant.blocks import Blocks, Quantize
from ..quant.codecs import Codec
from . import flash, native, reference, sdpa
from .call import AttendCall
from .triton import backend as triton_backend

logger = logging.get_logger("hf_kvattn")


class Backend(Protocol):
    """What a backend must have. Optional parts are methods that may be missing; `dispatch` asks for them by name:

    - `cannot_quantize(k, k_codec, v_codec)` and `quantize_blocks(jobs)`: turns blocks into codes;
    - `cannot_append(call)` and `append_attend(call, k, v, lengths, begin)`: stores a token and attends in one call;
    - `attend_lengths(call, lengths)`: reads how many tokens there are from the device;
    - `cannot_repeat(call)` and `Repeated(call, k, v, slot)`: stores a token and attends in layer after layer, in calls
      that differ in the addresses of their tensors alone.
    """

    def unavailable(self) -> str | None:
        """Why it cannot be used on this machine at all, or None."""

    def unsupported(self, call: AttendCall) -> str | None:
        """Why it cannot serve `call`, or None."""

    def attend(self, call: AttendCall) -> torch.Tensor:
        """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`."""


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "sdpa": sdpa,
    "native": native,
    "flash": flash,
    "triton": triton_backend,
}

# The order in which `auto` asks the backends for each kind of call (`_kind`), the fastest first.
PRIORITIES: dict[str, tuple[str, ...]] = {
    "gpu, packed": ("triton", "sdpa", "reference"),
    "gpu, few queries or in pieces": ("flash", "triton", "sdpa", "reference"),
    "gpu": ("flash", "sdpa", "reference"),
    # A step whose lengths are on the GPU. Triton reads a ring, and joins `s_aux`, in the kernel that it needs anyway.
    "gpu step, in pieces": ("triton", "flash", "sdpa", "reference"),
    "cpu, native leads": ("native", "sdpa", "reference"),
    "cpu, torch leads": ("sdpa", "native", "reference"),
    "other device": ("sdpa", "reference"),
}
QUANTIZERS: dict[str, str] = {"cuda": "triton", "cpu": "native"}  # by device; PyTorch's operations serve all others

# Up to this many query rows (query tokens x group) one pass over the cache is bound by memory, and the native kernel is
# the fastest on every CPU. Beyond them it is so where a window leaves out most keys, and where PyTorch's own kernel
# lacks a feature: it is about 10 times faster than the tiled PyTorch fallback.
NATIVE_MAX_ROWS = 128
# Up to this many query tokens, Triton goes before PyTorch's SDPA on a GPU: it splits the tokens over the GPU, and one
# kernel serves all lengths. SDPA may take cuDNN, which makes a plan for each new length.
FEW_QUERIES = 16

_in_context: ContextVar[str | None] = ContextVar("hf_kvattn_backend", default=None)
_for_process: list[str] = []  # set_backend's choice; empty: HF_KVATTN_BACKEND, else auto


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r} in {source}; known: {', '.join(['auto', *BACKENDS])}")
    return name


def set_backend(name: str) -> None:
    """Chooses the backend for the whole process, all threads: `auto` or a name in `BACKENDS`.

    With `auto` each call takes the fastest backend that can serve it. With any other choice, a call that the backend
    cannot serve raises.

    Raises:
        ValueError: unknown name, or a backend that cannot be used on this machine (with the reason).
    """
    _for_process[:] = [_usable(name, "set_backend")]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """`set_backend` for the body of a `with`, in the current thread (or task) only."""
    token = _in_context.set(_usable(name, "backend"))
    try:
        yield
    finally:
        _in_context.reset(token)


def chosen_backend() -> str:
    """The choice in force: the innermost `backend(...)`, else `set_backend`, else `HF_KVATTN_BACKEND`, else `auto`."""
    return chosen_in_code() or _checked(os.environ.get("HF_KVATTN_BACKEND", "auto"), "HF_KVATTN_BACKEND")


def chosen_in_code() -> str | None:
    """The choice of the innermost `backend(...)`, else of `set_backend`; None where there is none."""
    name = _in_context.get()
    return _for_process[0] if name is None and _for_process else name


def attend(call: AttendCall) -> torch.Tensor:
    """Computes `call` with the chosen backend: `(B, Tq, Hq, D)` in the dtype of `q`."""
    return serving(call).attend(call)


def serving(call: AttendCall, step: bool = False) -> Any:
    """The `Backend` that `call` is computed with; ValueError where it is wrong, or the chosen one cannot serve it.

    Args:
        step: whether `call` is a decode step over buffers whose lengths are on the device.
    """
    call.check()
    name = chosen_backend()
    if name == "auto":
        return BACKENDS[auto_choice(call, step)[0]]
    backend = BACKENDS[_usable(name, "HF_KVATTN_BACKEND")]
    reason = backend.unsupported(call)
    if reason:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}; choose another, or 'auto'")
    return backend


def auto_choice(call: AttendCall, step: bool = False) -> tuple[str, str | None]:
    """The backend that `auto` takes for `call`, and why it is not the one that would be fastest (None if it is)."""
    passed_over = None
    for name in PRIORITIES[_kind(call, step)]:
        backend = BACKENDS[name]
        reason = backend.unavailable() or backend.unsupported(call)
        if reason is None:
            break
        passed_over = passed_over or reason
    if passed_over:
        logger.info_once(f"auto backend: {name}, because {passed_over}")
    return name, passed_over


def _kind(call: AttendCall, step: bool) -> str:
    """The row of `PRIORITIES` for `call`."""
    device = call.q.device.type
    if device == "cuda":
        if call.packed is not None:
            return "gpu, packed"
        if step and (call.tokens is not None or call.s_aux is not None):
            return "gpu step, in pieces"
        # Pieces that must be joined: flash does so for one query, Triton reads them in place.
        pieces = call.slot > 0 or not sdpa.is_plain(call)
        return "gpu, few queries or in pieces" if pieces or call.q.shape[2] <= FEW_QUERIES else "gpu"
    if device != "cpu":
        return "other device"
    few = call.q.shape[2] * (call.q.shape[1] // call.k.shape[1]) <= NATIVE_MAX_ROWS
    local = call.window is not None and call.window < call.kv_len
    leads = few or local or not sdpa.is_plain(call) or native.leads_in_prompts(call.q.dtype)
    return "cpu, native leads" if leads else "cpu, torch leads"


def quantizer(k: torch.Tensor, k_codec: Codec, v_codec: Codec) -> Quantize:
    """The fastest function that turns blocks of keys such as `k`, `(B, Hkv, T, D)`, and their values into codes."""
    backend: Any = BACKENDS.get(QUANTIZERS.get(k.device.type, ""))
    if backend is None:
        return blocks.quantize_blocks
    reason = backend.unavailable() or backend.cannot_quantize(k, k_codec, v_codec)
    if reason is None:
        return backend.quantize_blocks
    logger.info_once(f"blocks are quantized with PyTorch's operations, because {reason}")
    return blocks.quantize_blocks


def quantize_blocks(jobs: Sequence[Blocks]) -> torch.Tensor | None:
    """`quant.blocks.quantize_blocks`, bit for bit, by the fastest function that serves each job."""
    together: dict[Quantize, list[int]] = {}
    for i, (k, v, into, slot) in enumerate(jobs):
        into.check_blocks(k, v, slot)
        together.setdefault(quantizer(k, into.k_codec, into.v_codec), []).append(i)
    finite: dict[int, torch.Tensor] = {}
    for quantize, numbers in together.items():
        answer = quantize([jobs[i] for i in numbers])
        if answer is not None and len(together) == 1:
            return answer
        finite |= {} if answer is None else dict(zip(numbers, answer.bool(), strict=True))
    return torch.stack([finite[i] for i in range(len(jobs))]) if finite else None


def _usable(name: str, source: str) -> str:
    if _checked(name, source) != "auto" and (reason := BACKENDS[name].unavailable()):
        raise ValueError(f"backend {name!r} in {source} cannot be used here: {reason}")
    return name
