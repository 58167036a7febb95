"""The ops of `decode_steps.py`: each stores a new token of each row and gives the attention of its query.

Numbers that change from step to step are tensors, made once a step for all layers (`Numbers`).
The ops are pure functions of tensors and constants but for the buffers, which they declare to mutate. With flash-attn
and Triton the kernels read the lengths themselves; elsewhere PyTorch's SDPA runs over the whole buffers under a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..kernels import dispatch
from ..kernels.call import AttendCall
from ..quant.codecs import CODECS
from ..quant.packed import PackedKV, check_tensor


class Numbers(NamedTuple):
    """What changes from step to step, on the device of the buffers.

    Attributes:
        lengths: `(B,)` int32, tokens stored before, the same for all rows: the position of the new ones.
        counts: `(2,)` int32, tokens in blocks and exact ones, the new one included. Without blocks the first is not
            read. In a ring the second counts all tokens, those that were overwritten too.
        slot: `(1,)` int64, where the new token goes.
        begin: `(B,)` int32, the first position that the query of each row sees (left padding, window), at most its own.
    """

    lengths: torch.Tensor
    counts: torch.Tensor
    slot: torch.Tensor
    begin: torch.Tensor


def _append_attend(
    k_buffer: torch.Tensor, v_buffer: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    lengths: torch.Tensor, counts: torch.Tensor, slot: torch.Tensor, begin: torch.Tensor, scale: float, wraps: bool,
    softcap: float | None, s_aux: torch.Tensor | None, backend: str,
) -> torch.Tensor:  # fmt: skip
    """Stores one new token of each row and gives the attention of its query, `(B, 1, Hq, D)`.

    Args:
        k_buffer, v_buffer: `(B, Hkv, slots, D)`, mutated; slots that were never written hold finite numbers.
        q: `(B, Hq, 1, D)`.
        k, v: `(B, Hkv, 1, D)`.
        lengths, counts, slot, begin: see `Numbers`.
        wraps: whether the buffers are rings: token `t` lies in slot `t % slots`.
        backend: `dispatch.chosen_backend()` at the time of the step.
    """
    _check(k_buffer, k, v, lengths, counts, slot, begin)
    slots = k_buffer.shape[2]
    call = AttendCall(q, k_buffer, v_buffer, scale, softcap=softcap, s_aux=s_aux, tokens=slots if wraps else None)
    with dispatch.backend(backend):
        serving = dispatch.serving(call, step=True)
        if hasattr(serving, "append_attend") and not serving.cannot_append(call):
            return serving.append_attend(call, k, v, lengths, begin)
        k_buffer.index_copy_(2, slot, k)
        v_buffer.index_copy_(2, slot, v)
        if hasattr(serving, "attend_lengths"):
            call.leftpad = begin
            return serving.attend_lengths(call, counts)
        ages = (lengths[:, None] - torch.arange(slots, device=slot.device)) % slots
        call.mask, call.tokens = (ages <= (lengths - begin)[:, None])[:, None, None], None
        return dispatch.attend(call).contiguous()


def _check(
    buffer: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor,
    slot: torch.Tensor, begin: torch.Tensor,
) -> None:  # fmt: skip
    """What the host has not seen before the step."""
    batch, heads, _, dim = buffer.shape
    for name, new in (("k", k), ("v", v)):
        check_tensor(name, new, (batch, heads, 1, dim), (buffer.dtype,), buffer.device)
    for name, numbers in (("lengths", lengths), ("begin", begin)):
        check_tensor(name, numbers, (batch,), (torch.int32,), buffer.device)
    check_tensor("counts", counts, (2,), (torch.int32,), buffer.device)
    check_tensor("slot", slot, (1,), (torch.int64,), buffer.device)


def _fake(k_buffer, v_buffer, q, k, v, lengths, counts, slot, begin, *rest) -> torch.Tensor:
    _check(k_buffer, k, v, lengths, counts, slot, begin)
    return q.new_empty(q.shape[0], 1, q.shape[1], q.shape[3])


def _append_attend_packed(
    k_exact: torch.Tensor, v_exact: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    lengths: torch.Tensor, counts: torch.Tensor, slot: torch.Tensor, begin: torch.Tensor,
    packed: list[torch.Tensor | None], codecs: list[str], layout: list[int], scale: float,
    softcap: float | None, s_aux: torch.Tensor | None, backend: str,
) -> torch.Tensor:  # fmt: skip
    """`append_attend` for a layer of a `QuantizedKVCache`, whose new tokens are exact.

    Args:
        k_exact, v_exact: `(B, Hkv, slots, D)`, mutated: the exact tokens before the blocks, then those after.
        packed: the arrays of a `PackedKV`, in its order.
        codecs: names in `CODECS` of its keys and values.
        layout: its `start` and `tokens` (as many as there is room for).
    """
    _check(k_exact, k, v, lengths, counts, slot, begin)
    call = AttendCall(q, k_exact, v_exact, scale, softcap=softcap, s_aux=s_aux, leftpad=begin)
    k_codec, v_codec = (CODECS[name] for name in codecs)
    start, tokens = layout
    call.packed = PackedKV(start, tokens, k_codec, v_codec, *packed)  # type: ignore[arg-type]  # some may be None
    with dispatch.backend(backend):
        serving = dispatch.serving(call, step=True)
        k_exact.index_copy_(2, slot, k)
        v_exact.index_copy_(2, slot, v)
        if hasattr(serving, "attend_lengths"):
            return serving.attend_lengths(call, counts)
        call.mask = _present(call, counts)
        return dispatch.attend(call).contiguous()


def _present(call: AttendCall, counts: torch.Tensor) -> torch.Tensor:
    """The mask `(B, 1, 1, Tk)` of the tokens that are there, where `call` has room for more."""
    assert call.packed is not None and call.leftpad is not None
    start, room = call.packed.start, call.packed.tokens
    key = torch.arange(call.kv_len, device=counts.device)
    in_blocks = (key >= start) & (key < start + room)
    exact = torch.where(key < start, key, key - room)  # where among the exact ones
    there = torch.where(in_blocks, key < start + counts[0], exact < counts[1])
    position = torch.where(key < start + room, key, exact + counts[0])
    return (there & (position >= call.leftpad[:, None]))[:, None, None]


_NEW = "Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor counts, Tensor slot, Tensor begin"
# Of `torch.ops.hf_kvattn`: arguments, implementation, fake implementation.
OPS: dict[str, tuple[str, Callable, Callable]] = {
    "append_attend": (
        f"Tensor(a!) k_buffer, Tensor(b!) v_buffer, {_NEW}, float scale, bool wraps, float? softcap, Tensor? s_aux, "
        "str backend", _append_attend, _fake,
    ),
    "append_attend_packed": (
        f"Tensor(a!) k_exact, Tensor(b!) v_exact, {_NEW}, Tensor?[] packed, str[] codecs, int[] layout, float scale, "
        "float? softcap, Tensor? s_aux, str backend", _append_attend_packed, _fake,
    ),
}  # fmt: skip


class Part(NamedTuple):
    """One layer's own arguments: of `append_attend_packed` where it has arrays of blocks, else of `append_attend`."""

    k: torch.Tensor
    v: torch.Tensor
    numbers: Numbers
    window: int | None
    wraps: bool
    packed: list[torch.Tensor | None]
    codecs: list[str]
    layout: list[int]
