"""GGUF files: converted checkpoints against what they were made from, and files that try to break it."""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import refused, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvattn.convert import gguf as gguf_room
from hf_kvattn.tools import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, VOCAB = 256, 320  # K-quants come in blocks of 256
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def blocks(rows: int, columns: int, kind: str, generator: np.random.Generator) -> np.ndarray:
    """Random weights of a GGUF type, as bytes; the package gguf quantizes no K-quants, so these are made of bytes."""
    import gguf

    quant = gguf.GGMLQuantizationType[kind]
    if not kind.endswith("_K"):
        return gguf.quantize(generator.normal(0, 0.2, (rows, columns)).astype(np.float32), quant)
    data = generator.integers(0, 256, (rows, columns // 256, gguf.GGML_QUANT_SIZES[quant][1]), dtype=np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in halves:  # the blocks' scales
        data[..., at : at + 2] = np.frombuffer(np.float16(1e-3).tobytes(), dtype=np.uint8)
    return data.reshape(rows, -1)


def write_gguf(
    path: Path, kind: str = "Q8_0", tokenizer: str = "gpt2", more_merges: tuple[str, ...] = (), **changes: int
) -> Path:
    """A whole tiny Llama in one file; `changes` replace entries of its metadata."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    sizes = {"block_count": 2, "embedding_length": WIDTH, "feed_forward_length": WIDTH, "context_length": 512}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "rope.dimension_count": 64, "vocab_size": VOCAB}
    for key, value in (sizes | changes).items():
        (writer.add_uint32 if value < 2**32 else writer.add_uint64)(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = sorted(ByteLevel.alphabet())
    merges = [*zip(letters, letters[1:4], strict=False), ("a", "b"), ("Ġ", "!")]
    tokens = [*letters, *(a + b for a, b in merges)]
    special = len(tokens)
    tokens += [f"<|{i}|>" for i in range(VOCAB - special)]
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * special + [3] * (VOCAB - special))
    writer.add_token_merges([*(" ".join(pair) for pair in merges), *more_merges])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_chat_template(TEMPLATE)
    names = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH}
    names |= {"ffn_gate": WIDTH, "ffn_up": WIDTH, "ffn_down": WIDTH}
    tensors = {"token_embd": VOCAB} | {f"blk.{i}.{name}": rows for i in range(2) for name, rows in names.items()}
    for name, rows in tensors.items():
        data = blocks(rows, WIDTH, kind, generator)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name in ["output_norm", *(f"blk.{i}.{norm}" for i in range(2) for norm in ("attn_norm", "ffn_norm"))]:
        writer.add_tensor(f"{name}.weight", generator.normal(1, 0.1, WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F16", "float16"), ("Q8_0", "bfloat16"), ("Q4_0", "float32"), ("Q4_1", "bfloat16"), ("Q4_K", "bfloat16"),
     ("Q6_K", "float32"), ("Q2_K", "float16"), ("Q5_K", "float32"), ("Q3_K", "bfloat16")],
)  # fmt: skip
def test_a_converted_gguf_gives_the_logits_of_its_source(tmp_path, capsys, kind, dtype):
    import gguf

    path = write_gguf(tmp_path / "tiny.gguf", kind)
    arguments = ["--output", tmp_path / "out", "--dtype", dtype, "--max-shard-size", "300KB", "--json"]
    assert run("convert_gguf", path, *arguments) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["weight_types"][kind] > 0.99 * found["parameters"] and found["chat_template"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    torch_dtype = inputs.DTYPES[dtype]
    source, source_tokenizer = inputs.load_model(str(path), torch_dtype)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        assert written.dtype == torch_dtype and torch.equal(written(ids).logits, source(ids).logits)
    (embedding,) = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "token_embd.weight"]
    expected = torch.from_numpy(gguf.dequantize(embedding.data, embedding.tensor_type)).to(torch_dtype)
    assert torch.equal(written.get_input_embeddings().weight, expected)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer("ab !é")["input_ids"] == source_tokenizer("ab !é")["input_ids"]
    assert written.generation_config.eos_token_id == VOCAB - 1 == tokenizer.eos_token_id
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and f"{kind} 9" in card and dtype in card


def test_a_cut_gguf_is_refused_wherever_it_is_cut(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    header_end = whole.index(b"blk.1.ffn_norm.weight")
    cuts = [0, 3, 4, 7, 20, 23, 24, 40, *range(100, header_end, header_end // 40), header_end, len(whole) - 1]
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.gguf is not a whole GGUF file"):
            gguf_room.convert(str(tmp_path / "cut.gguf"), tmp_path / "out", torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "cut.gguf"}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = struct.pack("<Q", 1 << 60)
HOSTILE = {
    "metadata count": struct.pack("<IQ", 3, 0) + HUGE,
    "tensor count": struct.pack("<I", 3) + HUGE + struct.pack("<Q", 0),
    "array of numbers": struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<II", 9, 4) + HUGE,
    "array of strings": struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<II", 9, 8) + HUGE,
    "array of arrays": struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<II", 9, 9) + HUGE,
    "string": struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 8) + b"\xff" * 8,
    "key": struct.pack("<IQQ", 3, 0, 1) + HUGE,
    "type": struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 99),
    "alignment": struct.pack("<IQQ", 3, 0, 1) + text("general.alignment") + struct.pack("<II", 4, 0),
    "dimensions": struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<I", 1 << 31),
    "shape": struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<I", 2) + HUGE * 2 + struct.pack("<IQ", 0, 0),
    "offset": struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<IQI", 1, 8, 0) + HUGE,
    "tensor type": struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<IQIQ", 1, 8, 77, 0),
    "version": struct.pack("<IQQ", 3 << 24, 0, 0),
    "text": struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<IB", 0, 0),
    "no metadata": struct.pack("<IQQ", 3, 0, 0),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_gguf_header_is_refused_in_a_second(tmp_path, capsys, what):
    pytest.importorskip("gguf")
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + HOSTILE[what] + bytes(64))
    start_s = time.perf_counter()
    line = refused(capsys, tmp_path, {path}, "convert_gguf", path, "--output", tmp_path / "out")
    assert time.perf_counter() - start_s < 1 and "hostile.gguf" in line


def values_of(raw: bytes) -> tuple[dict[str, tuple[int, int]], int]:
    """Where the type and value of each metadata key begin and end, and where the header ends."""
    reader = gguf_room._Reader(io.BytesIO(raw), len(raw))
    reader.take(8)
    tensors, keys = reader.number("Q"), reader.number("Q")
    places = {}
    for _ in range(keys):
        key = reader.string()
        start = len(raw) - reader.left_bytes
        reader.value()
        places[key] = start, len(raw) - reader.left_bytes
    for _ in range(tensors):
        reader.string()
        reader.take(8 * reader.number("I") + 12)
    return places, len(raw) - reader.left_bytes


def with_value(raw: bytes, key: str, value: bytes, as_key: str | None = None) -> bytes:
    """The file with another type and value of `key`, or with one key more."""
    places, end = values_of(raw)
    start, stop = places[key]
    if as_key is not None:
        raw = raw[:16] + struct.pack("<Q", len(places) + 1) + raw[24:]
        start, value = stop, text(as_key) + value
    header = raw[:start] + value + raw[stop:end]
    return header + bytes(-len(header) % 32) + raw[end + -end % 32 :]


def array(kind: int, code: str, *items) -> bytes:
    return struct.pack(f"<IIQ{len(items)}{code}", 9, kind, len(items), *items)


HUGE_COUNT = (1 << 31) - 1
OTHER_VALUES = {
    "array of one": array(4, "I", HUGE_COUNT),
    "array of one long": array(10, "Q", 1 << 62),
    "array of two": array(4, "I", 2, HUGE_COUNT),
    "empty array": array(4, "I"),
    "array of floats": array(6, "f", float("nan"), 1e30),
    "array of strings": struct.pack("<IIQ", 9, 8, 1) + text("2"),
    "no strings": struct.pack("<IIQ", 9, 8, 0),
    "string": struct.pack("<I", 8) + text("2"),
    "bool": struct.pack("<I?", 7, True),
    "float": struct.pack("<If", 6, float("inf")),
    "negative": struct.pack("<Ii", 5, -HUGE_COUNT),
    "huge": struct.pack("<IQ", 10, (1 << 64) - 1),
    "two": struct.pack("<II", 4, 2),
}


@pytest.mark.parametrize("what", OTHER_VALUES)
def test_metadata_of_another_type_load_or_are_refused_at_once(tmp_path, what):
    whole, path = write_gguf(tmp_path / "tiny.gguf").read_bytes(), tmp_path / "other.gguf"
    keys, loaded = list(values_of(whole)[0]), 0
    limits, used = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limits[1]))  # it shall not be filled
        for key in keys:
            path.write_bytes(with_value(whole, key, OTHER_VALUES[what]))
            start_s = time.process_time()
            try:
                model, _ = gguf_room._load(path, gguf_room.read_header(path), torch.float32)
                assert model.config.num_hidden_layers == 2
                loaded += 1
            except ValueError as error:
                assert "other.gguf" in str(error), key
            assert time.process_time() - start_s < 3, key
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert len(keys) > 20 and loaded < len(keys) / 2


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("block_count", "array of one", "cannot be Numbers(length=1) blocks"),
        ("block_count", "bool", "cannot be True blocks"),
        ("block_count", "float", "cannot be inf blocks"),
        ("attention.head_count", "array of one", "is Numbers(length=1), where a size is used"),
        ("attention.head_count_kv", "negative", "is -2147483647, where a size is used"),
        ("context_length", "array of strings", "is ['2'], where a size is used"),
        ("tokenizer.ggml.tokens", "two", "tokenizer.ggml.tokens is 2, which is no list"),
        ("tokenizer.ggml.tokens", "array of two", "tokenizer.ggml.tokens is Numbers(length=2), which is no list"),
        ("tokenizer.ggml.merges", "string", "tokenizer.ggml.merges is '2', which is no list"),
        ("tokenizer.ggml.model", "two", "tokenizer.ggml.model is 2, which is no str"),
        ("general.architecture", "array of strings", "general.architecture is ['2'], which is no str"),
        ("general.name", "array of two", "general.name is Numbers(length=2), which is no str"),
        ("general.license", "two", "general.license is 2, which is no str"),
    ],
)
def test_arrays_are_no_numbers_and_numbers_no_arrays(tmp_path, capsys, key, value, reason):
    path = write_gguf(tmp_path / "other.gguf")
    key = key if key.startswith(("general", "tokenizer")) else f"llama.{key}"
    path.write_bytes(with_value(path.read_bytes(), key, OTHER_VALUES[value]))
    line = refused(capsys, tmp_path, {path}, "convert_gguf", path, "--output", tmp_path / "out")
    assert key in line and reason in line


def test_counts_under_another_architectures_name_are_looked_at(tmp_path):
    """transformers reads a Llama called mistral as a Mistral."""
    path = write_gguf(tmp_path / "mistral.gguf")
    raw = with_value(path.read_bytes(), "general.name", struct.pack("<I", 8) + text("mistral"))
    path.write_bytes(
        with_value(raw, "llama.block_count", struct.pack("<II", 4, HUGE_COUNT), as_key="mistral.block_count")
    )
    with pytest.raises(ValueError, match="cannot be 2147483647 blocks"):
        gguf_room.convert(str(path), tmp_path / "out", torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 1 << 31), ("block_count", 0), ("embedding_length", 1 << 40), ("feed_forward_length", 1 << 45),
     ("vocab_size", 1 << 50), ("attention.head_count", 0), ("attention.head_count", 7), ("block_count", 3),
     ("attention.head_count_kv", 4), ("embedding_length", 128)],
)  # fmt: skip
def test_gguf_metadata_that_does_not_fit_the_tensors_is_refused(tmp_path, capsys, key, value):
    path = write_gguf(tmp_path / "lies.gguf", **{key: value})
    start_s = time.perf_counter()
    assert "lies.gguf" in refused(capsys, tmp_path, {path}, "convert_gguf", path, "--output", tmp_path / "out")
    assert time.perf_counter() - start_s < 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"more_merges": ("a c",)}, "'a c'"), ({"more_merges": ("a b c",)}, "'a b c'"), ({"more_merges": ("",)}, "''"),
     ({"more_merges": ("東 a",)}, "'東 a'"), ({"tokenizer": "gemma4"}, "<unk>")],
)  # fmt: skip
def test_a_gguf_vocabulary_that_lacks_tokens_is_refused(tmp_path, capsys, changes, reason):
    path = write_gguf(tmp_path / "lacks.gguf", **changes)
    line = refused(capsys, tmp_path, {path}, "convert_gguf", path, "--output", tmp_path / "out")
    assert "lacks.gguf" in line and "its vocabulary lacks" in line and reason in line


def test_flipped_bytes_in_a_gguf_header_convert_or_are_refused(tmp_path):
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    header_end = whole.index(b"blk.1.ffn_norm.weight") + 60
    rng = random.Random(0)
    for i in range(40):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(header_end)] = rng.randrange(256)
        (tmp_path / "flipped.gguf").write_bytes(data)
        try:
            gguf_room.convert(str(tmp_path / "flipped.gguf"), tmp_path / f"out{i}", torch.float32)
        except ValueError:
            assert not (tmp_path / f"out{i}").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_is_written_over_or_half(tmp_path, capsys):
    path = write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "full").mkdir()
    before = set(tmp_path.iterdir())
    assert "exists already" in refused(capsys, tmp_path, before, "convert_gguf", path, "--output", tmp_path / "full")
    line = refused(capsys, tmp_path, before, "convert_gguf", path, "--output", tmp_path / "no" / "out")
    assert "there is no folder" in line
    line = refused(capsys, tmp_path, before, "convert_gguf", tmp_path / "no.gguf", "--output", tmp_path / "out")
    assert "no such model file" in line
    assert "not a .gguf" in refused(capsys, tmp_path, before, "convert_gguf", "tiny", "--output", tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a write fails in the middle of the weights, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        refused(capsys, tmp_path, before, "convert_gguf", path, "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
