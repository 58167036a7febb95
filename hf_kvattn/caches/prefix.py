"""`KnownPrefix`: what a cache that was loaded knows of the tokens in it. The tokens themselves are not kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

TokenIds = torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any]


class KnownPrefix(NamedTuple):
    """The hash of the first `length` ids of each row, padding included, by `hash_ids`."""

    sha256: str
    length: int


def hash_ids(token_ids: TokenIds, batch_size: int, length: int) -> str:
    """sha256 of the ids `(B, length)` as little-endian int64, row after row.

    Args:
        token_ids: integers of that shape, `(length,)` for a single row, or a tokenizer's output with `input_ids`.
        batch_size, length: the shape that they must have.

    Raises:
        ValueError: no integers, or another shape.
    """
    if isinstance(token_ids, Mapping):
        token_ids = token_ids.get("input_ids")  # type: ignore[assignment]  # None is refused below
    try:
        ids = torch.as_tensor(token_ids).cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"token_ids must be integers: {error}") from error
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids must be integers, got {ids.dtype}")
    if ids.shape not in [(batch_size, length), *([(length,)] if batch_size == 1 else [])]:
        raise ValueError(f"token_ids are {ids.shape}, the cache holds {(batch_size, length)} tokens")
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
