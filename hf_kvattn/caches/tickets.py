"""Tickets: how an op in a compiled graph, which is given tensors and constants only, finds the cache it works on."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch

# The package's one registry: a number in a tensor leads to an object through nothing else.
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
