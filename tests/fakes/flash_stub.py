"""A CPU stand-in for the C++ half of flash-attn, so that the library's own Python code runs without a GPU.

`flash_attn_2_cuda.fwd_kvcache` of flash-attn 2.8.3 and `flash_attn_3.fwd`, as far as this package calls them: what they
compute, in fp32, the checks of `csrc/flash_attn/flash_api.cpp`, and checks of what the C++ code reads out of bounds or
gets wrong without a word. Arguments that this package never gives are refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import pytest
import torch
from impostor import Impostor

from hf_kvattn.kernels import flash_libraries as libraries

FA2, FA3 = "flash_attn", "flash_attn_interface"
HUB_FA2, HUB_FA3 = "kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3"
AITER = "kernels-community/aiter-flash-attn"
calls: list[dict] = []  # of the current `flash_libraries`: the arguments of every launch
probes: list[dict] = []  # those of the launches that only try a library


def fwd_kvcache(
    q, k, v, k_new, v_new, lengths, cos, sin, batch_idx, leftpad, block_table, alibi, out, scale, causal, left, right,
    softcap, interleaved, num_splits,
):  # fmt: skip
    """FA2's decoding entry: q `(B, Sq, Hq, D)`, k and v `(B, Sk, Hkv, D)`, to `[out, lse (B, Hq, Sq)]`."""
    _never_given(cos, sin, batch_idx, block_table, alibi, out)
    assert 0 <= num_splits <= 128, "num_splits > 128 not supported"
    if q.shape[-1] % 8:
        raise AssertionError("the library pads heads of this size by copying the whole cache")
    if k_new is not None:
        swapped = q.shape[1] == 1 and q.shape[2] > k.shape[2] and left < 0 and right < 0
        rows = q.shape[2] // k.shape[2] if swapped else q.shape[1]
        assert rows <= k.shape[1], "If key is supplied, it must have seqlen <= the seqlen of the KV cache"
        lengths = _append(q, k, v, k_new, v_new, lengths, leftpad)
    new = 0 if k_new is None else k_new.shape[1]
    return list(_forward("fa2", q, k, v, lengths, leftpad, scale, causal, left, right, softcap, new))


def fwd(
    q, k, v, k_new, v_new, qv, out, cu_q, cu_k, cu_k_new, used_q, lengths, max_q, max_k, page_table, batch_idx, leftpad,
    cos, sin, rotary_lengths, q_scale, k_scale, v_scale, scale, causal, left, right, chunk, softcap, interleaved,
    scheduler, num_splits, pack_gqa, sm_margin,
):  # fmt: skip
    """FA3's only entry; as `fwd_kvcache`."""
    _never_given(qv, out, cu_q, cu_k, cu_k_new, used_q, page_table, batch_idx, cos, sin, rotary_lengths)
    _never_given(max_q, max_k, q_scale, k_scale, v_scale, scheduler)
    assert chunk == 0 and 0 <= num_splits <= 256
    assert q.shape[-1] % 8 == 0, "head_size should be a multiple of 8"
    assert k.shape[0] == q.shape[0], "batch_size must be equal to batch_size_k"
    if k_new is not None:
        assert q.shape[1] <= k.shape[1], "If k_new is supplied, seqlen must be <= the seqlen of the KV cache"
        lengths = _append(q, k, v, k_new, v_new, lengths, leftpad)
    new = 0 if k_new is None else k_new.shape[1]
    return _forward("fa3", q, k, v, lengths, leftpad, scale, causal, left, right, softcap, new)


def _append(q, k, v, k_new, v_new, lengths, leftpad):
    """Writes the new tokens `(B, new, Hkv, D)` at `lengths`, in place; the lengths after that."""
    assert v_new is not None, "If key is supplied, value must also be passed in"
    assert lengths is not None, "If key is supplied, seqlens_k must also be passed in"
    shape = (k.shape[0], k_new.shape[1], *k.shape[2:])
    for tensor in (k_new, v_new):
        assert tensor.shape == shape and tensor.dtype == q.dtype and tensor.device == q.device
        assert tensor.stride(-1) == 1, "Key tensor must have contiguous last dimension"
        # Not in the C++ checks, as in `_forward`.
        assert all(tensor.stride(i) % 8 == 0 for i in (0, 1, 2)) and tensor.data_on_cpu.data_ptr() % 16 == 0
    new = torch.arange(shape[1])
    slots = lengths.data_on_cpu.long()[:, None] + new
    if bool((slots >= k.shape[1]).any()) or bool((slots < new).any()):
        raise AssertionError(f"out of bounds: tokens appended at {slots[:, 0].tolist()} of {k.shape[1]}")
    assert leftpad is None or bool((leftpad.data_on_cpu <= lengths.data_on_cpu).all()), "padding beyond the length"
    for buffer, tokens in ((k, k_new), (v, v_new)):
        buffer.data_on_cpu[torch.arange(shape[0])[:, None], slots] = tokens.data_on_cpu
    return Impostor((lengths.data_on_cpu + shape[1]).int(), q.device)


def _never_given(*arguments) -> None:
    if any(argument is not None for argument in arguments):
        raise NotImplementedError("the stand-in does not compute this; nothing here calls for it")


def _forward(library, q, k, v, lengths, leftpad, scale, causal, left, right, softcap, new):
    batch, q_len, q_heads, dim = q.shape
    capacity, kv_heads = k.shape[1:3]
    assert q.device.type == "cuda" and {k.device, v.device} == {q.device}, "Input tensor must be on CUDA device"
    assert torch.cuda.get_device_capability(q.device) >= (8, 0), "FlashAttention only supports Ampere GPUs or newer."
    assert q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    assert k.dtype == q.dtype and v.dtype == q.dtype, "query and key must have the same dtype"
    assert {t.stride(-1) for t in (q, k, v)} == {1}, "Input tensor must have contiguous last dimension"
    assert batch > 0 and dim <= 256 and q_heads % kv_heads == 0
    assert k.shape == v.shape == (batch, capacity, kv_heads, dim)
    for numbers in (lengths, leftpad):
        if numbers is not None:
            assert numbers.dtype == torch.int32 and numbers.device == q.device
            assert numbers.is_contiguous() and numbers.shape == (batch,)
    # Not in the C++ checks. Vectors of 16 bytes are read; and lengths must come with padding, see `attend`.
    assert all(t.stride(i) % 8 == 0 and t.data_on_cpu.data_ptr() % 16 == 0 for t in (q, k, v) for i in (0, 1, 2))
    assert leftpad is None or lengths is not None, "cache_leftpad without cache_seqlens: wrong where tiles are even"
    window = (left, right)
    calls.append({"library": library, "q": q, "k": k, "v": v, "leftpad": leftpad, "window": window, "new": new})

    q_, k_, v_ = (t.data_on_cpu.float() for t in (q, k, v))
    end = torch.full((batch,), capacity) if lengths is None else lengths.data_on_cpu.long()
    start = torch.zeros(batch, dtype=torch.long) if leftpad is None else leftpad.data_on_cpu.long()
    if not bool(((start >= 0) & (start <= end) & (end <= capacity)).all()):
        raise AssertionError(f"out of bounds: keys {start.tolist()} to {end.tolist()} of {capacity}")
    if q_len == 1:
        causal = False
    if causal:
        right = 0
    left, right = (-1 if size >= capacity else size for size in (left, right))
    key = torch.arange(capacity)
    position = (end[:, None] - q_len + torch.arange(q_len))[:, :, None]  # bottom-right aligned
    seen = (key >= start[:, None, None]) & (key < end[:, None, None]).expand(batch, q_len, capacity)
    if left >= 0:
        seen = seen & (key >= position - left)
    if right >= 0:
        seen = seen & (key <= position + right)
    group = q_heads // kv_heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q_, k_.repeat_interleave(group, 2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    out = torch.empty_like(q)
    out.copy_(torch.einsum("bhqk,bkhd->bqhd", weights, v_.repeat_interleave(group, 2)).to(q.dtype))
    if library == "fa3":
        nothing = bool((end == start).all())
        assert not nothing, "no row has a key: the scheduler of FA3 divides by their number"
        return out, Impostor(lse, q.device)  # -inf where nothing is seen
    return out, Impostor(torch.where(lse == -torch.inf, torch.inf, lse), q.device)


@functools.lru_cache(maxsize=1)
def _libraries() -> dict[str, ModuleType]:
    """The real Python modules over the stand-in; FA3's lies in the same source distribution, in a folder of its own."""
    try:
        files = importlib.metadata.files("flash-attn") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs flash-attn's Python code, which scripts/test.sh installs")
    (hopper,) = [file for file in files if str(file) == "hopper/flash_attn_interface.py"]
    stubs = {name: ModuleType(name) for name in ("flash_attn_2_cuda", "flash_attn_3", "flash_attn_3._C")}
    stubs["flash_attn_2_cuda"].fwd_kvcache = fwd_kvcache
    with mock.patch.dict(sys.modules, stubs):
        fa2 = importlib.import_module(FA2)
        spec = importlib.util.spec_from_file_location(FA3, hopper.locate())
        fa3 = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fa3)
    fa3.flash_attn_3_cuda = ModuleType("flash_attn_3_cuda")
    fa3.flash_attn_3_cuda.fwd = fwd
    return {FA2: fa2, FA3: fa3}


class Kernels(ModuleType):
    """In the place of the package `kernels`: a local cache that holds some kernels, and no network."""

    __version__ = "0.18.2"

    def __init__(self, cached: dict[str, ModuleType]):
        super().__init__("kernels")
        self.cached, self.asked = cached, []

    def install_kernel(self, repo_id, *, version=None, local_files_only=False, trust_remote_code=False):
        assert local_files_only, "nothing may be downloaded"
        self.asked.append((repo_id, version))
        if repo_id not in self.cached:
            raise ValueError(f"Version {version} of '{repo_id}' is not available in the local cache\nand so on")
        return f"/cache/{repo_id}"

    def get_local_kernel(self, repo_path, *, trust_remote_code=False):
        return self.cached[repo_path.removeprefix("/cache/")]


def probe(*args) -> str | None:
    """What it launches is no launch of a call."""
    before = len(calls)
    try:
        return real_probe(*args)
    finally:
        probes.extend(calls[before:])
        del calls[before:]


real_probe = libraries.probe


@contextlib.contextmanager
def flash_libraries(*names: str, **modules: ModuleType) -> Iterator[list[dict]]:
    """Only these flash-attn libraries can be loaded, for the body of a `with`; what they launch is returned.

    Args:
        names: import names, and repositories of the hub, whose kernels are in the local cache.
        modules: other modules in the place of those imported by these names.
    """
    real = _libraries()
    found = {name: modules.get(name, real[name] if name in names else None) for name in (FA2, FA3)}
    cached = {HUB_FA2: real[FA2], HUB_FA3: real[FA3], AITER: real[FA2]}
    found["kernels"] = (
        Kernels({name: cached[name] for name in names if name in cached}) if set(names) & set(cached) else None
    )
    calls.clear()
    probes.clear()
    libraries.load.cache_clear()
    with (
        mock.patch.dict(sys.modules, found),
        mock.patch.dict(libraries._probes, clear=True),
        mock.patch.object(libraries, "probe", probe),
    ):
        yield calls
    libraries.load.cache_clear()
