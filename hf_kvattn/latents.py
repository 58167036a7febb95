"""Multi-head latent attention over the latents themselves (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).

A module of this kind stores two latents a token, `c` and `k_rot`. From them it computes keys and values of every head,
for all tokens in every step: `k = [W_uk c, k_rot]`, `v = W_uv c`. But

    q . k = (W_uk^T q_nope) . c + q_rot . k_rot        sum of w v = W_uv (sum of w c)

So a few queries are better taken to the latents: all heads attend to one key, `[c, k_rot]`, whose first part is the
value, and nothing is expanded. For many queries over a long past, expanding is cheaper, and so it is done.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .attention import Handle, Rules, attend_tokens, check_rules
from .autograd import cut_graph
from .caches.layer import Stored, as_wide
from .kernels import dispatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .caches.base import KVCache

FEW = 128  # new tokens up to which queries are taken to the latents: about where both ways cost the same


def absorbs(module: Any) -> bool:
    """Whether keys and values are what `expand_kv` and one plain matrix make of latents, as described above."""
    linear = getattr(module, "kv_b_proj", None)
    if type(linear) is not torch.nn.Linear or linear.bias is not None or not hasattr(module, "expand_kv"):
        return False
    weight = linear.weight
    if weight.device.type == "meta" or not weight.is_floating_point():
        return False
    c, k_rot = (
        torch.linspace(-1, 1, 2 * width, dtype=weight.dtype, device=weight.device).view(1, 1, 2, width)
        for width in (module.kv_lora_rank, module.qk_rope_head_dim)
    )
    with torch.no_grad():
        up_k, up_v = _up_projections(module)
        expected = torch.cat((c @ up_k.mT, k_rot.expand(-1, len(up_k), -1, -1)), 3), c @ up_v.mT
        pairs = list(zip(module.expand_kv(c, k_rot), expected, strict=True))
    return all(a.shape == b.shape and (a - b).abs().max() <= 0.02 * b.abs().max() for a, b in pairs)


def _up_projections(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`W_uk` `(Hq, D_nope, rank)` and `W_uv` `(Hq, D_v, rank)`, views of the module's weight as it is now."""
    weight = module.kv_b_proj.weight.unflatten(0, (-1, module.qk_nope_head_dim + module.v_head_dim))
    up_k, up_v = weight.split((module.qk_nope_head_dim, module.v_head_dim), 1)
    return up_k, up_v


class LatentHandle(Handle):
    """The handle of a layer whose module is one that `absorbs`."""

    def __init__(self, cache: KVCache, index: int, given: Sequence[Any]):
        super().__init__(index, given)
        self._layer = cache.layer(index)

    def take(self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        self._module: Any = module
        shapes = {(t.shape[0], t.shape[2]) for t in (key, value, *self._new) if t is not None}
        if (
            self._new[0] is None
            or len(shapes) > 1
            or self.attended
            or not (mask is None or any(mask is each for each in self._given))
        ):
            raise self.refusal(module)
        self.attended = True

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        """`key` and `value`, `(B, Hq, T, D)`, are those of the new tokens alone."""
        layer, module, new = self._layer, self._module, query.shape[2]
        visible = check_rules(layer, query, new, rules)
        one, other = self._new
        assert one is not None and other is not None  # taken
        layer.append_latents(one, other)
        rules = replace(rules, scaling=query.shape[3] ** -0.5 if rules.scaling is None else rules.scaling)
        if visible > new and new <= FEW:
            rank, (up_k, up_v) = module.kv_lora_rank, _up_projections(module)
            q_nope, q_rot = query.split((module.qk_nope_head_dim, module.qk_rope_head_dim), 3)
            q, both = torch.cat((q_nope @ up_k, q_rot), 3), layer.latents()
            out = attend_tokens(layer, q, Stored(both, both), rules, visible)[..., :rank]
            out = (out.transpose(1, 2) @ up_v.mT).transpose(1, 2)
        else:
            if visible > new:
                key, value = module.expand_kv(*layer.latents().split(layer.latent, 3))
            out = attend_tokens(layer, query, Stored(*as_wide(key, value)), rules, visible)[..., : module.v_head_dim]
        layer.finish_attention(dispatch.quantize_blocks)
        return cut_graph(out, query, key, value).contiguous()
