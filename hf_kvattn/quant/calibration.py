"""`Calibration`: the bits of every layer's keys and values, and the file that stores them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .codecs import Codec, codec_for
from .layout import BLOCK

VERSION = 1
MAX_FILE_BYTES = 1 << 20  # some 10 bytes a layer are written
EXACT_BITS = 16  # counted for a number of a skipped layer


def check_group_size(group_size: int, head_dim: int | None = None) -> None:
    if type(group_size) is not int or group_size < 16 or group_size % 16:
        raise ValueError(f"group_size must be a multiple of 16, got {group_size!r}")
    if head_dim is not None and head_dim % group_size:
        raise ValueError(f"{group_size=} does not divide head_dim={head_dim}")


def default_group_size(head_dim: int | None, codec: Codec) -> int:
    """That of a cache which is told nothing, for values of `codec`.

    By channel, where a scale is a byte, it is the least one of 64 or more; else 32, or 16 where 32 does not divide
    head_dim.
    """
    if not codec.by_channel:
        return 32 if head_dim is None or head_dim % 32 == 0 else 16
    if head_dim is None:
        return 64
    sizes = [size for size in range(16, head_dim + 1, 16) if head_dim % size == 0]
    return next((size for size in sizes if size >= 64), max(sizes, default=16))


def bits_with_scales(bits: int, group: int) -> float:
    """Bits that one number takes, its share of a group's bfloat16 scale and zero included."""
    return bits + (16 if codec_for(bits).symmetric else 32) / group


def file_name(cache: str) -> str:
    """The file in a model's folder with the calibration of its cache `"int8"`, `"int4"` or `"int2"`."""
    return f"kvattn_calibration_{cache}.json"


@dataclass(frozen=True)
class Calibration:
    """What a calibrated `QuantizedKVCache` takes for each layer, and the model it was made for.

    Attributes:
        model_type: as in the config.
        layers: of the model, those that store keys and values; all numbers of layers here count these alone.
        kv_heads, head_dim: of the model.
        group_size: channels that share a value scale.
        key_bits, value_bits: 8, 4, 3 or 2 for each layer.
        skip_layers: layers that are not quantized; their bits above count for nothing.

    Raises:
        ValueError: values that no cache can take, named.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    group_size: int
    key_bits: tuple[int, ...]
    value_bits: tuple[int, ...]
    skip_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if type(self.model_type) is not str:
            raise ValueError(f"model_type must be a string, got {self.model_type!r}")
        for name in ("layers", "kv_heads", "head_dim"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {getattr(self, name)!r}")
        check_group_size(self.group_size, self.head_dim)
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if type(bits) is not tuple or len(bits) != self.layers:
                raise ValueError(f"{name} must be {self.layers} numbers, one a layer, got {bits!r}")
            for each in bits:
                if type(each) is not int:
                    raise ValueError(f"{name} must be ints, got {each!r}")
                codec_for(each)
        skipped = self.skip_layers
        if type(skipped) is not tuple or any(type(i) is not int or not 0 <= i < self.layers for i in skipped):
            raise ValueError(f"skip_layers must be from 0 to {self.layers - 1}, got {skipped!r}")

    @property
    def bits_per_element(self) -> float:
        """Average bits of a quantized number, scales included; a skipped layer's numbers count 16."""
        used = [i for i in range(self.layers) if i not in self.skip_layers]
        keys = sum(bits_with_scales(self.key_bits[i], BLOCK) for i in used)
        values = sum(bits_with_scales(self.value_bits[i], self.group_size) for i in used)
        return (keys + values + 2 * (self.layers - len(used)) * EXACT_BITS) / (2 * self.layers)

    def check_model(self, model_type: str, layers: int, kv_heads: int | None, head_dim: int | None) -> None:
        """Raises ValueError, saying what differs, when it was made for another model than this one."""
        model = {"model_type": model_type, "layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        other = [f"{name} {getattr(self, name)!r}, not {value!r}" for name, value in model.items()
                 if value != getattr(self, name)]  # fmt: skip
        if other:
            raise ValueError(f"the calibration was made for another model, one of {' and '.join(other)}")

    def as_json(self) -> dict[str, Any]:
        """What a calibration file holds."""
        return {"version": VERSION, **{name: list(x) if type(x) is tuple else x for name, x in asdict(self).items()}}

    @classmethod
    def of_json(cls, found: Any) -> Calibration:
        """The inverse of `as_json`; ValueError, saying what is wrong, for anything else."""
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError(f"no calibration of version {VERSION}")
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
        del values["version"]
        try:
            return cls(**values)
        except TypeError as error:  # names that are missing or not known
            raise ValueError(str(error)) from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file that holds `as_json`.

        Raises:
            ValueError: a broken file, or one of over 1 MiB, with its name and what is wrong.
            OSError: no such file, or one that cannot be read.
        """
        try:
            with Path(path).open("rb") as file:
                text = file.read(MAX_FILE_BYTES + 1)
            if len(text) > MAX_FILE_BYTES:
                raise ValueError(f"it is larger than {MAX_FILE_BYTES} bytes")
            return cls.of_json(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a calibration file: {error}") from error
