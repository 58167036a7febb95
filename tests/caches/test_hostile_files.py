"""Files of caches that are damaged, of another kind, or lie.

HF_KVATTN_FUZZ_FILES is the number of mutated files, 300 when it is not set. `parse` and `build` know the format on
their own.
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
from pathlib import Path

import pytest
import torch
from models import tiny_config
from saved_caches import KINDS, append, assert_same

from hf_kvattn import load_cache, save_cache

FUZZ_FILES = int(os.environ.get("HF_KVATTN_FUZZ_FILES", "300"))


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


@pytest.mark.parametrize("kind", ["static", "int8"])
def test_what_version_4_wrote_alike_is_read(files, kind, tmp_path):
    def older(header, said, data):
        said["version"] = 4

    (tmp_path / "cache").write_bytes(edited(files[kind], older))
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
        ("static", say("version", 1), "version 1 of the format, and 5 is read here"),
        ("int4-skips", say("version", 4), "written otherwise until version 5"),
        ("static", say("version", "1"), "version '1'"),
        ("static", say("cache", "os.system"), "class 'os.system', known are"),
        ("static", say("cache", ["StaticKVCache"]), "class \\['StaticKVCache'\\]"),
        ("static", say("cache", "QuantizedKVCache"), "QuantizedKVCache"),
        ("static", say("settings", []), "settings of its StaticKVCache are \\[\\]"),
        ("static", say("settings", "bits", 4), "unexpected keyword argument 'bits'"),
        ("static", say("settings", "max_cache_len", 74), "75 new ones exceed max_cache_len=74"),
        ("static", say("settings", "max_cache_len", 1 << 40), "allocate memory"),
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
        ("static", all_layers("seen", 76), "'shape': \\[2, 2, 75, 16\\].*, should be .*\\[2, 2, 76, 16\\]"),
        ("static", all_layers("seen", 0), "sizes are at least 1"),
        ("static", all_layers("seen", True), "layer 0 .* should be 0 to"),
        ("static", all_layers("batch_size", 1 << 39), "batch|cannot be made|shape"),
        ("static", all_layers("kv_heads", 3), "made for 2 KV heads of 16, got 3 of 16"),
        ("static", all_layers("stored", 75), "layer 0 .*'stored': 75"),
        ("static", drop("dtype"), "its metadata say"),
        ("static", say("prefix", 5), "its prefix is 5, should be a sha256 and a number of its 75 tokens"),
        ("static", say("prefix", 0, 5), "its prefix is \\[5, 75\\]"),
        ("static", say("prefix", 1, True), "its prefix is .*True"),
        ("static", say("prefix", ["a", 75, 1]), "its prefix is .*75, 1"),
        ("static", say("prefix", 1, 0), "its prefix is .* 0\\]"),
        ("static", say("prefix", 1, 76), "its prefix is .* 76\\]"),
        ("static", say("prefix", [0, 75]), "its prefix is \\[0, 75\\]"),
        ("static", say("stream", None), "its stream is None"),
        ("static", say("stream", []), "its stream is \\[\\]: \\('start', 'end'\\) should be None or"),
        ("sliding", drop("stream"), "its metadata say"),
        ("sliding", say("stream", [0]), "its stream is \\[0\\]"),
        ("sliding", say("stream", [True, 74]), "its stream is \\[True, 74\\]"),
        ("sliding", say("stream", [0, 74.0]), "its stream is \\[0, 74.0\\]"),
        ("sliding", say("stream", [-(1 << 41), 74]), "its stream is .*should be None or"),
        ("static", reshape("layers.1.k", [2, 2, 25, 48]), "layers.1.k is .*\\[2, 2, 25, 48\\].*, should be"),
        ("static", reshape("layers.1.k", [2, 2, 1 << 40, 16]), "layers.1.k is .*should be"),
        ("static", rename("layers.2.v", "layers.3.v"), "2 tensors are missing or not known, 'layers.2.v'"),
        ("int8", say("settings", "key_bits", 4), "k_codes|missing"),
        ("int8", say("settings", "key_bits", 5), "bits must be one of"),
        ("int8", say("settings", "key_bits", "fp4"), "bits must be one of .* got 'fp4'"),
        ("int8", say("settings", "sinks", "4"), "numbers are 0 to"),
        ("fp8-k", write_numbers("layers.1.k_codes", 255, torch.uint8), "layer 1: k_codes holds NaN"),
        ("int8", say("settings", "group_size", 32), "group_size=32 does not divide head_dim=16"),
        ("int8", say("settings", "skip_layers", [0]), "missing or not known|layer 0"),
        ("int8", say("settings", "skip_layers", 5), "skip_layers must be ints, .* got 5"),
        ("int8", say("settings", "skip_layers", [2, 2]), "which mean"),
        ("int8", say("settings", "sinks", 33), "sinks must be"),
        ("calibrated", say("settings", "calibration", "/dev/zero"), "numbers are 0 to"),
        ("calibrated", say("settings", "calibration", None), "which mean"),
        ("calibrated", say("settings", "calibration", {}), "no calibration of version 1"),
        ("calibrated", say("settings", "calibration", "key_bits", [8, 2, 5]), "bits must be one of"),
        ("calibrated", say("settings", "calibration", "key_bits", [8, 4, 4]), "k_codes|missing"),
        ("calibrated", say("settings", "calibration", "model_type", "mistral"), "made for another model"),
        ("calibrated", say("settings", "key_bits", 4), "a calibration sets the bits"),
        ("static", say("settings", "calibration", {}), "unexpected keyword argument 'calibration'"),
        ("sliding", all_layers("oldest", 50), "a window of 30 does not leave"),
        ("sliding", all_layers("seen", 200), "a window of 30 does not leave"),
        ("sliding", say("settings", "window", 5), "a window of 5 does not leave"),
        ("sliding", say("layers", 2, "rebased", 1), "do not agree on rebased, which is \\[0, 1\\]"),
        ("sliding-sinks", all_layers("rebased", 12), "a window of 12 does not leave .*'rebased': 12"),
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
        ("int8", all_layers("packed_tokens", 32), "should be .*\\[2, 2, 43, 16\\]"),
        ("int8", write_numbers("layers.1.k_scale", torch.nan), "layer 1: k_scale holds NaN or infinite"),
        ("int8", write_numbers("layers.2.v_scale", torch.inf), "layer 2: v_scale holds NaN or infinite"),
        ("int8", write_numbers("layers.0.v_scale", -1.0), "layer 0: v_scale holds negative"),
        ("int8", write_numbers("layers.0.k_mean", torch.nan, torch.float32), "layer 0: k_mean holds NaN"),
        ("sliding-sinks", write_numbers("layers.1.first", -1, torch.int32), "rows of 75 tokens begin at .*-1"),
        ("sliding-sinks", write_numbers("layers.1.first", 76, torch.int32), "rows of 75 tokens begin at .*76"),
        ("int4-skips", write_numbers("layers.1.k_step", -torch.inf), "layer 1: k_step holds NaN or infinite"),
        ("int4-skips", write_numbers("layers.1.k_unit", 0.0), "layer 1: units of keys must be from"),
        ("int4-skips", write_numbers("layers.1.k_order", 3, torch.int16), "layer 1: an order of keys' channels"),
        ("int4-skips", write_numbers("layers.1.k_widths", 9, torch.uint8), "layer 1: widths of keys must fall"),
    ],
    ids=lambda value: value.__qualname__.split(".")[0] if callable(value) else value,
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


UNDER_LIMITS = """
import resource, sys
import torch
sys.path.insert(0, "tests/helpers")
from models import tiny_config
from saved_caches import append
from hf_kvattn import StaticKVCache, load_cache, save_cache
from hf_kvattn.caches import serialize

torch.set_num_threads(1)
folder, hashed = sys.argv[1] + "/", serialize._sha256

def attempt(name):
    try:
        load_cache(folder + name, tiny_config())
    except ValueError as error:
        print(error)

def peak_bytes():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])

# What is filled, 50 MiB, in memory, and as much again at most, beside some slack of the allocator.
cache = append(StaticKVCache(tiny_config()), 130_000, chunk=130_000)
size = sum(t.nbytes for layer in cache.layers for t in layer.filled().values())
save_cache(cache, folder + "large")
del cache
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = peak_bytes()
cache = load_cache(folder + "large", tiny_config())
print("copies", (peak_bytes() - before) / size)
del cache

def cut(tensor):
    with open(folder + "large", "r+b") as file:
        file.truncate(serialize.MAX_HEADER_BYTES)
    return hashed(tensor)

serialize._sha256 = cut
attempt("large")
serialize._sha256 = hashed
resource.setrlimit(resource.RLIMIT_AS, (4 << 30,) * 2)
attempt("sparse")
"""


def test_files_that_shrink_or_are_larger_than_memory_are_refused(files, tmp_path):
    """Each could end the process, so it is one of its own."""
    huge = 1 << 24  # tokens, 12 GiB, of which none is on the disk

    header, _ = parse(files["static"])
    said = json.loads(header["__metadata__"]["hf_kvattn"])
    said["prefix"], end = None, 0
    for layer in said["layers"]:
        layer["seen"] = huge
    for name in list(header)[1:]:
        header[name]["shape"][2] = huge
        header[name]["data_offsets"] = [end, end := end + 4 * 2 * 2 * huge * 16]
    header["__metadata__"]["hf_kvattn"] = json.dumps(said)
    (tmp_path / "sparse").write_bytes(build(header, b""))
    os.truncate(tmp_path / "sparse", (tmp_path / "sparse").stat().st_size + end)
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", UNDER_LIMITS, str(tmp_path)]
    run = subprocess.run(command, cwd=paths[0], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr)
    copies, shrunk, sparse = run.stdout.splitlines()
    assert 0.9 < float(copies.split()[1]) < 2.2
    assert f"{tmp_path}/large cannot be loaded: it ended inside layers." in shrunk
    assert f"{tmp_path}/sparse cannot be loaded: " in sparse and "memory" in sparse


@pytest.mark.skipif(sys.platform != "linux", reason="these files are Linux's")
@pytest.mark.parametrize("path", ["/proc/self/mem", "/proc/self/maps", "/proc/self/cmdline"])
def test_files_that_are_no_files_are_refused(path):
    with pytest.raises(ValueError, match=f"^{path} cannot be loaded: "):
        load_cache(path, tiny_config())


def test_a_file_that_may_not_be_read_is_named(files, tmp_path, monkeypatch):
    (tmp_path / "cache").write_bytes(files["static"])

    def refused(*args):
        raise PermissionError(13, "Permission denied")  # root may read everything

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ValueError, match="cache cannot be loaded: .*Permission denied"):
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
