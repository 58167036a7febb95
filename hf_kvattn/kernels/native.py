"""The C++ kernels of `csrc/`, loaded with ctypes: flash-decoding on a CPU, one pass over each KV head for its group.

The library is built with the package where a C++ compiler is found. It uses neither Python's nor PyTorch's headers, so
one build serves every version of both. It shares PyTorch's OpenMP runtime: it must be loaded after PyTorch has loaded
its own.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..quant import rotation
from ..quant.blocks import Blocks
from ..quant.codecs import Codec
from ..quant.layout import BLOCK
from ..quant.packed import PackedKV
from .call import BATCHES, PIECES, QUANTIZED, RULES, AttendCall, Requests, SinkKV

SERVED = RULES | PIECES | QUANTIZED | BATCHES
CODECS = ("int8", "int4", "int3", "int2")  # read and written
_ABI_VERSION = 9
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INT8 = 3  # of weights alone
_ERRORS = {1: "bad argument", 2: "out of memory"}
_FILE_NAME = "libkvattn.so"  # CMake's MODULE suffix, on macOS too
# `kvattn_attend_args` in `csrc/kvattn.h`, packed in one call: setting 50 ctypes fields costs 10 us a layer. The fields
# from `packed_start` on stay the same for 32 steps, so they are packed separately. `_load` compares the sizes with C's.
_ARGS = struct.Struct("@4i7q2f10P9q4q4P6q3P")
_ADDRESSES = struct.Struct("@8P")  # those of its fields from `q` to `v_slot`, which differ from layer to layer
_ADDRESSES_BEGIN = struct.calcsize("@4i7q2f")
_NOTHING_NEW = (0,) * 4
_PACKED_ARGS = struct.Struct("@6q2i9P")
_QUANTIZE_ARGS = struct.Struct("@4i8q2P6q9P")  # `kvattn_quantize_args`
MAX_ROWS, MAX_WEIGHTS = 32, 4  # of `linear`, as in `csrc/kvattn.h`
_LINEAR_ARGS = struct.Struct("@4i3q2P" + "P2q" * MAX_WEIGHTS)  # `kvattn_linear_args`
_NO_SINKS = (0,) * 12
_NO_REQUESTS = (0,) * 3
_NOTHING_PACKED = _PACKED_ARGS.pack(0, 0, 0, 0, 0, 1, 0, 0, *(0,) * 9)


def _candidates() -> list[Path]:
    """Where the library may lie: beside this file, or where an editable install has put it."""
    places = [Path(__file__).parent / _FILE_NAME]
    try:
        distribution = importlib.metadata.distribution("hf_kvattn")
    except importlib.metadata.PackageNotFoundError:
        return places
    return [*places, Path(str(distribution.locate_file(f"hf_kvattn/kernels/{_FILE_NAME}")))]


def library_path() -> Path | None:
    """The library's file; None where it was not built."""
    return next((p for p in _candidates() if p.exists()), None)


@functools.lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The loaded library, or why there is none."""
    path = library_path()
    if path is None:
        return None, "the C++ kernels were not built: install a C++ compiler, then reinstall hf_kvattn"
    try:
        library = ctypes.CDLL(os.fspath(path))
        version = library.kvattn_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    if version != _ABI_VERSION:
        return None, f"{path.name} has ABI version {version}, this package needs {_ABI_VERSION}: reinstall hf_kvattn"
    sizes_bytes = tuple(getattr(library, f"kvattn_sizeof_{name}_args")() for name in ("attend", "quantize", "linear"))
    packed_bytes = _ARGS.size + _PACKED_ARGS.size, _QUANTIZE_ARGS.size, _LINEAR_ARGS.size
    if sizes_bytes != packed_bytes:
        return None, (
            f"{path.name} takes structs of {sizes_bytes} bytes, this package makes {packed_bytes}: reinstall hf_kvattn"
        )
    library.kvattn_variant.restype = ctypes.c_char_p
    library.kvattn_select.argtypes = [ctypes.c_char_p]
    for function in (library.kvattn_attend, library.kvattn_quantize, library.kvattn_linear):
        function.argtypes = [ctypes.c_char_p]  # the packed struct
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
    """The SIMD variant in use: `avx512_bf16`, `avx512`, `avx2`, `neon_bf16`, `neon_dot`, `neon` or `portable`; says
    so where it lacks OpenMP."""
    library = _library()
    return library.kvattn_variant().decode() + ("" if library.kvattn_has_openmp() else ", no OpenMP")


def leads_in_prompts(dtype: torch.dtype) -> bool:
    """Whether many query rows are served faster here than by PyTorch's own kernel, which is thought to lead where it
    multiplies tiles of 16-bit numbers (AMX), and where these kernels have no vectors of their own."""
    if unavailable() is not None or (dtype != torch.float32 and torch.cpu._is_amx_tile_supported()):
        return False
    return not variant().startswith("portable")


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
    if (packed := call.packed) is not None:
        for codec in (packed.k_codec, packed.v_codec):
            if codec.name not in CODECS:
                return f"native kernels read {', '.join(CODECS)}, not {codec.name}"
        if call.q.shape[-1] > 512:
            return f"native kernels read packed heads of up to 512, not {call.q.shape[-1]}"
    if beyond := call.beyond(SERVED):
        return f"native kernels serve {beyond}"
    if (requests := call.requests) is not None:
        if not all(t is None or t.is_contiguous() for t in (requests.q_begin, requests.kv_begin, requests.kv_rows)):
            return "native kernels take the numbers of requests side by side"
    if (sinks := call.sinks) is not None:
        side_by_side = sinks.q.stride(-1) == sinks.k.stride(-1) == 1 and sinks.k.stride() == sinks.v.stride()
        if not (call.causal and side_by_side):
            return "native kernels take sinks of causal attention, with channels side by side, as caches allocate them"
    return None


def attend(call: AttendCall, lse: torch.Tensor | None = None) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`, with PyTorch's number of threads.

    Args:
        call: one that `dispatch.serving` has checked and `unsupported` has not refused.
        lse: `(B, Hq, Tq)` float32, contiguous; filled with each query's log-sum-exp when given.
    """
    if lse is None and call.s_aux is not None:
        lse = torch.empty(call.q.shape[:3], dtype=torch.float32)
    out = _empty_result(call)
    args, _kept = _arguments(call, out, lse)
    if status := _library().kvattn_attend(args):
        raise _failure(status, call.q, call.k)
    if call.s_aux is not None and lse is not None:  # of which the kernel knows nothing
        out, total = call.after_s_aux(out, lse)
        lse.copy_(total)
    return out


def cannot_repeat(call: AttendCall) -> bool:
    """Whether `Repeated` does not serve calls such as `call`, which `attend` does serve."""
    one_token = call.q.shape[2] == 1 and call.requests is None
    return not one_token or call.sinks is not None or call.s_aux is not None or call.q.stride(-1) != 1


class Repeated:
    """One new token's attention in layers that are alike: the arguments of the kernel, but for their addresses.

    Args:
        call: that of the first layer, whose token is stored already.
        k, v: its buffers `(B, Hkv, slots, D)`; the keys and values of `call` are views of them.
        slot: where the token lies there.
    """

    def __init__(self, call: AttendCall, k: torch.Tensor, v: torch.Tensor, slot: int):
        self._like = _empty_result(call)
        args, (*_, self._leftpad, _) = _arguments(call, self._like)
        self._args = bytearray(args)
        self._struct = (ctypes.c_char * len(args)).from_buffer(self._args)
        self._attend = _library().kvattn_attend
        # How many bytes from the beginning of a buffer on.
        self._k_begin, self._v_begin = call.k.data_ptr() - k.data_ptr(), call.v.data_ptr() - v.data_ptr()
        self._k_slot, self._v_slot = (slot * t.stride(2) * t.element_size() for t in (k, v))

    def attend(
        self, q: torch.Tensor, new: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor], packed: PackedKV | None
    ) -> torch.Tensor:
        """Stores `new` keys and values, `(B, Hkv, 1, D)`, in a layer's `buffers`; the attention of `q`.

        All have the shapes, strides and dtypes of the first layer's, and `packed` its codecs and lengths. The result is
        `(B, 1, Hq, D)`. Where it raises nothing has been stored.
        """
        out, k, v = torch.empty_like(self._like), new[0].contiguous(), new[1].contiguous()
        k_buffer, v_buffer = buffers[0].data_ptr(), buffers[1].data_ptr()
        _ADDRESSES.pack_into(
            self._args, _ADDRESSES_BEGIN,
            q.data_ptr(), k_buffer + self._k_begin, v_buffer + self._v_begin, out.data_ptr(),
            k.data_ptr(), v.data_ptr(), k_buffer + self._k_slot, v_buffer + self._v_slot,
        )  # fmt: skip
        if packed is not None:
            self._args[_ARGS.size :] = packed.as_arguments or _packed_args(packed)
        if status := self._attend(self._struct):
            raise _failure(status, q, buffers[0])
        return out


def _empty_result(call: AttendCall) -> torch.Tensor:
    batch, heads, q_len, dim = call.q.shape
    return torch.empty((batch, q_len, heads, dim), dtype=call.q.dtype)


def _failure(status: int, q: torch.Tensor, k: torch.Tensor) -> RuntimeError:
    reason = _ERRORS.get(status, status)
    return RuntimeError(f"native attention failed ({reason}) for q {tuple(q.shape)}, k {tuple(k.shape)}")


def _arguments(
    call: AttendCall, out: torch.Tensor, lse: torch.Tensor | None = None
) -> tuple[bytes, tuple[torch.Tensor | None, ...]]:
    """The kernel's struct for `call`, and tensors that must live as long as it: q, k, v, leftpad, that of sinks."""
    q, k, v = _side_by_side(call.q), _side_by_side(call.k), _side_by_side(call.v)
    batch, q_heads, q_len, dim = q.shape
    requests, sinks = call.requests, call.sinks
    leftpad = None if call.leftpad is None else call.leftpad.contiguous()
    sink_leftpad = None if sinks is None or sinks.leftpad is None else sinks.leftpad.contiguous()
    # In the order of the struct, a line for each of its lines.
    args = _ARGS.pack(
        _DTYPES[q.dtype], call.causal, torch.get_num_threads(), 0,
        batch if requests is None else len(requests.q_begin) - 1, q_heads, k.shape[1], q_len, call.kv_len, dim,
        call.window or 0, call.scale, call.softcap or 0.0,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), *_NOTHING_NEW,
        0 if leftpad is None else leftpad.data_ptr(), 0 if lse is None else lse.data_ptr(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0) if call.tokens is None else (k.shape[2], call.slot)),
        *(_NO_SINKS if sinks is None else _sink_args(sinks, sink_leftpad)),
        *(_NO_REQUESTS if requests is None else _request_args(requests)),
    )  # fmt: skip
    packed = _NOTHING_PACKED
    if call.packed is not None:
        packed = call.packed.as_arguments or _packed_args(call.packed)
    return args + packed, (q, k, v, leftpad, sink_leftpad)


def _side_by_side(t: torch.Tensor) -> torch.Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _sink_args(sinks: SinkKV, leftpad: torch.Tensor | None) -> tuple[int, ...]:
    """The fields of the struct from `sinks` to `sink_kv_stride`; `leftpad` must live as long as the call."""
    q, k, v = sinks.q, sinks.k, sinks.v
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if leftpad is None else leftpad.data_ptr())
    return k.shape[2], sinks.evicted, *pointers, *q.stride()[:3], *k.stride()[:3]


def _request_args(requests: Requests) -> tuple[int, ...]:
    """The fields of the struct from `q_begin` to `kv_rows`; `requests` must live as long as the call."""
    rows = requests.kv_rows
    if rows is not None and len(rows) < requests.kv_begin[-1]:
        raise ValueError(f"requests have {requests.kv_begin[-1].item()} keys, kv_rows names {len(rows)}")
    return requests.q_begin.data_ptr(), requests.kv_begin.data_ptr(), 0 if rows is None else rows.data_ptr()


def _packed_args(packed: PackedKV) -> bytes:
    """The last fields of the struct, from `packed_start` on."""
    dim = packed.k_mean.shape[-1]
    packed.as_arguments = _PACKED_ARGS.pack(
        packed.start, packed.tokens, packed.k_codes.shape[2], packed.slot,
        dim // packed.v_scale.shape[3], rotation.size_for(dim), packed.k_codec.bits, packed.v_codec.bits,
        *_addresses(packed),
    )  # fmt: skip
    return packed.as_arguments


def _addresses(packed: PackedKV) -> tuple[int, ...]:
    return tuple(0 if t is None else t.data_ptr() for t in packed.arrays())


def cannot_quantize(k: torch.Tensor, k_codec: Codec, v_codec: Codec) -> str | None:
    """Why `quantize_blocks` does not serve keys (and values) such as `k`, `(B, Hkv, T, D)`, or None."""
    if k.device.type != "cpu":
        return f"native kernels quantize on the CPU, the tensors are on {k.device}"
    if {k_codec.name, v_codec.name} - set(CODECS):
        return (
            f"native kernels quantize to {', '.join(CODECS)}, not keys to {k_codec.name} and values to {v_codec.name}"
        )
    if k.dtype not in _DTYPES or k.shape[-1] > 512:
        return f"native kernels quantize heads of up to 512 in 16 or 32-bit floats, not {k.shape[-1]} {k.dtype}"
    return None


def quantize_blocks(jobs: Sequence[Blocks]) -> None:
    """`quant.blocks.quantize_blocks` on the CPU, bit for bit, with PyTorch's number of threads."""
    for job in jobs:
        _quantize(*job)


def _quantize(k: torch.Tensor, v: torch.Tensor, into: PackedKV, slot: int) -> None:
    k, v = _side_by_side(k), _side_by_side(v)
    dim = k.shape[3]
    args = _QUANTIZE_ARGS.pack(
        _DTYPES[k.dtype], torch.get_num_threads(), into.k_codec.bits, into.v_codec.bits,
        *k.shape[:2], k.shape[2] // BLOCK, dim, dim // into.v_scale.shape[3], rotation.size_for(dim),
        into.k_codes.shape[2], slot,
        k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3],
        *_addresses(into),
    )  # fmt: skip
    if status := _library().kvattn_quantize(args):
        raise RuntimeError(f"native quantization failed ({_ERRORS.get(status, status)}) for keys {tuple(k.shape)}")


def cannot_multiply(dtype: torch.dtype, weights: torch.dtype) -> str | None:
    """Why `linear` does not serve rows of `dtype` and such weights, or None."""
    if reason := unavailable():
        return reason
    if dtype not in _DTYPES or weights not in (dtype, torch.int8):
        return f"native kernels multiply floats with weights of their dtype or int8, not {dtype} with {weights}"
    return None


def linear(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """`x` `(rows, in)` times up to `MAX_WEIGHTS` weights `(out, in)`, side by side: `(rows, sum of out)`, contiguous.

    Sums are fp32, rounded to the dtype of `x`. Each weight is read once for all rows, of which there are `MAX_ROWS` at
    most, with PyTorch's number of threads. The weights are of the dtype of `x`, or all int8 without their scales.

    Raises:
        ValueError: more or fewer rows or weights than that.
    """
    if not (0 < x.shape[0] <= MAX_ROWS and 0 < len(weights) <= MAX_WEIGHTS):
        raise ValueError(f"1 to {MAX_ROWS} rows and 1 to {MAX_WEIGHTS} weights, not {x.shape[0]} and {len(weights)}")
    x, weights = _side_by_side(x), [_side_by_side(w) for w in weights]
    out = torch.empty((x.shape[0], sum(w.shape[0] for w in weights)), dtype=x.dtype)
    parts = [number for w in weights for number in (w.data_ptr(), w.shape[0], w.stride(0))]
    args = _LINEAR_ARGS.pack(
        _DTYPES[x.dtype], _INT8 if weights[0].dtype == torch.int8 else _DTYPES[weights[0].dtype],
        torch.get_num_threads(), len(weights),
        *x.shape, x.stride(0), x.data_ptr(), out.data_ptr(), *parts, *(0,) * (3 * MAX_WEIGHTS - len(parts)),
    )  # fmt: skip
    if status := _library().kvattn_linear(args):
        raise RuntimeError(
            f"native product failed ({_ERRORS.get(status, status)}) for x {tuple(x.shape)}, weights "
            f"{[tuple(w.shape) for w in weights]}"
        )
    return out


def read_bytes(data: torch.Tensor) -> None:
    """Reads `data`, contiguous, with PyTorch's number of threads, and keeps nothing of it: a measure of the memory."""
    _library().kvattn_read_bytes(data.data_ptr(), data.nbytes, torch.get_num_threads())
