"""bfloat16 in Triton's interpreter (3.7.1), which keeps it as raw 16-bit integers and computes with those.

After `install` casts round as on a GPU, dots are right, and arithmetic or reductions on bfloat16 raise.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _to_float32(handle):
    if not _is_bf16(handle):
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest, ties to even, as raw bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _is_bf16(value) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _loud(name, function):
    def guarded(self, *arguments):
        if any(_is_bf16(getattr(each, "handle", each)) for each in arguments):
            raise NotImplementedError(f"{name} of bfloat16: cast to float32 first")
        return function(self, *arguments)

    return guarded


def install(monkeypatch) -> None:
    builder = interpreter.InterpreterBuilder
    dot, cast, fp_to_fp = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def create_dot(self, a, b, d, *rest):
        return dot(self, _to_float32(a), _to_float32(b), d, *rest)

    def cast_impl(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return cast(self, source, target)
        if before == tl.bfloat16:
            wide = _to_float32(source)
            return wide if after == tl.float32 else cast(self, wide, target)
        return interpreter.TensorHandle(_to_bf16(source.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return fp_to_fp(self, source, target, rounding)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_fp_to_fp", create_fp_to_fp)
    for name in ("binary_op", "unary_op"):
        monkeypatch.setattr(builder, name, _loud(name, getattr(builder, name)))
    monkeypatch.setattr(interpreter.ReduceOps, "apply", _loud("a reduction", interpreter.ReduceOps.apply))
