"""Layers that must agree with each other: how a change of all is marked, and what an interrupted forward left is found.

An exception or an interrupt may come between any two lines. Layers then hold different numbers of tokens, which `crop`
repairs, or a change of all layers has come half way, which only `reset` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from .layer import KVLayer


def check_consistent_layers(layers: Sequence[KVLayer]) -> None:
    """Raises ValueError, with the way out, where an exception or an interrupt left layers unlike each other."""
    complete, longest = _lengths(layers)
    if complete != longest:
        raise ValueError(
            f"a forward was interrupted half way: layers hold {complete} to {longest} tokens; "
            f"crop({complete - longest}) goes back to the last whole step"
        )


@contextlib.contextmanager
def changing_all(layers: Sequence[KVLayer], change: str) -> Iterator[None]:
    """For what is done to all layers or to none: they stay torn where the body does not come to its end."""
    for layer in layers:
        layer.inconsistent = change
    yield
    for layer in layers:
        layer.inconsistent = None


def crop(layers: Sequence[KVLayer], tokens_to_remove: int) -> None:
    """Forgets the last `-tokens_to_remove` tokens, counted from the longest layer, in all layers or in none.

    Raises:
        ValueError: a length that not all layers hold, or that one of them cannot go back to; nothing has changed then.
    """
    complete, longest = _lengths(layers)
    kept = longest + tokens_to_remove
    if tokens_to_remove > 0 or not 0 <= kept <= complete:
        raise ValueError(
            f"crop takes a number from {-longest} (all stored tokens) to {complete - longest}, got {tokens_to_remove}"
        )
    for layer in layers:
        layer.check_crop(kept - layer.seen)
    if tokens_to_remove:
        with changing_all(layers, "crop"):
            for layer in layers:
                layer.crop(kept - layer.seen)


def _lengths(layers: Sequence[KVLayer]) -> tuple[int, int]:
    """Tokens of which all layers hold everything, and those of the longest; ValueError where one is torn."""
    for layer in layers:
        layer.check_consistent()
    return min([layer.complete_tokens for layer in layers]), max([layer.seen for layer in layers])
