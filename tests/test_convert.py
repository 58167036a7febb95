"""The conversion room: written checkpoints against what they were made from, and inputs that try to break it."""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import runpy
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import SCRIPTS, run
from models import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvattn
from hf_kvattn.convert import compare, gqa, training
from hf_kvattn.convert import gguf as gguf_room
from hf_kvattn.evaluation import inputs, report

WIDTH, VOCAB = 256, 320  # K-quants come in blocks of 256
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


pytestmark = pytest.mark.usefixtures("one_thread")


def refused(capsys, folder: Path, before: set[Path], *arguments: object) -> str:
    """The one line with which a command line refuses, after checking that it wrote nothing."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "error: " in lines[-1] and not [line for line in lines if "Traceback" in line]
    assert set(folder.iterdir()) == before
    return lines[-1]


# ------------------------------------------------------------------------------------------------- GGUF


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


# -------------------------------------------------------------------------------------------- fewer KV heads

FAMILIES = ["llama", "mistral", "qwen2", "granite", "smollm3"]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8}


def double_model(family: str = "llama", **changes):
    """Random, with biases that are not 0, in float64, so that exact means 1e-9."""
    model = tiny_model(family, **{**HEADS, **changes}).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def rows_of(linear: nn.Linear, heads: int) -> list[torch.Tensor]:
    """Views of each head's rows of weight and, if there is one, bias."""
    parts = [linear.weight.data] + ([] if linear.bias is None else [linear.bias.data])
    return [part.view(heads, -1, *part.shape[1:]) for part in parts]


def make_equal(model, source: list[int]) -> None:
    """Every KV head becomes a copy of head `source[head]`."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for part in rows_of(linear, len(source)):
                part.copy_(part[source].clone())


@torch.no_grad()
def difference(one, other) -> float:
    ids = torch.randint(0, 128, (2, 25), generator=torch.Generator().manual_seed(3))
    return (one(ids).logits - other(ids).logits).abs().max().item()


def calibration(count: int = 8, tokens: int = 30) -> torch.Tensor:
    return torch.randint(0, 128, (count, tokens), generator=torch.Generator().manual_seed(4))


def converted(model, kv_heads: int, method: str):
    return gqa.convert(model, kv_heads, method, calibration() if method == "activation" else None)


@pytest.mark.parametrize("method", gqa.METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equal_heads_changes_nothing(family, method):
    for q_heads, source in ((8, [0, 0, 2, 2]), (4, [0, 0, 2, 2]), (8, [3, 3, 3, 3])):
        model = double_model(family, num_attention_heads=q_heads)
        make_equal(model, source)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fewer = converted(model, len(set(source)), method)
        assert difference(model, fewer) < 1e-9
        assert fewer.config.num_key_value_heads == len(set(source)) and model.config.num_key_value_heads == 4
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert fewer.model.layers[0].self_attn.k_proj.out_features == 8 * len(set(source))
        half = gqa.cache_bytes_per_token(fewer, torch.bfloat16) * 4 // len(set(source))
        assert half == gqa.cache_bytes_per_token(model, torch.bfloat16) == 2 * 3 * 4 * 8 * 2


def test_similar_heads_that_are_no_neighbours_are_found():
    model = double_model("qwen2")
    make_equal(model, [0, 1, 0, 1])
    assert difference(model, converted(model, 2, "mean")) > 1e-3
    assert difference(model, converted(model, 2, "cluster")) < 1e-9
    assert difference(model, converted(model, 2, "activation")) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_merge_sees_through_what_can_be_folded_away(family):
    """Keys that differ by a complex factor in each RoPE pair, and values by any invertible matrix."""
    model = double_model(family)
    make_equal(model, [0, 0, 2, 2])
    for layer in model.model.layers:
        for head in range(4):
            turn = torch.polar(torch.rand(4).double() + 0.5, 6.3 * torch.rand(4).double())
            for part in rows_of(layer.self_attn.k_proj, 4):
                turned = turn.view(-1, *[1] * (part.dim() - 2)) * torch.complex(*part[head].chunk(2))
                part[head] = torch.cat([turned.real, turned.imag])
            matrix = torch.randn(8, 8).double()
            for part in rows_of(layer.self_attn.v_proj, 4):
                part[head] = matrix @ part[head]
    assert difference(model, converted(model, 2, "cluster")) > 1e-3
    assert difference(model, converted(model, 2, "activation")) < 1e-8


@pytest.mark.parametrize("method", gqa.METHODS)
def test_a_layer_of_zeros_stays_one(method):
    model = double_model("llama")
    make_equal(model, [0, 0, 2, 2])
    for parts in (["q_proj"], ["k_proj"], ["v_proj"], ["o_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]):
        zeroed = copy.deepcopy(model)
        for part in parts:
            nn.init.zeros_(getattr(zeroed.model.layers[1].self_attn, part).weight)
        assert difference(zeroed, converted(zeroed, 2, method)) < 1e-9


def test_groups_are_found_whatever_the_order():
    for seed in range(20):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
        points = (order // 3).double()[:, None]  # 4 clusters of 3 heads
        groups = gqa.group_heads(torch.cdist(points, points).square(), 4)
        assert sorted(head for group in groups for head in group) == list(range(12))
        assert all(len({int(points[head]) for head in group}) == 1 for group in groups)
    assert gqa.group_heads(torch.ones(6, 6).fill_diagonal_(0), 2) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
def test_expanding_is_exact_and_merging_takes_it_back(family):
    model = double_model(family)
    full = gqa.expand(model)
    assert full.config.num_key_value_heads == 8 and difference(model, full) < 1e-12
    attention, old = full.model.layers[1].self_attn, model.model.layers[1].self_attn
    for new_rows, old_rows in zip(rows_of(attention.k_proj, 8), rows_of(old.k_proj, 4), strict=True):
        assert torch.equal(new_rows, old_rows.repeat_interleave(2, 0))
    back = gqa.convert(full, 4, "mean")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="each of its 8 query heads already"):
        gqa.expand(full)


@pytest.mark.parametrize(
    ("family", "kv_heads", "method", "reason"),
    [("llama", 3, "mean", "4 KV heads cannot be merged to 3"), ("llama", 4, "mean", "4 KV heads cannot be merged to 4"),
     ("llama", 8, "mean", "to 8"), ("llama", 0, "mean", "to 0"), ("llama", 2, "median", "unknown method 'median'"),
     ("llama", 2, "activation", "needs them"), ("phi3", 2, "mean", "no separate linear q_proj"),
     ("qwen3", 2, "mean", "'qwen3' is none of"), ("gemma2", 2, "mean", "'gemma2' is none of")],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(family, kv_heads, method, reason):
    with pytest.raises(ValueError, match=reason):
        gqa.convert(tiny_model(family, **HEADS), kv_heads, method)


def test_other_shapes_of_models_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ValueError, match="GPT2LMHeadModel is not Llama-style"):
        gqa.check(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50)))
    partial = tiny_model("llama", **HEADS)
    partial.config.rope_parameters["partial_rotary_factor"] = 0.5
    with pytest.raises(ValueError, match="only 0.5 of its channels"):
        gqa.check(partial)
    with pytest.raises(ValueError, match="not for 'mean'"):
        gqa.convert(tiny_model("llama", **HEADS), 2, "mean", calibration())


# -------------------------------------------------------------------------------- a trained model, and the script


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    whole = inputs.load_text("pydoc")
    for name, part in {"train": whole[:60_000], "heldout": whole[100_000:112_000]}.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in ("train", "heldout")}


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory) -> tuple[Path, list[float]]:
    """A folder with an MHA model of bytes that has learned something in seconds, and its training losses."""
    tokenizer = runpy.run_path(str(SCRIPTS / "train_tiny.py"))["byte_tokenizer"]("", 257)
    model = tiny_model(vocab_size=len(tokenizer), num_key_value_heads=4, num_hidden_layers=2, initializer_range=0.05)
    windows = inputs.load_windows(tokenizer, texts["train"].read_text(encoding="utf-8"), 64)
    losses = training.train(model, windows, steps=200, learning_rate=6e-3, batch_size=16)
    folder = tmp_path_factory.mktemp("trained") / "mha"
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    return folder, losses


def arguments_of(folder: Path, texts: dict[str, Path], *more: object) -> list[object]:
    common = ["--model", folder, "--calibration-text", texts["train"], "--text", texts["heldout"], "--window", 64]
    return ["convert_gqa", *common, "--windows", 60, "--calibration-windows", 60, *more]


def test_activation_merge_beats_the_mean_and_uptraining_lowers_the_loss(trained, texts, tmp_path, capsys):
    folder, losses = trained
    assert losses[-1] < 0.7 * losses[0]
    more = ["--kv-heads", 1, "--compare", "mean", "cluster", "--uptrain-steps", 25, "--learning-rate", 1e-3]
    out = tmp_path / "mqa"
    assert run(*arguments_of(folder, texts, *more, "--output", out, "--max-shard-size", "100KB", "--json")) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.read(out) == {"conversion": results}
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["activation", "mean", "cluster"]
    assert 0 < rows["activation"]["share_of_mean_loss"] < 0.7 and rows["mean"]["loss_nats"] > 0.02
    for row in rows.values():
        kl = row["uptrained"]["training_kl_nats"]
        assert len(kl) == 25 and kl[-1] < kl[0] and row["uptrained"]["perplexity"] < row["perplexity"]
        assert row["loss"] == pytest.approx(row["perplexity"] - results["perplexity_before"])
    assert results["cache_bytes_per_token_before"] == 4 * results["cache_bytes_per_token_after"] == 2 * 2 * 64 * 2
    assert results["written"]["perplexity"] == pytest.approx(rows["activation"]["uptrained"]["perplexity"], rel=0.01)
    assert len(list(out.glob("*.safetensors"))) > 1 and (out / "perplexity_by_method.png").stat().st_size > 10_000
    assert "gqa" in (out / "README.md").read_text() and "| original |" in (out / "report.md").read_text()

    written = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert written.dtype == torch.bfloat16 and written.config.num_key_value_heads == 1
    ids = torch.arange(40)[None]
    stock = written.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    hf_kvattn.enable(written, cache="static")
    assert torch.equal(written.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None), stock)


def test_script_expands(trained, texts, tmp_path, capsys):
    folder, _ = trained
    assert run(*arguments_of(folder, texts, "--kv-heads", 2, "--method", "mean", "--output", tmp_path / "gqa")) == 0
    assert run(*arguments_of(tmp_path / "gqa", texts, "--expand", "--output", tmp_path / "mha", "--json")) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["rows"][0]["method"] == "expand" and abs(results["rows"][0]["loss_nats"]) < 1e-5
    assert results["settings"]["kv_heads_before"] == 2 and results["settings"]["kv_heads_after"] == 4


def test_training_learns_from_a_teacher_and_refuses_half_precision(trained, texts):
    model, tokenizer = inputs.load_model(str(trained[0]), torch.float32)
    windows = inputs.load_tokens(tokenizer, inputs.load_text(str(texts["train"])), 640).view(10, 64)
    (nothing,) = training.train(gqa.convert(gqa.expand(tiny := tiny_model()), 2, "mean"), calibration(), steps=1,
                                learning_rate=1e-4, teacher=tiny)  # fmt: skip
    assert abs(nothing) < 1e-5  # KL of a model with itself
    with pytest.raises(ValueError, match="float32, not torch.bfloat16"):
        training.train(model.to(torch.bfloat16), windows, steps=1, learning_rate=1e-4)
    with pytest.raises(ValueError, match="nothing to train: 0 windows"):
        training.train(model.float(), windows[:0], steps=1, learning_rate=1e-4)
    for methods, kv_heads in ((["mean"], None), (["expand"], 2), ([], 2), ([], None)):
        with pytest.raises(ValueError, match=f"kv_heads={kv_heads}"):
            compare.compare(model, methods, kv_heads=kv_heads, text_windows=windows, calibration_windows=1,
                            heldout_windows=windows)  # fmt: skip
    with pytest.raises(ValueError, match="has 10 windows, not 11"):
        compare.compare(model, ["mean"], kv_heads=2, text_windows=windows, calibration_windows=11,
                        heldout_windows=windows)  # fmt: skip


def damage(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated shard":
        shard.write_bytes(data[: len(data) // 2])
    elif how == "truncated header":
        shard.write_bytes(data[:5])
    elif how == "hostile length":
        shard.write_bytes(struct.pack("<Q", 1 << 62) + data[8:])
    elif how == "hostile offsets":
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        next(entry for name, entry in header.items() if name != "__metadata__")["data_offsets"] = [0, 1 << 60]
        text = json.dumps(header).encode()
        shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    elif how == "NaN":
        tensors = load_file(shard)
        save_file({name: tensor * math.nan for name, tensor in tensors.items()}, shard, {"format": "pt"})
    elif how == "missing weight":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        tensors = load_file(shard)
        removed = next(iter(tensors))
        save_file({name: tensor for name, tensor in tensors.items() if name != removed}, shard, {"format": "pt"})
        del index["weight_map"][removed]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text())
        config.update(
            {
                "other width": {"hidden_size": 128},
                "huge": {"hidden_size": 1 << 40},
                "heads": {"num_attention_heads": 5},
            }[how]
        )
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how", ["missing shard", "truncated shard", "truncated header", "hostile length", "hostile offsets",
            "missing weight", "NaN", "other width", "huge", "heads"],
)  # fmt: skip
def test_a_broken_checkpoint_is_refused(trained, texts, tmp_path, capsys, how):
    shutil.copytree(trained[0], tmp_path / "broken")
    damage(tmp_path / "broken", how)
    more = ["--kv-heads", 1, "--output", tmp_path / "out"]
    refused(capsys, tmp_path, {tmp_path / "broken"}, *arguments_of(tmp_path / "broken", texts, *more))


def test_the_script_refuses_with_one_line(trained, texts, tmp_path, capsys):
    folder = trained[0]
    for more, reason in (
        (["--kv-heads", 3], "4 KV heads cannot be merged to 3"),
        (["--kv-heads", 2, "--windows", 10_000], "tokens, and 640000 are needed"),
        (["--kv-heads", 2, "--calibration-windows", 10_000], "windows, not 10000"),
        (["--kv-heads", 2, "--text", texts["train"]], "measure on text the method has not seen"),
        (["--kv-heads", 2, "--uptrain-steps", -1], "--uptrain-steps is -1"),
        (["--expand", "--compare", "mean"], "nothing to --compare"),
        (["--expand"], "each of its 4 query heads already"),
        (["--kv-heads", 2, "--max-shard-size", "many"], "many"),
        (["--kv-heads", 2, "--output", folder], "exists already"),
    ):
        line = refused(capsys, tmp_path, set(), *arguments_of(folder, texts, "--output", tmp_path / "out", *more))
        assert reason in line
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        more = ["--kv-heads", 2, "--method", "mean", "--output", tmp_path / "out"]
        refused(capsys, tmp_path, set(), *arguments_of(folder, texts, *more))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_tiny_model_is_trained_and_its_held_out_text_kept_apart(tmp_path, capsys):
    sizes = ["--steps", 4, "--layers", 1, "--hidden-size", 32, "--heads", 4, "--vocabulary", 300, "--window", 32]
    assert run("train_tiny", "--output", tmp_path / "tiny", *sizes) == 0
    model, tokenizer = inputs.load_model(str(tmp_path / "tiny"), torch.float32)
    assert model.config.num_key_value_heads == 4 and len(tokenizer) == 300
    train, heldout = ((tmp_path / "tiny" / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "heldout"))
    assert 5 * len(heldout) < len(train) and heldout[2000:2500] not in train
    assert tokenizer.decode(tokenizer(heldout[:300])["input_ids"]) == heldout[:300]
    before = {tmp_path / "tiny"}
    for wrong, reason in (
        (["--heads", 5], "5"),
        (["--kv-heads", 3], "--heads 4 is no multiple of --kv-heads 3"),
        (["--window", 10_000_000], "0 windows of text"),
        (["--vocabulary", 256], "a vocabulary of 256"),
    ):
        assert reason in refused(capsys, tmp_path, before, "train_tiny", "--output", tmp_path / "x", *sizes, *wrong)
