"""The one place that says how far from the fp32 reference a result may be."""

from dataclasses import dataclass

import torch

from hf_kvattn.kernels import reference
from hf_kvattn.kernels.call import AttendCall

FACTOR = 2.0  # a backend may be this much worse than PyTorch's plain formula in the same dtype
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}  # half a unit in the last place of 0.5, about
LSE = 5e-6  # of fp32 log-sum-exps, absolute; a key more or less in a thousand moves it by 1e-3


def plain_torch(call: AttendCall) -> torch.Tensor:
    """The textbook formula, every step in the call's own dtype: `(B, Tq, Hq, D)`."""
    group = call.q.shape[1] // call.k.shape[1]
    k, v = call.k.repeat_interleave(group, 1), call.v.repeat_interleave(group, 1)
    scores = call.q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    mask = call.visible() if call.mask is None else call.mask
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if call.sinks is not None:
        sinks = call.sinks
        sink_scores = sinks.q @ sinks.k.repeat_interleave(group, 1).transpose(-1, -2) * call.scale
        if call.softcap is not None:
            sink_scores = call.softcap * torch.tanh(sink_scores / call.softcap)
        scores = torch.cat([sink_scores.masked_fill(~sinks.visible(), -torch.inf), scores], -1)
        v = torch.cat([sinks.v.repeat_interleave(group, 1), v], 2)
    if call.s_aux is not None:
        scores = torch.cat([scores, call.s_aux.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = torch.nan_to_num(torch.softmax(scores, -1, dtype=torch.float32)).to(call.q.dtype)
    return (weights[..., : v.shape[2]] @ v).transpose(1, 2)


@dataclass
class Expected:
    """What a backend should give for a call."""

    out: torch.Tensor  # in fp32
    lse: torch.Tensor
    dtype: torch.dtype
    allowed: float  # the largest error of `out`

    @classmethod
    def of(cls, call: AttendCall) -> "Expected":
        """At most FACTOR times the error of plain PyTorch in the same dtype, both against fp32."""
        exact, lse = reference.attend_with_lse(call)
        error = (plain_torch(call).float() - exact).abs().max().item()
        return cls(exact, lse, call.q.dtype, FACTOR * error + FLOOR[call.q.dtype])

    def assert_close(self, out: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        assert out.shape == self.out.shape and out.dtype == self.dtype
        error = (out.float() - self.out).abs().max().item()
        assert error <= self.allowed, f"error {error:.3e} against fp32, {self.allowed:.3e} allowed"  # false for NaN too
        if lse is not None:
            torch.testing.assert_close(lse, self.lse, rtol=0, atol=LSE)


def assert_close_to_reference(out: torch.Tensor, call: AttendCall) -> None:
    Expected.of(call).assert_close(out)
