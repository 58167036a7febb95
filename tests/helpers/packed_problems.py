"""Attention problems whose tokens are partly quantized."""

from collections.abc import Callable
from dataclasses import replace

import torch
from problems import problem

from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant import widths
from hf_kvattn.quant.blocks import Blocks, quantize_blocks
from hf_kvattn.quant.codecs import Codec, codec_for
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.packed import OF_BLOCKS, PackedKV, shapes_of

POISON = {torch.uint8: 255, torch.bfloat16: 1e30}


def blank(k_codec: Codec, v_codec: Codec, table: widths.KeyTable, slots: int, group: int) -> PackedKV:
    """Arrays with room for `slots` blocks of keys with this table, all poisoned."""
    *lead, dim = table.mean.shape
    arrays = {"k_mean": table.mean}
    if k_codec.by_channel:
        arrays |= {f"k_{name}": getattr(table, name) for name in ("step", "unit", "order", "widths")}
    for name, (shape, dtype) in shapes_of(k_codec, v_codec, dim, group).items():
        if name in OF_BLOCKS:
            size = (*lead, slots, *shape)
            arrays[name] = torch.full(size, POISON.get(dtype, 255), dtype=torch.uint8 if dtype not in POISON else dtype)
            arrays[name] = arrays[name].view(dtype)
    none = {f"k_{name}": None for name in ("step", "unit", "order", "widths")}
    return PackedKV(0, 0, k_codec, v_codec, **(none | arrays))


def packed_problem(
    name: str,
    k_bits: int | str,
    v_bits: int | str,
    dtype=torch.float32,
    split: float = 0.7,
    start: int = 0,
    change: Callable[[torch.Tensor, torch.Tensor], None] = lambda k, v: None,
) -> AttendCall:
    """A problem whose tokens from `start` on, whole blocks, are quantized, with poisoned spare blocks behind them.

    Before that `change` may write to its keys and values.
    """
    call = problem(name, dtype)
    call.k *= torch.exp2(-torch.randint(0, 8, (call.k.shape[-1],)))  # so that there are keys of all widths
    change(call.k, call.v)
    batch, heads, length, dim = call.k.shape
    count = max(1, int((length - start) * split) // BLOCK)
    done, group = count * BLOCK, 16 if dim % 32 else 32
    k, v = (t[:, :, start : start + done].float() for t in (call.k, call.v))
    k_codec, v_codec = codec_for(k_bits), codec_for(v_bits)
    table = widths.choose(k, None, k_codec.bits if k_codec.by_channel else 4)
    packed = blank(k_codec, v_codec, table, count + 3, group)
    quantize_blocks([Blocks(k, v, packed, 0)])
    call.packed = replace(packed, start=start, tokens=done)
    call.k, call.v = (torch.cat([t[:, :, :start], t[:, :, start + done :]], 2) for t in (call.k, call.v))
    return call


def as_dense(call: AttendCall) -> AttendCall:
    """The same problem with the packed tokens dequantized, which is what it means."""
    start, (packed_k, packed_v) = call.packed.start, call.packed.dense(0, call.packed.tokens // BLOCK)
    k, v = (
        torch.cat([t[:, :, :start].float(), packed, t[:, :, start:].float()], 2)
        for t, packed in ((call.k, packed_k), (call.v, packed_v))
    )
    return replace(call, k=k, v=v, packed=None)


PACKED = ["g3-65", "g4-d128", "g5-d80", "g8-d96", "d256", "long-split", "short-query", "rows-cross-chunk",
          "prefill-after-past", "prompt-jobs", "prompt-g8-d256", "prompt-softcap", "prompt-empty-row",
          "window-1", "window-crosses-tile", "window-many-queries", "softcap", "softcap-window",
          "padded", "padded-window", "not-causal", "s-aux", "s-aux-padded"]  # fmt: skip
