"""Attention problems whose tokens are partly quantized."""

from collections.abc import Callable
from dataclasses import replace

import torch
from problems import problem

from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.quant.layout import BLOCK, pack_keys, pack_values
from hf_kvattn.quant.packed import PackedKV
from hf_kvattn.quant.rotation import rotate


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
    change(call.k, call.v)
    batch, heads, length, dim = call.k.shape
    count = max(1, int((length - start) * split) // BLOCK)
    done, group = count * BLOCK, 16 if dim % 32 else 32
    k, v = (t[:, :, start : start + done].float() for t in (call.k, call.v))
    mean, k_codec, v_codec = k.mean(2), codec_for(k_bits), codec_for(v_bits)
    blocks = (k - mean[:, :, None]).unflatten(2, (count, BLOCK))
    k_codes, k_scale, k_zero = k_codec.quantize(blocks, -2, k_codec.key_shares)
    groups = rotate(v).unflatten(2, (count, BLOCK)).unflatten(-1, (-1, group))
    v_codes, v_scale, v_zero = v_codec.quantize(groups, -1, v_codec.value_shares)

    def roomy(tensor, poison):
        if tensor is None:
            return None
        spare = torch.full((*tensor.shape[:2], 3, *tensor.shape[3:]), poison, dtype=tensor.dtype)
        return torch.cat([tensor, spare], 2).contiguous()

    call.packed = PackedKV(
        start,
        done,
        k_codec,
        v_codec,
        roomy(pack_keys(k_codes, k_codec.planes), 255),
        roomy(k_scale[..., 0, :].bfloat16(), 1e30),
        roomy(None if k_zero is None else k_zero[..., 0, :].bfloat16(), 1e30),
        mean,
        roomy(pack_values(v_codes.flatten(-2), v_codec.planes), 255),
        roomy(v_scale[..., 0].transpose(-1, -2).bfloat16(), 1e30),
        roomy(None if v_zero is None else v_zero[..., 0].transpose(-1, -2).bfloat16(), 1e30),
    )
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
