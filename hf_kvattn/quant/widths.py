"""How many bits each channel of a key gets: the more, the more its rounding error changes scores.

An error `e` of a key's channel shifts a query's score by `q * e`, so a channel matters by E[q**2] * var(k). That is the
variance within blocks, since each block has an offset of its own. Bits are given one by one to the channels that gain
most by them, in groups of 16 that lie side by side in the codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import few_bits
from .few_bits import GROUP, MAX_WIDTH, STEPS
from .layout import BLOCK

# What is left of the variance of a number with 0, 1, 2, ... bits: that of a normal distribution, rounded to levels of
# equal distance (Max, 1960).
_LEFT = (1.0, 0.3634, 0.1188, 0.0374, 0.01154, 0.00349, 0.00104, 0.0003)
_EXPONENT = 0.8  # of a channel's weight; measured to be better than 1
_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8)  # of the steps, to try
_LEAST_SHARE = 1e-3  # of the mean importance, added: a channel that no query has used may be used yet
_SAMPLE_BLOCKS = 32  # that steps are chosen by
_RANGE = (1e-18, 1e18)  # of steps and units: neither products nor reciprocals overflow
_DRIFT = 2.0  # blocks to come may lie so many times as far from the mean as those seen


class KeyTable(NamedTuple):
    """What the codes of a head's keys share, in all blocks; `few_bits.py` says how.

    Attributes:
        mean: `(..., D)` float32, of each channel.
        step, unit: `(..., D)` bfloat16, positive, of codes and of offsets; in the order of the codes.
        order: `(..., D)` int16: the channel whose codes come first, and so on.
        widths: `(..., D / 16)` uint8, bits of the codes of each group in that order, 0 to 7.
    """

    mean: torch.Tensor
    step: torch.Tensor
    unit: torch.Tensor
    order: torch.Tensor
    widths: torch.Tensor


def choose(k: torch.Tensor, importance: torch.Tensor | None, bits: int) -> KeyTable:
    """The table for keys such as `k`.

    Args:
        k: `(..., T, D)`, finite, whole blocks of 32 tokens.
        importance: `(..., D)`, not negative: E[q**2] of the queries that meet each channel, in any unit. None stands
            for equal ones.
        bits: of a code on average.
    """
    k = k.float()
    mean = k.mean(-2)
    blocks = (k - mean[..., None, :]).unflatten(-2, (-1, BLOCK))
    middle = (blocks.amax(-2, keepdim=True) + blocks.amin(-2, keepdim=True)) / 2
    centred = blocks - blocks.mean(-2, keepdim=True)
    variance = centred.square().mean((-3, -2))
    # Offsets must reach all blocks, those of later tokens too. What their rounding leaves is for the codes: it lies
    # anywhere in a unit, even where the sample's middles lie near the mean.
    unit = _reach(middle, mean) / few_bits.LARGEST_OFFSET
    weight = variance + unit.square() / 12
    order, widths = share_bits(weight if importance is None else weight * _with_least(importance.float()), bits)
    widths = widths.repeat_interleave(GROUP, -1)
    sample = (blocks - middle)[..., :_SAMPLE_BLOCKS, :, :]
    left = torch.linspace(-0.5, 0.5, sample.shape[-3], device=k.device)[:, None, None]
    sample = (sample + left * unit[..., None, None, :]).flatten(-3, -2)
    sample = sample.gather(-1, order[..., None, :].expand_as(sample))
    step = _steps(sample, weight.sqrt().gather(-1, order), widths)
    unit = torch.maximum(unit.gather(-1, order), step * torch.exp2(widths) / 8).clamp(*_RANGE)
    return KeyTable(mean, step.bfloat16(), unit.bfloat16(), order.to(torch.int16), widths[..., ::GROUP].to(torch.uint8))


def check(table: KeyTable, bits: int) -> None:
    """Raises ValueError, saying what is wrong, for numbers that `choose` does not give: kernels trust a table."""
    mean, step, unit, order, widths = table
    if not bool(mean.isfinite().all()):
        raise ValueError("means of keys are NaN or infinite")
    low, high = _RANGE[0] / 2, _RANGE[1] * 2  # rounded to bfloat16
    for name, x in (("steps", step), ("units", unit)):
        if not bool(((x >= low) & (x <= high)).all()):
            raise ValueError(f"{name} of keys must be from {low:g} to {high:g}, got {x.min():g} to {x.max():g}")
    if not bool((order.long().sort(-1).values == torch.arange(order.shape[-1], device=order.device)).all()):
        raise ValueError(f"an order of keys' channels is none of {order.shape[-1]}")
    total, falls = widths.sum(-1, dtype=torch.int64), widths[..., :-1] >= widths[..., 1:]
    if not bool((total == bits * widths.shape[-1]).all() and falls.all() and (widths <= MAX_WIDTH).all()):
        raise ValueError(f"widths of keys must fall from {MAX_WIDTH} at most, with {bits} bits on average")


def share_bits(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares out `bits` a channel by `weight` `(..., D)`: order and widths of a `KeyTable`, int64."""
    weight = weight.double().clamp(min=0) ** _EXPONENT
    order = weight.argsort(dim=-1, descending=True, stable=True)
    groups = weight.gather(-1, order).unflatten(-1, (-1, GROUP)).sum(-1)
    left = torch.tensor(_LEFT, dtype=torch.float64, device=weight.device)
    gains = groups[..., None] * (left[:-1] - left[1:])  # of each further bit; they fall
    # Equal gains, as of channels that are constant, go to the bits that come first in every group.
    gains = gains + 1e-300 * torch.arange(MAX_WIDTH, 0, -1, dtype=torch.float64, device=weight.device)
    taken = gains.flatten(-2).topk(bits * groups.shape[-1], dim=-1).indices // MAX_WIDTH
    widths = torch.zeros_like(groups, dtype=torch.int64).scatter_add_(-1, taken, torch.ones_like(taken))
    # Wider groups first, whatever their gains: kernels read groups of one width together.
    widths, by_width = widths.sort(dim=-1, descending=True, stable=True)
    order = order.unflatten(-1, (-1, GROUP))
    order = order.gather(-2, by_width[..., None].expand_as(order)).flatten(-2)
    return order, widths


def _reach(middle: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """How far from the mean the middle of a later block may lie, `(..., D)`, by those seen, `(..., blocks, 1, D)`.

    Positions turn pairs of channels (RoPE), the slowest ones hardly in a whole prompt: a large mean of one channel is
    its other's after enough tokens. Pairs are D / 2 channels apart, or neighbours, as models differ.
    """
    at = (middle[..., 0, :] + mean[..., None, :]).abs().amax(-2)
    half, neighbour = at.roll(at.shape[-1] // 2, -1), at.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    turned = torch.hypot(at, torch.maximum(half, neighbour)) + mean.abs()
    return torch.maximum(turned, middle[..., 0, :].abs().amax(-2) * _DRIFT)


def _with_least(importance: torch.Tensor) -> torch.Tensor:
    return importance + importance.mean(-1, keepdim=True) * _LEAST_SHARE


def _steps(x: torch.Tensor, deviation: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Of each channel the step `(..., D)` with the least sum of fourth powers of errors; `x` is `(..., n, D)`."""
    sizes = torch.tensor((2.0, *STEPS), device=x.device)  # without bits a step is the unit of offsets alone
    base = (sizes[widths] * deviation).clamp(*_RANGE)
    top, best, best_error = torch.exp2(widths.float()) - 1, base, torch.full_like(base, torch.inf)
    for factor in _FACTORS:
        step = (base * factor)[..., None, :]
        codes = (x / step + top[..., None, :] / 2).clamp(torch.zeros_like(step), top[..., None, :]).round()
        error = ((codes - top[..., None, :] / 2) - x / step).square().square().sum(-2) * factor**4
        better = (error < best_error) & (widths > 0)
        best, best_error = torch.where(better, step[..., 0, :], best), torch.where(better, error, best_error)
    return best
