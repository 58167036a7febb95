"""The caches that the evaluation compares: one row, one variant.

A row says how to make the cache for a model config and a number of tokens, whether the model runs under the `kvattn`
attention hook, which packages it needs, and whether it must give the stock model's tokens (`exact`) or is lossy by
design. To compare another cache, add a row to `VARIANTS`.

What they take is measured here too: the sizes that stock caches don't report themselves, computed from the real tensor
storages, and how far the memory of the process rises while it decodes.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib.util
import itertools
import resource
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache, StaticCache

MakeCache = Callable[[PreTrainedConfig, int], Cache | None]

GROUP_SIZE = 32  # numbers that share one scale in the stock quantized caches
RESIDUAL_TOKENS = 128  # newest tokens that the stock quantized caches keep in the model's dtype


@dataclass(frozen=True)
class Variant:
    """One cache to compare.

    Args:
        name: what command lines and reports call it.
        hooked: run inside `hf_kvattn.enabled(model)`; otherwise the model is left untouched.
        make: `(config, capacity)` to a fresh cache with room for `capacity` tokens, or None for no cache at all. May
            raise ValueError or ImportError when this model, capacity or installation cannot have it; the reason then
            stands in the results.
        requires: import names of packages it cannot do without.
        exact: it must give the same tokens as the stock cache. False for caches that are lossy by design.
        compiled: decode steps are compiled (`enable(compile=True)`) where `generate()` makes them.
    """

    name: str
    hooked: bool
    make: MakeCache
    requires: tuple[str, ...] = ()
    exact: bool = True
    compiled: bool = False


def _no_cache(config: PreTrainedConfig, capacity: int) -> Cache | None:
    return None


def _stock_dynamic(config: PreTrainedConfig, capacity: int) -> Cache:
    return DynamicCache(config=config)


def _stock_static(config: PreTrainedConfig, capacity: int) -> Cache:
    return StaticCache(config=config, max_cache_len=capacity)


def _stock_static_of(length: int) -> MakeCache:
    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        if capacity > length:
            raise ValueError(f"a StaticCache of {length} tokens cannot hold the {capacity} tokens of this measurement")
        return StaticCache(config=config, max_cache_len=length)

    return make


def _stock_quantized(backend: str, **settings: int) -> MakeCache:
    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        return QuantizedCache(backend=backend, config=config, **settings)

    return make


def _stock_grouped(backend: str, bits: int, axis: int) -> MakeCache:
    return _stock_quantized(
        backend, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=GROUP_SIZE, residual_length=RESIDUAL_TOKENS
    )


def _kvattn_static(config: PreTrainedConfig, capacity: int) -> Cache:
    from hf_kvattn import StaticKVCache

    return StaticKVCache(config)


def _kvattn_static_fit(config: PreTrainedConfig, capacity: int) -> Cache:
    from hf_kvattn import StaticKVCache

    return StaticKVCache(config, max_cache_len=capacity)


def _kvattn_quantized(**settings: Any) -> MakeCache:
    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        from hf_kvattn import QuantizedKVCache

        return QuantizedKVCache(config, max_cache_len=capacity, **settings)

    return make


def _kvattn_window(config: PreTrainedConfig, capacity: int) -> Cache:
    from hf_kvattn import SlidingWindowKVCache

    return SlidingWindowKVCache(config, window=1024, sinks=4)


BASELINE = "stock-dynamic"  # the default of generate(): what every variant is compared with
STATIC_BASELINE = "stock-static"

# The axes are the ones that transformers recommends for each quantization package.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("none", False, _no_cache),
        Variant(BASELINE, False, _stock_dynamic),
        Variant(STATIC_BASELINE, False, _stock_static),
        Variant("stock-static-8192", False, _stock_static_of(8192)),
        Variant("stock-quanto-int4", False, _stock_grouped("quanto", 4, axis=0), ("optimum.quanto",), exact=False),
        Variant("stock-quanto-int2", False, _stock_grouped("quanto", 2, axis=0), ("optimum.quanto",), exact=False),
        Variant("stock-hqq-int8", False, _stock_grouped("hqq", 8, axis=1), ("hqq",), exact=False),
        Variant("stock-hqq-int4", False, _stock_grouped("hqq", 4, axis=1), ("hqq",), exact=False),
        Variant("stock-hqq-int2", False, _stock_grouped("hqq", 2, axis=1), ("hqq",), exact=False),
        Variant("stock-fp8", False, _stock_quantized("fp8"), exact=False),
        Variant("kvattn-static", True, _kvattn_static),
        Variant("kvattn-static-fit", True, _kvattn_static_fit),
        Variant("kvattn-static-compiled", True, _kvattn_static_fit, compiled=True),
        Variant("kvattn-window-1024", True, _kvattn_window, exact=False),
        Variant("kvattn-int8", True, _kvattn_quantized(bits=8), exact=False),
        Variant("kvattn-fp8", True, _kvattn_quantized(bits="fp8"), exact=False),
        Variant("kvattn-int4", True, _kvattn_quantized(bits=4), exact=False),
        Variant("kvattn-int4-compiled", True, _kvattn_quantized(bits=4), exact=False, compiled=True),
        Variant("kvattn-k8v4", True, _kvattn_quantized(key_bits=8, value_bits=4), exact=False),
        Variant("kvattn-int4-g64", True, _kvattn_quantized(bits=4, group_size=64), exact=False),
        Variant("kvattn-int3-g64", True, _kvattn_quantized(bits=3, group_size=64), exact=False),
        Variant("kvattn-int2", True, _kvattn_quantized(bits=2), exact=False),
        Variant("kvattn-int2-g64", True, _kvattn_quantized(bits=2, group_size=64), exact=False),
    )
}


def default_names() -> list[str]:
    """What is compared where nobody says: all but the compiled rows, which take a C++ compiler and minutes."""
    return [name for name, variant in VARIANTS.items() if not variant.compiled]


def select(names: Iterable[str]) -> list[Variant]:
    """The rows of these names, in the order given."""
    names = list(names)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"unknown cache variants {unknown}; known are {list(VARIANTS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"a cache variant is named twice in {names}")
    return [VARIANTS[name] for name in names]


def missing_package(variant: Variant) -> str | None:
    """The first import name that the variant requires and that is not installed."""
    for name in variant.requires:
        parent = name.rpartition(".")[0]
        # find_spec imports the parent of a dotted name, so the parent is asked for first.
        if (parent and importlib.util.find_spec(parent) is None) or importlib.util.find_spec(name) is None:
            return name
    return None


def try_make(variant: Variant, config: PreTrainedConfig, capacity: int) -> tuple[Cache | None, str | None]:
    """A fresh cache and None, or None and the reason why this variant cannot be measured here."""
    missing = missing_package(variant)
    if missing is not None:
        return None, f"the package {missing} is not installed"
    try:
        return variant.make(config, capacity), None
    except (ValueError, ImportError) as error:
        return None, str(error)


def running(model: PreTrainedModel, variant: Variant) -> AbstractContextManager[Any]:
    """The state of the model that the variant is measured in."""
    if not variant.hooked:
        return nullcontext()
    import hf_kvattn

    return hf_kvattn.enabled(model)


def generator(model: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """The model whose `generate()` is measured: `model`, or its compiled twin."""
    return _compiled_twin(model) if variant.compiled else model


@functools.lru_cache(maxsize=1)
def _compiled_twin(model: PreTrainedModel) -> PreTrainedModel:
    """`model` over the same weights, always enabled and compiled: what is compiled would not survive `disable`."""
    import hf_kvattn

    weights = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return hf_kvattn.enable(copy.deepcopy(model, weights), compile=True)


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
    text = config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    numbers = 0
    layers: list[Any] = cache.layers  # of many classes, with the attributes asked for here
    for layer in layers:
        if hasattr(layer, "_quantized_keys"):  # packed, so its tensors don't show how many numbers they hold
            numbers += 2 * batch_size * text.num_key_value_heads * head_dim * int(layer.get_seq_length())
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
