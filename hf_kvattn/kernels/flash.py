"""FlashAttention on NVIDIA GPUs: `flash_attn` (FA2), or `flash_attn_interface` (FA3) on compute capability 9.0.

One library function serves everything, `flash_attn_with_kvcache`, on views of the cache transposed to `(B, T, Hkv, D)`:
nothing is copied. A decode step is split over the tokens, with the query heads of a group as rows of their KV head; for
a prompt it launches the kernel of `flash_attn_func`. Left padding is `cache_leftpad`: nothing is unpadded, which would
copy keys and values and read lengths back from the GPU. The library could append the new tokens in the same call; here
the cache has written them before, as it does for every backend, with two small copies a layer.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from .call import AttendCall

_FA2, _FA3 = "flash_attn", "flash_attn_interface"
_INSTALL = "pip install flash-attn --no-build-isolation"


@functools.lru_cache(maxsize=2)
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The library of that import name, or why there is none."""
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        return None, f"{name}: {error}"


def _library(device: torch.device) -> tuple[ModuleType | None, str | None]:
    """The library that serves a GPU, or why none does."""
    capability = torch.cuda.get_device_capability(device)
    version = "{}.{}".format(*capability)
    if capability < (8, 0):
        return None, f"flash-attn needs a GPU of compute capability 8.0 or later, {device} has {version}"
    reasons = []
    for name in (_FA3, _FA2) if capability == (9, 0) else (_FA2,):
        module, reason = _load(name)
        if module is not None:
            return module, None
        reasons.append(reason)
    return None, f"no flash-attn for compute capability {version} ({'; '.join(map(str, reasons))}): {_INSTALL}"


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    if torch.version.hip is not None:
        return "flash-attn is used on NVIDIA GPUs only: on AMD's it may ignore left padding"
    reasons = [_load(name)[1] for name in (_FA2, _FA3)]
    return None if None in reasons else f"flash-attn cannot be imported ({'; '.join(map(str, reasons))}): {_INSTALL}"


def unsupported(call: AttendCall) -> str | None:
    q, k, v = call.q, call.k, call.v
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA GPUs, the tensors are on {q.device}"
    reason = _library(q.device)[1]
    if reason is not None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, not {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: one dtype is needed"
    if q.shape[-1] > 256 or q.shape[-1] % 8:
        return f"flash-attn takes a head_dim of up to 256 in steps of 8 (it pads others, copying), not {q.shape[-1]}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "flash-attn reads keys and values whose channels lie side by side"
    if call.mask is not None:
        return "flash-attn takes causal, window and left-padding rules, not a dense mask"
    if call.dropout > 0 or call.needs_grad:
        return "the flash backend is for inference: no dropout, no gradients"
    if call.packed is not None:
        return "flash-attn reads no quantized keys and values"
    if call.sinks is not None:
        return "flash-attn takes no first tokens beside a window"
    if call.slot and not _order_is_free(call):
        return (
            f"flash-attn reads keys in the order of storage; this ring buffer begins in slot {call.slot}, which serves "
            "only one query that sees all slots, without padding"
        )
    return None


def _order_is_free(call: AttendCall) -> bool:
    """Whether one query sees every slot of a ring buffer, so that it does not matter where the first token lies."""
    full = call.tokens == call.k.shape[2]
    return full and call.q.shape[2] == 1 and call.first is None and (call.window or call.kv_len) >= call.kv_len


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`: `(B, Tq, Hq, D)` in the dtype of `q`. Nothing is read back from the GPU."""
    library, reason = _library(call.q.device)
    if library is None:
        raise ValueError(f"backend 'flash' cannot be used here: {reason}")
    kv_len, window, first = call.kv_len, call.window, call.first
    begin = 0
    if window is not None and call.q.shape[2] == 1:  # one query: the window is a slice, and costs no speed then
        begin, window = max(0, kv_len - window), None
    k, v = (t[:, :, begin:kv_len].transpose(1, 2) for t in (call.k, call.v))
    padding = {}
    if first is not None:
        # With the length: without it the kernels read whole tiles as if nothing were padded.
        first = (first.to(call.q.device, torch.int32) - begin).clamp(min=0)
        padding = {"cache_leftpad": first, "cache_seqlens": kv_len - begin}
    out, lse, *_ = library.flash_attn_with_kvcache(
        call.q.transpose(1, 2),
        k,
        v,
        softmax_scale=call.scale,
        causal=call.causal,
        window_size=(-1, -1)
        if window is None
        else (window - 1, 0 if call.causal else -1),  # the query's own not counted
        softcap=call.softcap or 0.0,
        return_softmax_lse=True,
        **padding,
    )
    if call.s_aux is None:
        return out
    # A score more in the softmax shrinks every weight alike; builds of the library that take it are not needed.
    share = torch.sigmoid(lse.transpose(1, 2) - call.s_aux.float())
    return (out * share[..., None]).to(out.dtype)
