"""`plan`: how many bytes each cache takes, and the longest context that fits into a GPU beside the weights.

The numbers come from the caches themselves: each is made for the config and given one token on PyTorch's `meta` device,
where tensors have shapes but no memory.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .caches.base import KVCache
from .caches.configs import check_config
from .caches.registry import CACHES, COMPLETE

LONGEST = 1 << 24  # tokens; longer contexts are not searched

_GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One cache of a `Plan`.

    Attributes:
        cache_bytes: for the batch and context of the plan; None where the model cannot have this cache.
        longest_context: tokens a row that fit beside the weights, 0 if none do, at most `LONGEST`; None as above.
        fits: whether the batch and context of the plan fit.
        reason: why the model cannot have this cache, or None.
    """

    cache_bytes: int | None
    longest_context: int | None
    fits: bool
    reason: str | None = None


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`; `str()` of it is a table.

    Attributes:
        batch, context, dtype, gpu_bytes: as asked.
        weights_bytes: of the model's parameters and buffers.
        rows: each cache, from the one that keeps the predictions to the smallest.
        choice: the first of them that fits, or None.
    """

    batch: int
    context: int
    dtype: torch.dtype
    gpu_bytes: int
    weights_bytes: int
    rows: dict[str, Row]

    @property
    def choice(self) -> str | None:
        return next((name for name, row in self.rows.items() if row.fits), None)

    def __str__(self) -> str:
        lines = [
            f"{self.batch} x {self.context:,} tokens, {str(self.dtype).removeprefix('torch.')}: weights "
            f"{self.weights_bytes / _GIB:.2f} GiB of {self.gpu_bytes / _GIB:.2f} GiB",
            "",
            f"  {'cache':<8} {'GiB':>9}  {'longest context':>15}  fits",
        ]
        for name, row in self.rows.items():
            if row.cache_bytes is None or row.longest_context is None:
                lines.append(f"  {name:<8} {row.reason}")
                continue
            more = "+" if row.longest_context == LONGEST else ""
            lines.append(
                f"  {name:<8} {row.cache_bytes / _GIB:>9.3f}  {f'{row.longest_context:,}{more}':>15}  "
                f"{'yes' if row.fits else 'no'}"
            )
        return "\n".join([*lines, "", f"take: {self.choice or 'nothing here fits'}"])


def plan(
    config: PreTrainedConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    gpu_bytes: int,
    weights_bytes: int | None = None,
) -> Plan:
    """What each cache takes for `batch` rows of `context` tokens, and how long a context fits into `gpu_bytes`.

    The weights and a cache made with `max_cache_len=context` are counted. A cache that grows takes up to half as much
    again, and more while it moves. Activations, PyTorch's workspaces and the driver are not counted: subtract a
    gigabyte or two from `gpu_bytes`. While a prompt is read, a quantized cache holds it unquantized in one layer at a
    time.

    Args:
        config: the model's config.
        batch: rows; beams count as rows.
        context: tokens of a row, the prompt and the new ones.
        dtype: of the weights and of exact keys and values.
        gpu_bytes: of memory, for all of it.
        weights_bytes: of the weights, if they are not plain ones in `dtype` (quantized, or partly on the host); None
            computes them from the config.

    Raises:
        ValueError: numbers below 1, a model that the caches do not serve, or weights whose bytes the config does not
            say.
    """
    for name, value in (("batch", batch), ("context", context), ("gpu_bytes", gpu_bytes)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating one, got {dtype}")
    check_config(config)
    if weights_bytes is None:
        weights_bytes = model_bytes(config, dtype)
    elif type(weights_bytes) is not int or weights_bytes < 0:
        raise ValueError(f"weights_bytes must be an int of at least 0, or None, got {weights_bytes!r}")
    left = gpu_bytes - weights_bytes
    rows = {}
    for name in COMPLETE:
        size = functools.partial(cache_bytes, CACHES[name], config, batch, dtype)
        try:
            n_bytes = size(context)
        except ValueError as error:
            rows[name] = Row(None, None, False, str(error))
            continue
        longest = bisect.bisect_right(range(1, LONGEST + 1), left, key=size)
        rows[name] = Row(n_bytes, longest, n_bytes <= left)
    return Plan(batch, context, dtype, gpu_bytes, weights_bytes, rows)


def cache_bytes(
    make: Callable[..., KVCache], config: PreTrainedConfig, batch: int, dtype: torch.dtype, context: int
) -> int:
    """Bytes that `make(config, max_cache_len=context)` allocates for `batch` rows, recurrent states left out.

    Few-bit codes without a calibration take 32 exact tokens a layer more until there is a table.
    """
    cache = make(config, max_cache_len=context)
    for layer in cache.kv_layers:
        heads, dim = layer.expected_heads, layer.expected_dim
        if heads is None or dim is None:
            raise ValueError(f"{config.model_type}: the config does not say how many KV heads of which size there are")
        token = torch.empty(batch, heads, 1, dim, dtype=dtype, device="meta")
        layer.append(token, token[..., : layer.value_dim])
    return cache.nbytes


def model_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the parameters and buffers of the config's causal language model, tied ones counted once."""
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{config.model_type}: its weights are quantized: pass weights_bytes")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
