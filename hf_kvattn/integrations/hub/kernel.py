"""hf_kvattn as the `kernels` package loads it: the installed hf_kvattn, or else the copy that lies beside this file.

    kernel = kernels.get_kernel("OWNER/hf-kvattn", version=1, backend="cpu", trust_remote_code=True)
    kernel.enable(model, cache="int4")

`attn_implementation="OWNER/hf-kvattn"` takes the attention function alone, without the caches that it reads best.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("hf_kvattn") is None:
    sys.path.append(str(Path(__file__).parent))

from hf_kvattn.attention import kvattn_attention
from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.caches.sliding import SlidingWindowKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.plugin import disable, enable, enabled, is_enabled

# By these two names transformers knows a kernel that is an attention function and takes the masks of `sdpa`.
flash_attn_forward = kvattn_attention
supports_flash_attn = True

__all__ = [
    "QuantizedKVCache",
    "SlidingWindowKVCache",
    "StaticKVCache",
    "disable",
    "enable",
    "enabled",
    "flash_attn_forward",
    "is_enabled",
    "kvattn_attention",
    "supports_flash_attn",
]
