"""Where a stream without end stands: positions as the model counts them, and how far they may go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .rope import Rope


class Limit(NamedTuple):
    """Positions from which on stored keys are turned back, and whether the model's frequencies change there."""

    positions: int
    changes: bool


def limit_of(ropes: Sequence[Rope | None] | None, needed: int) -> Limit | None:
    """The limit of a model with such embeddings, for `needed` tokens in view; None where positions may go on."""
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
    """How far a stream has come, as the model counts.

    Attributes:
        start: the position of an unpadded row's first token.
        end: the greatest of the rows' last positions; None where it is not known.
    """

    start: int
    end: int | None = None


def go_on(position: StreamPosition | None, asked: torch.Tensor, seen: int, padded: bool) -> StreamPosition:
    """Where a stream of `seen` tokens stands after tokens at the positions `asked`, `(B or 1, T)`.

    Reading positions back would stall a GPU at every step, so there only a stream's beginning is looked at.

    Args:
        padded: whether the last of the new tokens is padding in a row.

    Raises:
        ValueError: positions that do not go on from where the stream stands.
    """
    if seen and position is not None and asked.device.type != "cpu":
        return position
    backwards = (asked[:, 1:] < asked[:, :-1]) & (asked[:, :-1] > 1)  # padding is 0 or 1
    if bool(backwards.any()):
        raise ValueError(f"position_ids run backwards: {asked[backwards.any(1)][0].tolist()}")
    end, last = int(asked[:, -1].max()), seen + asked.shape[1] - 1
    if not seen or position is None:
        return StreamPosition(end - last, end)
    if end > position.start + last:
        raise ValueError(f"position_ids end at {end}, a jump ahead of {position.start + last}, where the stream stands")
    if position.end is not None and end <= position.end and not padded:
        raise ValueError(f"position_ids run backwards: they end at {end}, and ended at {position.end} before")
    return StreamPosition(position.start, end)
