"""Published schemes of few bits, for comparison: their rounding alone, in a cache that stores full numbers.

KIVI (Liu et al., 2024, arXiv:2402.02750) codes keys per channel in groups of 32 tokens and values per token in groups
of 32 channels, from the least to the greatest number of a group. KVarN-like means tiles of 128 tokens that are rotated
(Hadamard) and divided by scales of channels and of tokens in turns, until rows and columns vary alike; what is left is
rounded to levels around 0. Scales and zeros are bfloat16. The newest 128 tokens stay exact, at least. It is nobody's
own code, without a search or a calibration: read the numbers as what such schemes reach, not as what a package does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import DynamicCache, DynamicLayer, PreTrainedConfig

from hf_kvattn.caches.configs import kv_shape
from hf_kvattn.quant.few_bits import STEPS
from hf_kvattn.quant.rotation import rotate

RESIDUAL = 128
GROUP = 32  # of KIVI
TILE = 128  # tokens that become codes at once
TURNS = 4  # of scaling channels and tokens

Round = Callable[
    [torch.Tensor, int], torch.Tensor
]  # (B, H, n * TILE, D), of n tiles, to what codes of so many bits keep


def kivi_keys(x: torch.Tensor, bits: int) -> torch.Tensor:
    return _affine(x.unflatten(2, (-1, GROUP)), bits, 3).flatten(2, 3)


def kivi_values(x: torch.Tensor, bits: int) -> torch.Tensor:
    return _affine(x.unflatten(3, (-1, GROUP)), bits, 4).flatten(3, 4)


def kvarn(x: torch.Tensor, bits: int) -> torch.Tensor:
    tiles = rotate(x).unflatten(2, (-1, TILE))
    scale, left = torch.ones_like(tiles), tiles
    for _ in range(TURNS):
        for dim in (3, 4):
            size = left.square().mean(dim, keepdim=True).sqrt()
            size = torch.where(size > 0, size, 1.0)
            scale, left = scale * size, left / size
    # Scales are products of one number a token and one a channel: as many bytes.
    tokens, channels = scale[..., :1], scale[..., :1, :] / scale[..., :1, :1]
    scale = tokens.bfloat16().float() * channels.bfloat16().float() * STEPS[bits - 1]
    top = 2.0**bits - 1
    codes = (tiles / scale + top / 2).round().clamp(0, top)
    return rotate(((codes - top / 2) * scale).flatten(2, 3))


def _affine(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero, scale = low.bfloat16().float(), ((high - low) / (2.0**bits - 1)).bfloat16().float()
    codes = torch.where(scale > 0, (x - zero) / scale, 0.0).round().clamp(0, 2.0**bits - 1)
    return codes * scale + zero


# Of keys, of values, and the bits beside codes: two numbers a group, or one a token and one a channel of a tile.
SCHEMES: dict[str, tuple[Round, Round, Callable[[int], float]]] = {
    "kivi": (kivi_keys, kivi_values, lambda dim: 32 / GROUP),
    "kvarn": (kvarn, kvarn, lambda dim: 16 / TILE + 16 / dim),
}


class _Layer(DynamicLayer):
    """Tokens that `RESIDUAL` newer ones follow are rounded, a tile at a time, when the next ones come."""

    def __init__(self, rounds: tuple[Round, Round], bits: int):
        super().__init__()
        self.rounds, self.bits, self.rounded = rounds, bits, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        end = (self.get_seq_length() - RESIDUAL) // TILE * TILE
        if end > self.rounded:
            part, self.rounded = slice(self.rounded, end), end
            assert self.keys is not None and self.values is not None
            for x, to_codes in zip((self.keys, self.values), self.rounds, strict=True):
                x[:, :, part] = to_codes(x[:, :, part].float(), self.bits).to(x.dtype)
        return super().update(key_states, value_states, *args, **kwargs)


class FakeQuantizedCache(DynamicCache):
    """A `DynamicCache` with the rounding errors of one of `SCHEMES`, which counts the bytes that the scheme would take.

    Raises:
        ValueError: a model with sliding windows, or whose head_dim is no multiple of 32.
    """

    def __init__(self, config: PreTrainedConfig, scheme: str, bits: int):
        super().__init__(config=config)
        dim = kv_shape(config.get_text_config(decoder=True))[1]
        if any(type(layer) is not DynamicLayer for layer in self.layers) or dim is None or dim % GROUP:
            raise ValueError(
                f"{scheme} stands for full attention alone, with a head_dim a multiple of {GROUP}, got {dim}"
            )
        keys, values, beside = SCHEMES[scheme]
        self.layers: list[_Layer] = [_Layer((keys, values), bits) for _ in self.layers]  # type: ignore[assignment]
        self._code_bits = bits + beside(dim)

    @property
    def nbytes(self) -> int:
        return round(self._numbers_times(self._code_bits, 16) / 8)

    @property
    def bits_per_element(self) -> float | None:
        numbers = self._numbers_times(1, 1)
        return 8 * self.nbytes / numbers if numbers else None

    def _numbers_times(self, rounded: float, exact: float) -> float:
        """How many numbers there are, those that are rounded times `rounded`, the others times `exact`."""
        total = 0.0
        for layer in self.layers:
            if layer.is_initialized and layer.keys is not None:
                tokens = layer.rounded * rounded + (layer.get_seq_length() - layer.rounded) * exact
                total += 2 * layer.keys[:, :, 0].numel() * tokens
        return total
