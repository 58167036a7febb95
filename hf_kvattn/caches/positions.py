"""Positions of a stream without end: how the model counts them, and how far they may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .rope import Rope


class Limit(NamedTuple):
    """Where the positions of stored keys must be counted anew.

    Attributes:
        positions: from this position on, stored keys are rotated back.
        changes: whether the model's rotary frequencies change there.
    """

    positions: int
    changes: bool


def limit_of(ropes: Sequence[Rope | None] | None, needed: int) -> Limit | None:
    """The limit for layers with such embeddings and `needed` tokens in view; None where positions may grow for ever."""
    known = [rope for rope in ropes or () if rope is not None]
    if not known:
        return None
    limit, changes = min(rope.limit for rope in known), any(rope.changes for rope in known)
    if changes and needed > limit:
        raise ValueError(
            f"a window and sinks of {needed} tokens in all, slack included, exceed the {limit} positions at which "
            "the model's rotary frequencies change"
        )
    return Limit(max(limit, 2 * needed), changes)


class StreamPosition(NamedTuple):
    """How far a stream has come, in the model's own counting.

    Attributes:
        start: the position of an unpadded row's first token; None before the first tokens.
        end: the greatest position of the newest tokens; None where it is not known.
        seen: tokens of the stream up to there.
    """

    start: int | None = None
    end: int | None = None
    seen: int = 0

    def advance(self, asked: torch.Tensor, seen: int, padded: bool) -> StreamPosition:
        """The stream after new tokens at the positions `asked`, `(B or 1, T)`.

        To read positions back would stall a GPU at every step, so there only a stream's beginning is checked.

        Args:
            seen: tokens of the stream before them.
            padded: whether the last of the new tokens is padding in a row.

        Raises:
            ValueError: positions that run backwards or jump ahead.
        """
        now = seen + asked.shape[1]
        if seen and self.start is not None and asked.device.type != "cpu":
            return StreamPosition(self.start, None, now)
        # Padding is 0 or 1, wherever it is.
        backwards = (asked[:, 1:] < asked[:, :-1]) & (asked[:, :-1] > 1) & (asked[:, 1:] > 1)
        if bool(backwards.any()):
            raise ValueError(f"position_ids run backwards: {asked[backwards.any(1)][0].tolist()}")
        end = int(asked.max())
        if not seen or self.start is None:
            return StreamPosition(max(0, end - now + 1), end, now)
        if end >= self.start + now:
            last = self.start + now - 1
            raise ValueError(f"position_ids end at {end}, a jump ahead of {last}, where the stream stands")
        if self.end is not None and end <= self.end and not padded:
            raise ValueError(f"position_ids run backwards: they end at {end}, and ended at {self.end} before")
        return StreamPosition(self.start, end, now)
