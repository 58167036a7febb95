"""Bytes of a cache, and how far memory rises while something runs.

Stock caches don't report their sizes, so those are computed from the real tensor storages.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from hf_kvattn.caches.configs import kv_shape


def _storages(value: Any, found: dict[int, int]) -> None:
    """Collect address -> bytes of every tensor storage reachable from `value`."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):  # a wrapper (quanto): the memory is in its inner tensors
            names, _ = value.__tensor_flatten__()
            _storages([getattr(value, name) for name in names], found)
        else:
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        _storages(list(value.values()), found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _storages(item, found)


def cache_bytes(cache: Cache | None) -> int:
    """Bytes allocated for the cache: what ours report, the summed tensor storages of stock ones."""
    if cache is None:
        return 0
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    found: dict[int, int] = {}
    for layer in cache.layers:
        _storages(vars(layer), found)
    return sum(found.values())


def bits_per_element(cache: Cache | None, config: PreTrainedConfig, batch_size: int = 1) -> float | None:
    """Average bits spent on one cached number, scales and full-precision residuals included; None without a cache.

    Stock caches are measured as they are filled now; a StaticCache counts its whole allocation as filled.
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
            numbers += 2 * batch_size * heads * head_dim * int(layer.get_seq_length())
        elif layer.keys is not None:
            numbers += layer.keys.numel() + layer.values.numel()
    return 8 * cache_bytes(cache) / numbers if numbers else None


class PeakMemory:
    """How far memory rises above its level at `start()`.

    On CUDA this is the allocator's peak, on a CPU the peak of the process's resident memory. glibc keeps freed memory
    and reuses it without the resident memory rising, so it is asked to hand it back first.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before_bytes = 0
        if device.type == "cuda":
            self.method = "peak of the CUDA allocator above its level before the steps"
        elif self._reset_high_water_mark():
            self.method = "peak resident memory (VmHWM, reset before) above its level before the steps"
        else:
            self.method = "rise of ru_maxrss, which cannot be reset: 0 when an earlier peak was higher"

    @staticmethod
    def _reset_high_water_mark() -> bool:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            return False
        return True

    @staticmethod
    def _status_bytes(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key + ":"))

    def _read_bytes(self, peak: bool) -> int:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(self.device)
        if self.method.startswith("rise"):
            unit = 1 if sys.platform == "darwin" else 1024
            return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self._status_bytes("VmHWM" if peak else "VmRSS")

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
            if trim is not None:
                trim(0)
            self._reset_high_water_mark()
        self.before_bytes = self._read_bytes(peak=False)

    def stop(self) -> int:
        return max(0, self._read_bytes(peak=True) - self.before_bytes)
