"""Rotates stored keys and queries to other positions with the model's own rotary embedding (Su et al., 2021).

A rotation by `a` positions after one by `b` is a rotation by `a + b`, whatever the frequencies are. Linear, Llama-3,
YaRN, dynamic and LongRoPE scaling only choose the frequencies. The angles and the pairs of channels come from the
model's own code.
"""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

# Models that rotate the keys of every layer, except those in `no_rope_layers`, with the function and class below.
SERVED_MODELS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text", "granite", "smollm3")
# Kinds whose frequencies change with the longest position seen: positions must stay below the first change.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class Rope:
    """Rotates by whole positions, for the layers of one type.

    Attributes:
        limit: positions below it are what the model was trained on.
        changes: whether frequencies change from there on.
    """

    def __init__(self, decoder: PreTrainedConfig, layer_type: str):
        module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(decoder)].__module__]
        embedding = next(c for name, c in vars(module).items() if name.endswith("RotaryEmbedding"))
        self._apply, self._embedding = module.apply_rotary_pos_emb, embedding(decoder)
        parameters, self._of_type, self._scaling = decoder.rope_parameters, {}, "attention_scaling"
        if layer_type in parameters:  # one set for each type of layer
            parameters, self._of_type = parameters[layer_type], {"layer_type": layer_type}
            self._scaling = f"{layer_type}_attention_scaling"
        self.changes = parameters.get("rope_type", "default") in _LENGTH_DEPENDENT
        self.limit = int(decoder.max_position_embeddings)
        if self.changes:
            self.limit = int(parameters.get("original_max_position_embeddings") or self.limit)
        # The last request and its angles.
        self._last: tuple[tuple, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor]] | None = None

    def rerotate(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """`x` `(B, H, T, D)` rotated by `by` `(B or 1, T)` positions, computed in fp32."""
        return self._rerotate(x, self._angles(by, x.device))

    def rerotate_back(
        self, x: torch.Tensor, gap: int, ahead: int = 0, leftpad: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotates token `t` by `ahead - max(0, gap + t)` positions. All layers of a forward ask for the same angles.

        Args:
            leftpad: `(B,)`, by how much the gap of each row is smaller; None for 0.
        """
        asked, last = (gap, ahead, x.shape[2], x.device), self._last
        if last is None or last[0] != asked or not _known_equal(last[1], leftpad):
            tokens = torch.arange(x.shape[2], device=x.device)[None]
            by = ahead - (gap + tokens - (0 if leftpad is None else leftpad[:, None])).clamp(min=0)
            self._last = last = (asked, leftpad, self._angles(by, x.device))
        return self._rerotate(x, last[2])

    def _rerotate(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        wide = x.float()
        return self._apply(wide, wide[:, :0], *angles)[0].to(x.dtype)

    def _angles(self, by: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._embedding(torch.empty(0, device=device), by, **self._of_type)
        scaling = getattr(self._embedding, self._scaling)
        return cos / scaling, sin / scaling


def layer_ropes(decoder: PreTrainedConfig) -> list[Rope | None] | None:
    """The embedding of each layer, None for a layer without one; None if the model's embedding is not known."""
    if decoder.model_type not in SERVED_MODELS:
        return None
    types = getattr(decoder, "layer_types", None) or ["full_attention"] * decoder.num_hidden_layers
    rotated = getattr(decoder, "no_rope_layers", None) or [1] * decoder.num_hidden_layers
    of_type = {kind: Rope(decoder, kind) for kind in set(types)}
    return [of_type[kind] if use else None for kind, use in zip(types, rotated, strict=True)]


def _known_equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether both are known to hold the same numbers. A GPU is not asked: to wait for its answer would stall it."""
    if one is None or other is None:
        return one is other
    return one.device.type == other.device.type == "cpu" and torch.equal(one, other)
