"""How far from the truth a result may be.

The truth is the textbook formula in float64. A result may be `FACTOR` times as far from it as the same formula is in
the result's own dtype, every step rounded, as plain PyTorch computes it; and a fraction of a unit in the last place,
where the formula happens to be exact. A whole model is computed with the one formula, with the other, and with what is
checked; there the unit is that of its largest logit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch

from hf_kvattn.evaluation.gpu_check.running import Found
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall

FACTOR = 2.0
UNITS = 0.25  # in the last place of 1: half of one of a number around 0.5
TRUTH, PLAIN = "float64 formula", "plain formula"  # backends within `formulas()`


def formula(call: AttendCall, dtype: torch.dtype) -> torch.Tensor:
    """The textbook formula with every step in `dtype`: `(B, Tq, Hq, D)`."""
    group = call.q.shape[1] // call.k.shape[1]
    _, keys, values = zip(*call.tiles(call.kv_len), strict=True)  # of rings and blocks, in order
    k, v = (torch.cat(parts, 2).to(dtype).repeat_interleave(group, 1) for parts in (keys, values))
    scores = call.q.to(dtype) @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = call.visible() if call.mask is None else call.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if (sinks := call.sinks) is not None:
        own_k, own_v = (t.to(dtype).repeat_interleave(group, 1) for t in (sinks.k, sinks.v))
        own = sinks.q.to(dtype) @ own_k.transpose(-1, -2) * call.scale
        own = own if call.softcap is None else call.softcap * torch.tanh(own / call.softcap)
        scores = torch.cat([own.masked_fill(~sinks.visible(), -torch.inf), scores], -1)
        v = torch.cat([own_v, v], 2)
    if call.s_aux is not None:
        scores = torch.cat([scores, call.s_aux.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1))
    return (weights[..., : v.shape[2]] @ v).transpose(1, 2)


def judged(out: torch.Tensor, call: AttendCall) -> Found:
    """Whether `out` is the attention of `call`: `(B, Tq, Hq, D)` in its dtype."""
    truth, dtype = formula(call, torch.float64), call.q.dtype
    if out.shape != truth.shape or out.dtype != dtype:
        return {"ok": False, "error": None, "said": f"{tuple(out.shape)} {out.dtype}, not {tuple(truth.shape)} {dtype}"}
    return compared(out, truth, formula(call, dtype), UNITS * torch.finfo(dtype).eps)


def compared(out: torch.Tensor, truth: torch.Tensor, rounded: torch.Tensor, least: float) -> Found:
    """Whether `out` is at most FACTOR times as far from `truth` as `rounded` is, and `least`."""
    error, noise = ((each.double() - truth.double()).abs().max().item() for each in (out, rounded))
    allowed = FACTOR * noise + least
    if not math.isfinite(error + allowed):
        return {"ok": False, "error": None, "said": "not finite"}
    return {"ok": error <= allowed, "error": error, "allowed": allowed}


def logits_compared(out: torch.Tensor, truth: torch.Tensor, rounded: torch.Tensor, dtype: torch.dtype) -> Found:
    """The same of logits that a model of `dtype` computed in these three ways."""
    return compared(out, truth, rounded, torch.finfo(dtype).eps * truth.double().abs().max().item())


class _Formula:
    """A backend that computes every call by the formula, in `dtype` or in that of the call."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype

    def unavailable(self) -> None:
        return None

    def unsupported(self, call: AttendCall) -> str | None:
        return "the formula serves no requests and no dropout" if call.requests is not None or call.dropout else None

    def attend(self, call: AttendCall) -> torch.Tensor:
        return formula(call, self.dtype or call.q.dtype).to(call.q.dtype)


@contextlib.contextmanager
def formulas() -> Iterator[None]:
    """For the body of a `with`, TRUTH and PLAIN are backends that `dispatch.backend` knows."""
    dispatch.BACKENDS.update({TRUTH: _Formula(torch.float64), PLAIN: _Formula(None)})
    try:
        yield
    finally:
        for name in (TRUTH, PLAIN):
            del dispatch.BACKENDS[name]
