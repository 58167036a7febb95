"""What the first tokens of a quantized layer tell about those to come: the table of widths is chosen by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from ..quant import widths
from ..quant.layout import BLOCK

WARM_UP = 2 * BLOCK  # tokens that a table is chosen by at least
_MOST_QUERIES = 1024  # tokens of a forward whose queries are looked at: bounds the fp32 temporaries of a long prefill


@dataclass(frozen=True)
class FirstTokens:
    """Queries seen so far, and padding; nothing here is ever written to.

    Padding is no text, but it is stored: keys of it, and queries, would make widths that real tokens do not want. In a
    padded row the real tokens of the least padded one stand in for it.

    Attributes:
        importance: `(B, Hkv, D)` float32, sums of squared queries, or None before any.
        padding: `(B,)`, how many tokens at the left of each row are padding; None where no row is padded.
    """

    importance: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    def noted(self, query: torch.Tensor, kv_heads: int, end: int, padding: torch.Tensor | None) -> FirstTokens:
        """With the queries `(B, Hq, T, D)` of the tokens before token `end`, and what is known of `padding` now."""
        if padding is not None and self.padding is not None:
            padding = torch.maximum(padding, self.padding)
        padding = self.padding if padding is None else padding
        squares = query[:, :, -_MOST_QUERIES:].detach().float().square()
        if padding is not None:
            at = torch.arange(end - squares.shape[2], end, device=query.device)
            squares = torch.where((at >= padding[:, None])[:, None, :, None], squares, 0.0)
        squares = squares.unflatten(1, (kv_heads, -1)).sum((2, 3))
        return FirstTokens(squares if self.importance is None else self.importance + squares, padding)

    def enough(self, begin: int, end: int) -> bool:
        """Whether the least padded row has `WARM_UP` tokens among [begin, end)."""
        return end - begin >= WARM_UP and end - max(begin, self._least_padding) >= WARM_UP

    @cached_property
    def _least_padding(self) -> int:
        """On a GPU this waits, once: every step of a warm-up asks several times whether there is enough."""
        return 0 if self.padding is None else int(self.padding.min())

    def sample(self, k: torch.Tensor, begin: int, count: int) -> torch.Tensor:
        """Of `count` real tokens the keys `(B, Hkv, count, D)`, of keys `(B, Hkv, T, D)` of the tokens from `begin` on.

        The least padded row gives what another lacks; it repeats its own.
        """
        if self.padding is None:
            return k[:, :, :count]
        there = k.shape[2]
        first = (self.padding - begin).clamp(0, there)[:, None].long()
        at, rows = torch.arange(count, device=k.device), torch.arange(len(k), device=k.device)[:, None]
        fullest = first.argmin(0, keepdim=True)
        lends, own = first[fullest[:, 0]].clamp(max=there - 1), there - first
        lent = lends + (at - own) % (there - lends)
        tokens = torch.where(at < own, first + at, lent)
        rows = torch.where(at < own, rows, fullest)
        return k.transpose(1, 2)[rows, tokens].transpose(1, 2)

    def table(self, k: torch.Tensor, bits: int) -> widths.KeyTable:
        """The table for keys such as `sample` gave."""
        importance, padding = self.importance, self.padding
        if importance is not None and padding is not None:
            fullest = padding.argmin(0, keepdim=True)
            lacks = (padding > padding[fullest])[:, None, None]
            importance = importance + torch.where(lacks, importance[fullest], 0.0)
        return widths.choose(k, importance, bits)

    def rows(self, chosen: torch.Tensor) -> FirstTokens:
        """Of the rows `chosen`, indices or a mask."""
        return self._each(lambda t: t[chosen])

    def rows_copied(self, target: torch.Tensor, source: torch.Tensor) -> FirstTokens:
        """Where the rows `target` are what the rows `source` were."""
        return self._each(lambda t: t.index_copy(0, target, t[source]))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> FirstTokens:
        return FirstTokens(*(None if t is None else change(t) for t in (self.importance, self.padding)))
