"""Caches saved, loaded, pickled, copied and moved; and files that lie.

HF_KVATTN_FUZZ_FILES is the number of mutated files, 300 when it is not set.
"""

import copy
import hashlib
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache, load_cache, save_cache
from hf_kvattn.caches import serialize
from hf_kvattn.evaluation import cards, inputs, prefix, report, variants

FUZZ_FILES = int(os.environ.get("HF_KVATTN_FUZZ_FILES", "300"))
KINDS = {
    "static": StaticKVCache,
    "static-fixed": partial(StaticKVCache, max_cache_len=400),
    "int8": partial(QuantizedKVCache, bits=8, group_size=16),
    "int4-skips": partial(QuantizedKVCache, bits=4, group_size=16, skip_layers=(0, -1), residual_length=5),
    "k3v2-fixed": partial(QuantizedKVCache, key_bits=3, value_bits=2, group_size=16, sinks=0, max_cache_len=400),
    "sliding": partial(SlidingWindowKVCache, window=30),
    "sliding-sinks": partial(SlidingWindowKVCache, window=12, sinks=3),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def append(cache, count: int, seed: int = 0, chunk: int = 23, batch: int = 2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(3, 2, batch, 2, count, 16, generator=generator).to(dtype)
    for start in range(0, count, chunk):
        for layer, (k, v) in enumerate(tokens[..., start : start + chunk, :]):
            cache.layers[layer].append(k, v)
            cache.layers[layer].beside(k, None)  # as attention asks
            cache.layers[layer].settle()
    return cache


def contents(cache) -> dict[str, torch.Tensor]:
    """Everything stored, with the numbers that say how much it is."""
    found = {f"{i}.{name}": t for i, layer in enumerate(cache.layers) for name, t in layer.filled().items()}
    counts = {f"{i}.counts": torch.tensor([getattr(layer, name) for name in layer.counts])
              for i, layer in enumerate(cache.layers)}  # fmt: skip
    return found | counts


def assert_same(cache, other):
    assert type(cache) is type(other) and cache.settings == other.settings
    ours, theirs = contents(cache), contents(other)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def detours(path: Path) -> dict:
    """Ways in which a cache may travel and come back."""

    def disk(cache):
        save_cache(cache, path)
        return load_cache(path, tiny_config())

    return {"disk": disk, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "deepcopy": copy.deepcopy}


every_detour = pytest.mark.parametrize("way", ["disk", "pickle", "deepcopy"])


@every_detour
@every_kind
@pytest.mark.parametrize("left_padding", [0, 5])
def test_generation_goes_on_with_the_same_tokens(kind, way, left_padding, tmp_path):
    model, start = tiny_model(), prompt(70, left_padding=left_padding)
    cache = KINDS[kind](model.config)
    with hf_kvattn.enabled(model):
        ids, _ = generate(model, start, 20, past_key_values=cache)
        mask = torch.cat([start["attention_mask"], torch.ones(2, 20, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask}
        copied = detours(tmp_path / "cache")[way](cache)
        assert_same(cache, copied)
        expected, logits = generate(model, turn, 60, past_key_values=cache)
        found, found_logits = generate(model, turn, 60, past_key_values=copied)
    assert torch.equal(found, expected) and torch.equal(found_logits, logits)
    assert_same(cache, copied)
    if kind.startswith("static"):
        assert torch.equal(found, generate(model, start, 80)[0])


@every_detour
@every_kind
@pytest.mark.parametrize("length", [1, 4, 40, 101])
def test_what_is_appended_later_is_stored_as_without_the_detour(kind, way, length, tmp_path):
    cache = append(KINDS[kind](tiny_config()), length)
    copied = detours(tmp_path / "cache")[way](cache)
    assert_same(cache, copied)
    before = {name: tensor.clone() for name, tensor in contents(copied).items()}
    append(cache, 250, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in contents(copied).items())
    append(copied, 250, seed=1)
    assert_same(cache, copied)
    for made in (cache, copied):
        made.reorder_cache(torch.tensor([1, 1]))
        made.crop(-60)
        append(made, 33, seed=2)
    assert_same(cache, copied)


@every_detour
@pytest.mark.parametrize(
    "make", [StaticKVCache, partial(QuantizedKVCache, bits=4, group_size=16)], ids=["exact", "int4"]
)
def test_rings_of_layers_with_a_window_travel_too(make, way, tmp_path):
    model, start = tiny_model("mistral"), prompt(300)
    with hf_kvattn.enabled(model):
        cache = make(model.config)
        ids, _ = generate(model, start, 20, past_key_values=cache)
        if way == "disk":
            save_cache(cache, tmp_path / "cache")
            copied = load_cache(tmp_path / "cache", tiny_config("mistral"))
        else:
            copied = detours(tmp_path / "cache")[way](cache)
        assert_same(cache, copied)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected, found = (generate(model, turn, 60, past_key_values=c) for c in (cache, copied))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert_same(cache, copied)


def test_a_capacity_given_at_first_still_holds_after_loading(tmp_path):
    save_cache(append(StaticKVCache(tiny_config(), max_cache_len=12), 9), tmp_path / "cache")
    cache = load_cache(tmp_path / "cache", tiny_config())
    assert cache.layers[0].capacity == 12 and cache.get_max_length() == 12
    with pytest.raises(ValueError, match="9 stored tokens and 4 new ones exceed max_cache_len=12"):
        append(cache, 4)
    append(cache, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_kind
def test_every_dtype_and_only_the_filled_part(kind, dtype, tmp_path):
    cache = append(KINDS[kind](tiny_config()), 100, dtype=dtype)
    save_cache(cache, tmp_path / "cache")
    stored_bytes = sum(t.numel() * t.element_size() for t in contents(cache).values() if t.dim() > 1)
    assert 0 < (tmp_path / "cache").stat().st_size - stored_bytes < 12_000  # the header
    assert_same(load_cache(tmp_path / "cache", tiny_config()), cache)


def test_memory_of_the_file_is_not_the_caches(tmp_path):
    path = tmp_path / "cache"
    save_cache(append(StaticKVCache(tiny_config()), 20), path)
    cache, raw = load_cache(path, tiny_config()), path.read_bytes()
    append(cache, 1)
    cache.layers[0]._k.zero_()
    assert path.read_bytes() == raw
    path.write_bytes(b"")  # shorter than what was mapped
    assert cache.layers[1].keys.isfinite().all()


def test_token_ids_are_compared(tmp_path):
    path, ids = tmp_path / "cache", torch.arange(18).view(2, 9)
    cache = append(StaticKVCache(tiny_config()), 9)
    save_cache(cache, path, token_ids=ids)
    for same in (ids, ids.int(), ids.tolist()):
        assert_same(load_cache(path, tiny_config(), token_ids=same), cache)
    load_cache(path, tiny_config())
    with pytest.raises(ValueError, match=r"another prefix: the sha256 .* [0-9a-f]{64}, of those given [0-9a-f]{64}"):
        load_cache(path, tiny_config(), token_ids=ids + 1)
    with pytest.raises(ValueError, match=r"token_ids are \(2, 8\), the cache holds \(2, 9\)"):
        load_cache(path, tiny_config(), token_ids=ids[:, :8])
    for wrong in (ids.flatten(), ids[:, :8], ids[:1]):
        with pytest.raises(ValueError, match=r"the cache holds \(2, 9\) tokens"):
            save_cache(cache, path, token_ids=wrong)
    for wrong in (ids.float(), ids > 3, ids + 1j, [[1 << 70] * 9] * 2, [None], "text"):
        with pytest.raises(ValueError, match="token_ids must be integers"):
            save_cache(cache, path, token_ids=wrong)
    save_cache(append(StaticKVCache(tiny_config()), 9, batch=1), path, token_ids=range(9))
    load_cache(path, tiny_config(), token_ids=[list(range(9))])
    save_cache(cache, path)
    with pytest.raises(ValueError, match="saved without token_ids"):
        load_cache(path, tiny_config(), token_ids=ids)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("qwen2"), "another model: model_type is 'llama', in the config 'qwen2'"),
        (tiny_config(num_hidden_layers=2), "num_hidden_layers is 3, in the config 2"),
        (tiny_config(num_key_value_heads=4), "num_key_value_heads is 2, in the config 4"),
        (tiny_config(head_dim=32), "head_dim is 16, in the config 32"),
        (tiny_config(hidden_size=96), "hidden_size is 64, in the config 96"),
        (tiny_config(vocab_size=130), "vocab_size is 128, in the config 130"),
        (tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters is .*500000.0"),
        (tiny_config(dtype=torch.bfloat16), "holds torch.float32, the model is torch.bfloat16"),
        (tiny_config(dtype="float16"), "holds torch.float32, the model is torch.float16"),
    ],
    ids=["type", "layers", "kv-heads", "head-dim", "hidden", "vocabulary", "rope", "dtype", "dtype-text"],
)
def test_another_model_or_dtype_is_refused_with_both_names(config, message, tmp_path):
    save_cache(append(StaticKVCache(tiny_config()), 9), tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "cache", config)


def test_a_windowed_model_is_another_one(tmp_path):
    save_cache(append(StaticKVCache(tiny_config("mistral")), 9), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"sliding_windows is \[8, 8, 8\], in the config \[4, 4, 4\]"):
        load_cache(tmp_path / "cache", tiny_config("mistral", sliding_window=4))
    load_cache(tmp_path / "cache", tiny_config("mistral"))


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "cache"

    class Mine(StaticKVCache):
        pass

    uneven = append(StaticKVCache(tiny_config()), 9)
    uneven.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    half = StaticKVCache(tiny_config())
    half.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    forgotten = append(StaticKVCache(tiny_config()), 9)
    forgotten.reset()
    for cache, message in (
        (StaticKVCache(tiny_config()), r"layers \[0, 1, 2\] of the cache hold no tokens"),
        (half, r"layers \[1, 2\] of the cache hold no tokens"),
        (forgotten, "nothing to save"),
        (uneven, r"do not agree on seen, which is \[9, 10\]"),
        (append(Mine(tiny_config()), 9), r"caches that can be saved are .*QuantizedKVCache.*, got Mine"),
        ("cache", "got str"),
    ):
        with pytest.raises(ValueError, match=message):
            save_cache(cache, path)
    assert not list(tmp_path.iterdir())


def test_paths(tmp_path):
    cache, path = append(StaticKVCache(tiny_config()), 9), tmp_path / "cache"
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        save_cache(cache, tmp_path / "nowhere" / "cache")
    with pytest.raises(ValueError, match="is no file$"):
        load_cache(path, tiny_config())
    save_cache(cache, str(path))
    save_cache(append(cache, 1), path)  # a regular file is replaced
    assert load_cache(path, tiny_config()).get_seq_length() == 10
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]

    link, folder, pipe = (tmp_path / name for name in ("link", "folder", "pipe"))
    link.symlink_to(path)
    folder.mkdir()
    os.mkfifo(pipe)
    assert_same(load_cache(link, tiny_config()), cache)
    for other in (link, folder, pipe):
        with pytest.raises(ValueError, match="a link, a folder or a device, and is not replaced"):
            save_cache(cache, other)
    for other in (folder, pipe):  # a pipe must not be opened: nobody writes to it
        with pytest.raises(ValueError, match="is no file, but a folder or a device"):
            load_cache(other, tiny_config())
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="is no file$"):
        load_cache(link, tiny_config())


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    save_cache(append(StaticKVCache(tiny_config()), 9), path)
    raw = path.read_bytes()
    code = (
        "import resource, sys, torch\n"
        "sys.path.insert(0, 'tests')\n"
        "from models import tiny_config\n"
        "from hf_kvattn import StaticKVCache, save_cache\n"
        "cache = StaticKVCache(tiny_config())\n"
        "for layer in range(3): cache.update(torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16), layer)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"  # as if the disk were full
        "try: save_cache(cache, sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert run.returncode == 0 and "cannot be written" in run.stdout, run.stderr
    assert path.read_bytes() == raw and list(tmp_path.iterdir()) == [path]

    def interrupted(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(serialize, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_cache(append(StaticKVCache(tiny_config()), 9), path)
    assert path.read_bytes() == raw and list(tmp_path.iterdir()) == [path]


@every_kind
def test_moving(kind):
    cache = append(KINDS[kind](tiny_config()), 50)
    assert cache.to("cpu") is cache and cache.to(torch.float32) is cache and cache.to("cpu", torch.float32) is cache
    before = copy.deepcopy(cache)
    for wrong in ({"device": torch.bfloat16}, {"device": "meta", "dtype": torch.float16}, {"dtype": torch.float64}):
        with pytest.raises(ValueError, match="a cache of torch.float32 is not converted to torch"):
            cache.to(**wrong)
    assert_same(cache, before)
    assert cache.to("meta").layers[0].keys.device.type == "meta"
    with pytest.raises(ValueError, match="holds torch.float32 on meta, got torch.float32 on cpu"):
        append(cache, 1)
    assert cache.get_seq_length() == 50
    unused = KINDS[kind](tiny_config()).to("meta", torch.float16)
    append(unused, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_kind
def test_moving_to_a_gpu_and_back(kind, tmp_path):
    cache = append(KINDS[kind](tiny_config()), 50)
    before = copy.deepcopy(cache)
    assert cache.to("cuda").layers[0].device.type == "cuda"
    cache.update(*(torch.randn(2, 2, 1, 16, device="cuda") for _ in "kv"), 0)
    cache.layers[0].crop(-1)
    save_cache(cache, tmp_path / "cache")
    assert_same(load_cache(tmp_path / "cache", tiny_config()), before)
    assert_same(cache.to("cpu"), before)


# Files that lie. `parse` and `build` know the format on their own.


def parse(raw: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def build(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def sign(header: dict, data: bytes) -> None:
    """Writes the sha256 that makes it through the test for damage."""
    metadata = header["__metadata__"]
    total = hashlib.sha256(metadata["hf_kvattn"].encode())
    for name in sorted(set(header) - {"__metadata__"}):
        total.update(name.encode() + hashlib.sha256(data[slice(*header[name]["data_offsets"])]).digest())
    metadata["sha256"] = total.hexdigest()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a small file of each kind."""
    folder, made = tmp_path_factory.mktemp("files"), {}
    for kind, make in KINDS.items():
        save_cache(append(make(tiny_config()), 75), folder / kind, token_ids=torch.zeros(2, 75, dtype=torch.long))
        made[kind] = (folder / kind).read_bytes()
    return made


def edited(raw: bytes, change) -> bytes:
    """The file after `change(header, said, data)`, which may give other data; `said` is what the metadata say."""
    header, data = parse(raw)
    said = json.loads(header["__metadata__"]["hf_kvattn"])
    data = change(header, said, bytearray(data)) or data
    header["__metadata__"]["hf_kvattn"] = json.dumps(said, sort_keys=True)
    sign(header, data)
    return build(header, bytes(data))


def test_the_test_knows_the_format(files, tmp_path):
    for kind, raw in files.items():
        again = edited(raw, lambda header, said, data: None)
        assert parse(again) == parse(raw)
        (tmp_path / "cache").write_bytes(again)
        assert_same(load_cache(tmp_path / "cache", tiny_config()), append(KINDS[kind](tiny_config()), 75))


def write_numbers(name: str, value: float, dtype=torch.bfloat16):
    """A change that puts `value` into the middle of a tensor."""

    def change(header, said, data):
        start, end = header[name]["data_offsets"]
        place = start + (end - start) // 2 // 4 * 4
        number = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
        data[place : place + len(number)] = number
        return data

    return change


def say(*path_and_value):
    """A change of one value in the metadata."""
    *path, last, value = path_and_value

    def change(header, said, data):
        for key in path:
            said = said[key]
        said[last] = value

    return change


def all_layers(name: str, value):
    def change(header, said, data):
        for layer in said["layers"]:
            layer[name] = value

    return change


def reshape(name: str, shape: list[int]):
    def change(header, said, data):
        header[name]["shape"] = shape

    return change


def drop(name: str):
    def change(header, said, data):
        del said[name]

    return change


def rename(old: str, new: str):
    def change(header, said, data):
        header[new] = header.pop(old)

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("static", say("version", 1), "version 1 of the format, and 2 is read here"),
        ("static", say("version", "1"), "version '1'"),
        ("static", say("cache", "os.system"), "class 'os.system', known are"),
        ("static", say("cache", ["StaticKVCache"]), "class \\['StaticKVCache'\\]"),
        ("static", say("cache", "QuantizedKVCache"), "QuantizedKVCache"),
        ("static", say("settings", []), "settings of its StaticKVCache are \\[\\]"),
        ("static", say("settings", "bits", 4), "unexpected keyword argument 'bits'"),
        ("static", say("settings", "max_cache_len", 74), "75 new ones exceed max_cache_len=74"),
        ("static", say("settings", "max_cache_len", 1 << 40), "cannot be made"),
        ("static", say("settings", "max_cache_len", 1 << 70), "numbers are 0 to"),
        ("static", say("settings", "max_cache_len", 80.0), "numbers are 0 to"),
        ("static", say("dtype", "torch.float16"), "F32|float32 .* should be torch.float16"),
        ("static", say("dtype", "torch.uint8"), "dtype is 'torch.uint8', known are"),
        ("static", say("dtype", None), "dtype is None"),
        ("static", say("model", {}), "it says of its model {}"),
        ("static", say("model", "head_dim", 32), "head_dim is 32, in the config 16"),
        ("static", say("layers", []), "0 layers, the model 3"),
        ("static", say("layers", 7), "7 layers, the model 3"),
        ("static", say("layers", 1, 5), "layer 1 is 5"),
        ("static", say("layers", 1, "seen", 74), "do not agree on seen, which is \\[74, 75\\]"),
        ("static", say("layers", 1, "seen", -75), "layer 1 .* should be 0 to"),
        ("static", all_layers("seen", 74), "shape \\(2, 2, 75, 16\\), should be .*\\(2, 2, 74, 16\\)"),
        ("static", all_layers("seen", 0), "sizes are at least 1"),
        ("static", all_layers("seen", True), "layer 0 .* should be 0 to"),
        ("static", all_layers("batch_size", 1 << 39), "batch|cannot be made|shape"),
        ("static", all_layers("kv_heads", 3), "made for 2 KV heads of 16, got 3 of 16"),
        ("static", all_layers("stored", 75), "layer 0 .*'stored': 75"),
        ("static", drop("dtype"), "its metadata say"),
        ("static", say("token_ids_sha256", 5), "hash of the token ids is 5"),
        ("static", reshape("layers.1.k", [2, 2, 25, 48]), "layers.1.k is .*\\(2, 2, 25, 48\\), should be"),
        ("static", reshape("layers.1.k", [2, 2, 1 << 40, 16]), "invalid shape"),
        ("static", rename("layers.2.v", "layers.3.v"), "2 tensors are missing or not known, 'layers.2.v'"),
        ("int8", say("settings", "key_bits", 4), "k_codes|missing"),
        ("int8", say("settings", "key_bits", 5), "bits must be one of"),
        ("int8", say("settings", "group_size", 32), "group_size=32 does not divide head_dim=16"),
        ("int8", say("settings", "skip_layers", [0]), "missing or not known|layer 0"),
        ("int8", say("settings", "skip_layers", 5), "is not iterable"),
        ("int8", say("settings", "skip_layers", [2, 2]), "which mean"),
        ("int8", say("settings", "sinks", 33), "sinks must be"),
        ("sliding", all_layers("oldest", 50), "a window of 30 does not leave"),
        ("sliding", all_layers("seen", 200), "a window of 30 does not leave"),
        ("sliding", say("settings", "window", 5), "a window of 5 does not leave"),
        ("int8", all_layers("dropped", 64), "64 dropped and 4 exact ones do not fit"),
        (
            "int8",
            all_layers("packed_tokens", 33),
            "33 tokens in blocks of 32 after 0 dropped and 4 exact ones do not fit",
        ),
        (
            "int8",
            all_layers("packed_tokens", 96),
            "96 tokens in blocks of 32 after 0 dropped and 4 exact ones do not fit into 75",
        ),
        ("int8", all_layers("packed_tokens", 32), "should be .*\\(2, 2, 43, 16\\)"),
        ("int8", write_numbers("layers.1.k_scale", torch.nan), "layer 1: k_scale holds NaN or infinite"),
        ("int8", write_numbers("layers.2.v_scale", torch.inf), "layer 2: v_scale holds NaN or infinite"),
        ("int8", write_numbers("layers.0.v_scale", -1.0), "layer 0: v_scale holds negative"),
        ("int8", write_numbers("layers.0.k_mean", torch.nan, torch.float32), "layer 0: k_mean holds NaN"),
        ("sliding-sinks", write_numbers("layers.1.first", -1, torch.int32), "rows of 75 tokens begin at .*-1"),
        ("sliding-sinks", write_numbers("layers.1.first", 76, torch.int32), "rows of 75 tokens begin at .*76"),
        ("int4-skips", write_numbers("layers.1.k_zero", -torch.inf), "layer 1: k_zero holds NaN or infinite"),
    ],
    ids=str,
)
def test_files_that_lie_are_refused(files, kind, change, message, tmp_path):
    """Each with the right sha256, so that nothing but the check itself stops them."""
    (tmp_path / "cache").write_bytes(edited(files[kind], change))
    with pytest.raises(ValueError, match=f"(?s)cannot be loaded: .*({message})"):
        load_cache(tmp_path / "cache", tiny_config())


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", (4 << 20) + 1) + b"{" * 100,
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        pickle.dumps({"a": torch.zeros(3)}),
        pickle.dumps(os.system, protocol=0),
        b"PK\x03\x04" + bytes(200),
        b"GGUF" + bytes(200),
        bytes(4096),
        build({"__metadata__": {"hf_kvattn": "[" * 100_000, "sha256": ""}}, b""),
        build({"__metadata__": {"hf_kvattn": '{"version": 1}', "sha256": ""}}, b""),
        build({"__metadata__": {"hf_kvattn": "1" * 5000, "sha256": ""}}, b""),
        build({"__metadata__": {"hf_kvattn": "[1]", "sha256": ""}}, b""),
        build({"__metadata__": {"hf_kvattn": "no JSON", "sha256": ""}}, b""),
        build(
            {"__metadata__": {"format": "pt"}, "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
        ),
        build({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    ],
    ids=range(20),
)
def test_files_of_other_kinds_are_refused(raw, tmp_path):
    (tmp_path / "cache").write_bytes(raw)
    with pytest.raises(ValueError, match="cache cannot be loaded: "):
        load_cache(tmp_path / "cache", tiny_config())


def test_a_long_header_takes_no_time_and_gives_no_long_message(files, tmp_path):
    def many(header, said, data):
        header.update({f"layers.{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)})

    def deep(header, said, data):
        said["model"] = {"x" * 1000: "y" * 3_000_000}

    for change, message in ((many, "50000 tensors are missing or not known"), (deep, "it says of its model")):
        (tmp_path / "cache").write_bytes(edited(files["static"], change))
        start_s = time.process_time()
        with pytest.raises(ValueError, match=message) as found:
            load_cache(tmp_path / "cache", tiny_config())
        assert time.process_time() - start_s < 1 and len(str(found.value)) < 3000


def test_a_pickle_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    for write in (pickle.dump, torch.save):
        with open(tmp_path / "cache", "wb") as file:
            write(Trap(), file)
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_cache(tmp_path / "cache", tiny_config())
    assert not (tmp_path / "sprung").exists()


def test_every_flipped_bit_of_a_tensor_is_noticed(files, tmp_path):
    raw, chance = files["int4-skips"], random.Random(3)
    start = len(raw) - len(parse(raw)[1])
    for _ in range(100):
        flipped = bytearray(raw)
        flipped[chance.randrange(start, len(raw))] ^= 1 << chance.randrange(8)
        (tmp_path / "cache").write_bytes(flipped)
        with pytest.raises(ValueError, match="it is damaged: its sha256 is [0-9a-f]{64}, and was [0-9a-f]{64}"):
            load_cache(tmp_path / "cache", tiny_config())


HOSTILE = [None, True, False, -1, 0, 1, 2, 3, 3.5, 4.0, 31, 32, 33, 64, 1 << 20, 1 << 31, 1 << 40, 1 << 63, 1 << 70,
           1e308, float("nan"), "", "x", "\0", "torch.float16", "F16", "I64", "F8_E4M3", "QuantizedKVCache",
           "StaticKVCache", [], [1], [0, 1], [[[]]], ["a"], {}, {"a": 1}]  # fmt: skip


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def edit_json(chance: random.Random, value) -> None:
    """Replaces, removes or repeats one thing inside a JSON value."""
    *path, last = chance.choice(list(places(value)))
    for key in path:
        value = value[key]
    old, how = value[last], chance.random()
    if how < 0.1:
        del value[last]
    elif how < 0.2 and isinstance(value, list):
        value.insert(last, copy.deepcopy(old))
    elif how < 0.5 and type(old) is int:
        value[last] = chance.choice([old + 1, old - 1, 2 * old, old // 2, -old])
    else:
        value[last] = copy.deepcopy(chance.choice(HOSTILE))


def mutated(chance: random.Random, raw: bytes) -> bytes:
    kind, spot = chance.randrange(8), chance.randrange(len(raw))
    start = len(raw) - len(parse(raw)[1])
    if kind == 0:
        return raw[:spot]
    if kind == 1:
        return struct.pack("<Q", chance.choice([0, 1, chance.randrange(len(raw)), chance.randrange(1 << 64)])) + raw[8:]
    if kind == 2:  # bytes moved, doubled, replaced
        end = min(len(raw), spot + chance.randrange(1, 64))
        return raw[:spot] + chance.choice([b"", raw[spot:end] * 2, chance.randbytes(end - spot)]) + raw[end:]
    if kind == 3:
        flipped = bytearray(raw)
        for _ in range(chance.randrange(1, 9)):
            flipped[chance.randrange(chance.choice([start, len(raw)]))] ^= 1 << chance.randrange(8)
        return bytes(flipped)
    header, data = parse(raw)
    metadata = header["__metadata__"]
    said = json.loads(metadata["hf_kvattn"])
    if kind == 7:  # other numbers
        flipped = bytearray(data)
        for _ in range(chance.randrange(1, 9)):
            flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        data = bytes(flipped)
    else:
        for _ in range(chance.choice([1, 1, 1, 2, 5])):
            edit_json(chance, header if kind == 4 else said)
        if kind != 4:
            metadata["hf_kvattn"] = json.dumps(said, sort_keys=True)
    if chance.random() < 0.9:
        try:
            sign(header, data)
        except (TypeError, KeyError, AttributeError):
            pass  # too far from a file to have a sha256
    return build(header, data)


def assert_is_what_the_file_says(cache, raw: bytes, path: Path) -> None:
    """Saved again it gives the same metadata and the same bytes, whose sha256 is right."""
    header, data = parse(raw)
    signed = copy.deepcopy(header)
    sign(signed, data)
    assert signed == header
    save_cache(cache, path)
    again, again_data = parse(path.read_bytes())
    said, said_again = (json.loads(h["__metadata__"]["hf_kvattn"]) for h in (header, again))
    said["token_ids_sha256"] = None
    assert said == said_again and set(again) == set(header)
    for name in set(header) - {"__metadata__"}:
        assert header[name]["shape"] == again[name]["shape"] and header[name]["dtype"] == again[name]["dtype"]
        assert data[slice(*header[name]["data_offsets"])] == again_data[slice(*again[name]["data_offsets"])], name


def test_mutated_files_are_refused_or_loaded_as_they_say(files, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # capacity must cost nothing
    path, loaded, before = tmp_path / "cache", 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(FUZZ_FILES):
        chance = random.Random(seed)
        raw = mutated(chance, files[chance.choice(list(files))])
        path.write_bytes(raw)
        start_s = time.process_time()
        try:
            cache = load_cache(path, tiny_config())
        except ValueError as error:
            assert str(error).startswith(f"{path} cannot be loaded: "), seed
        except BaseException as error:
            raise AssertionError(f"file {seed} raised {type(error).__name__}: {error}") from error
        else:
            assert_is_what_the_file_says(cache, raw, tmp_path / "again")
            loaded += 1
        assert time.process_time() - start_s < 1, seed
    assert 0 < loaded < 0.2 * FUZZ_FILES
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_the_measurement_of_a_prefix(tmp_path, monkeypatch):
    model, ids = tiny_model(), prompt(70, batch=1)["input_ids"][0]
    chosen = variants.select(["kvattn-static", "kvattn-static-fit"])
    found = prefix.measure(model, ids, variants=chosen, rounds=2)
    assert found["settings"] == {"context": 69, "rounds": 2, "new_tokens": 16}
    for row in found["rows"]:
        assert row["same_tokens"] and 0 < row["load_ms"]["p20"] <= row["load_ms"]["p80"]
        assert row["speedup"]["of_medians"] == pytest.approx(row["prefill_ms"]["median"] / row["load_ms"]["median"])
        assert 0 < row["file_bytes"] - 3 * 2 * 2 * 69 * 16 * 4 < 4096 and row["cache_bytes"] >= 3 * 2 * 2 * 86 * 16 * 4
    conditions = inputs.conditions(model, SimpleNamespace(model="tiny", text="x", backend="auto"))
    report.write({"kind": "prefix", "conditions": conditions} | found, tmp_path)
    assert "| kvattn-static-fit | " in (tmp_path / "report.md").read_text() and (tmp_path / "prefix.png").is_file()
    assert "times faster to load than to compute: kvattn-static" in cards.render(tmp_path)

    for wrong, message in (
        (
            {"variants": variants.select(["stock-static"])},
            r"only caches of hf_kvattn .* got \['stock-static'\]",
        ),
        ({"variants": []}, "can be saved, got"),
        ({"variants": chosen, "rounds": 0}, "70 tokens, rounds=0"),
    ):
        with pytest.raises(ValueError, match=message):
            prefix.measure(model, ids, **wrong)

    def lossy(path, config, token_ids):
        cache = load_cache(path, config, token_ids)
        cache.layers[0]._v.neg_()
        return cache

    monkeypatch.setattr(prefix, "load_cache", lossy)
    assert not any(row["same_tokens"] for row in prefix.measure(model, ids, variants=chosen, rounds=1)["rows"])
