"""Medians with their spread, and ratios of times that were taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import torch

T = TypeVar("T")


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    found = torch.tensor(list(values), dtype=torch.float64)
    return dict(zip(("median", "p20", "p80"), found.quantile(found.new_tensor([0.5, 0.2, 0.8])).tolist(), strict=True))


def spread_of(rounds: Iterable[Iterable[float]]) -> dict[str, float]:
    """`spread` of all times, given by round."""
    return spread(chain.from_iterable(rounds))


def ratio(other: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> dict[str, float]:
    """How many times longer the other's times are, both by round: of medians, and paired within each round."""
    paired = spread(statistics.median(a) / statistics.median(b) for a, b in zip(other, own, strict=True))
    medians = [statistics.median(chain.from_iterable(rounds)) for rounds in (other, own)]
    return {"of_medians": medians[0] / medians[1]} | {f"paired_{key}": value for key, value in paired.items()}


def in_turns(items: Sequence[T], turns: Iterable[int]) -> Iterator[T]:
    """All items in every turn; every turn starts with another one."""
    return (items[(turn + i) % len(items)] for turn in turns for i in range(len(items)))
