"""`KVSlidingLayer`: the ring buffer in which every cache keeps a layer with a sliding window, with its sinks."""

from __future__ import annotations

import torch

from ..quant.blocks import Quantize, quantize_blocks
from .layer import KVLayer, Place, Stored, ring_spans
from .rope import Rope

SLACK = 64  # tokens that `crop` can remove after the ring has wrapped; also how many are appended without a copy


class KVSlidingLayer(KVLayer):
    """One layer's ring, `(B, Hkv, window + SLACK, D)` for keys and values. A token lies in slot `position % slots`.

    Tokens never move. A chunk of more tokens than the slack would overwrite keys that its first queries see. So its own
    attention reads a copy of the window followed by the chunk, which lives until `finish_attention`.

    With `sinks`, each row's first tokens are also kept in buffers of their own. Queries see them once the window has
    passed them, at positions right before the window.
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
        self.forces_window, self.sinks, self.rope = forced, sinks, rope
        self.kind = *self.kind, forced
        self.oldest = 0  # the first position that is still in the ring
        self.begin = 0  # the first position that the newest forward sees
        self.rebased = 0  # by how many positions stored keys were rotated back
        self._chunk: tuple[torch.Tensor, torch.Tensor] | None = None
        self._leftpad: torch.Tensor | None = None  # (B,) int32, left padding; None while no row is padded
        self._sinks_complete_from = sinks  # from this position on all rows have all their sinks
        self._sinks_seen_until = 0  # tokens whose attention has looked for sinks among them
        self._k = self._v = self._sink_k = self._sink_v = torch.empty(0)

    @property
    def stored(self) -> int:
        return self.seen - self.oldest

    @property
    def complete_tokens(self) -> int:
        if self.sinks and self._sinks_seen_until < self._sinks_complete_from:
            return min(self.seen, self._sinks_seen_until)
        return self.seen

    def buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        used = min(self.seen, self._k.shape[2]) if self.is_initialized else 0
        rings = {"k": (self._k, used), "v": (self._v, used)}
        return rings | {"sink_k": (self._sink_k, self.sinks), "sink_v": (self._sink_v, self.sinks)}

    def replace_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        self._k, self._v, self._sink_k, self._sink_v = (buffers[name] for name in ("k", "v", "sink_k", "sink_v"))

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.make_ready(k, v)
        k, v = k.detach(), v.detach()
        new, past = k.shape[2], min(self.seen, self.sliding_window - 1)
        slots = self._k.shape[2]
        self.begin, self._chunk = self.seen - past, None
        if past + new > slots:
            old_k, old_v = self._in_order(self.begin)
            self._chunk = (torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)) if past else (k, v)
            self.inconsistent = "storing of a prompt"  # tokens that the window still needs are overwritten
        self.oldest = max(self.oldest, self.seen + new - slots)
        kept = min(new, slots)
        slot = (self.seen + new - kept) % slots
        for ring, own in ((self._k, k[:, :, new - kept :]), (self._v, v[:, :, new - kept :])):
            to_wrap = min(kept, slots - slot)
            ring[:, :, slot : slot + to_wrap].copy_(own[:, :, :to_wrap])
            ring[:, :, : kept - to_wrap].copy_(own[:, :, to_wrap:])
        self.seen += new  # last: an interrupt must not leave tokens counted that are not there
        self.inconsistent = None

    def place(self) -> Place | None:
        if not self.seen or self.sinks:
            return None
        return Place(self._k, self._v, self.seen % self._k.shape[2])

    def reserve_slot(self) -> None:
        self.begin = self.seen - min(self.seen, self.sliding_window - 1)
        self.oldest = max(self.oldest, self.seen + 1 - self._k.shape[2])

    def _allocate(self, needed: int) -> None:
        slots = min(self.sliding_window + SLACK, self.max_cache_len or self.sliding_window + SLACK)
        self.capacity = slots + self.sinks
        self._k, self._v = (self._empty(slots, self.head_dim) for _ in range(2))
        self._sink_k, self._sink_v = (self._empty(self.sinks, self.head_dim).zero_() for _ in range(2))

    def stored_kv(self) -> Stored:
        slots, slot, tokens = self._k.shape[2], self.begin % self._k.shape[2], self.seen - self.begin
        if self._chunk is None and slot + tokens > slots:  # in place, where it wraps
            return Stored(self._k, self._v, tokens=tokens, slot=slot)
        return super().stored_kv()

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the newest forward sees, without sinks, in order; a copy if the ring wraps."""
        return self._chunk or self._in_order(self.begin)

    def _in_order(self, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the ring from position `begin` on."""
        slots, slot, tokens = self._k.shape[2], begin % self._k.shape[2], self.seen - begin
        if slot + tokens <= slots:
            return self._k[:, :, slot : slot + tokens], self._v[:, :, slot : slot + tokens]
        rest = slot + tokens - slots
        k, v = (torch.cat([ring[:, :, slot:], ring[:, :, :rest]], 2) for ring in (self._k, self._v))
        return k, v

    def sink_inputs(self, q: torch.Tensor, leftpad: torch.Tensor | None) -> tuple | None:
        """See `KVLayer.sink_inputs`; None while the window still covers the sinks for every query of the newest tokens.

        Args:
            q: `(B, Hq, Tq, D)`, rotated as for the window's keys.
            leftpad: `(B,)`, the first visible key of each row, counted from the first that the forward sees; or None.
        """
        if not self.sinks:
            return None
        before = self.seen - q.shape[2]
        if before < self._sinks_complete_from or not before:
            self._note_leftpad(before, leftpad)
            self._keep_sinks(before)
        self._sinks_seen_until = self.seen
        evicted = before - self.sliding_window + 1
        if evicted + q.shape[2] <= 1:
            return None
        gap = evicted - self.sinks
        rotated = q if self.rope is None else self.rope.rerotate_back(q, gap, self.rebased, self._leftpad)
        return self._sink_k, self._sink_v, rotated, evicted, self._leftpad

    def _note_leftpad(self, before: int, leftpad: torch.Tensor | None) -> None:
        """Notes the left padding of rows: known once a row's first token that is not padding has come."""
        if before == 0:
            self._leftpad, self._sinks_complete_from = None, self.sinks
        if leftpad is None or (before and self._leftpad is None):
            return
        found = self.begin + leftpad.to(torch.int32)
        self._leftpad = found if self._leftpad is None else torch.where(self._leftpad >= before, found, self._leftpad)
        self._sinks_complete_from = int(self._leftpad.max()) + self.sinks

    @torch.inference_mode(False)
    def _keep_sinks(self, before: int) -> None:
        """Copies the rows' first tokens to the sinks, as far as they are new."""
        (k, v), sinks = self.dense(), self.sinks
        leftpad = 0 if self._leftpad is None else self._leftpad[:, None]
        at = leftpad + torch.arange(sinks, device=self.device).expand(self.batch_size, -1)  # positions
        wanted = ((at >= before) & (at < self.seen))[:, None, :, None]
        index = (at - self.begin).clamp(0, k.shape[2] - 1)[:, None, :, None].expand_as(self._sink_k)
        self._sink_k = torch.where(wanted, k.gather(2, index), self._sink_k)
        self._sink_v = torch.where(wanted, v.gather(2, index), self._sink_v)

    def finish_attention(self, quantize: Quantize = quantize_blocks) -> None:
        self._chunk = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """For a model that is not enabled: its masks do not know a forced window or sinks, which are refused."""
        new = key_states.shape[2]
        if self.forces_window and (self.sinks or (new > 1 and self.seen + new > self.sliding_window)):
            raise ValueError(
                f"layer {self.layer_idx}: a window of {self.sliding_window} with {self.sinks} sinks, forced on {new} "
                f"tokens after {self.seen}, needs this package's attention: call hf_kvattn.enable(model)"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    @torch.inference_mode(False)
    def rebase(self, by: int) -> None:
        """Rotates all stored keys back by `by` positions."""
        if self.rope is not None:
            self._k = self.rope.rerotate(self._k, torch.full((1, 1), -by, device=self._k.device))
        self.rebased += by
        self.unchanged_prefix = 0

    def check_crop(self, tokens_to_remove: int) -> None:
        super().check_crop(tokens_to_remove)
        kept = self.seen + tokens_to_remove
        if tokens_to_remove and kept and max(0, kept - self.sliding_window + 1) < self.oldest:
            raise overwritten(self, tokens_to_remove, self.seen - self.sliding_window + 1 - self.oldest)

    def exact_prefix(self, stored: int, wanted: int) -> int:
        """All while nothing was overwritten. A forced window comes with positions of its own, and stays as it is."""
        whole = wanted == stored or (stored <= self.sliding_window + SLACK and not self.forces_window)
        return wanted if whole else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens: after a wrap at most `SLACK` of them, or all."""
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == -self.seen:
            return self.reset()
        self._chunk = None
        self.seen += tokens_to_remove
        self.unchanged_prefix = min(self.unchanged_prefix, self.seen)
        self._sinks_seen_until = min(self._sinks_seen_until, self.seen)
        self._leftpad = None if self._leftpad is None else self._leftpad.clamp(max=self.seen)
        self.begin = max(self.oldest, min(self.begin, self.seen))

    def reset(self) -> None:
        self.seen = self.oldest = self.begin = self.rebased = self._sinks_seen_until = 0
        self._leftpad = self._chunk = None
        self._sinks_complete_from = self.sinks
        super().reset()

    def select(self, rows: torch.Tensor) -> None:
        self.replace_buffers({name: tensor[rows] for name, (tensor, _) in self.buffers().items()})
        self._leftpad = None if self._leftpad is None else self._leftpad[rows]
        self.batch_size = self._k.shape[0]
        self._chunk, self.unchanged_prefix = None, 0

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        super().copy_rows(target, source, start)
        if self._leftpad is not None:
            self._leftpad = self._leftpad.index_copy(0, target, self._leftpad[source])

    def filled(self) -> dict[str, torch.Tensor]:
        slot = self.oldest % self._k.shape[2]
        tensors = ring_spans("k", self._k, slot, self.stored) | ring_spans("v", self._v, slot, self.stored)
        if self.sinks:
            unpadded = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
            leftpad = unpadded if self._leftpad is None else self._leftpad
            tensors |= {"sink_k": self._sink_k, "sink_v": self._sink_v, "first": leftpad}
        return tensors

    def allocate_for(self, like: torch.Tensor, counts: dict[str, int]) -> None:
        super().allocate_for(like, counts)
        window = self.sliding_window
        outside = max(0, self.seen - window + 1)
        if not max(counts["rebased"], self.seen - self._k.shape[2]) <= counts["oldest"] <= outside:
            raise ValueError(f"layer {self.layer_idx}: a window of {window} does not leave {counts}")
        self.oldest, self.rebased = counts["oldest"], counts["rebased"]
        self.begin = max(self.oldest, self.seen - window)  # as after a step of one token
        self._sinks_seen_until = self.seen
        if self.sinks:  # which may be incomplete, where rows begin that late
            self._leftpad = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
            self._sinks_complete_from = self.seen + self.sinks

    def check_loaded(self) -> None:
        if self._leftpad is not None and not bool(((self._leftpad >= 0) & (self._leftpad <= self.seen)).all()):
            raise ValueError(f"layer {self.layer_idx}: rows of {self.seen} tokens begin at {self._leftpad.tolist()}")

    def move(self, device: torch.device | str) -> None:
        super().move(device)
        self._leftpad = None if self._leftpad is None else self._leftpad.to(device)


def overwritten(layer: KVLayer, tokens_to_remove: int, slack: int) -> ValueError:
    """The error of a `crop` that would leave a window whose oldest tokens are overwritten."""
    return ValueError(
        f"layer {layer.layer_idx}: crop({tokens_to_remove}) needs tokens that were overwritten; of {layer.seen} seen "
        f"by a window of {layer.sliding_window}, the last {max(0, slack)} can be taken back, or all"
    )
