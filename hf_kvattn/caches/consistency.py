"""Keeps the layers of a cache consistent: all-or-nothing changes, `crop`, and what an interrupted forward left.

An exception or an interrupt may come between any two lines. Two things can be wrong then:

- the layers hold different numbers of tokens: `crop` repairs it;
- a change of all layers came half way: only `reset` makes the cache usable again.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence

from .layer import KVLayer
from .recurrent import RecurrentLayer


def check_consistent_layers(layers: Sequence[KVLayer]) -> None:
    """Raises ValueError, with the way out, if an interrupted forward left the layers with different lengths."""
    complete, longest = _lengths(layers)
    if complete != longest:
        raise ValueError(
            f"a forward was interrupted half way: layers hold {complete} to {longest} tokens; "
            f"crop({complete - longest}) goes back to the last whole step"
        )


@contextlib.contextmanager
def changing_all(layers: Sequence[KVLayer], change: str) -> Iterator[None]:
    """Marks all layers inconsistent while the body runs; they stay so if it does not come to its end."""
    for layer in layers:
        layer.inconsistent = change
    yield
    for layer in layers:
        layer.inconsistent = None


def crop(layers: Sequence[KVLayer], tokens_to_remove: int, states: Sequence[RecurrentLayer] = ()) -> None:
    """Removes the last `-tokens_to_remove` tokens, counted from the longest layer, from all layers or from none.

    Where nothing is left, recurrent `states` begin anew. Else they go back as far as they can.

    Raises:
        ValueError: a length that not all layers hold, or that one of them cannot go back to; nothing has changed then.
    """
    complete, longest = _lengths(layers)
    try:
        number = operator.index(tokens_to_remove)  # transformers 5.17 gives a tensor
    except TypeError:
        number = 1
    kept = longest + number
    if isinstance(tokens_to_remove, bool) or number > 0 or not 0 <= kept <= complete:
        raise ValueError(
            f"crop takes an int from {-longest} (all stored tokens) to {complete - longest}, got {tokens_to_remove!r}"
        )
    for layer in layers:
        layer.check_crop(kept - layer.seen)
    if states and kept:
        if complete != longest:
            raise ValueError(
                "a forward was interrupted half way, and recurrent states cannot go back: crop to nothing, or reset()"
            )
        for state in states:
            state.check_crop(-number)
    if number or states:
        with changing_all(layers, "crop"):
            for layer in layers:
                layer.crop(kept - layer.seen)
            for state in states:
                state.crop(number) if kept else state.reset()


def _lengths(layers: Sequence[KVLayer]) -> tuple[int, int]:
    """Tokens that all layers hold completely, and tokens of the longest layer; ValueError if one is inconsistent."""
    for layer in layers:
        layer.check_consistent()
    return min([layer.complete_tokens for layer in layers]), max([layer.seen for layer in layers])
