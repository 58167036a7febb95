"""Bytes of a cache, and how far memory rises while something runs.

Stock caches don't report their sizes, so those are computed from the real tensor storages.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import Cache, PreTrainedConfig

from hf_kvattn.caches.configs import kv_shape


def _storages(value: Any) -> dict[int, int]:
    """Address -> bytes of every tensor storage in nested dicts, lists and tuples."""
    found: dict[int, int] = {}
    for leaf in tree_leaves(value):
        if hasattr(leaf, "__tensor_flatten__"):  # a wrapper (quanto): the memory is in its inner tensors
            found |= _storages([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
        elif isinstance(leaf, torch.Tensor):
            found[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
    return found


def cache_bytes(cache: Cache | None) -> int:
    """Bytes allocated for the cache: what ours report, the summed tensor storages of stock ones."""
    if cache is None:
        return 0
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    return sum(_storages([vars(layer) for layer in cache.layers]).values())


def bits_per_element(cache: Cache | None, config: PreTrainedConfig) -> float | None:
    """Average bits spent on one cached number, scales and full-precision residuals included; None without a cache.

    Stock caches are measured as one row fills them now; a StaticCache counts its whole allocation as filled.
    """
    if cache is None:
        return None
    if hasattr(cache, "bits_per_element"):
        return float(cache.bits_per_element)
    heads, head_dim = kv_shape(config.get_text_config(decoder=True))
    numbers = 0
    layers: list[Any] = cache.layers  # of many classes, with the attributes asked for here
    for layer in layers:
        if hasattr(layer, "_quantized_keys"):  # packed, so its tensors don't show how many numbers they hold
            assert heads is not None and head_dim is not None
            numbers += 2 * heads * head_dim * int(layer.get_seq_length())
        elif layer.keys is not None:
            numbers += layer.keys.numel() + layer.values.numel()
    return 8 * cache_bytes(cache) / numbers if numbers else None


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _max_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_high_water_mark() -> bool:
    """Whether Linux let VmHWM be set to the resident memory of now; glibc hands back what was freed before that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


class PeakMemory:
    """How far memory rises above its level at `start()`.

    On CUDA this is the allocator's peak, on a CPU the peak of the process's resident memory. glibc keeps freed memory
    and reuses it without the resident memory rising, so it is asked to hand it back first.
    """

    def __init__(self, device: torch.device) -> None:
        self._reset: Callable[[], object] = _reset_high_water_mark
        self._level: Callable[[], int] = _max_rss_bytes
        self._peak: Callable[[], int] = _max_rss_bytes
        if device.type == "cuda":
            self.method = "peak of the CUDA allocator above its level before the steps"
            self._reset = partial(torch.cuda.reset_peak_memory_stats, device)
            self._level = partial(torch.cuda.memory_allocated, device)
            self._peak = partial(torch.cuda.max_memory_allocated, device)
        elif _reset_high_water_mark():
            self.method = "peak resident memory (VmHWM, reset before) above its level before the steps"
            self._level, self._peak = partial(_status_bytes, "VmRSS"), partial(_status_bytes, "VmHWM")
        else:
            self.method = "rise of ru_maxrss, which cannot be reset: 0 when an earlier peak was higher"

    def start(self) -> None:
        self._reset()
        self._before_bytes = self._level()

    def stop(self) -> int:
        return max(0, self._peak() - self._before_bytes)
