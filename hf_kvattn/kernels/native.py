"""The C++ kernels of `csrc/`, loaded with ctypes: flash-decoding on a CPU, one pass over each KV head for its group.

The library is built with the package where a C++ compiler is found. It knows nothing of Python or PyTorch, so one
build serves every version of both; what it must share with PyTorch is the OpenMP runtime, and it does so by being
loaded after PyTorch has loaded its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
import time
from pathlib import Path

import torch

from ..quant.packed import PackedKV
from .call import AttendCall

_ABI_VERSION = 2
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ERRORS = {1: "bad argument", 2: "out of memory"}
_FILE_NAME = "libkvattn.so"  # CMake's MODULE suffix, on macOS too
_Strides = ctypes.c_int64 * 3


class _AttendArgs(ctypes.Structure):
    """Mirrors `kvattn_attend_args` in `csrc/kvattn.h`."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        ("q_heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("q_len", ctypes.c_int64),
        ("kv_len", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("q_stride", _Strides),
        ("k_stride", _Strides),
        ("v_stride", _Strides),
        ("packed_len", ctypes.c_int64),
        ("packed_blocks", ctypes.c_int64),
        ("v_group", ctypes.c_int64),
        ("k_bits", ctypes.c_int32),
        ("v_bits", ctypes.c_int32),
        ("k_codes", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("k_zero", ctypes.c_void_p),
        ("k_mean", ctypes.c_void_p),
        ("v_codes", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("v_zero", ctypes.c_void_p),
    ]


def _candidates() -> list[Path]:
    """Where the library may lie: beside this file, or where an editable install has put it."""
    places = [Path(__file__).parent / _FILE_NAME]
    try:
        distribution = importlib.metadata.distribution("hf_kvattn")
    except importlib.metadata.PackageNotFoundError:
        return places
    return [*places, Path(str(distribution.locate_file(f"hf_kvattn/kernels/{_FILE_NAME}")))]


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded library, or why there is none."""
    path = next((p for p in _candidates() if p.exists()), None)
    if path is None:
        return None, "the C++ kernels were not built: install a C++ compiler, then reinstall hf_kvattn"
    try:
        library = ctypes.CDLL(os.fspath(path))
        version = library.kvattn_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if version != _ABI_VERSION:
        return None, f"{path.name} has ABI version {version}, this package needs {_ABI_VERSION}: reinstall hf_kvattn"
    library.kvattn_variant.restype = ctypes.c_char_p
    library.kvattn_select.argtypes = [ctypes.c_char_p]
    library.kvattn_attend.argtypes = [ctypes.POINTER(_AttendArgs)]
    library.kvattn_read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.kvattn_read_bytes.restype = ctypes.c_uint64
    return library, None


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise ValueError(f"backend 'native' is not usable: {reason}")
    return library


def unavailable() -> str | None:
    return _load()[1]


def variant() -> str:
    """The SIMD variant in use: `avx512_bf16`, `avx512`, `avx2` or `portable`; says so where it lacks OpenMP."""
    library = _library()
    return library.kvattn_variant().decode() + ("" if library.kvattn_has_openmp() else ", no OpenMP")


def select_variant(name: str | None) -> None:
    """Forces a SIMD variant for the whole process; None goes back to the best one.

    Raises:
        ValueError: this CPU or build lacks the variant.
    """
    if _library().kvattn_select((name or "").encode()):
        raise ValueError(f"native variant {name!r} is not usable on this CPU ({sys.platform}); now: {variant()!r}")


def unsupported(call: AttendCall) -> str | None:
    if call.q.device.type != "cpu":
        return f"native kernels run on the CPU, the tensors are on {call.q.device}"
    if call.q.dtype not in _DTYPES:
        return f"native kernels take float32, float16 and bfloat16, not {call.q.dtype}"
    if call.k.dtype != call.q.dtype or call.v.dtype != call.q.dtype:
        return f"q is {call.q.dtype}, k {call.k.dtype}, v {call.v.dtype}: one dtype is needed"
    if call.v.shape != call.k.shape:
        return f"k is {tuple(call.k.shape)} but v {tuple(call.v.shape)}"
    if call.packed is not None and call.q.shape[-1] > 512:
        return f"native kernels read packed heads of up to 512, not {call.q.shape[-1]}"
    if call.mask is not None:
        return "native kernels take causal, window and left-padding rules, not a dense mask"
    if call.dropout > 0 or call.needs_grad:
        return "native kernels are for inference: no dropout, no gradients"
    return None


def attend(call: AttendCall, lse: torch.Tensor | None = None) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`, with PyTorch's number of threads.

    Args:
        call: float32, float16 or bfloat16 tensors on the CPU, without mask or dropout.
        lse: `(B, Hq, Tq)` float32, contiguous; filled with each query's log-sum-exp when given.
    """
    q, k, v = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (call.q, call.k, call.v))
    batch, q_heads, q_len, dim = q.shape
    out = torch.empty((batch, q_len, q_heads, dim), dtype=q.dtype)
    first = None if call.first is None else call.first.to(torch.int32).contiguous()
    args = _AttendArgs(
        _DTYPES[q.dtype],
        call.causal,
        torch.get_num_threads(),
        0,
        batch,
        q_heads,
        k.shape[1],
        q_len,
        call.kv_len,
        dim,
        call.window or 0,
        call.scale,
        call.softcap or 0.0,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if first is None else first.data_ptr(),
        out.data_ptr(),
        None if lse is None else lse.data_ptr(),
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
    )
    if call.packed is not None:
        _add_packed(args, call.packed)
    status = _library().kvattn_attend(ctypes.byref(args))
    if status:
        raise RuntimeError(
            f"native attention failed ({_ERRORS.get(status, status)}) for q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}, window {call.window}"
        )
    return out


def _add_packed(args: _AttendArgs, packed: PackedKV) -> None:
    args.packed_len, args.k_bits, args.v_bits = packed.tokens, packed.k_bits, packed.v_bits
    args.packed_blocks = packed.k_codes.shape[2]
    args.v_group = packed.k_scale.shape[-1] // packed.v_scale.shape[3]
    for name in ("k_codes", "k_scale", "k_zero", "k_mean", "v_codes", "v_scale", "v_zero"):
        tensor = getattr(packed, name)
        assert tensor.is_contiguous()  # as caches allocate them
        setattr(args, name, tensor.data_ptr())


def read_bandwidth_bytes_s(data: torch.Tensor, seconds: float = 0.5) -> float:
    """Bytes a second at which this machine reads `data` (contiguous, larger than its caches), the best of many runs."""
    library, n_bytes, best_s = _library(), data.numel() * data.element_size(), float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        library.kvattn_read_bytes(data.data_ptr(), n_bytes, torch.get_num_threads())
        best_s = min(best_s, time.perf_counter() - start)
    return n_bytes / best_s
