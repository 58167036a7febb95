"""Caches as files: a prefix is computed once, and restored later or elsewhere.

A file is safetensors. Its tensors are the filled parts of each layer's buffers, `layers.<i>.<name>` with the names of
`KVLayer.filled`. Two strings stand in its header's `__metadata__`:

- `hf_kvattn`: JSON with the keys of `_KEYS`: the version of this format, the cache's class and settings (the codec:
  bits of keys and values and group size or a calibration, exact first tokens, skipped layers), the model's
  fingerprint, the dtype, counts and sizes of each layer, and a hash of the token ids;
- `sha256`: of that JSON and of every tensor's bytes. It finds damage, not forgery: whoever can write the file can write
  the hash as well. What a file says is therefore checked in any case.

`VERSION` goes up with every change of what is written here, of `quant/layout.py` included.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from .base import KVCache
from .registry import CLASSES

VERSION = 2
MAX_HEADER_BYTES = 4 << 20  # some 1 KiB a layer is written
_MAX_MESSAGE = 2000  # characters: what a file says may be long

_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
_SIZES = ("batch_size", "kv_heads", "head_dim")
_KEYS = {"version", "cache", "settings", "model", "dtype", "layers", "token_ids_sha256"}
_LARGEST = 1 << 40

TokenIds = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]


def save_cache(cache: KVCache, path: str | os.PathLike[str], token_ids: TokenIds | None = None) -> None:
    """Writes what a cache holds, without spare capacity, to a file that appears whole or not at all.

    A regular file at `path` is replaced. Only its owner may read the new one: it holds what was said. While it is
    written, a second copy of what the cache holds is in memory.

    Args:
        cache: a `StaticKVCache`, `SlidingWindowKVCache` or `QuantizedKVCache` between two forwards.
        path: the file; a link, a folder or anything else than a regular file there is left alone.
        token_ids: what the cache was filled with, `(B, seen)`, or `(seen,)` of a single row, padding included: its hash
            is stored, for `load_cache` to compare. After `generate()`, which leaves the last token out of the cache,
            these are `sequences[:, :-1]`.

    Raises:
        ValueError: a cache that is empty, of another class, or whose layers hold different numbers of tokens (after an
            interrupted forward; `crop` it first); `token_ids` of another shape; an impossible `path`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(_describe(cache, token_ids), sort_keys=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link, a folder or a device, and is not replaced")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the file {path.name!r}")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _filled(cache).items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digest = _digest(text, tensors, pool.map(_sha256, tensors.values()))
    with tempfile.TemporaryDirectory(prefix=".kvcache-", dir=path.parent) as folder:
        temporary = Path(folder) / "cache"
        try:
            save_file(tensors, temporary, {"hf_kvattn": text, "sha256": digest})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        temporary.chmod(0o600)
        os.replace(temporary, path)


def load_cache(path: str | os.PathLike[str], config: PreTrainedConfig, token_ids: TokenIds | None = None) -> KVCache:
    """The cache that `save_cache` wrote, on the CPU (`cache.to(device)` moves it), ready to be appended to.

    Everything that the file says is checked, against itself, its size and `config`, before memory is allocated; the
    tensors are mapped, and copied once. No code in the file is run: there is none in the format.

    Args:
        path: a regular file, or a link to one.
        config: of the model that goes on. Shapes, positions (RoPE) and dtype must be those of the model that filled the
            cache; weights are not known to a config, so another checkpoint of the same architecture is not noticed.
        token_ids: the prefix that the file should hold, as in `save_cache`.

    Raises:
        ValueError: no such file; a damaged one or one of another kind; another model, dtype or prefix than asked for,
            with both. Nothing of it is returned.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file" + (", but a folder or a device" if path.exists() else ""))
    try:
        return _load(path, config, token_ids)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded: {str(error)[:_MAX_MESSAGE]}") from error


def _filled(cache: KVCache) -> dict[str, torch.Tensor]:
    return {f"layers.{i}.{name}": t for i, layer in enumerate(cache.layers) for name, t in layer.filled().items()}


def _describe(cache: KVCache, token_ids: TokenIds | None) -> dict[str, Any]:
    """The metadata of a cache's file, as JSON can hold it."""
    if CLASSES.get(type(cache).__name__) is not type(cache):
        raise ValueError(f"caches that can be saved are {list(CLASSES)}, got {type(cache).__name__}")
    empty = [layer.layer_idx for layer in cache.layers if not (layer.is_initialized and layer.seen)]
    if empty:
        raise ValueError(f"layers {empty} of the cache hold no tokens: there is nothing to save")
    layers = [{name: getattr(layer, name) for name in (*_SIZES, *layer.counts)} for layer in cache.layers]
    _check_alike(layers)
    first = cache.layers[0]
    return {
        "version": VERSION,
        "cache": type(cache).__name__,
        "settings": cache.settings,
        "model": _plain(cache.fingerprint),
        "dtype": str(first.dtype),
        "layers": layers,
        "token_ids_sha256": None if token_ids is None else _hash_ids(token_ids, first.batch_size, first.seen),
    }


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _check_alike(layers: list[dict[str, int]]) -> None:
    for name in ("seen", "batch_size"):
        found = {layer[name] for layer in layers}
        if len(found) > 1:
            raise ValueError(f"the layers do not agree on {name}, which is {sorted(found)}: a forward was interrupted")


def _hash_ids(token_ids: TokenIds, batch_size: int, seen: int) -> str:
    """sha256 of the ids as little-endian int64, row after row."""
    try:
        ids = torch.as_tensor(token_ids).cpu().numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"token_ids must be integers: {error}") from error
    if ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids must be integers, got {ids.dtype}")
    if ids.shape not in [(batch_size, seen), *([(seen,)] if batch_size == 1 else [])]:
        raise ValueError(f"token_ids are {ids.shape}, the cache holds {(batch_size, seen)} tokens")
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def _sha256(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(tensor.view(torch.uint8).flatten().numpy().data).digest()


def _digest(text: str, names: Iterable[str], hashes: Iterable[bytes]) -> str:
    """What the file's `sha256` must be, from its JSON and each tensor's name and hash."""
    total = hashlib.sha256(text.encode())
    for name, found in sorted(zip(names, hashes, strict=True)):
        total.update(name.encode() + found)
    return total.hexdigest()


def _load(path: Path, config: PreTrainedConfig, token_ids: TokenIds | None) -> KVCache:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
    with safe_open(path, "pt") as file:
        strings = file.metadata() or {}
        if set(strings) != {"hf_kvattn", "sha256"}:
            raise ValueError(f"its metadata are {sorted(strings)}, not those of a cache")
        said = _read_json(strings["hf_kvattn"])
        cache, sketch = (_make(said, config) for _ in range(2))
        _check_model(said, cache, config)
        _check_ids(said, token_ids)
        _prepare(sketch, said, "meta")
        expected = _filled(sketch)
        unknown = sorted(set(expected) ^ set(file.keys()))
        if unknown:
            raise ValueError(f"{len(unknown)} tensors are missing or not known, {unknown[0]!r} among them")
        stored = {name: file.get_tensor(name) for name in expected}  # mapped, not read
    _check_tensors(stored, expected)
    _prepare(cache, said, "cpu")
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        hashes = pool.map(_sha256, stored.values())
        for name, tensor in _filled(cache).items():
            tensor.copy_(stored[name])
        digest = _digest(strings["hf_kvattn"], stored, hashes)
    if digest != strings["sha256"]:
        raise ValueError(f"it is damaged: its sha256 is {digest}, and was {strings['sha256']}")
    for layer in cache.layers:
        layer.check_loaded()
    return cache


def _read_json(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except RecursionError:
        raise ValueError("its metadata are nested without end") from None
    if not isinstance(said, dict) or said.get("version") != VERSION:
        version = said.get("version") if isinstance(said, dict) else None
        raise ValueError(f"it has version {version!r} of the format, and {VERSION} is read here")
    if set(said) != _KEYS:
        raise ValueError(f"its metadata say {sorted(said)}, and {sorted(_KEYS)} is read here")
    return said


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _make(said: dict[str, Any], config: PreTrainedConfig) -> KVCache:
    """An unused cache of the class and settings that the file names."""
    name, settings = said["cache"], said["settings"]
    if not isinstance(name, str) or name not in CLASSES:
        raise ValueError(f"it holds a cache of class {name!r}, known are {list(CLASSES)}")
    if not isinstance(settings, dict):
        raise ValueError(f"the settings of its {name} are {settings!r}")
    # A calibration's own checks follow; a string would be the path of a file to read. Of bits strings may be said.
    checked = {"calibration": dict, "key_bits": str, "value_bits": str}
    for value in [x for key, x in settings.items() if not isinstance(x, checked.get(key, ()))]:
        if not all(item is None or _is_count(item) for item in (value if isinstance(value, list) else [value])):
            raise ValueError(f"the settings of its {name} are {settings}: numbers are 0 to {_LARGEST}")
    try:
        cache = CLASSES[name](config, **settings)
    except TypeError as error:
        raise ValueError(f"the settings of its {name} are {settings}: {error}") from error
    if cache.settings != settings:
        raise ValueError(f"the settings of its {name} are {settings}, which mean {cache.settings}")
    return cache


def _check_model(said: dict[str, Any], cache: KVCache, config: PreTrainedConfig) -> None:
    ours, theirs = _plain(cache.fingerprint), said["model"]
    if not isinstance(theirs, dict) or set(theirs) != set(ours):
        raise ValueError(f"it says of its model {theirs!r}, and {sorted(ours)} is read here")
    for name in ours:
        if theirs[name] != ours[name]:
            raise ValueError(f"it belongs to another model: {name} is {theirs[name]!r}, in the config {ours[name]!r}")
    if not isinstance(said["dtype"], str) or said["dtype"] not in _DTYPES:
        raise ValueError(f"its dtype is {said['dtype']!r}, known are {list(_DTYPES)}")
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    if dtype is not None and str(dtype) != said["dtype"]:
        raise ValueError(
            f"it holds {said['dtype']}, the model is {dtype} (config.dtype; set it if the model was converted)"
        )
    layers = said["layers"]
    if not isinstance(layers, list) or len(layers) != len(cache.layers):
        found = len(layers) if isinstance(layers, list) else repr(layers)
        raise ValueError(f"it has {found} layers, the model {len(cache.layers)}")
    for layer, found in zip(cache.layers, layers, strict=True):
        names = {*_SIZES, *layer.counts}
        if not isinstance(found, dict) or set(found) != names or not all(map(_is_count, found.values())):
            raise ValueError(f"layer {layer.layer_idx} is {found!r}: {sorted(names)} should be 0 to {_LARGEST}")
        if not all(found[name] for name in (*_SIZES, "seen")):
            raise ValueError(f"layer {layer.layer_idx} is {found}: sizes are at least 1")
    _check_alike(layers)


def _check_ids(said: dict[str, Any], token_ids: TokenIds | None) -> None:
    theirs = said["token_ids_sha256"]
    if theirs is not None and not isinstance(theirs, str):
        raise ValueError(f"its hash of the token ids is {theirs!r}")
    if token_ids is None:
        return
    if theirs is None:
        raise ValueError("it was saved without token_ids, so those given cannot be compared")
    ours = _hash_ids(token_ids, said["layers"][0]["batch_size"], said["layers"][0]["seen"])
    if ours != theirs:
        raise ValueError(f"it holds another prefix: the sha256 of its token ids is {theirs}, of those given {ours}")


def _prepare(cache: KVCache, said: dict[str, Any], device: str) -> None:
    """Makes the buffers that the file's sizes and counts need; on `meta` only their shapes."""
    one = torch.zeros((), dtype=_DTYPES[said["dtype"]], device=device)
    try:
        for layer, found in zip(cache.layers, said["layers"], strict=True):
            like = one.expand(found["batch_size"], found["kv_heads"], found["seen"], found["head_dim"])
            layer.allocate_for(like, {name: found[name] for name in layer.counts})
    except RuntimeError as error:  # PyTorch's, of numbers that overflow and of memory that is not there
        raise ValueError(f"buffers of the sizes it names cannot be made: {error}") from error


def _check_tensors(stored: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        found = stored[name]
        if (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise ValueError(
                f"{name} is {found.dtype} of shape {tuple(found.shape)}, should be {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
