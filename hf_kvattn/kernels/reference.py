"""What every attention op means, in fp32 PyTorch. All other backends are tested against this file."""

from __future__ import annotations

import torch

from .call import BATCHES, MASKS, PIECES, QUANTIZED, RULES, TRAINING, AttendCall

SERVED = RULES | PIECES | TRAINING | MASKS | QUANTIZED | BATCHES


def unavailable() -> str | None:
    return None


def unsupported(call: AttendCall) -> str | None:
    beyond = call.beyond(SERVED)
    return beyond and f"the reference serves {beyond}"


def attend(call: AttendCall) -> torch.Tensor:
    """The attention of `call`, computed in fp32 and rounded once: `(B, Tq, Hq, D)` in the dtype of `q`."""
    if call.requests is not None:
        return call.by_request(attend)
    return attend_with_lse(call)[0].to(call.q.dtype)


def attend_with_lse(call: AttendCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The unrounded fp32 result `(B, Tq, Hq, D)`, and the log-sum-exp of each query's scores, `(B, Hq, Tq)`.

    The log-sum-exp (natural, after scale, softcap and mask, `s_aux` included) is -inf where nothing is visible.
    """
    group = call.q.shape[1] // call.k.shape[1]
    q = call.q.float()
    _, keys, values = zip(*call.tiles(call.kv_len), strict=True)
    k, v = (torch.cat(parts, dim=2).repeat_interleave(group, dim=1) for parts in (keys, values))
    scores = _capped(q @ k.transpose(-1, -2) * call.scale, call)
    mask = call.visible() if call.mask is None else call.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if call.sinks is not None:
        sinks = call.sinks
        sink_k, sink_v = (t.float().repeat_interleave(group, dim=1) for t in (sinks.k, sinks.v))
        sink_scores = _capped(sinks.q.float() @ sink_k.transpose(-1, -2) * call.scale, call)
        scores = torch.cat([sink_scores.masked_fill(~sinks.visible(), -torch.inf), scores], -1)
        v = torch.cat([sink_v, v], 2)
    lse = torch.logsumexp(scores, dim=-1)
    if call.s_aux is not None:
        lse = torch.logaddexp(lse, call.s_aux.float()[:, None])
    weights = torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])
    weights = torch.nn.functional.dropout(weights, call.dropout, training=call.dropout > 0)
    return (weights @ v).transpose(1, 2), lse


def _capped(scores: torch.Tensor, call: AttendCall) -> torch.Tensor:
    return scores if call.softcap is None else call.softcap * torch.tanh(scores / call.softcap)
