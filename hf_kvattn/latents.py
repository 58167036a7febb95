"""Multi-head latent attention over the latents themselves (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

A module of this kind stores two latents a token, `c` and `k_rot`. From them it computes keys and values of every head,
for all tokens in every step: `k = [W_uk c, k_rot]`, `v = W_uv c`. But

    q . k = (W_uk^T q_nope) . c + q_rot . k_rot        sum of w v = W_uv (sum of w c)

So a few queries are better taken to the latents: all heads attend to one key, `[c, k_rot]`, whose first part is the
value, and nothing is expanded. For many queries over a long past, expanding is cheaper, and so it is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention import Handle, Rules, attend_tokens, check_rules, scale_of
from .autograd import cut_graph
from .caches.layer import Stored, as_wide
from .kernels import dispatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .caches.base import KVCache

FEW = 128  # new tokens up to which queries are taken to the latents: about where both ways cost the same


def absorbs(module: Any) -> bool:
    """Whether keys and values are what `expand_kv` and one plain matrix make of latents, as described above."""
    if not is_plain(module):
        return False
    weight = module.kv_b_proj.weight
    c, k_rot = (
        torch.linspace(-1, 1, 2 * width, dtype=weight.dtype, device=weight.device).view(1, 1, 2, width)
        for width in (module.kv_lora_rank, module.qk_rope_head_dim)
    )
    with torch.no_grad():
        up_k, up_v = _up_projections(module, weight.dtype)
        expected = torch.cat((c @ up_k.mT, k_rot.expand(-1, len(up_k), -1, -1)), 3), c @ up_v.mT
        pairs = list(zip(module.expand_kv(c, k_rot), expected, strict=True))
    return all(a.shape == b.shape and (a - b).abs().max() <= 0.02 * b.abs().max() for a, b in pairs)


def is_plain(module: Any) -> bool:
    """Whether `kv_b_proj` does nothing but multiply by its weight, now: an adapter may come, or be merged, later."""
    linear = getattr(module, "kv_b_proj", None)
    if type(linear) is not torch.nn.Linear or linear.bias is not None or not hasattr(module, "expand_kv"):
        return False
    weight, is_hooked = linear.weight, linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(weight) is torch.nn.Parameter and weight.is_floating_point() and not (weight.is_meta or is_hooked)


def _up_projections(module: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`W_uk` `(Hq, D_nope, rank)` and `W_uv` `(Hq, D_v, rank)`, of the module's weight as it is now."""
    weight = module.kv_b_proj.weight.to(dtype).unflatten(0, (-1, module.qk_nope_head_dim + module.v_head_dim))
    up_k, up_v = weight.split((module.qk_nope_head_dim, module.v_head_dim), 1)
    return up_k, up_v


class LatentHandle(Handle):
    """The handle of a layer whose module is one that `absorbs`."""

    def __init__(self, cache: KVCache, index: int, given: Sequence[Any], module: Any):
        super().__init__(index, given)
        self._layer, self._module = cache.layer(index), module

    def handed_out(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether these can be what the module made of the latents that `update` returned."""
        latent = self._new[0]
        return latent is not None and all((t.shape[0], t.shape[2]) == latent.shape[0:3:2] for t in (key, value))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        """`key` and `value`, `(B, Hq, T, D)`, are those of the new tokens alone."""
        layer, module, new, dtype = self._layer, self._module, query.shape[2], query.dtype
        visible = check_rules(layer, query, new, rules)
        one, other = self._new
        assert one is not None and other is not None  # taken
        layer.append_latents(one.to(dtype), other.to(dtype))  # queries have autocast's dtype, where it is on
        rules = rules._replace(scaling=scale_of(query, rules))
        if visible > new and new <= FEW:
            rank, (up_k, up_v) = module.kv_lora_rank, _up_projections(module, dtype)
            q_nope, q_rot = query.split((module.qk_nope_head_dim, module.qk_rope_head_dim), 3)
            q, both = torch.cat((q_nope @ up_k, q_rot), 3), layer.latents()
            out = attend_tokens(layer, q, Stored(both, both), rules, visible)[..., :rank]
            out = (out.transpose(1, 2) @ up_v.mT).transpose(1, 2)
        else:
            if visible > new:
                latents = layer.latents().to(module.kv_b_proj.weight.dtype).split(layer.latent, 3)
                key, value = (t.to(dtype) for t in module.expand_kv(*latents))
            out = attend_tokens(layer, query, Stored(*as_wide(key, value)), rules, visible)[..., : module.v_head_dim]
        layer.finish_attention(dispatch.quantize_blocks)
        return cut_graph(out, query, key, value).contiguous()
