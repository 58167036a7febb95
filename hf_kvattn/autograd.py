"""PyTorch's modes around a cache. Gradients are refused: stored tokens carry none. Autocast settles what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _CutGraph(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, *sources):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grad_outputs):
        raise RuntimeError(
            "hf_kvattn caches hold no autograd graph, so gradients through cached attention would be wrong; "
            "train without past_key_values, or run the forward under torch.no_grad()"
        )


def cut_graph(out: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    """`out`; a backward pass through it raises, since the gradients of `sources` would be incomplete."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
        return _CutGraph.apply(out, *sources)
    return out


def outside_autocast(function: Callable, *args: Any) -> Any:
    """`function(*args)`; where autocast is on, without it, and with tensors in its dtype, as PyTorch's SDPA gets them.

    Autocast leaves float64 as it is, and so does this.

    The first of `args` is a tensor. What a module makes under autocast may have several dtypes (fp32 keys from a rotary
    embedding, bfloat16 values); a cache holds one.
    """
    kind = args[0].device.type
    available = kind == "cpu" or torch.amp.is_autocast_available(kind)
    if not (available and torch.is_autocast_enabled(kind)):
        return function(*args)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return function(*(t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype != torch.float64 else t for t in args))
