"""hf_kvattn: fast and lean `model.generate()` on long contexts, without leaving transformers.

import hf_kvattn
from hf_kvattn import StaticKVCache

hf_kvattn.enable(model)
model.generate(**inputs, past_key_values=StaticKVCache(model.config, max_cache_len=8192))
"""

from .caches.base import KVCache
from .caches.quantized import QuantizedKVCache
from .caches.serialize import load_cache, save_cache
from .caches.sliding import SlidingWindowKVCache
from .caches.static import StaticKVCache
from .describe import describe
from .kernels.dispatch import backend, set_backend
from .planning import plan
from .plugin import disable, enable, enabled, is_enabled

__version__ = "0.1.0"

__all__ = [
    "KVCache",
    "QuantizedKVCache",
    "SlidingWindowKVCache",
    "StaticKVCache",
    "backend",
    "describe",
    "disable",
    "enable",
    "enabled",
    "is_enabled",
    "load_cache",
    "plan",
    "save_cache",
    "set_backend",
]
