"""Attention problems whose tokens are partly quantized."""

from collections.abc import Callable
from dataclasses import replace

import torch
from problems import problem

from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant.blocks import Blocks, quantize_blocks
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.packed import ARRAYS, OF_BLOCKS, PackedKV, shapes_of
from hf_kvattn.quant.widths import choose


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

    Before that `change` may write to its keys and values. Queries of keys by channel are such as their table is for.
    """
    call = problem(name, dtype)
    change(call.k, call.v)
    batch, heads, length, dim = call.k.shape
    count = max(1, int((length - start) * split) // BLOCK)
    done, group = count * BLOCK, 16 if dim % 32 else 32
    k, v = (t[:, :, start : start + done] for t in (call.k, call.v))
    packed = blank((batch, heads), count + 3, dim, (k_bits, v_bits), group, k)
    call.packed = replace(packed, start=start, tokens=done)
    if call.packed.k_codec.by_channel:
        call.q = (call.q.float() * importance(dim).sqrt()).to(dtype)
    quantize_blocks([Blocks(k, v, call.packed, 0)])
    call.k, call.v = (torch.cat([t[:, :, :start], t[:, :, start + done :]], 2) for t in (call.k, call.v))
    return call


def blank(
    lead: tuple[int, int],
    slots: int,
    dim: int,
    bits: tuple[int | str, int | str],
    group: int,
    k: torch.Tensor | None = None,
) -> PackedKV:
    """Poisoned arrays with room for `slots` blocks of keys such as `k` `(*lead, T, dim)`, or of random ones."""
    k = torch.randn(*lead, 2 * BLOCK, dim) if k is None else k
    codecs = codec_for(bits[0]), codec_for(bits[1])
    arrays: dict[str, torch.Tensor | None] = dict.fromkeys(ARRAYS)
    for name in OF_BLOCKS:
        shape, dtype = shapes_of(*codecs, dim, group)[name]
        made = torch.empty(*lead, slots, *shape, dtype=dtype)
        arrays[name] = made.fill_(1e30) if dtype == torch.bfloat16 else made.view(torch.uint8).fill_(255).view(dtype)
    arrays["k_mean"] = k.float().mean(2)
    if codecs[0].by_channel:
        table = choose(k, importance(dim).expand(*lead, dim), codecs[0].bits)
        arrays |= {f"k_{name}": array for name, array in table._asdict().items()}
    return PackedKV(0, 0, *codecs, **arrays)


def importance(dim: int) -> torch.Tensor:
    """E[q**2] of the channels, 1 on average, as unlike as they can be, so that all kinds of groups are met."""
    unlike = torch.linspace(-12, 12, dim).exp2()
    return (unlike / unlike.mean())[torch.randperm(dim, generator=torch.Generator().manual_seed(dim))]


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
