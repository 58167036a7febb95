"""Refuses gradients through a cache: stored tokens carry none, so they would be wrong."""

from __future__ import annotations

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
