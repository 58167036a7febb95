"""Which backend serves an attention call, and why the others do not."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType

import torch

from ..quant.blocks import quantize_blocks
from ..quant.codecs import Bits
from . import flash, native, reference, sdpa
from .call import AttendCall
from .triton import backend as triton_backend

logger = logging.getLogger("hf_kvattn")

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "sdpa": sdpa,
    "native": native,
    "flash": flash,
    "triton": triton_backend,
}

# Up to this many query rows (query tokens x group) one pass over the cache is bound by memory and the native kernel
# wins on every CPU, and beyond them where a window leaves out most keys, or where PyTorch's kernel has not all that is
# asked for (0.1 of the time of what does it with several of PyTorch's).
NATIVE_MAX_ROWS = 128

_in_context: ContextVar[str | None] = ContextVar("hf_kvattn_backend", default=None)
_for_process: list[str] = []  # set_backend's choice; empty: HF_KVATTN_BACKEND, else auto


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r} in {source}; known: {', '.join(['auto', *BACKENDS])}")
    return name


def set_backend(name: str) -> None:
    """Chooses the backend for the whole process, all threads: `auto` or a name in `BACKENDS`.

    With `auto` each call takes the fastest backend that can serve it. Any other choice is a demand: a call that the
    backend cannot serve raises.

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
    name = _in_context.get()
    if name is not None:
        return name
    if _for_process:
        return _for_process[0]
    return _checked(os.environ.get("HF_KVATTN_BACKEND", "auto"), "HF_KVATTN_BACKEND")


def attend(call: AttendCall) -> torch.Tensor:
    """Computes `call` with the chosen backend: `(B, Tq, Hq, D)` in the dtype of `q`."""
    return serving(call).attend(call)


def serving(call: AttendCall) -> ModuleType:
    """The backend that `call` is computed with; ValueError where the chosen one cannot serve it."""
    name = chosen_backend()
    if name == "auto":
        return auto_choice(call)[0]
    module = BACKENDS[_usable(name, "HF_KVATTN_BACKEND")]
    reason = module.unsupported(call)
    if reason:
        raise ValueError(f"backend {name!r} cannot serve this call: {reason}; choose another, or 'auto'")
    return module


def auto_choice(call: AttendCall) -> tuple[ModuleType, str | None]:
    """The backend that `auto` takes for `call`, and why it is not the one that would be fastest (None if it is)."""
    passed_over = None
    for module in _fastest_first(call):
        reason = module.unavailable() or module.unsupported(call)
        if reason is None:
            break
        passed_over = passed_over or reason
    if passed_over:
        _log_once(f"auto backend: {name_of(module)}, because {passed_over}")
    return module, passed_over


def _fastest_first(call: AttendCall) -> tuple[ModuleType, ...]:
    if call.q.device.type == "cuda":
        if call.packed is not None:
            return triton_backend, sdpa, reference
        # Pieces that must be joined: flash does so for one query, Triton reads them in place.
        special = call.slot > 0 or not sdpa.is_plain(call)
        return (flash, triton_backend, sdpa, reference) if special else (flash, sdpa, reference)
    if call.q.device.type != "cpu":
        return sdpa, reference
    few = call.q.shape[2] * (call.q.shape[1] // call.k.shape[1]) <= NATIVE_MAX_ROWS
    local = call.window is not None and call.window < call.kv_len
    if few or local or not sdpa.is_plain(call) or native.leads_in_prompts(call.q.dtype):
        return native, sdpa, reference
    return sdpa, native, reference


def quantizer(k: torch.Tensor, k_bits: Bits, v_bits: Bits) -> Callable[..., None]:
    """What turns blocks of such keys (and values) into codes, as `quant.blocks.quantize_blocks` does: equal results."""
    module = triton_backend if k.device.type == "cuda" else native
    reason = module.unavailable() or module.cannot_quantize(k, k_bits, v_bits)
    if reason is None:
        return module.quantize_blocks
    _log_once(f"blocks are quantized with PyTorch's operations, because {reason}")
    return quantize_blocks


def _usable(name: str, source: str) -> str:
    if _checked(name, source) != "auto" and (reason := BACKENDS[name].unavailable()):
        raise ValueError(f"backend {name!r} in {source} cannot be used here: {reason}")
    return name


def name_of(module: ModuleType) -> str:
    return next(name for name, backend_module in BACKENDS.items() if backend_module is module)


@functools.lru_cache(maxsize=256)
def _log_once(message: str) -> None:
    logger.info(message)
