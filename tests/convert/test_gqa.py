"""Fewer KV heads: merged, expanded and trained models against what they were made from."""

from __future__ import annotations

import copy
import json
import math
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from command_lines import refused, run
from models import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import hf_kvattn
from hf_kvattn.convert import compare, gqa, training
from hf_kvattn.convert.train_tiny import byte_tokenizer
from hf_kvattn.evaluation.common import report
from hf_kvattn.tools import inputs

pytestmark = pytest.mark.usefixtures("one_thread")

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
    tokenizer = byte_tokenizer("", 257)
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


@pytest.mark.slow
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
