"""`CACHES`: the caches that have a name, one row each. Whatever takes or lists cache names reads this table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from .base import KVCache
from .quantized import QuantizedKVCache
from .sliding import SlidingWindowKVCache
from .static import StaticKVCache


@dataclass(frozen=True)
class CacheKind:
    """How a named cache is made.

    Attributes:
        cls: its class.
        settings: the arguments that the name stands for.
        required: arguments that the name leaves open and the class needs.
        calibrated: whether a model's folder may hold a calibration for it (`quant.calibration.file_name`).
    """

    cls: type[KVCache]
    settings: dict[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    calibrated: bool = False

    def __call__(self, config: PreTrainedConfig, **more: Any) -> KVCache:
        """A fresh cache for a model of `config`; `more` are arguments of the class, `required` ones among them."""
        return self.cls(config, **{**self.settings, **more})


# From the one that keeps the predictions to the smallest; `plan` takes the first that fits.
CACHES: dict[str, CacheKind] = {
    "static": CacheKind(StaticKVCache),
    "int8": CacheKind(QuantizedKVCache, {"bits": 8}, calibrated=True),
    "fp8": CacheKind(QuantizedKVCache, {"bits": "fp8"}),
    "k8v4": CacheKind(QuantizedKVCache, {"key_bits": 8, "value_bits": 4}),
    "int4": CacheKind(QuantizedKVCache, {"bits": 4}, calibrated=True),
    "int3": CacheKind(QuantizedKVCache, {"bits": 3}, calibrated=True),
    "int2": CacheKind(QuantizedKVCache, {"bits": 2}, calibrated=True),
    "sliding": CacheKind(SlidingWindowKVCache, required=("window",)),
}

# Complete without further arguments: what `enable(model, cache=NAME)` takes and `plan` lists.
COMPLETE: tuple[str, ...] = tuple(name for name, kind in CACHES.items() if not kind.required)
CLASSES: dict[str, type[KVCache]] = {kind.cls.__name__: kind.cls for kind in CACHES.values()}
