"""`AttendCall`: one attention problem, the only thing that a backend is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import IntFlag, auto
from itertools import pairwise

import torch

from ..quant.layout import BLOCK
from ..quant.packed import PackedKV, check_tensor


class Feature(IntFlag):
    """What a call may ask for beyond causal attention over dense keys.

    A backend lists those that it serves and refuses all others: a new one is refused until a backend lists it.
    """

    BIDIRECTIONAL_ATTENTION = auto()
    WINDOW = auto()
    SOFTCAP = auto()
    LEFT_PADDING = auto()
    DENSE_MASK = auto()
    DROPOUT = auto()
    QUANTIZED_TOKENS = auto()
    RING_BUFFERS = auto()
    WINDOW_SINKS = auto()
    LEARNED_SINKS = auto()
    GRADIENTS = auto()
    REQUESTS = auto()


# Groups of features that backends have in common. Plain ints: they are compared in every layer of every step.
RULES = int(Feature.BIDIRECTIONAL_ATTENTION | Feature.WINDOW | Feature.SOFTCAP | Feature.LEFT_PADDING)
PIECES = int(Feature.RING_BUFFERS | Feature.WINDOW_SINKS | Feature.LEARNED_SINKS)  # parts of one softmax
QUANTIZED = int(Feature.QUANTIZED_TOKENS)
MASKS = int(Feature.DENSE_MASK)
TRAINING = int(Feature.DROPOUT | Feature.GRADIENTS)
BATCHES = int(Feature.REQUESTS)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # of queries, keys and values
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # kernels hold numbers in fp32
_MAX_SINKS = 64


def check_mask(mask: torch.Tensor, q: torch.Tensor, kv_len: int) -> None:
    """Raises ValueError unless `mask` is `(B or 1, Hq or 1, Tq, kv_len)`, bool or float, for `q` `(B, Hq, Tq, D)`."""
    lead = [1 if found == 1 else full for found, full in zip(mask.shape[:2], q.shape, strict=False)]
    check_tensor("mask", mask, (*lead, q.shape[2], kv_len), (torch.bool, *FLOATS), q.device)


@dataclass(slots=True)
class SinkKV:
    """First tokens that stay visible after a sliding window has passed them (StreamingLLM, arXiv:2309.17453).

    Attributes:
        k, v: `(B, Hkv, S, D)`, each row's first S tokens; S is at most 64.
        q: `(B, Hq, Tq, D)`, the queries rotated to the distance that they would have from `k` if no token lay between
            the sinks and the window.
        evicted: tokens of an unpadded row that query 0 does not see any more; negative while it sees all. Query
            `i` of row `b` sees the first `min(S, evicted + i - leftpad[b])` sinks, in addition to its window.
        leftpad: `(B,)` int32, the position of each row's first token, or None for 0.
    """

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    evicted: int
    leftpad: torch.Tensor | None = None

    def visible(self) -> torch.Tensor:
        """Which sinks each query sees, `(B or 1, 1, Tq, S)` bool."""
        device = self.q.device
        query = torch.arange(self.q.shape[2], device=device)[None, None, :, None]
        leftpad = 0 if self.leftpad is None else self.leftpad[:, None, None, None]
        return torch.arange(self.k.shape[2], device=device) < self.evicted + query - leftpad


@dataclass(slots=True)
class Requests:
    """Requests of any lengths that share one call, as a continuous batch has them: queries and keys side by side.

    Attributes:
        q_begin: `(n + 1,)` int32, not falling, from 0 to Tq: request `i` has the query tokens from `q_begin[i]` up to
            `q_begin[i + 1]`.
        kv_begin: `(n + 1,)` int32, from 0 on: the same of its keys. Its last query stands at its last key.
        kv_rows: `(kv_begin[n],)` int64, which of the Tk rows of `k` and `v` holds each key; None where key `j` of all
            lies in row `j`.
    """

    q_begin: torch.Tensor
    kv_begin: torch.Tensor
    kv_rows: torch.Tensor | None = None


@dataclass(slots=True)
class AttendCall:
    """`softmax(softcap(q k^T * scale)) v` over the visible keys, for `G = Hq // Hkv` query heads per KV head.

    Query `i` stands at key position `Tk - Tq + i` (bottom-right aligned). Without `mask`, key `j` is visible to it when

        leftpad[b] <= j    and    j <= position  (if causal)    and    j > position - window  (if window)

    so that with Tq = 3, Tk = 5, window = 3 and leftpad = 1:

        position 2:  . # # . .
        position 3:  . # # # .
        position 4:  . . # # #

    A query that sees nothing gets zeros.

    Attributes:
        q: `(B, Hq, Tq, D)` of one of `FLOATS`; no size is 0. All other tensors are on its device.
        k: `(B, Hkv, Tk, D)`, the dtype of `q`; any strides with a contiguous last dimension. For a ring buffer, where
            `tokens` says how many tokens there are, Tk is the number of slots.
        v: the same shape as `k`.
        scale: factor of the scores.
        causal: whether a query sees only keys up to its own position.
        window: visible keys including the query's own (transformers' meaning), or None for all.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2), or None.
        leftpad: `(B,)` int32, first visible key of each row (left padding), or None for 0.
        mask: replaces `causal`, `window` and `leftpad`: `(B or 1, Hq or 1, Tq, Tk)`, bool (True is visible) or float
            (added to the scores after the softcap), or None.
        dropout: probability of dropping a weight, for training; below 1.
        packed: quantized keys and values, or None. The first `packed.start` tokens of `k` and `v` come before them,
            the others after. Tk counts all.
        tokens: of a ring buffer without `packed`: how many tokens it holds. Token `t` lies in slot
            `(slot + t) % slots`; if `slot` is not 0, all slots have been written.
        slot: the slot of a ring buffer's first token.
        sinks: tokens visible beside the window, with a mask of their own, or None. Tk does not count them.
        s_aux: learned sinks, `(Hq,)` of one of `FLOATS`: a score for each query head that takes part in the softmax and
            has no value (gpt-oss; the name is transformers'), or None. It is neither scaled nor capped.
        requests: several requests in one row (B is 1), each with causality and window of its own, or None. Then there
            are no `leftpad`, `mask`, `packed`, `tokens` and `sinks`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    leftpad: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    dropout: float = 0.0
    packed: PackedKV | None = None
    tokens: int | None = None
    slot: int = 0
    sinks: SinkKV | None = None
    s_aux: torch.Tensor | None = None
    requests: Requests | None = None

    def check(self) -> None:
        """Raises ValueError, saying what differs, unless all is as described above: backends rely on it.

        Numbers in tensors are not read: backends serve every `leftpad`.
        """
        q, k, v, packed, tokens, slot = self.q, self.k, self.v, self.packed, self.tokens, self.slot
        q_shape, k_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
        fits = len(q_shape) == len(k_shape) == 4 and k_shape == v.shape and 0 not in q_shape and k_shape[1] > 0
        fits = fits and q_shape[0] == k_shape[0] and q_shape[1] % k_shape[1] == 0 and q_shape[3] == k_shape[3]
        if not (fits and dtype == k.dtype == v.dtype and dtype in FLOATS and device == k.device == v.device):
            given = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (q, k, v))
            raise ValueError(f"q, k, v are {given}: they do not fit each other, or are not floating point")
        batch, heads, q_len, dim = q_shape
        kv_heads, slots = k_shape[1:3]
        if not -_LARGEST <= self.scale <= _LARGEST:
            raise ValueError(f"scale must be finite in float32, got {self.scale!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 on and below 1, got {self.dropout!r}")
        if self.softcap is not None and not _SMALLEST <= self.softcap <= _LARGEST:
            raise ValueError(f"softcap must be positive and finite in float32, got {self.softcap!r}")
        if self.window is not None and (type(self.window) is not int or not 0 < self.window < 2**63):
            raise ValueError(f"window must be an int of at least 1, got {self.window!r}")
        if packed is not None:
            check_tensor("k_mean", packed.k_mean, (batch, kv_heads, dim), (torch.float32,), device)
        if tokens is None:
            fits = not slot and (slots > 0 if packed is None else slots >= packed.start and self.kv_len > 0)
        else:
            fits = packed is None and type(tokens) is type(slot) is int and 0 < tokens <= slots and 0 <= slot < slots
        if not fits:
            raise ValueError(f"k {tuple(k_shape)} holds no ring of {tokens=} from {slot=} on, or too few beside blocks")
        if self.leftpad is not None:
            check_tensor("leftpad", self.leftpad, (batch,), (torch.int32,), device)
        if self.s_aux is not None:
            check_tensor("s_aux", self.s_aux, (heads,), FLOATS, device)
        if self.mask is not None:
            check_mask(self.mask, q, self.kv_len)
        if (sinks := self.sinks) is not None:
            AttendCall(sinks.q, sinks.k, sinks.v, self.scale, leftpad=sinks.leftpad).check()
            check_tensor("sinks' q", sinks.q, q_shape, (dtype,), device)
            check_tensor(
                "sinks' k", sinks.k, (batch, kv_heads, min(sinks.k.shape[2], _MAX_SINKS), dim), (dtype,), device
            )
            if type(sinks.evicted) is not int or abs(sinks.evicted) > 2**60:
                raise ValueError(f"evicted must be an int, got {sinks.evicted!r}")

        if (requests := self.requests) is not None:
            others = (self.leftpad, self.mask, packed, tokens, sinks)
            if batch != 1 or any(other is not None for other in others):
                raise ValueError(f"requests share one row without masks, rings or blocks, not {batch} rows or these")
            begins = requests.q_begin.shape if requests.q_begin.dim() == 1 and len(requests.q_begin) > 1 else (2,)
            check_tensor("q_begin", requests.q_begin, begins, (torch.int32,), device)
            check_tensor("kv_begin", requests.kv_begin, begins, (torch.int32,), device)
            if (rows := requests.kv_rows) is not None:
                check_tensor("kv_rows", rows, (rows.numel(),), (torch.int64,), device)

    def by_request(self, attend: Callable[[AttendCall], torch.Tensor]) -> torch.Tensor:
        """The result of `attend` over each request alone, joined: `(1, Tq, Hq, D)`.

        Raises:
            ValueError: numbers of `requests` that are not as described there.
        """
        assert self.requests is not None
        q_begin, kv_begin, rows = self.requests.q_begin.tolist(), self.requests.kv_begin.tolist(), self.requests.kv_rows
        spans = [(range(*q), range(*kv)) for q, kv in zip(pairwise(q_begin), pairwise(kv_begin), strict=True)]
        whole = (q_begin[0], kv_begin[0], q_begin[-1]) == (0, 0, self.q.shape[2])
        held = self.k.shape[2] if rows is None else len(rows)
        if not whole or kv_begin[-1] > held or any(q.start > q.stop or len(kv) < len(q) for q, kv in spans):
            raise ValueError(
                f"requests with queries {q_begin} and keys {kv_begin} do not fit {self.q.shape[2]} queries, {held} keys"
            )
        if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.k.shape[2]:
            raise ValueError(f"requests name rows {rows.min()} to {rows.max()} of {self.k.shape[2]}")
        parts = []
        for q, kv in spans:
            if q:
                k, v = (
                    t[:, :, kv.start : kv.stop] if rows is None else t.index_select(2, rows[kv.start : kv.stop])
                    for t in (self.k, self.v)
                )
                parts.append(attend(replace(self, q=self.q[:, :, q.start : q.stop], k=k, v=v, requests=None)))
        return torch.cat(parts, 1)

    @property
    def kv_len(self) -> int:
        """Tk: all keys, packed ones included."""
        if self.tokens is not None:
            return self.tokens
        return self.k.shape[2] + (0 if self.packed is None else self.packed.tokens)

    def features(self) -> int:
        """What this call asks for beyond causal attention over dense keys: bits of `Feature`, in its order."""
        tensors = (self.q, self.k, self.v, self.s_aux)
        return (
            (not self.causal)
            | (self.window is not None) << 1
            | (self.softcap is not None) << 2
            | (self.leftpad is not None) << 3
            | (self.mask is not None) << 4
            | (self.dropout > 0) << 5
            | (self.packed is not None) << 6
            | (self.tokens is not None) << 7
            | (self.sinks is not None) << 8
            | (self.s_aux is not None) << 9
            | (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) << 10
            | (self.requests is not None) << 11
        )

    def beyond(self, served: int) -> str | None:
        """The features that are not among `served`, as `no dense mask, no dropout`; None where all are."""
        missing = self.features() & ~served
        if not missing:
            return None
        names = [str(feature.name).lower().replace("_", " ") for feature in Feature if feature & missing]
        return ", ".join(f"no {name}" for name in names)

    def after_s_aux(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`out` `(B, Tq, Hq, D)` and `lse` `(B, Hq, Tq)` of the keys alone, once `s_aux` has taken its share."""
        if self.s_aux is None:
            return out, lse
        total = torch.logaddexp(lse, self.s_aux.float()[:, None])
        share = torch.nan_to_num(torch.exp(lse - total))  # 0 where nothing is visible
        return (out * share.transpose(1, 2)[..., None]).to(out.dtype), total

    def tiles(self, tile: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """All keys and values in fp32, `tile` quantized tokens at a time: the first one's position, keys, values."""
        if self.packed is None:
            to_wrap = min(self.kv_len, self.k.shape[2] - self.slot)
            for begin, slots in ((0, slice(self.slot, self.slot + to_wrap)), (to_wrap, slice(self.kv_len - to_wrap))):
                if begin < self.kv_len:
                    yield begin, self.k[:, :, slots].float(), self.v[:, :, slots].float()
            return
        start, tokens = self.packed.start, self.packed.tokens
        if start:
            yield 0, self.k[:, :, :start].float(), self.v[:, :, :start].float()
        for done in range(0, tokens, tile):
            yield start + done, *self.packed.dense(done // BLOCK, min(done + tile, tokens) // BLOCK)
        if self.k.shape[2] > start:
            yield start + tokens, self.k[:, :, start:].float(), self.v[:, :, start:].float()

    def visible(self) -> torch.Tensor | None:
        """What the rules above allow, as a bool mask `(B or 1, 1, Tq, Tk)`, or None when everything is visible."""
        q_len, kv_len, device = self.q.shape[2], self.kv_len, self.q.device
        rules = []
        key = torch.arange(kv_len, device=device)
        position = torch.arange(kv_len - q_len, kv_len, device=device)[None, None, :, None]
        if self.causal and q_len > 1:
            rules.append(key <= position)
        if self.window is not None and self.window < kv_len:
            rules.append(key > position - self.window)
        if self.leftpad is not None:
            rules.append(key >= self.leftpad[:, None, None, None])
        if not rules:
            return None
        allowed = rules[0]
        for rule in rules[1:]:
            allowed = allowed & rule
        return allowed.expand(-1, -1, q_len, kv_len)
