"""Tickets: tensors by which an op in a compiled graph finds its cache. A graph passes tensors and constants only."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

# The package's only registry of objects: nothing else leads from a number in a tensor to a cache.
_caches: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.inference_mode(False)
def issue_ticket(cache: Any) -> torch.Tensor:
    """A new ticket for `cache`: int64 `(1,)` on the CPU."""
    number = next(_numbers)
    _caches[number] = cache
    return torch.tensor([number], device="cpu")  # whatever the default device is


def cache_of(ticket: torch.Tensor) -> Any:
    """The cache that `ticket` was issued for."""
    return _caches[int(ticket)]
