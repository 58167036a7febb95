"""`RecurrentLayer`: what a layer of linear attention or convolution keeps, in a cache beside layers of attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch.nn.functional import pad
from transformers.cache_utils import LinearAttentionLayer

from .layer import KVLayer, shallow_copy

KINDS = ("conv_states", "recurrent_states")


class RecurrentLayer(LinearAttentionLayer):
    """One layer's states, transformers' own, with what the life of a cache asks of a layer.

    A state sums up all tokens so far. So it cannot go back, but for convolutions while the past is recorded
    (`activate_past_recording`): then the columns of earlier tokens are still there.

    Args:
        layer_idx: the layer's number.
        number_of_states: of each kind.
        kv: the keys and values of a layer that has both (Falcon-H1), or None.
    """

    def __init__(self, layer_idx: int, number_of_states: int, kv: KVLayer | None):
        super().__init__(number_of_states)
        self.layer_idx, self.kv = layer_idx, kv
        self._starts_whole = False  # whether recorded columns go back to the first token

    @property
    def is_sliding(self) -> bool:
        return self.kv is not None and self.kv.is_sliding

    def tensors(self) -> dict[str, torch.Tensor]:
        """The states that are there, as `conv_states.0`, `(B, channels, kernel)`, and `recurrent_states.0`, `(B, ...)`.

        Of recorded columns a copy of the newest, with zeros before the first token.
        """
        found = {}
        for i, state in self._those("conv_states"):
            missing = (self.conv_kernel_size[i] or 0) - state.shape[-1]
            found[f"conv_states.{i}"] = pad(state, (missing, 0)) if missing else state  # a negative number takes away
        return found | {f"recurrent_states.{i}": t for i, t in self._those("recurrent_states")}

    def _those(self, kind: str) -> list[tuple[int, torch.Tensor]]:
        return [(i, t) for i, t in getattr(self, kind).items() if t is not None]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for kind in KINDS for _, t in self._those(kind))

    def put(self, name: str, state: torch.Tensor) -> None:
        """Makes `state` the one that `tensors` calls `name`, as if a forward had left it there."""
        kind, index = name.split(".")
        i = int(index)
        if kind == "conv_states":
            self.dtype, self.device = state.dtype, state.device  # type: ignore[assignment]  # None, transformers says
            self.conv_kernel_size[i] = state.shape[-1]
        getattr(self, kind)[i] = state
        getattr(self, f"is_{kind}_initialized")[i] = self.has_previous_state[i] = True

    def fork(self) -> RecurrentLayer:
        """A layer with states of its own, which are small, and the same buffers of keys and values."""
        return copy.deepcopy(self, {id(self.kv): None if self.kv is None else shallow_copy(self.kv)})

    @torch.inference_mode(False)  # states are written to by later forwards, in whatever mode
    def lazy_initialization(self, *args, **kwargs) -> None:
        super().lazy_initialization(*args, **kwargs)

    def update_conv_state(  # type: ignore[override]  # `kwargs` holds the superclass's others
        self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs
    ) -> torch.Tensor:
        if not self.has_previous_state[state_idx]:
            self._starts_whole = self.record_past
        return super().update_conv_state(conv_states.detach(), state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        return super().update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)

    def change(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Each state becomes what `function` makes of it."""
        for kind in KINDS:
            for i, state in self._those(kind):
                changed = getattr(self, kind)[i] = function(state)
                self.device = changed.device  # type: ignore[assignment]  # as above

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError unless the states can go back by `tokens` tokens."""
        if not tokens:
            return
        if self._those("recurrent_states"):
            raise ValueError(
                f"layer {self.layer_idx}: a recurrent state cannot go back by {tokens} tokens; crop to nothing, or "
                "reset(), begins anew"
            )
        for i, state in self._those("conv_states"):
            recorded = state.shape[-1] - (0 if self._starts_whole else self.conv_kernel_size[i] or 0)
            if not self.record_past or recorded < tokens:
                raise ValueError(
                    f"layer {self.layer_idx}: its convolution can go back by {recorded if self.record_past else 0} "
                    f"tokens, not by {tokens}: activate_past_recording() keeps those of one forward"
                )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens, and recorded columns that no later forward needs."""
        for i, state in self._those("conv_states") if self.record_past else ():
            end = state.shape[-1] + tokens_to_remove
            begin = max(0, end - (self.conv_kernel_size[i] or 0))
            self._starts_whole = self._starts_whole and begin == 0
            self.conv_states[i] = state[..., begin:end].clone()

    def reset(self) -> None:
        """Forgets everything: the next forward makes new states, of whatever batch size."""
        fresh = RecurrentLayer(self.layer_idx, self.number_of_states, self.kv)
        fresh.record_past = self.record_past
        self.__dict__ = fresh.__dict__
