"""`SlidingWindowKVCache`: a window of the newest tokens, sinks, and positions that stay in range."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from .base import KVCache
from .consistency import changing_all
from .layer import KVLayer
from .positions import StreamPosition, limit_of
from .ring import SLACK, KVSlidingLayer
from .rope import SERVED_MODELS, layer_ropes

MAX_SINKS = 64


class SlidingWindowKVCache(KVCache):
    """Keeps a window of the newest tokens, and the first tokens as sinks, in memory that does not grow; for any model.

        cache = SlidingWindowKVCache(model.config, window=1024, sinks=4)
        model.generate(**inputs, past_key_values=cache)

    Every token sees the `window` newest tokens, itself included, and each row's first `sinks` tokens, which many models
    need to see (StreamingLLM, arXiv:2309.17453). The sinks have the positions right before the window, however long the
    stream is. On an enabled model, positions are counted from the stream's own start. Before they leave the range that
    the model was trained on, stored keys are rotated back; a constant shift of all positions changes nothing.

    Sinks, and prompts longer than the window, need an enabled model.

    Args:
        config: the model's config.
        window: tokens that each one sees, its own included; a layer with a smaller window of its own keeps that.
        sinks: first tokens that stay visible, fewer than `window` and at most 64.

    Raises:
        ValueError: impossible settings, with their values; an unsupported model; `sinks` on a model whose position
            embedding is not known to be a rotary one.
    """

    counts_positions = True

    def __init__(self, config: PreTrainedConfig, window: int, sinks: int = 0):
        if type(window) is not int or window < 1:
            raise ValueError(f"window must be an int of at least 1, got {window!r}")
        if type(sinks) is not int or not 0 <= sinks <= MAX_SINKS or sinks >= window:
            raise ValueError(f"sinks must be an int from 0 to {MAX_SINKS} below window={window}, got {sinks!r}")
        decoder = config.get_text_config(decoder=True)
        ropes = layer_ropes(decoder)
        if sinks and ropes is None:
            raise ValueError(
                f"{decoder.model_type}: sinks={sinks} are rotated with the model's rotary position embedding, which is "
                f"known of {', '.join(SERVED_MODELS)}; sinks=0 works"
            )
        self._limit = limit_of(ropes, window + SLACK + sinks)

        def make_layer(layer_idx: int, heads: int | None, dim: int | None, native: int | None) -> KVLayer:
            own, forced = (window, True) if native is None or window < native else (native, False)
            rope = None if ropes is None else ropes[layer_idx]
            layer = KVSlidingLayer(own, None, layer_idx, heads, dim, forced, sinks if forced else 0, rope)
            layer.is_sliding = native is not None  # which of the model's masks it gets
            return layer

        super().__init__(config, make_layer)
        self.settings = {"window": window, "sinks": sinks}

    def positions(
        self, asked: torch.Tensor | None, new: int, device: torch.device, padded: bool = False
    ) -> torch.Tensor | None:
        """See `KVCache.positions`. Rotates stored keys back first, where positions would leave the trained range.

        Args:
            padded: whether the last of the new tokens is padding in a row.

        Raises:
            ValueError: positions that do not go on where the stream stands, or too many new tokens for a model whose
                frequencies change with length; nothing has changed then.
        """
        if self._limit is None:
            return asked
        seen = self.get_seq_length()
        before = self.stands_at()
        if asked is None:
            start = before.start or 0
            asked = torch.arange(start + seen, start + seen + new, device=device)[None]
        if asked.ndim != 2 or asked.shape[1] != new:
            raise ValueError(f"position_ids {tuple(asked.shape)} must be (B, {new})")
        position = before.advance(asked, seen, padded)
        if self._limit.changes and new > self._limit.positions:
            raise ValueError(
                f"{new} tokens at once exceed the {self._limit.positions} positions at which the model's rotary "
                "frequencies change; give generate() a prefill_chunk_size"
            )
        rings = [layer for layer in self.kv_layers if isinstance(layer, KVSlidingLayer)]
        rebased = rings[0].rebased
        by = min(ring.oldest for ring in rings) - rebased
        if seen + new - rebased > self._limit.positions and by > 0:
            self.check_consistent_layers()  # or an inconsistent cache would look consistent afterwards
            with changing_all(self.kv_layers, "rotation of keys"):
                for ring in rings:
                    ring.rebase(by)
            rebased += by
        self._stream_position, self._next_position = before, position
        offset = (position.start or 0) + rebased
        return asked if offset == 0 else asked - offset

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self._forget_end()

    def reset(self) -> None:
        super().reset()
        self._stream_position = self._next_position = StreamPosition()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._forget_end()  # the row that was ahead may be gone

    def _forget_end(self) -> None:
        self._next_position = StreamPosition(self._next_position.start, None, self.get_seq_length())
