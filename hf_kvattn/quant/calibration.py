"""`Calibration`: the bits of every layer's keys and values, key tables, and the file that stores them."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from . import widths
from .codecs import Codec, codec_for
from .few_bits import GROUP
from .layout import BLOCK
from .widths import KeyTable

VERSION = 2
MAX_FILE_BYTES = 16 << 20  # some 40 bytes a key channel are written: 4 MB for 80 layers of 8 heads of 128
EXACT_BITS = 16  # counted for a number of a skipped layer
LARGEST = 3e38  # of numbers in a file: float32 holds it
# The fields of a table in a file: channels a number, dtype, and the digits that give it back, 0 of whole numbers.
_TABLE: dict[str, tuple[int, torch.dtype, int]] = {
    "mean": (1, torch.float32, 9),
    "step": (1, torch.bfloat16, 4),
    "unit": (1, torch.bfloat16, 4),
    "order": (1, torch.int16, 0),
    "widths": (GROUP, torch.uint8, 0),
}


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


def key_bits_with_scales(bits: int) -> float:
    """Bits that one number of a key takes, its share of what its block stores beside codes included."""
    return bits + (6 if codec_for(bits).by_channel else 16) / BLOCK


def value_bits_with_scales(bits: int, group: int) -> float:
    """Bits that one number of a value takes, its share of the scale of `group` channels included."""
    return bits + (8 if codec_for(bits).by_channel else 16) / group


def file_name(cache: str) -> str:
    """The file in a model's folder with the calibration of its cache `"int8"`, `"int4"` or `"int2"`."""
    return f"kvattn_calibration_{cache}.json"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a calibrated `QuantizedKVCache` takes for each layer, and the model it was made for.

    Attributes:
        model_type: as in the config.
        layers: of the model, those that store keys and values; all numbers of layers here count these alone.
        kv_heads, head_dim: of the model.
        group_size: channels that share a value scale.
        key_bits, value_bits: 8, 4, 3 or 2 for each layer.
        skip_layers: layers that are not quantized; their bits above count for nothing.
        tables: of each layer's keys, tensors `(kv_heads, ...)` on the CPU. None where keys have 8 bits, or where a
            cache chooses by its first tokens; `()` stands for that everywhere.

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
    tables: tuple[KeyTable | None, ...] = ()

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
        if self.tables == ():
            object.__setattr__(self, "tables", (None,) * self.layers)
        if type(self.tables) is not tuple or len(self.tables) != self.layers:
            raise ValueError(f"tables must be {self.layers}, one a layer, or none")
        for i, table in enumerate(self.tables):
            if table is not None:
                try:
                    self._check_table(table, self.key_bits[i])
                except ValueError as error:
                    raise ValueError(f"the table of layer {i}: {error}") from error

    def _check_table(self, table: KeyTable, bits: int) -> None:
        if not codec_for(bits).by_channel:
            raise ValueError(f"keys of {bits} bits have none")
        for name, (channels, dtype, _) in _TABLE.items():
            x, shape = getattr(table, name), (self.kv_heads, self.head_dim // channels)
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{name} must be {shape} {dtype}, got {tuple(x.shape)} {x.dtype}")
        widths.check(table, bits)

    @property
    def bits_per_element(self) -> float:
        """Average bits of a quantized number, scales included; a skipped layer's numbers count 16."""
        used = [i for i in range(self.layers) if i not in self.skip_layers]
        keys = sum(key_bits_with_scales(self.key_bits[i]) for i in used)
        values = sum(value_bits_with_scales(self.value_bits[i], self.group_size) for i in used)
        return (keys + values + 2 * (self.layers - len(used)) * EXACT_BITS) / (2 * self.layers)

    def check_model(self, model_type: str, layers: int, kv_heads: int | None, head_dim: int | None) -> None:
        """Raises ValueError, saying what differs, when it was made for another model than this one."""
        model = {"model_type": model_type, "layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        other = [f"{name} {getattr(self, name)!r}, not {value!r}" for name, value in model.items()
                 if value != getattr(self, name)]  # fmt: skip
        if other:
            raise ValueError(f"the calibration was made for another model, one of {' and '.join(other)}")

    def without_tables(self) -> Calibration:
        """The same without key tables: what is left to say where a cache's tensors hold them."""
        return replace(self, tables=())

    def as_json(self) -> dict[str, Any]:
        """What a calibration file holds."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        tables = [table if table is None else _table_as_json(table) for table in found.pop("tables")]
        found = {name: list(x) if type(x) is tuple else x for name, x in found.items()}
        return {"version": VERSION, **found, "tables": tables if any(tables) else []}

    @classmethod
    def of_json(cls, found: Any) -> Calibration:
        """The inverse of `as_json`; version 1 had no tables. ValueError, saying what is wrong, for anything else."""
        if not isinstance(found, dict) or type(found.get("version")) is not int or found["version"] not in (1, VERSION):
            raise ValueError(f"no calibration of version 1 or {VERSION}")
        values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}
        del values["version"]
        tables = values.get("tables", ())
        if type(tables) is not tuple or (tables and found["version"] == 1):
            raise ValueError(f"tables must be a list, and came with version {VERSION}, got version {found['version']}")
        values["tables"] = tuple(table if table is None else _table_of_json(table) for table in tables)
        try:
            return cls(**values)
        except TypeError as error:  # names that are missing or not known
            raise ValueError(str(error)) from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file that holds `as_json`.

        Raises:
            ValueError: a broken file, or one of over 16 MiB, with its name and what is wrong.
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


def _table_as_json(table: KeyTable) -> dict[str, list]:
    found = {}
    for name, (_, _, precision) in _TABLE.items():
        rows = getattr(table, name).tolist()
        found[name] = [[float(f"{x:.{precision}g}") for x in row] for row in rows] if precision else rows
    return found


def _table_of_json(found: Any) -> KeyTable:
    """The inverse of `_table_as_json`, with what `Calibration` does not check: that they are rows of numbers."""
    if not isinstance(found, dict) or set(found) != set(_TABLE):
        raise ValueError(f"a table must have {', '.join(_TABLE)}")
    tensors = []
    for name, (_, dtype, precision) in _TABLE.items():
        rows, low, high = found[name], -LARGEST if precision else 0, LARGEST if precision else torch.iinfo(dtype).max
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
            raise ValueError(f"{name} of a table must be a list for each KV head")
        if len({len(row) for row in rows}) > 1:
            raise ValueError(f"{name} of a table must be lists of one length")
        for x in (x for row in rows for x in row):
            if type(x) not in ((int, float) if precision else (int,)) or not low <= x <= high:
                raise ValueError(f"{name} of a table holds {x!r}, which is no number or out of range")
        numbers = [[float(x) for x in row] for row in rows]
        tensors.append(torch.tensor(numbers, dtype=torch.float64).to(dtype))
    return KeyTable(*tensors)
