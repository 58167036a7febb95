"""The caches that the evaluation compares: one row, one variant.

To compare another cache, add a row to `VARIANTS`; the package's own are made by `caches.registry.CACHES`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, QuantizedCache, StaticCache

import hf_kvattn
from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.caches.registry import CACHES
from hf_kvattn.evaluation.common.fake_quantized import SCHEMES, FakeQuantizedCache
from hf_kvattn.quant.calibration import file_name

MakeCache = Callable[[PreTrainedConfig, int], Cache | None]


@dataclass(frozen=True)
class Variant:
    """One cache to compare.

    `make` may raise ValueError or ImportError when this model, capacity or installation cannot have the cache; the
    reason then stands in the results.
    """

    name: str  # what command lines and reports call it
    hooked: bool  # run inside `hf_kvattn.enabled(model)`; otherwise the model is left untouched
    make: MakeCache  # (config, capacity) to a fresh cache with room for `capacity` tokens, or None for no cache at all
    requires: tuple[str, ...] = ()  # import names of packages that it cannot do without
    exact: bool = True  # it must give the same tokens as the stock cache; False for caches that are lossy by design
    fake: bool = False  # numbers are rounded as a scheme would, and stored in full: no time or memory is its own
    compiled: bool = False  # decode steps are compiled (`enable(compile=True)`) where `generate()` makes them


BASELINE = "stock-dynamic"  # the default of generate(): what every variant is compared with
STATIC_BASELINE = "stock-static"


def _static_of(length: int) -> MakeCache:
    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        if capacity > length:
            raise ValueError(f"a StaticCache of {length} tokens cannot hold the {capacity} tokens of this measurement")
        return StaticCache(config=config, max_cache_len=length)

    return make


def _stock_quantized(backend: str, bits: int, axis: int, package: str) -> Variant:
    """32 numbers share a scale, and the newest 128 tokens stay exact; `axis` is what transformers recommends."""
    settings = {"nbits": bits, "axis_key": axis, "axis_value": axis, "q_group_size": 32, "residual_length": 128}

    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        return QuantizedCache(backend=backend, config=config, **settings)

    return Variant(f"stock-{backend}-int{bits}", False, make, (package,), exact=False)


def _kvattn(name: str, cache: str, sized: bool = True, compiled: bool = False, **settings: Any) -> Variant:
    """A row of `CACHES`, with room for the whole measurement from the start if `sized`."""

    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        return CACHES[cache](config, **({"max_cache_len": capacity} if sized else {}), **settings)

    return Variant(f"kvattn-{name}", True, make, exact=cache == "static", compiled=compiled)


def _calibrated(bits: int) -> Variant:
    """`_kvattn`, with the calibration in the model's folder."""

    def make(config: PreTrainedConfig, capacity: int) -> Cache:
        path = Path(config._name_or_path, file_name(f"int{bits}"))
        if not path.is_file():
            raise ValueError(f"no calibration {path}: `hf-kvattn calibrate --model FOLDER --bits {bits}` makes it")
        return QuantizedKVCache(config, calibration=path, max_cache_len=capacity)

    return Variant(f"kvattn-int{bits}-calibrated", True, make, exact=False)


def _fake(scheme: str, bits: int) -> Variant:
    """A row of `fake_quantized.SCHEMES`."""
    return Variant(f"fake-{scheme}-int{bits}", False, lambda config, capacity: FakeQuantizedCache(config, scheme, bits),
                   exact=False, fake=True)  # fmt: skip


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("none", False, lambda config, capacity: None),
        Variant(BASELINE, False, lambda config, capacity: DynamicCache(config=config)),
        Variant(STATIC_BASELINE, False, lambda config, capacity: StaticCache(config=config, max_cache_len=capacity)),
        Variant("stock-static-8192", False, _static_of(8192)),
        _stock_quantized("quanto", 4, 0, "optimum.quanto"),
        _stock_quantized("quanto", 2, 0, "optimum.quanto"),
        _stock_quantized("hqq", 8, 1, "hqq"),
        _stock_quantized("hqq", 4, 1, "hqq"),
        _stock_quantized("hqq", 2, 1, "hqq"),
        Variant("stock-fp8", False, lambda config, capacity: QuantizedCache("fp8", config=config), exact=False),
        _kvattn("static", "static", sized=False),
        _kvattn("static-fit", "static"),
        _kvattn("static-compiled", "static", compiled=True),
        _kvattn("window-1024", "sliding", sized=False, window=1024, sinks=4),
        _kvattn("int8", "int8"),
        _kvattn("fp8", "fp8"),
        _kvattn("int4", "int4"),
        _kvattn("int4-compiled", "int4", compiled=True),
        _kvattn("k8v4", "k8v4"),
        _kvattn("int3", "int3"),
        _kvattn("int2", "int2"),
        *map(_calibrated, (4, 3, 2)),
        *(_fake(scheme, bits) for scheme in SCHEMES for bits in (4, 3, 2)),
    )
}


def default_names(fakes: bool = False) -> list[str]:
    """What is compared where nobody says: all but the compiled rows, which take a C++ compiler and minutes.

    Args:
        fakes: with those that stand for the rounding of a scheme alone.
    """
    return [name for name, variant in VARIANTS.items() if not variant.compiled and (fakes or not variant.fake)]


def select(names: Iterable[str]) -> list[Variant]:
    """The rows of these names, in the order given."""
    names = list(names)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"unknown cache variants {unknown}; known are {list(VARIANTS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"a cache variant is named twice in {names}")
    return [VARIANTS[name] for name in names]


def _installed(name: str) -> bool:
    """Looks for the parents of a dotted name first, because `find_spec` imports them."""
    return all(map(importlib.util.find_spec, itertools.accumulate(name.split("."), "{}.{}".format)))


def try_make(variant: Variant, config: PreTrainedConfig, capacity: int) -> tuple[Cache | None, str | None]:
    """A fresh cache and None, or None and the reason why this variant cannot be measured here."""
    missing = [name for name in variant.requires if not _installed(name)]
    if missing:
        return None, f"the package {missing[0]} is not installed"
    try:
        return variant.make(config, capacity), None
    except (ValueError, ImportError) as error:
        return None, str(error)


def running(model: PreTrainedModel, variant: Variant) -> AbstractContextManager[Any]:
    """The state of the model that the variant is measured in."""
    return hf_kvattn.enabled(model) if variant.hooked else nullcontext()


def generator(model: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """The model whose `generate()` is measured: `model`, or its compiled twin."""
    return _last_twin(model) if variant.compiled else model


def compiled_twin(model: PreTrainedModel) -> PreTrainedModel:
    """`model` over the same weights, always enabled and compiled: what is compiled would not survive `disable`."""
    weights = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return hf_kvattn.enable(copy.deepcopy(model, weights), compile=True)


_last_twin = functools.lru_cache(maxsize=1)(compiled_twin)
