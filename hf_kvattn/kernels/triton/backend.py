"""Triton on a GPU, for quantized caches: decode attention over packed blocks (the backend `triton`), and a kernel that
quantizes blocks. This module needs no triton. Those with the kernels, `attention_kernels.py` and `quantize.py`, do, and
are imported when the first call comes.

Compiled for eight GPUs, NVIDIA sm_80 to sm_120 and two of AMD, and checked in Triton's interpreter; never run on a
GPU. What it compiles to is in `model_cards/kernels/TRITON.md`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch

from ...quant.blocks import Blocks
from ...quant.codecs import Codec
from .. import flash, sdpa
from ..call import PIECES, QUANTIZED, RULES, AttendCall

SERVED = RULES | PIECES | QUANTIZED
READ_CODECS = ("int8", "fp8", "int4", "int3", "int2")
WRITTEN_CODECS = ("int8", "int4", "int3", "int2")
# Each tile of 32 query rows reads all codes again, mostly from the L2 cache: at 4 bits about 160 bytes a token and KV
# head of 128. Dequantized once, a token takes 512 bytes to write and as many to read: as much as seven tiles, which are
# 56 query tokens in a group of 4. Those are read in one launch, while any other backend takes many a layer.
MAX_QUERIES = 128
# In float32 the products leave the tensor cores, and the kernels spill: up to 1,392 bytes a thread on sm_80 (head_dim
# 256, 4 bits); on gfx942 heads of 256 do not fit into shared memory.
_DTYPES = (torch.float16, torch.bfloat16)


def unavailable() -> str | None:
    if not _installed():
        return "triton is not installed: pip install triton (PyTorch's CUDA and ROCm builds bring it along)"
    if not torch.cuda.is_available():
        return f"no GPU that this PyTorch ({torch.__version__}) can use"
    return _too_old(torch.device("cuda", torch.cuda.current_device()))


@functools.lru_cache
def _installed() -> bool:
    """Asked once: a search for a module reads folders, and backends are chosen for every call."""
    return importlib.util.find_spec("triton") is not None


def _too_old(
    device: torch.device, least: tuple[int, int] = (8, 0), needs: str = "the triton kernels need 8.0 (Ampere)"
) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < least:
        return "{} has compute capability {}.{}, {} or later".format(device, *capability, needs)
    return None


def _no_fp8(device: torch.device) -> str | None:
    """Why the kernels do not read fp8 on this GPU. ROCm's Triton may convert it in software, which doubles a kernel's
    instructions: 8-bit codes take as many bytes and are faster there."""
    if torch.version.hip is not None:
        return "triton kernels read fp8 on NVIDIA's GPUs only"
    return _too_old(device, (8, 9), "fp8 needs 8.9 (Ada)")


def unsupported(call: AttendCall) -> str | None:
    q = call.q
    if q.device.type != "cuda":
        return f"triton kernels run on a GPU, the tensors are on {q.device}"
    if reason := _too_old(q.device):
        return reason
    if q.dtype not in _DTYPES:
        return f"triton kernels take float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] % 16 or q.shape[-1] > 256:
        return f"triton kernels take heads of 16 to 256 in steps of 16, not {q.shape[-1]}"
    if q.shape[2] > MAX_QUERIES and call.packed is None:
        return f"triton kernels serve up to {MAX_QUERIES} query tokens, not {q.shape[2]}"
    codecs = set() if call.packed is None else {call.packed.k_codec.name, call.packed.v_codec.name}
    if codecs - set(READ_CODECS):
        return f"triton kernels read {', '.join(READ_CODECS)}, not {', '.join(sorted(codecs - set(READ_CODECS)))}"
    if "fp8" in codecs and (reason := _no_fp8(q.device)):
        return reason
    if q.shape[2] > MAX_QUERIES:
        k = q.new_empty((1, 1, 1, q.shape[3])).expand(*call.k.shape[:2], call.kv_len, -1)
        return _dense_backend(replace(call, k=k, v=k, packed=None))[1]
    if beyond := call.beyond(SERVED):
        return f"triton kernels serve {beyond}"
    return None


def _dense_backend(call: AttendCall) -> tuple[ModuleType, str | None]:
    """What computes `call`, of more than `MAX_QUERIES` query tokens, once they are dense; why nothing does, or None."""
    reason = flash.unavailable() or flash.unsupported(call)
    if reason is None:
        return flash, None
    if not sdpa.is_plain(call):
        return sdpa, f"beyond {MAX_QUERIES} query tokens blocks are dequantized for flash-attn or SDPA; {reason}"
    return sdpa, sdpa.unsupported(call)


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`. Queued; nothing waits for the GPU."""
    return attend_lengths(call, None)


def attend_lengths(call: AttendCall, lengths: torch.Tensor | None) -> torch.Tensor:
    """As `attend`, for a launch that is captured once for all lengths, which `attention.launch` describes."""
    from . import attention, dequantize  # triton is an optional dependency

    with torch.cuda.device(call.q.device):
        if lengths is None and call.q.shape[2] > MAX_QUERIES:
            dense = dequantize.dense(call)
            return _dense_backend(dense)[0].attend(dense)
        out, _ = attention.launch(call, _multiprocessors(call.q.device), lengths)
    return out


def cannot_quantize(k: torch.Tensor, k_codec: Codec, v_codec: Codec) -> str | None:
    """Why `quantize_blocks` does not serve keys (and values) such as `k`, `(B, Hkv, T, D)` on a GPU, or None."""
    if reason := _too_old(k.device):
        return reason
    if {k_codec.name, v_codec.name} - set(WRITTEN_CODECS):
        return (
            f"triton quantizes to {', '.join(WRITTEN_CODECS)}, not keys to {k_codec.name} and values to {v_codec.name}"
        )
    if k.shape[-1] > 256:
        return f"triton quantizes heads of up to 256, not {k.shape[-1]}"
    return None


def quantize_blocks(jobs: Sequence[Blocks]) -> torch.Tensor:
    """`quant.blocks.quantize_blocks` on a GPU. Queued."""
    from . import quantize  # triton is an optional dependency

    with torch.cuda.device(jobs[0].k.device):
        return quantize.launch(jobs)


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
