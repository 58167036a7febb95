"""The layer of `QuantizedKVCache`: its first and newest tokens are exact, all others are codes, written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from ..quant import widths
from ..quant.blocks import Blocks, Quantize, quantize_blocks
from ..quant.calibration import check_group_size
from ..quant.codecs import Codec
from ..quant.layout import BLOCK, by_width_to, keys_to, planes_of, values_to
from ..quant.packed import OF_BLOCKS, TABLE, PackedKV, shapes_of
from .first_tokens import WARM_UP, FirstTokens
from .layer import GROWTH, KVLayer, Place, Stored, ring_spans
from .ring import SLACK, overwritten

logger = logging.get_logger("hf_kvattn")

_CHUNK_BLOCKS = 64  # blocks quantized at once: bounds the fp32 temporaries of a long prefill


@dataclass(frozen=True)
class QuantSettings:
    """The arguments of `QuantizedKVCache`, for one layer; see there."""

    k_codec: Codec
    v_codec: Codec
    group_size: int
    residual_length: int
    exact_first: int  # its argument `sinks`
    table: widths.KeyTable | None = None  # of a calibration, `(Hkv, ...)`; else it is chosen by the first tokens

    @property
    def few_bits(self) -> bool:
        return self.k_codec.by_channel or self.v_codec.by_channel


class KVQuantizedLayer(KVLayer):
    """One layer: the first `exact_first` tokens exact, then blocks of 32 tokens as codes, then the newest ones exact.

    `_exact_k` and `_exact_v` hold the first and the newest tokens one after the other. A block is quantized once,
    when attention over its tokens is done (`finish_attention`) and `residual_length` newer tokens follow it; its codes
    never change again. Between forwards `exact_first + residual_length + 31` tokens are exact at most, once there is a
    table of widths.

    Keys of few bits need a table of widths and steps (`quant/widths.py`), chosen once. Where no calibration gives it,
    it follows from the first `WARM_UP` tokens, their keys and the queries that met them; so many are exact until then.

    With a sliding window the blocks lie in a ring, block `i` in slot `i % slots`; the first `dropped` tokens are gone.
    """

    counts = ("seen", "packed_tokens", "dropped")

    def __init__(self, settings: QuantSettings, max_cache_len: int | None, layer_idx: int, *shape: int | None):
        super().__init__(max_cache_len, layer_idx, *shape)
        self.settings = settings
        self.kind = *self.kind, settings.k_codec.name, settings.v_codec.name
        self.packed_tokens = self.dropped = 0
        self._exact_k = self._exact_v = torch.empty(0)
        self._usual: tuple[torch.Tensor, torch.Tensor] | None = None  # while a prompt's tokens stand in their place
        self._packed: dict[str, torch.Tensor] = {}
        self.wants_queries = self._awaits_table
        self._first_tokens = FirstTokens()
        self._last_packed: PackedKV | None = None  # of the last `stored_kv`: most steps do not change it
        # A GPU's answers `(n, 2)` to whether keys and values were finite, each with the event of its arrival.
        self._finite_checks: tuple[tuple[torch.Tensor, torch.cuda.Event], ...] = ()

    @property
    def stored(self) -> int:
        return self.seen - self.dropped

    @property
    def _exact(self) -> int:
        return self.stored - self.packed_tokens

    def buffers(self) -> dict[str, tuple[torch.Tensor, int]]:
        blocks = (self.dropped + self.packed_tokens) // BLOCK
        packed = {
            name: (t, min(blocks, t.shape[2]) if name in OF_BLOCKS else 0 if self.wants_queries else t.shape[2])
            for name, t in self._packed.items()
        }
        return {"exact_k": (self._exact_k, self._exact), "exact_v": (self._exact_v, self._exact), **packed}

    def replace_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        self._packed, self._last_packed = {name: buffers[name] for name in self._packed}, None
        self._exact_k, self._exact_v, self._usual = buffers["exact_k"], buffers["exact_v"], None

    def stored_kv(self) -> Stored:
        exact = slice(0, self._exact)
        return Stored(self._exact_k[:, :, exact], self._exact_v[:, :, exact], self._blocks())

    def place(self) -> Place | None:
        return Place(self._exact_k, self._exact_v, self._exact, self._blocks()) if self.seen else None

    def _blocks(self) -> PackedKV | None:
        """The blocks that hold tokens; no copy."""
        if not self.packed_tokens:
            return None
        packed, scale = self._last_packed, self._packed["k_scale"]
        slot = self.dropped // BLOCK % scale.shape[2]
        if packed is None or packed.k_scale is not scale or (packed.tokens, packed.slot) != (self.packed_tokens, slot):
            packed = self._last_packed = self.packed(self.packed_tokens, slot)
        return packed

    def packed(self, tokens: int, slot: int = 0) -> PackedKV:
        """The blocks of `tokens` tokens from `slot` on; no copy."""
        settings = self.settings
        arrays: dict[str, Any] = {**dict.fromkeys(TABLE), **self._packed}
        arrays["k_codes"] = _as_codes(self._packed["k_codes"], settings.k_codec)
        arrays["v_codes"] = _as_codes(self._packed["v_codes"], settings.v_codec)
        return PackedKV(settings.exact_first, tokens, settings.k_codec, settings.v_codec, slot=slot, **arrays)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything dequantized, in the model's dtype: a copy."""
        k, v, packed, *_ = self.stored_kv()
        if packed is None:
            return k, v
        lead, pairs = packed.start, zip((k, v), packed.dense(0, packed.tokens // BLOCK), strict=True)
        k, v = (torch.cat([exact[:, :, :lead], blocks.to(k.dtype), exact[:, :, lead:]], 2) for exact, blocks in pairs)
        return k, v

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        logger.warning_once(
            "a quantized cache is read through update(), which dequantizes all of it in every layer at every step: "
            "call hf_kvattn.enable(model) to have it read packed"
        )
        return super().update(key_states, value_states, *args, **kwargs)

    def check(self, k: torch.Tensor, v: torch.Tensor) -> None:
        super().check(k, v)
        if self._finite_checks:
            self.raise_if_not_finite(wait=False)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.make_ready(k, v)
        exact, new_exact = self._exact, self._exact + k.shape[2]
        room, warm_up = self._exact_k.shape[2], self._least_exact + WARM_UP
        if new_exact > room:
            if room == self._usual_exact:
                self._usual = self._exact_k, self._exact_v
            if self._awaits_table and new_exact < warm_up:
                room = warm_up
                self._resize_exact(room, exact)
            elif exact:  # a prompt: all of it is exact until `finish_attention`
                room = new_exact
                self._resize_exact(room, exact)
        if new_exact <= room:
            self._exact_k[:, :, exact:new_exact].copy_(k.detach())
            self._exact_v[:, :, exact:new_exact].copy_(v.detach())
        else:  # the first prompt: the caller's own tensors, until its attention is done
            self._exact_k, self._exact_v = k.detach(), v.detach()
        self.seen += k.shape[2]

    def _allocate(self, needed: int) -> None:
        check_group_size(self.settings.group_size, self.head_dim)  # of a model whose config does not say it
        blocks = 0 if self.max_cache_len is None else max(0, self.max_cache_len - self._least_exact) // BLOCK
        if self.sliding_window is not None:
            ring = 2 * (-(-(self.sliding_window + SLACK) // (2 * BLOCK)) + 1)  # even, as `PackedKV.slot` needs it
            blocks = ring if self.max_cache_len is None else min(ring, blocks + blocks % 2)
        self._packed, self._usual, self._first_tokens = {}, None, FirstTokens()
        self._allocate_blocks(blocks)
        self._resize_exact(self._usual_exact, 0)

    @property
    def _least_exact(self) -> int:
        return self.settings.exact_first + self.settings.residual_length

    @property
    def _awaits_table(self) -> bool:
        """Whether the next block is the first one, and a table is to be chosen by what is stored then."""
        chooses = self.settings.k_codec.by_channel and self.settings.table is None
        return chooses and not self.packed_tokens and not self.dropped

    @property
    def _usual_exact(self) -> int:
        """The room for exact tokens, but for a prompt's, and until there is a table."""
        return self._least_exact + BLOCK

    def note_queries(self, query: torch.Tensor, padding: torch.Tensor | None) -> None:
        self._first_tokens = self._first_tokens.noted(query, self.kv_heads, self.stored, padding)

    def finish_attention(self, quantize: Quantize = quantize_blocks) -> None:
        """Quantizes the oldest whole blocks of the newest tokens, and leaves at least `residual_length` tokens exact.

        On a GPU no step waits to hear whether they are finite: `raise_if_not_finite` says so later.

        Raises:
            ValueError: not on a GPU: NaN or infinite keys or values; no block has been written then.
        """
        if self.blocks_due:
            quantize_due([self], quantize)
        elif self.wants_queries and self._exact_k.shape[2] == self._exact > self._least_exact + WARM_UP:
            # Mostly padding: it may be long until there is a table.
            self._resize_exact(self._exact + BLOCK, self._exact)

    @property
    def blocks_due(self) -> int:
        """How many of the oldest whole blocks of exact tokens are to be quantized."""
        due, lead = max(0, self._exact - self._least_exact), self.settings.exact_first
        if self.wants_queries and not self._first_tokens.enough(lead, lead + due):
            return 0
        return due // BLOCK

    @property
    def _next_block(self) -> int:
        """The number in the stream of the first block that is not quantized."""
        return (self.dropped + self.packed_tokens) // BLOCK

    def check_finite(self) -> None:
        """Refuses NaN and infinite numbers in the blocks that are due."""
        part = slice(self.settings.exact_first, self.settings.exact_first + self.blocks_due * BLOCK)
        finite = torch.stack([tensor[:, :, part].isfinite().all() for tensor in (self._exact_k, self._exact_v)])
        if name := _not_finite(finite):
            raise ValueError(f"layer {self.layer_idx}: {name} are NaN or infinite and cannot be quantized")

    def begin_blocks(self) -> tuple[list[Blocks], int]:
        """Makes room for the blocks that are due; returns them, and the number of the oldest block that stays."""
        first, blocks = self._next_block, self.blocks_due
        dropped = self._make_room(first, blocks)
        self.inconsistent = "quantization"  # from here on a ring's old blocks are overwritten
        written = self.dropped + self.settings.exact_first + self.packed_tokens
        self.unchanged_prefix = min(self.unchanged_prefix, written)
        return self._new_blocks(first, max(0, dropped - first), blocks), dropped

    def end_blocks(self, dropped: int, finite: torch.Tensor | None, answered: torch.cuda.Event | None) -> None:
        """Counts the blocks of `begin_blocks`, now that they are codes.

        Args:
            finite: whether they were finite, `(n, 2)` on the host as soon as a GPU has `answered`.
        """
        if finite is not None and answered is not None:
            self._finite_checks += ((finite, answered),)
        first, blocks, lead, exact = self._next_block, self.blocks_due, self.settings.exact_first, self._exact
        rest, after = slice(lead + blocks * BLOCK, exact), slice(lead, exact - blocks * BLOCK)
        k, v = self._exact_k[:, :, rest].clone(), self._exact_v[:, :, rest].clone()
        self.packed_tokens, self.dropped = (first + blocks - dropped) * BLOCK, dropped * BLOCK
        self.wants_queries = self._awaits_table
        self._fit_exact(lead)
        self._exact_k[:, :, after], self._exact_v[:, :, after] = k, v
        self.inconsistent = None

    def _make_room(self, first: int, blocks: int) -> int:
        """Makes room for `blocks` from block number `first` on; returns the number of the oldest block that stays."""
        slots, dropped = self._packed["k_codes"].shape[2], self.dropped // BLOCK
        if self.sliding_window is not None:
            dropped = max(dropped, first + blocks - slots)
            dropped += dropped % 2
        elif first + blocks > slots:
            self._allocate_blocks(max(first + blocks, int((first + blocks) * GROWTH)))
        return dropped

    def _new_blocks(self, first: int, start: int, stop: int) -> list[Blocks]:
        """Blocks [start, stop) of the exact tokens; block `i` becomes block number `first + i`.

        Those before `start` no later token sees: they are not quantized at all.
        """
        lead, slots = self.settings.exact_first, self._packed["k_codes"].shape[2]
        if not self.packed_tokens and not self.dropped and self.settings.table is None:
            begin, count = lead + start * BLOCK, min(stop - start, _CHUNK_BLOCKS) * BLOCK
            self._choose_table(self._first_tokens.sample(self._exact_k[:, :, begin : self._exact], begin, count))
        jobs = []
        while start < stop:
            slot = (first + start) % slots
            end = min(start + _CHUNK_BLOCKS, stop, start + slots - slot)
            part = slice(lead + start * BLOCK, lead + end * BLOCK)
            jobs.append(Blocks(self._exact_k[:, :, part], self._exact_v[:, :, part], self.packed(0), slot))
            start = end
        return jobs

    def _choose_table(self, k: torch.Tensor) -> None:
        """What all blocks share, chosen by the keys `(B, Hkv, T, D)` of the first ones."""
        if not self.settings.k_codec.by_channel:
            self._packed["k_mean"].copy_(k.float().mean(2))
            return
        if self._first_tokens.importance is None and self.latent is None:  # what queries of latents want is not known
            logger.warning_once(
                "key widths are chosen by keys alone, since no queries were seen: hf_kvattn.enable(model), or a "
                "calibration, would keep predictions closer"
            )
        self._write_table(self._first_tokens.table(k, self.settings.k_codec.bits))
        self._first_tokens = FirstTokens()

    def _write_table(self, table: widths.KeyTable) -> None:
        for name, array in table._asdict().items():
            self._packed[f"k_{name}"].copy_(array)

    def raise_if_not_finite(self, wait: bool) -> None:
        """Raises ValueError, until `reset`, if a GPU has answered that what it quantized was NaN or infinite.

        Args:
            wait: whether to wait for answers that have not arrived; else a later call looks at them.
        """
        pending = []
        for answer, answered in self._finite_checks:
            if wait:
                answered.synchronize()
            elif not answered.query():
                pending.append((answer, answered))
                continue
            if name := _not_finite(answer):
                raise ValueError(
                    f"layer {self.layer_idx}: {name} were NaN or infinite when they were quantized; only reset() makes "
                    "the cache usable again"
                )
        self._finite_checks = tuple(pending)

    def _allocate_blocks(self, blocks: int) -> None:
        """Makes room for `blocks` blocks. Codes that are there are copied, not quantized again."""
        settings, used, old = self.settings, self.packed_tokens // BLOCK, self._packed
        self._last_packed = None  # else it would keep the old arrays
        grown = {}
        for name, (shape, dtype) in shapes_of(
            settings.k_codec, settings.v_codec, self.head_dim, settings.group_size
        ).items():
            if name not in OF_BLOCKS:
                grown[name] = old[name] if old else self._empty(*shape, dtype=dtype).zero_()
                continue
            grown[name] = self._empty(blocks, *shape, dtype=torch.uint8 if name.endswith("codes") else dtype)
            if used:
                grown[name][:, :, :used] = old[name][:, :, :used]
        self._packed = grown
        if not old and settings.table is not None:
            self._write_table(settings.table)
        room = blocks * BLOCK + self._least_exact + BLOCK
        self.capacity = room if self.max_cache_len is None else min(room, self.max_cache_len)

    def _resize_exact(self, capacity: int, keep: int) -> None:
        k, v = (self._empty(capacity, self.head_dim) for _ in range(2))
        if keep:
            k[:, :, :keep], v[:, :, :keep] = self._exact_k[:, :, :keep], self._exact_v[:, :, :keep]
        self._exact_k, self._exact_v = k, v  # together: an interrupt must not leave more keys than values

    def _fit_exact(self, keep: int) -> None:
        """After a prompt (maybe the caller's own tensors), or a warm-up: moves `keep` tokens to the usual buffer."""
        if not self.is_initialized or self._exact_k.shape[2] == (usual := self._usual_exact):
            return
        if self._usual is None or self._usual[0].shape[2] != usual or keep > usual:
            self._usual = None
            return self._resize_exact(max(keep, usual), keep)
        (k, v), self._usual = self._usual, None  # where they were: CUDA graphs know the address
        k[:, :, :keep], v[:, :, :keep] = self._exact_k[:, :, :keep], self._exact_v[:, :, :keep]
        self._exact_k, self._exact_v = k, v

    def check_crop(self, tokens_to_remove: int) -> None:
        super().check_crop(tokens_to_remove)
        self.raise_if_not_finite(wait=True)
        kept, window = self.seen + tokens_to_remove, self.sliding_window
        if window is not None and tokens_to_remove and kept and max(0, kept - window + 1) < self.dropped:
            raise overwritten(self, tokens_to_remove, self.seen - window + 1 - self.dropped)

    def exact_prefix(self, stored: int, wanted: int) -> int:
        """Whole blocks. Of a window they may be gone, and `residual_length` tokens after them would not be exact."""
        settings, lead = self.settings, self.settings.exact_first
        if wanted == stored or wanted <= lead:
            return wanted
        return 0 if self.is_sliding or settings.residual_length else lead + (wanted - lead) // BLOCK * BLOCK

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens. What is left of a cut block is dequantized to exact tokens."""
        self.check_crop(tokens_to_remove)
        kept, lead = self.seen + tokens_to_remove, self.settings.exact_first
        if not kept:
            return self.reset()
        kept_here = kept - self.dropped
        self.unchanged_prefix = min(self.unchanged_prefix, kept)
        self._fit_exact(max(lead, kept_here - self.packed_tokens))  # they are there if a forward was interrupted
        if kept_here < lead + self.packed_tokens:
            block, cut = divmod(max(0, kept_here - lead), BLOCK)
            if cut:
                packed = self.stored_kv().packed
                assert packed is not None
                slots = slice(lead, lead + BLOCK)
                self._exact_k[:, :, slots], self._exact_v[:, :, slots] = packed.dense(block, block + 1)
                self.unchanged_prefix = min(self.unchanged_prefix, self.dropped + lead + block * BLOCK)
            self.packed_tokens = block * BLOCK
        self.seen = kept
        self.wants_queries = self._awaits_table

    def reset(self) -> None:
        self.seen = self.packed_tokens = self.dropped = 0
        self.wants_queries = self._awaits_table
        self._finite_checks, self._first_tokens = (), FirstTokens()
        self._fit_exact(0)
        super().reset()

    def __deepcopy__(self, memo: dict) -> KVLayer:
        self.raise_if_not_finite(wait=True)
        return super().__deepcopy__(memo)

    def select(self, rows: torch.Tensor) -> None:
        self.replace_buffers({name: tensor[rows] for name, (tensor, _) in self.buffers().items()})
        self.batch_size, self.unchanged_prefix = len(rows), 0
        self._first_tokens = self._first_tokens.rows(rows)

    def filled(self) -> dict[str, torch.Tensor]:
        self.raise_if_not_finite(wait=True)
        exact, blocks = self._exact, self.packed_tokens // BLOCK
        tensors = {"exact_k": self._exact_k[:, :, :exact], "exact_v": self._exact_v[:, :, :exact]}
        if blocks:
            slot = self.dropped // BLOCK % self._packed["k_codes"].shape[2]
            for name, array in self._packed.items():
                tensors |= ring_spans(name, array, slot, blocks) if name in OF_BLOCKS else {name: array}
        return tensors

    def _moved(self, name: str, tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
        k_codec, v_codec = self.settings.k_codec, self.settings.v_codec
        if name.startswith("k_codes") and k_codec.by_channel:
            return by_width_to(tensor, self._packed["k_widths"], device)
        if name.startswith("k_codes"):
            return keys_to(tensor, planes_of(k_codec.bits), device)
        if name.startswith("v_codes"):
            return values_to(tensor, planes_of(v_codec.bits), device)
        return super()._moved(name, tensor, device)

    def copy_rows(self, target: torch.Tensor, source: torch.Tensor, start: int) -> None:
        if self.sliding_window is not None:
            return super().copy_rows(target, source, start)
        blocks = self.packed_tokens // BLOCK
        first = max(0, start - self.settings.exact_first) // BLOCK
        for name, array in self._packed.items() if first < blocks else ():
            changed = slice(first, blocks) if name in OF_BLOCKS else slice(None)
            array[target, :, changed] = array[source, :, changed]
        beyond = start - self.packed_tokens  # rows may differ in the newest tokens only
        exact = slice(beyond if beyond > self.settings.exact_first else 0, self._exact)
        for buffer in (self._exact_k, self._exact_v):
            buffer[target, :, exact] = buffer[source, :, exact]
        self._first_tokens = self._first_tokens.rows_copied(target, source)

    def allocate_for(self, like: torch.Tensor, counts: dict[str, int]) -> None:
        seen, packed, dropped = (counts[name] for name in self.counts)
        lead, window = self.settings.exact_first, self.sliding_window
        outside = max(0, seen - window + 1) if window is not None else 0
        if packed % BLOCK or dropped % (2 * BLOCK) or (packed and dropped + packed > seen - lead) or dropped > outside:
            raise ValueError(
                f"layer {self.layer_idx}: {packed} tokens in blocks of {BLOCK} after {dropped} dropped and {lead} "
                f"exact ones do not fit into {seen} tokens"
            )
        super().allocate_for(like, counts)
        slots = self._packed["k_codes"].shape[2]
        if packed // BLOCK > slots:
            if window is not None:
                raise ValueError(f"layer {self.layer_idx}: {packed} tokens do not fit into a window of {window}")
            self._allocate_blocks(packed // BLOCK)
        self.packed_tokens, self.dropped = packed, dropped
        self.wants_queries = self._awaits_table
        self._resize_exact(max(self._usual_exact, seen - dropped - packed), 0)

    def check_loaded(self) -> None:
        for name, tensor in self.filled().items():
            name = name.removesuffix("_wrapped")
            if name in ("k_codes", "v_codes"):
                tensor = _as_codes(tensor, self.settings.k_codec if name == "k_codes" else self.settings.v_codec)
            if tensor.dtype in (torch.uint8, torch.int16):
                continue
            tensor = tensor.bfloat16() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
            if not name.startswith("exact") and not bool(tensor.isfinite().all()):
                raise ValueError(f"layer {self.layer_idx}: {name} holds NaN or infinite numbers")
            if name in ("k_scale", "v_scale") and not bool((tensor >= 0).all()):
                raise ValueError(f"layer {self.layer_idx}: {name} holds negative numbers")
        if self.packed_tokens and self.settings.k_codec.by_channel:
            table = widths.KeyTable(*(self._packed[f"k_{name}"] for name in widths.KeyTable._fields))
            try:
                widths.check(table, self.settings.k_codec.bits)
            except ValueError as error:
                raise ValueError(f"layer {self.layer_idx}: {error}") from error


def _as_codes(stored: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Codes as kernels read them. Layers store bytes: PyTorch can neither pickle nor compare float8 tensors."""
    return stored if stored.dtype == codec.dtype else stored.view(codec.dtype)


def _not_finite(finite: torch.Tensor) -> str | None:
    """ "keys" or "values", whichever is not finite by `finite` `(2,)` or `(n, 2)`; None if both are."""
    both = finite.reshape(-1, 2).bool().all(0).tolist()
    return next((name for name, each in zip(("keys", "values"), both, strict=True) if not each), None)


def quantize_due(layers: Sequence[KVQuantizedLayer], quantize: Quantize) -> None:
    """`finish_attention` of all `layers`, which lie on one device, in one call of `quantize`."""
    due = [layer for layer in layers if layer.blocks_due]
    for layer in due:
        if layer.device.type != "cuda":  # a GPU says so later
            layer.check_finite()
    begun = [layer.begin_blocks() for layer in due]
    jobs = [job for jobs, _ in begun for job in jobs]
    finite, answered = quantize(jobs) if jobs else None, None
    if finite is not None:
        stream, answered = torch.cuda.current_stream(finite.device), torch.cuda.Event()
        finite = finite.to("cpu", non_blocking=True)
        answered.record(stream)
    at = 0
    for layer, (own, dropped) in zip(due, begun, strict=True):
        layer.end_blocks(dropped, None if finite is None else finite[at : at + len(own)], answered)
        at += len(own)
