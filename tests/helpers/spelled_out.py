"""Attention under a window with sinks, spelled out a query at a time: what sliding caches must compute."""

import functools

import torch
from transformers import AttentionInterface


def spelled_out(module, query, key, value, attention_mask, scaling, window, sinks, first, angles, **kwargs):
    """Attention of a whole stream, a query at a time: its window, and the first tokens turned to stand before it."""
    own = kwargs.get("sliding_window")
    w, s = (own, 0) if own is not None and own <= window else (window, sinks)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        begin = int(first[b])
        for i in range(begin, query.shape[2]):
            low = max(begin, i - w + 1)
            kept = min(s, low - begin)
            gap = max(0, low - begin - s)
            sink_k = key[b, :, begin : begin + kept]
            if getattr(module, "use_rope", True):
                sink_k = turned(sink_k, gap * angles(module))
            k = torch.cat([sink_k, key[b, :, low : i + 1]], 1)
            v = torch.cat([value[b, :, begin : begin + kept], value[b, :, low : i + 1]], 1)
            scores = (query[b, :, i, None] * k).sum(-1) * scaling
            if kwargs.get("softcap"):
                scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
            out[b, :, i] = (torch.softmax(scores, -1)[..., None] * v).sum(1)
    return out.transpose(1, 2), None


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Pairs of channels `(c, c + n)` turned as in a plane, `(..., D)`, by `angle` `(n,)`."""
    n = len(angle)
    a, b = x[..., :n], x[..., n : 2 * n]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos(), x[..., 2 * n :]], -1)


def expected_logits(model, ids, window, sinks=0, first=None, **inputs) -> torch.Tensor:
    """Logits of the whole stream at once under the oracle above, from stock modules.

    Args:
        model: a stock model; it keeps the oracle as its attention.
        ids: `(B, T)`.
        window, sinks: as of a `SlidingWindowKVCache`.
        first: the position of each row's first token, `(B,)`; None means 0.
        inputs: more of what the model takes.
    """
    rotary = model.get_decoder().rotary_emb

    def angles(module):
        kind = getattr(module, "layer_type", None)
        return getattr(rotary, f"{kind}_inv_freq") if hasattr(rotary, f"{kind}_inv_freq") else rotary.inv_freq

    first = torch.zeros(len(ids), dtype=torch.long) if first is None else first
    oracle = functools.partial(spelled_out, window=window, sinks=sinks, first=first, angles=angles)
    AttentionInterface.register("oracle", oracle)
    model.get_decoder().set_attn_implementation("oracle")
    positions = (torch.arange(ids.shape[1]) - first[:, None]).clamp(min=0)
    with torch.no_grad():
        return model(ids, position_ids=positions, use_cache=False, **inputs).logits
