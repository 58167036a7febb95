"""Caches as files: a prefix is computed once, and restored later or elsewhere.

A file is safetensors. Its tensors are the filled parts of each layer's buffers, `layers.<i>.<name>` with the names of
`KVLayer.filled`. Two strings stand in its header's `__metadata__`:

- `hf_kvattn`: JSON with the keys of `_KEYS`: the version of this format, the cache's class and settings (the codec:
  bits of keys and values and group size or a calibration, exact first tokens, skipped layers), the model's
  fingerprint, the dtype, where a stream stands, counts and sizes of each layer, dtypes and shapes of each layer's
  recurrent states (`states.<i>.<name>` are their tensors), and what is known of the token ids;
- `sha256`: of that JSON and of every tensor's bytes. It finds damage, not forgery: whoever can write the file can write
  the hash as well. What a file says is therefore checked in any case.

`VERSION` goes up with every change of what is written here, of `quant/layout.py` included. Version 4 wrote codes of 4
bits and fewer otherwise; all else in it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from .base import KnownPrefix, KVCache, TokenIds, hash_ids
from .positions import StreamPosition
from .quantized_layer import KVQuantizedLayer
from .recurrent import KINDS
from .registry import CLASSES

VERSION = 5
_READ = (4, VERSION)
MAX_HEADER_BYTES = 4 << 20  # some 1 KiB a layer is written
_MAX_MESSAGE = 2000  # characters: what a file says may be long

# What safetensors calls the dtypes of stored tensors.
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
          torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}  # fmt: skip
_DTYPES = {str(dtype): dtype for dtype in _TYPES if dtype.is_floating_point}
_SIZES = ("batch_size", "kv_heads", "head_dim")
_KEYS = {"version", "cache", "settings", "model", "dtype", "stream", "layers", "states", "prefix"}
_LARGEST = 1 << 40


def save_cache(cache: KVCache, path: str | os.PathLike[str], token_ids: TokenIds | None = None) -> None:
    """Writes what a cache holds, without spare capacity, to a file that appears whole or not at all.

    A regular file at `path` is replaced. Only its owner may read the new one: it holds what was said. While it is
    written, a second copy of what the cache holds is in memory.

    Args:
        cache: a `StaticKVCache`, `SlidingWindowKVCache` or `QuantizedKVCache` between two forwards.
        path: the file; a link, a folder or anything else than a regular file there is left alone.
        token_ids: what the cache was filled with, `(B, seen)`, or `(seen,)` of a single row, padding included, or a
            tokenizer's output that holds them: its hash is stored, for `load_cache` and `KVCache.check_prompt` to
            compare. After `generate()`, which leaves the last token out of the cache, these are `sequences[:, :-1]`.
            None stores what the cache knows of them (`known_prefix`).

    Raises:
        ValueError: a cache that is empty, of another class, or left inconsistent by an interrupted forward (with the
            way out); `token_ids` of another shape; an impossible `path`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    text = json.dumps(_describe(cache, token_ids), sort_keys=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link, a folder or a device, and is not replaced")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the file {path.name!r}")
    tensors = {
        f"layers.{layer.layer_idx}.{name}": t for layer in cache.kv_layers for name, t in layer.portable().items()
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in (tensors | _states(cache)).items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        digest = _digest(text, tensors, pool.map(_sha256, tensors.values()))
    with _temporary_folder(path.parent) as folder:
        temporary = folder / "cache"
        try:
            save_file(tensors, temporary, {"hf_kvattn": text, "sha256": digest})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        temporary.chmod(0o600)
        os.replace(temporary, path)


def load_cache(path: str | os.PathLike[str], config: PreTrainedConfig, token_ids: TokenIds | None = None) -> KVCache:
    """The cache that `save_cache` wrote, on the CPU (`cache.to(device)` moves it), ready to be appended to.

    Everything that the file says is checked, against itself, its size and `config`, before memory is allocated; then it
    is read once, which takes at most twice the memory of the cache. No code in the file is run: there is none in the
    format. The cache's `known_prefix` is what the file says of its token ids.

    Args:
        path: a regular file, or a link to one.
        config: of the model that goes on. Shapes, positions (RoPE) and dtype must be those of the model that filled the
            cache; weights are not known to a config, so another checkpoint of the same architecture is not noticed.
        token_ids: the prefix that the file should hold, as in `save_cache`.

    Raises:
        ValueError: no such file; one that cannot be read, is damaged or of another kind; another model, dtype or prefix
            than asked for, with both. Nothing of it is returned.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file" + (", but a folder or a device" if path.exists() else ""))
    try:
        with open(path, "rb") as file:
            return _load(file, config, token_ids)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # PyTorch's for lack of memory is the third
        raise ValueError(f"{path} cannot be loaded: {str(error)[:_MAX_MESSAGE] or type(error).__name__}") from error


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent` to write a file in. Those that killed processes left behind are removed first.

    Whoever writes shares a lock on `parent`, and it ends with the process: who gets it alone knows that nobody writes.
    """
    prefix = f".kvcache-{platform.node()}-"  # not every file system tells other machines of its locks
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # a system or a file system without locks
            import fcntl

            lock = os.open(parent, os.O_RDONLY)
            stack.callback(os.close, lock)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for left_behind in parent.glob(f"{prefix}*"):
                    shutil.rmtree(left_behind, ignore_errors=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=parent)))


def _filled(cache: KVCache) -> dict[str, torch.Tensor]:
    tensors = {f"layers.{layer.layer_idx}.{name}": t for layer in cache.kv_layers for name, t in layer.filled().items()}
    return tensors | _states(cache)


def _states(cache: KVCache) -> dict[str, torch.Tensor]:
    return {f"states.{each.layer_idx}.{name}": t for each in cache.states for name, t in each.tensors().items()}


def _describe(cache: KVCache, token_ids: TokenIds | None) -> dict[str, Any]:
    """The metadata of a cache's file, as JSON can hold it."""
    if CLASSES.get(type(cache).__name__) is not type(cache):
        way_out = "make one, as cache = StaticKVCache(model.config), and fill it with model(ids, past_key_values=cache)"
        raise ValueError(f"caches that can be saved are {list(CLASSES)}, got {type(cache).__name__}: {way_out}")
    empty = [layer.layer_idx for layer in cache.kv_layers if not (layer.is_initialized and layer.seen)]
    if empty:
        raise ValueError(f"layers {empty} of the cache hold no tokens: there is nothing to save")
    cache.check_consistent_layers()
    first, prefix = cache.kv_layers[0], cache.known_prefix
    if token_ids is not None:
        prefix = KnownPrefix(hash_ids(token_ids, first.batch_size, first.seen), first.seen)
    return {
        "version": VERSION,
        "cache": type(cache).__name__,
        "settings": cache.settings,
        "model": _plain(cache.fingerprint),
        "dtype": str(first.dtype),
        "stream": cache.stands_at()[:2],
        "layers": [{name: getattr(layer, name) for name in (*_SIZES, *layer.counts)} for layer in cache.kv_layers],
        "states": [{name: [str(t.dtype), *t.shape] for name, t in each.tensors().items()} for each in cache.states],
        "prefix": prefix,
    }


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).flatten().numpy().data


def _sha256(tensor: torch.Tensor) -> bytes:
    return hashlib.sha256(_bytes(tensor)).digest()


def _digest(text: str, names: Iterable[str], hashes: Iterable[bytes]) -> str:
    """What the file's `sha256` must be, from its JSON and each tensor's name and hash."""
    total = hashlib.sha256(text.encode())
    for name, found in sorted(zip(names, hashes, strict=True)):
        total.update(name.encode() + found)
    return total.hexdigest()


def _load(file: BinaryIO, config: PreTrainedConfig, token_ids: TokenIds | None) -> KVCache:
    header, strings, said = _read_header(file)
    cache, sketch = (_make(said, config) for _ in range(2))
    _check_model(said, cache, config)
    cache.known_prefix = _check_prefix(said, token_ids)
    _prepare(sketch, said, "meta")
    _check_tensors(header, _filled(sketch), os.fstat(file.fileno()).st_size - file.tell())
    _prepare(cache, said, "cpu")
    tensors, hashes = _filled(cache), []
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name in header:
            read = torch.empty(tensors[name].shape, dtype=tensors[name].dtype)
            if file.readinto(_bytes(read)) != read.nbytes:  # type: ignore[attr-defined]  # a BufferedReader has it
                raise ValueError(f"it ended inside {name} while it was read")
            hashes.append(pool.submit(_sha256, read))
            tensors[name].copy_(read)
        digest = _digest(strings["hf_kvattn"], header, [found.result() for found in hashes])
    if digest != strings["sha256"]:
        raise ValueError(f"it is damaged: its sha256 is {digest}, and was {strings['sha256']}")
    for layer in cache.kv_layers:
        layer.check_loaded()
    start, end = said["stream"]
    cache._next_position = StreamPosition(start, end, cache.get_seq_length())
    return cache


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """The tensors' places, the two strings, and what the first of them says."""
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {header_bytes} bytes is over the limit of {MAX_HEADER_BYTES}")
    header = json.loads(file.read(header_bytes))
    strings = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(strings, dict) or {k: type(v) for k, v in strings.items()} != {"hf_kvattn": str, "sha256": str}:
        raise ValueError(f"its metadata are {strings!r}, not those of a cache")
    said = json.loads(strings["hf_kvattn"])
    if not isinstance(said, dict) or said.get("version") not in _READ:
        version = said.get("version") if isinstance(said, dict) else None
        raise ValueError(f"it has version {version!r} of the format, and {VERSION} is read here")
    if set(said) != _KEYS:
        raise ValueError(f"its metadata say {sorted(said)}, and {sorted(_KEYS)} is read here")
    return header, strings, said


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
    few = [layer for layer in cache.kv_layers if isinstance(layer, KVQuantizedLayer) and layer.settings.few_bits]
    if said["version"] == 4 and few:
        raise ValueError(
            "codes of 4 bits and fewer were written otherwise until version 5 of the format: let the model fill a new "
            "cache and save that"
        )
    if cache.settings != settings:
        raise ValueError(f"the settings of its {name} are {settings}, which mean {cache.settings}")
    return cache


def _check_model(said: dict[str, Any], cache: KVCache, config: PreTrainedConfig) -> None:
    ours, theirs = _plain(cache.fingerprint), said["model"]
    if isinstance(theirs, dict):
        share, own = (each.get("kv_heads_of", "a whole model") for each in (theirs, ours))
        if share != own:
            raise ValueError(f"it holds the KV heads of {share!r}, and the config is that of {own}")
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
            f"it holds {said['dtype']}, and the config says {dtype}. model.to(dtype) does not change the config: after "
            f"it, set config.get_text_config().dtype = {said['dtype']}"
        )
    layers = said["layers"]
    if not isinstance(layers, list) or len(layers) != len(cache.kv_layers):
        found = len(layers) if isinstance(layers, list) else repr(layers)
        raise ValueError(f"it has {found} layers, the model {len(cache.kv_layers)}")
    for layer, found in zip(cache.kv_layers, layers, strict=True):
        names = {*_SIZES, *layer.counts}
        if not isinstance(found, dict) or set(found) != names or not all(map(_is_count, found.values())):
            raise ValueError(f"layer {layer.layer_idx} is {found!r}: {sorted(names)} should be 0 to {_LARGEST}")
        if not all(found[name] for name in (*_SIZES, "seen")):
            raise ValueError(f"layer {layer.layer_idx} is {found}: sizes are at least 1")
    for name in ("seen", "batch_size", "rebased"):
        values = sorted({layer[name] for layer in layers if name in layer})
        if len(values) > 1:
            raise ValueError(f"the layers do not agree on {name}, which is {values}")
    _check_states(said["states"], cache, layers[0]["batch_size"])
    stream = said["stream"]
    is_pair = isinstance(stream, list) and len(stream) == 2
    if not is_pair or any(n is not None and (type(n) is not int or abs(n) > _LARGEST) for n in stream):
        raise ValueError(f"its stream is {stream!r}: ('start', 'end') should be None or {-_LARGEST} to {_LARGEST}")


def _check_states(said: Any, cache: KVCache, batch_size: int) -> None:
    """Raises ValueError unless `said` describes tensors for each layer's states."""
    if not isinstance(said, list) or len(said) != len(cache.states):
        raise ValueError(f"its states are {said!r}, the model has {len(cache.states)} layers of them")
    for state, named in zip(cache.states, said, strict=True):
        known = {f"{kind}.{i}" for kind in KINDS for i in range(state.number_of_states)}
        if not isinstance(named, dict) or not named or not set(named) <= known:
            raise ValueError(f"the states of layer {state.layer_idx} are {named!r}, known are {sorted(known)}")
        for name, each in named.items():
            dtype, *shape = each if isinstance(each, list) and each else [None]
            sized = len(shape) > 1 and all(map(_is_count, shape)) and shape[0] == batch_size
            if not isinstance(dtype, str) or dtype not in _DTYPES or not sized:
                raise ValueError(
                    f"{name} of layer {state.layer_idx} is {each!r}: no dtype and shape of {batch_size} rows"
                )


def _check_prefix(said: dict[str, Any], token_ids: TokenIds | None) -> KnownPrefix | None:
    """What the file says of its tokens; ValueError if `token_ids` are others."""
    found, layer = said["prefix"], said["layers"][0]
    if found is None:
        if token_ids is not None:
            raise ValueError("it was saved without token_ids, so those given cannot be compared")
        return None
    if not isinstance(found, list) or [*map(type, found)] != [str, int] or not 0 < found[1] <= layer["seen"]:
        raise ValueError(f"its prefix is {found!r}, should be a sha256 and a number of its {layer['seen']} tokens")
    theirs, length = found
    ours = theirs if token_ids is None else hash_ids(token_ids, layer["batch_size"], length)
    if ours != theirs:
        raise ValueError(f"it holds another prefix: the sha256 of its token ids is {theirs}, of those given {ours}")
    return KnownPrefix(theirs, length)


def _prepare(cache: KVCache, said: dict[str, Any], device: str) -> None:
    """Makes the buffers that the file's sizes and counts need; on `meta` only their shapes."""
    one = torch.zeros((), dtype=_DTYPES[said["dtype"]], device=device)
    for layer, found in zip(cache.kv_layers, said["layers"], strict=True):
        like = one.expand(found["batch_size"], found["kv_heads"], found["seen"], found["head_dim"])
        layer.allocate_for(like, {name: found[name] for name in layer.counts})
    for state, named in zip(cache.states, said["states"], strict=True):
        for name, (dtype, *shape) in named.items():
            state.put(name, torch.empty(shape, dtype=_DTYPES[dtype], device=device))


def _check_tensors(header: dict[str, Any], expected: dict[str, torch.Tensor], data_bytes: int) -> None:
    """Raises ValueError unless the header lists the tensors `expected`, one after the other in `data_bytes`."""
    unknown = sorted(set(expected) ^ set(header))
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are missing or not known, {unknown[0]!r} among them")
    end = 0
    for name, found in header.items():
        tensor, start, end = expected[name], end, end + expected[name].nbytes
        wanted = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        if found != wanted:
            raise ValueError(f"{name} is {found}, should be {wanted}")
    if end != data_bytes:
        raise ValueError(f"its tensors take {end} bytes, and {data_bytes} are there")
