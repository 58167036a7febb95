"""`PrefixStore`: caches of prompts that were computed before, in memory and in a folder, found by their tokens.

In the folder a cache is two files of one name, `KIND-HASH`. KIND is a hash of everything that must be the same: the
model with its weights, the cache's class and settings, the dtype. HASH is `hash_ids` of its token ids.

- `.safetensors`: the cache, as `save_cache` writes it;
- `.ids`: the token ids, little-endian int64, whose sha256 is HASH. It is written after the cache and removed before it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import os
import re
import threading
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_kvattn.caches.base import KnownPrefix, KVCache, TokenIds, hash_ids
from hf_kvattn.caches.registry import CLASSES
from hf_kvattn.caches.serialize import VERSION, load_cache, save_cache
from hf_kvattn.generation import generate
from hf_kvattn.plugin import new_cache
from hf_kvattn.tools import files

logger = logging.getLogger("hf_kvattn")

MIN_TOKENS = 32  # of a prefix: to compute fewer takes less time than to look for them
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")


class PrefixStore:
    """Keeps the caches of prompts. A later prompt that begins with the same tokens goes on from a fork of one.

        store = PrefixStore("prefixes", limit_bytes=8 << 30)
        hf_kvattn.enable(model, cache="int4")
        out = store.generate(model, **inputs)

    Several threads may use one store, and several processes one folder. Models, kinds of caches and dtypes are never
    mixed up; what was stored with other weights is not found. A model's weights are hashed once: a model that is
    trained, or gets another adapter, needs a new store.

    Args:
        folder: a folder, made if it is not there; None keeps caches in this process's memory alone. Only its owner may
            read what is written: the token ids are what was said.
        limit_bytes: of the caches' files, and of the caches that are in memory. What was used last stays. None is no
            limit.

    Raises:
        ValueError: a `folder` that is none, or is to be made where there is none; a `limit_bytes` below 1.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, limit_bytes: int | None = None):
        if limit_bytes is not None and (type(limit_bytes) is not int or limit_bytes < 1):
            raise ValueError(f"limit_bytes must be an int of at least 1, or None, got {limit_bytes!r}")
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            if self.folder.exists() or not self.folder.parent.is_dir():
                raise ValueError(f"{self.folder} is no folder, and cannot be made in {self.folder.parent}")
            self.folder.mkdir(mode=0o700, exist_ok=True)
        self.limit_bytes = limit_bytes
        self._lock = threading.RLock()
        self._ids: dict[str, torch.Tensor] = {}  # of every name that was met
        self._held: OrderedDict[str, KVCache] = OrderedDict()  # in memory; what was used last is last
        self._weights: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()

    def generate(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """`model.generate(**kwargs)`, from the longest prefix that is stored; stores the cache that it leaves.

        Batches, padded prompts, beams and calls that bring a cache or ask for another one run as without a store.

        Raises:
            ValueError: `model` is not enabled with a cache of this package, or with one that cannot be stored; as
                `generate()`.
        """
        like, ids = fresh_cache(model), kwargs.get("input_ids")
        self._check(like)
        if not isinstance(ids, torch.Tensor) or not _is_single(model, ids, kwargs):
            return generate(model, **kwargs)
        cache = self.longest(model, like, ids)
        cache = like if cache is None else cache
        out = generate(model, **{**kwargs, "past_key_values": cache})
        sequences = out if isinstance(out, torch.Tensor) else out.sequences
        if cache.get_seq_length() >= MIN_TOKENS:
            try:
                self.put(model, cache, sequences[0, : cache.get_seq_length()])
            except OSError as error:  # a full disk does not take the answer away
                logger.warning("the prefix is not stored: %s", error)
        return out

    def longest(self, model: PreTrainedModel, like: KVCache, token_ids: TokenIds) -> KVCache | None:
        """A cache of the first tokens of a prompt, as many as are stored; at least the last is left to compute.

        Of a cache that holds more, those that both begin with are taken, as far as that is exact
        (`KVCache.exact_prefix`). A file that cannot be loaded is removed, and named in the log.

        Args:
            model: what goes on from the cache.
            like: a cache of the kind that is wanted; what it holds does not matter.
            token_ids: the prompt, `(T,)` or `(1, T)`, or a tokenizer's output that holds it.

        Returns:
            A fork, whose number of tokens is `get_seq_length()`; None where fewer than `MIN_TOKENS` are stored.
        """
        prompt = _row(token_ids)
        with self._lock:
            kind = self._kind(model, like, model.dtype)
            found = {name: common_length(ids, prompt[:-1]) for name, ids in self._known(kind).items()}
            usable = {name: like.exact_prefix(len(self._ids[name]), count) for name, count in found.items()}
            for name in sorted(usable, key=lambda name: usable[name], reverse=True):
                if usable[name] < MIN_TOKENS:
                    break
                held = self._load(model, name)
                if held is None:
                    continue
                cache = held.fork()
                try:
                    cache.crop(usable[name] - cache.get_seq_length())
                except ValueError:  # a window that had gone on, and was cropped before it was stored
                    continue
                return cache
        return None

    def put(self, model: PreTrainedModel, cache: KVCache, token_ids: TokenIds) -> None:
        """Stores a copy of a cache of one row, and what was used longest ago goes where there is no room.

        Args:
            model: what filled the cache.
            cache: between two forwards. It can go on.
            token_ids: what it was filled with, all of it: after `generate()`, `sequences[0, :-1]`.

        Raises:
            ValueError: a cache that is empty, offloaded, or for a folder of a class that `save_cache` does not know;
                other `token_ids` than one row of its length. Nothing is stored then.
            OSError: the files cannot be written.
        """
        ids, seen = _row(token_ids), cache.get_seq_length()
        self._check(cache)
        if not seen:
            raise ValueError("an empty cache is not stored")
        digest = hash_ids(ids, cache.kv_layers[0].batch_size, seen)
        with self._lock:
            name = f"{self._kind(model, cache, cache.kv_layers[0].dtype)}-{digest}"
            held = cache.fork()
            held.known_prefix = KnownPrefix(digest, seen)
            if self.folder is not None and not self._ids_path(name).exists():
                save_cache(held, self._path(name))
                files.replace(self._ids_path(name), lambda path: _write_private(path, ids))
            self._ids[name] = ids
            self._hold(name, held)
            self._evict()

    def _check(self, cache: KVCache) -> None:
        """Raises ValueError for a cache that cannot be stored, whatever it holds."""
        if getattr(cache, "offloads", False):
            raise ValueError("a cache with offload=True is not stored: a fork of it would copy all of it")
        if self.folder is not None and CLASSES.get(type(cache).__name__) is not type(cache):
            raise ValueError(f"caches that a folder can hold are {list(CLASSES)}, got {type(cache).__name__}")

    def _kind(self, model: PreTrainedModel, cache: KVCache, dtype: torch.dtype) -> str:
        if model not in self._weights:
            self._weights[model] = uuid.uuid4().hex if self.folder is None else hash_weights(model)
        said = [VERSION, type(cache).__name__, cache.settings, cache.fingerprint, str(dtype), self._weights[model]]
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _ids_path(self, name: str) -> Path:
        return self._path(name).with_suffix(".ids")

    def _known(self, kind: str) -> dict[str, torch.Tensor]:
        """The token ids of all caches of a kind, in memory or in the folder, by name."""
        names = {name for name in self._held if name.startswith(f"{kind}-")}
        if self.folder is not None:
            names |= {path.stem for path in self.folder.glob(f"{kind}-*.ids") if _NAME.fullmatch(path.stem)}
        for name in [name for name in self._ids if name.startswith(f"{kind}-") and name not in names]:
            del self._ids[name]
        for name in names - set(self._ids):
            try:
                ids = torch.from_numpy(np.frombuffer(self._ids_path(name).read_bytes(), "<i8").astype(np.int64))
            except OSError:  # another process removed it, or only its owner may read it
                continue
            except ValueError as error:  # no whole number of ids
                self._remove_bad(name, error)
                continue
            if hash_ids(ids, 1, len(ids)) != name.rpartition("-")[2]:
                self._remove_bad(name, "its token ids are not those of its name")
                continue
            self._ids[name] = ids
        return {name: self._ids[name] for name in names & set(self._ids)}

    def _load(self, model: PreTrainedModel, name: str) -> KVCache | None:
        """The cache of a name, from memory or else from its file; None where neither can be had."""
        held = self._held.get(name)
        if held is None:
            config = copy.deepcopy(model.config)
            config.get_text_config(decoder=True).dtype = model.dtype  # `model.to(dtype)` does not change it
            try:
                held = load_cache(self._path(name), config, self._ids[name]).to(model.device)
            except ValueError as error:
                if not self._path(name).exists():  # another process removed it
                    self._remove(name)
                elif isinstance(error.__cause__, (OSError, RuntimeError, MemoryError)):  # no fault of the file
                    logger.warning("the prompt is computed: %s", error)
                else:
                    self._remove_bad(name, error)
                return None
        self._hold(name, held)
        if self.folder is not None:
            with contextlib.suppress(OSError):  # another process removed it, or only its owner may
                os.utime(self._path(name))
        return held

    def _hold(self, name: str, cache: KVCache) -> None:
        """Keeps a cache in memory, as the one that was used last."""
        self._held[name] = cache
        self._held.move_to_end(name)
        total_bytes = sum(each.nbytes for each in self._held.values())
        while self.limit_bytes is not None and total_bytes > self.limit_bytes:
            _, oldest = self._held.popitem(last=False)
            total_bytes -= oldest.nbytes

    def _evict(self) -> None:
        """Removes the files that were used longest ago, until the others are within the limit."""
        if self.folder is None or self.limit_bytes is None:
            return
        found = sorted(self._files())
        excess_bytes = sum(size for _, size, _ in found) - self.limit_bytes
        for _, size, name in found:
            if excess_bytes <= 0:
                break
            self._remove(name)
            excess_bytes -= size

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """Of each cache's file, when it was used (ns), its bytes, its name."""
        assert self.folder is not None
        for path in self.folder.glob("*.safetensors"):
            if _NAME.fullmatch(path.stem):
                try:
                    stat = path.stat()
                except FileNotFoundError:  # another process removed it
                    continue
                yield stat.st_mtime_ns, stat.st_size, path.stem

    def _remove(self, name: str) -> None:
        self._held.pop(name, None)
        if self.folder is not None:
            for path in (self._ids_path(name), self._path(name)):
                with contextlib.suppress(OSError):  # another process removed it, or only its owner may
                    path.unlink()

    def _remove_bad(self, name: str, why: object) -> None:
        logger.warning("%s is removed, and the prompt is computed: %s", self._path(name), why)
        self._remove(name)


def fresh_cache(model: PreTrainedModel) -> KVCache:
    """The cache that a `generate()` of an enabled model would make; ValueError where that is none of this package."""
    cache = new_cache(model)
    if not isinstance(cache, KVCache):
        raise ValueError(f"{type(model).__name__} makes no such cache: call hf_kvattn.enable(model, cache='static')")
    return cache


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and answer that an enabled model and its cache take; None for no limit that is known."""
    cache = new_cache(model)
    limits = [getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)]
    limits += [cache.max_cache_len] if isinstance(cache, KVCache) else []
    return min((limit for limit in limits if limit is not None and limit > 0), default=None)


def hash_weights(model: PreTrainedModel) -> str:
    """sha256 of all names, shapes, dtypes and bytes of a model's weights.

    Raises:
        ValueError: weights that are on no device that holds them (`meta`), as where they wait on a disk.
    """
    total = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if not isinstance(weight, torch.Tensor):
            total.update(repr((name, weight)).encode())
            continue
        for part in _plain_tensors(weight):
            if part.is_meta:
                raise ValueError(f"{name} is on the device meta: a folder of prefixes needs weights in memory")
            total.update(repr((name, part.dtype, tuple(part.shape))).encode())
            total.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _plain_tensors(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """A weight, or what a quantized one keeps in its place."""
    if not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(weight, name))


def _is_single(model: Any, ids: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call of `generate()` is one of a single row of plain tokens, with the cache of `enable`."""
    mask = kwargs.get("attention_mask")
    given = [name for name in ("past_key_values", "inputs_embeds", "inputs") if kwargs.get(name) is not None]
    if given or ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        return False
    if mask is not None and (mask.shape != ids.shape or not bool(mask.all())):
        return False
    config, _ = model._prepare_generation_config(**{"generation_config": None, **kwargs})
    rows = (config.num_beams or 1) * (config.num_return_sequences or 1)
    return rows == 1 and config.cache_implementation is None and config.use_cache is not False


def _row(token_ids: TokenIds) -> torch.Tensor:
    """The token ids of one row as `(T,)` int64; ValueError for anything else."""
    ids = token_ids.get("input_ids") if isinstance(token_ids, Mapping) else token_ids
    row = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
    row = row[0] if row.ndim == 2 and len(row) == 1 else row
    if row.ndim != 1 or not len(row) or row.dtype.kind not in "iu":
        raise ValueError(f"token_ids must be integers, one row of them, got {row.dtype} {row.shape}")
    return torch.from_numpy(row.astype(np.int64))


def common_length(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many tokens two rows `(T,)` both begin with."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0]) if len(differ) else length


def _write_private(path: Path, ids: torch.Tensor) -> None:
    path.touch(0o600)
    path.write_bytes(ids.numpy().astype("<i8").tobytes())
