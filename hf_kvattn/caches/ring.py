"""`KVSlidingLayer`: the ring buffer in which every cache keeps layers with a sliding window, and sinks beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layer import KVLayer, Stored, ring_spans
from .rope import Rope

SLACK = 64  # tokens that `crop` can take back after the ring has wrapped; also how many are appended without a copy


class Beside(NamedTuple):
    """What a layer's queries see beside their window: the fields of `kernels.call.SinkKV`."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    evicted: int
    first: torch.Tensor | None


class KVSlidingLayer(KVLayer):
    """One layer's ring, `(B, Hkv, window + SLACK, D)` for keys and values: a token stays in slot `position % slots`.

    Nothing is ever moved. A chunk of more tokens than the slack would overwrite keys that its first queries see: its
    own attention reads a copy of the window followed by the chunk, which lives until `settle`.

    With `sinks` each row's first tokens are kept in buffers of their own as well. Queries see them once the window has
    left them behind, turned as if no token lay between them and the window.
    """

    counts = ("seen", "oldest", "rebased")
    sliding_window: int

    def __init__(
        self,
        window: int,
        max_cache_len: int | None,
        layer_idx: int,
        heads: int | None = None,
        dim: int | None = None,
        forced: bool = False,
        sinks: int = 0,
        rope: Rope | None = None,
    ):
        super().__init__(max_cache_len, layer_idx, heads, dim, window)
        self.forced, self.sinks, self.rope = forced, sinks, rope
        self.oldest = 0  # the first position that is still in the ring
        self.begin = 0  # the first position that the newest forward sees
        self.rebased = 0  # how far stored keys were turned back, in positions
        self._chunk: tuple[torch.Tensor, torch.Tensor] | None = None
        self._first: torch.Tensor | None = None  # (B,) int32, where rows begin; None while no row is padded
        self._complete = sinks  # from this position on all rows have all their sinks
        self._looked = 0  # tokens that were looked at for them, by their own attention
        self._k = self._v = self._sink_k = self._sink_v = torch.empty(0)

    @property
    def stored(self) -> int:
        return self.seen - self.oldest

    @property
    def whole(self) -> int:
        return min(self.seen, self._looked) if self.sinks and self._looked < self._complete else self.seen

    def buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        used = min(self.seen, self._k.shape[2]) if self.is_initialized else 0
        rings = {"k": (self._k, used), "v": (self._v, used)}
        return rings | {"sink_k": (self._sink_k, self.sinks), "sink_v": (self._sink_v, self.sinks)}

    def adopt(self, buffers: dict[str, torch.Tensor]) -> None:
        self._k, self._v, self._sink_k, self._sink_v = (buffers[name] for name in ("k", "v", "sink_k", "sink_v"))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        past = min(self.seen, self.sliding_window - 1)
        return past + query_length, self.seen - past

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.ready(k, v)
        k, v = k.detach(), v.detach()
        new, past = k.shape[2], min(self.seen, self.sliding_window - 1)
        slots = self._k.shape[2]
        self.begin, self._chunk = self.seen - past, None
        if past + new > slots:
            old_k, old_v = self._in_order(self.begin)
            self._chunk = (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)) if past else (k, v)
            self.torn = "storing of a prompt"  # tokens that the window still needs are overwritten
        self.oldest = max(self.oldest, self.seen + new - slots)
        kept = min(new, slots)
        slot = (self.seen + new - kept) % slots
        for ring, own in ((self._k, k[:, :, new - kept :]), (self._v, v[:, :, new - kept :])):
            to_wrap = min(kept, slots - slot)
            ring[:, :, slot : slot + to_wrap].copy_(own[:, :, :to_wrap])
            ring[:, :, : kept - to_wrap].copy_(own[:, :, to_wrap:])
        self.seen += new  # last: an interrupt must not leave tokens counted that are not there
        self.torn = None

    def claim(self) -> None:
        self.begin = self.seen - min(self.seen, self.sliding_window - 1)
        self.oldest = max(self.oldest, self.seen + 1 - self._k.shape[2])

    @torch.inference_mode(False)  # a buffer is written to by later forwards, in whatever mode
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.batch_size, self.kv_heads, _, self.head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        slots = min(self.sliding_window + SLACK, self.max_cache_len or self.sliding_window + SLACK)
        self.capacity = slots + self.sinks

        def buffer(tokens: int) -> torch.Tensor:
            shape = (self.batch_size, self.kv_heads, tokens, self.head_dim)
            return torch.empty(shape, dtype=self.dtype, device=self.device)

        self._k, self._v = buffer(slots), buffer(slots)
        self._sink_k, self._sink_v = buffer(self.sinks).zero_(), buffer(self.sinks).zero_()
        self.is_initialized = True

    def kv(self) -> Stored:
        if self._chunk is not None:
            return Stored(*self._chunk)
        tokens, slot = self.seen - self.begin, self.begin % self._k.shape[2]
        if slot + tokens <= self._k.shape[2]:
            return Stored(*self._in_order(self.begin))
        return Stored(self._k, self._v, tokens=tokens, slot=slot)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the newest forward sees, without sinks, in order: a copy where the ring wraps."""
        return self._chunk or self._in_order(self.begin)

    def _in_order(self, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the positions from `begin` on, of those in the ring."""
        slots, slot, tokens = self._k.shape[2], begin % self._k.shape[2], self.seen - begin
        if slot + tokens <= slots:
            return self._k[:, :, slot : slot + tokens], self._v[:, :, slot : slot + tokens]
        rest = slot + tokens - slots
        k, v = (torch.cat([ring[:, :, slot:], ring[:, :, :rest]], 2) for ring in (self._k, self._v))
        return k, v

    def beside(self, q: torch.Tensor, first: torch.Tensor | None) -> Beside | None:
        """The sinks for the queries `(B, Hq, Tq, D)` of the newest tokens; None while no query has left any behind.

        Args:
            q: as the window's keys are to see them.
            first: `(B,)`, the first visible key of each row, counted from the first that the forward sees; or None.
        """
        if not self.sinks:
            return None
        before = self.seen - q.shape[2]
        if before < self._complete or not before:
            self._note_first(before, first)
            self._keep_first(before)
        self._looked = self.seen
        evicted = before - self.sliding_window + 1
        if evicted + q.shape[2] <= 1:
            return None
        gap = evicted - self.sinks
        turned = q if self.rope is None else self.rope.turn_back(q, gap, self.rebased, self._first)
        return Beside(self._sink_k, self._sink_v, turned, evicted, self._first)

    def _note_first(self, before: int, first: torch.Tensor | None) -> None:
        """Where rows begin: known once the first token that is not padding has come."""
        if before == 0:
            self._first, self._complete = None, self.sinks
        if first is None or (before and self._first is None):
            return
        found = self.begin + first.to(torch.int32)
        self._first = found if self._first is None else torch.where(self._first >= before, found, self._first)
        self._complete = int(self._first.max()) + self.sinks

    @torch.inference_mode(False)
    def _keep_first(self, before: int) -> None:
        """Copies the rows' first tokens, as far as they are new."""
        (k, v), sinks = self.dense(), self.sinks
        first = 0 if self._first is None else self._first[:, None]
        at = first + torch.arange(sinks, device=self.device).expand(self.batch_size, -1)  # positions
        wanted = ((at >= before) & (at < self.seen))[:, None, :, None]
        index = (at - self.begin).clamp(0, k.shape[2] - 1)[:, None, :, None].expand_as(self._sink_k)
        self._sink_k = torch.where(wanted, k.gather(2, index), self._sink_k)
        self._sink_v = torch.where(wanted, v.gather(2, index), self._sink_v)

    def settle(self) -> None:
        self._chunk = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """transformers' entry on a model that is not enabled, whose masks know nothing of a forced window or sinks."""
        new = key_states.shape[2]
        if self.forced and (self.sinks or (new > 1 and self.seen + new > self.sliding_window)):
            raise ValueError(
                f"layer {self.layer_idx}: a window of {self.sliding_window} with {self.sinks} sinks, forced on {new} "
                f"tokens after {self.seen}, needs this package's attention: call hf_kvattn.enable(model)"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    @torch.inference_mode(False)
    def rebase(self, by: int) -> None:
        """Turns all stored keys back by `by` positions."""
        if self.rope is not None:
            self._k = self.rope.turn(self._k, torch.full((1, 1), -by, device=self._k.device))
        self.rebased += by
        self.untouched = 0

    def check_crop(self, tokens_to_remove: int) -> None:
        super().check_crop(tokens_to_remove)
        kept = self.seen + tokens_to_remove
        if tokens_to_remove and kept and max(0, kept - self.sliding_window + 1) < self.oldest:
            raise overwritten(self, tokens_to_remove, self.seen - self.sliding_window + 1 - self.oldest)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; after a wrap at most `SLACK` of them, or all."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == -self.seen:
            return self.reset()
        self._chunk = None
        self.seen += tokens_to_remove
        self.untouched, self._looked = min(self.untouched, self.seen), min(self._looked, self.seen)
        self.begin = max(self.oldest, min(self.begin, self.seen))

    def reset(self) -> None:
        self.seen = self.oldest = self.begin = self.rebased = self._looked = 0
        self._first = self._chunk = None
        self._complete = self.sinks
        super().reset()

    def select(self, rows: torch.Tensor) -> None:
        self._k, self._v, self._sink_k, self._sink_v = (t[rows] for t in (self._k, self._v, self._sink_k, self._sink_v))
        self._first = None if self._first is None else self._first[rows]
        self.batch_size = self._k.shape[0]
        self._chunk, self.untouched = None, 0

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        super().copy_rows(target, source, start)
        if self._first is not None:
            self._first = self._first.index_copy(0, target, self._first[source])

    def filled(self) -> dict[str, torch.Tensor]:
        slot = self.oldest % self._k.shape[2]
        tensors = ring_spans("k", self._k, slot, self.stored) | ring_spans("v", self._v, slot, self.stored)
        if self.sinks:
            unpadded = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
            first = unpadded if self._first is None else self._first
            tensors |= {"sink_k": self._sink_k, "sink_v": self._sink_v, "first": first}
        return tensors

    def prepare(self, like: torch.Tensor, counts: dict[str, int]) -> None:
        super().prepare(like, counts)
        window = self.sliding_window
        if not max(0, self.seen - self._k.shape[2]) <= counts["oldest"] <= max(0, self.seen - window + 1):
            raise ValueError(f"layer {self.layer_idx}: a window of {window} does not leave {counts}")
        self.oldest, self.rebased, self.begin = counts["oldest"], counts["rebased"], self.seen
        self._looked = self.seen
        if self.sinks:  # which may be incomplete, where rows begin that late
            self._first = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
            self._complete = self.seen + self.sinks

    def verify(self) -> None:
        if self._first is not None and not bool(((self._first >= 0) & (self._first <= self.seen)).all()):
            raise ValueError(f"layer {self.layer_idx}: rows of {self.seen} tokens begin at {self._first.tolist()}")

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        self._first = None if self._first is None else self._first.to(device)


def overwritten(layer: KVLayer, tokens_to_remove: int, slack: int) -> ValueError:
    """Why a rollback is refused: the window of what would be left is not whole any more."""
    return ValueError(
        f"layer {layer.layer_idx}: crop({tokens_to_remove}) needs tokens that were overwritten; of {layer.seen} seen "
        f"by a window of {layer.sliding_window}, the last {max(0, slack)} can be taken back, or all"
    )
