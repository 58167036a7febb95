"""Weights that torchao has quantized, under every cache: what the same numbers give without it."""

import functools
import importlib
import json

import pytest
import torch
from command_lines import run
from models import generate, prompt, tiny_model
from stand_ins import save_with_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache, TorchAoConfig

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.evaluation import doctor
from hf_kvattn.tools import inputs

WEIGHTS = list(inputs.WEIGHTS)
CACHES = {
    "static": StaticKVCache,
    "sliding": functools.partial(SlidingWindowKVCache, window=24, sinks=4),
    "int8": functools.partial(QuantizedKVCache, bits=8, group_size=16),
    "int4": functools.partial(QuantizedKVCache, bits=4, group_size=16),
}
LOGITS = {"rtol": 1e-4, "atol": 1e-3}


def quantized(name: str, dtype: torch.dtype = torch.float32, **changes):
    model = tiny_model(num_hidden_layers=2, **changes).to(dtype)
    inputs.quantize_weights(model, name)
    return model


def spelled_out(model):
    """The numbers that `model` multiplies with as plain weights, layer by layer."""
    plain = tiny_model(num_hidden_layers=2)
    for (_, ours), (_, theirs) in zip(plain.named_modules(), model.named_modules(), strict=True):
        if isinstance(ours, torch.nn.Linear):
            ours.weight = torch.nn.Parameter(theirs(torch.eye(ours.in_features)).T.contiguous())
    return plain


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_every_cache_gives_what_the_same_numbers_give(weights, cache):
    model, prompts = quantized(weights), prompt(45, left_padding=4)
    plain = spelled_out(model)
    unlike = (plain.lm_head.weight - tiny_model(num_hidden_layers=2).lm_head.weight).abs().max()
    assert unlike > 1e-4  # they are codes
    results = []
    for each in (model, plain):
        with hf_kvattn.enabled(each):
            results.append(generate(each, prompts, past_key_values=CACHES[cache](each.config)))
    (tokens, logits), (expected, expected_logits) = results
    assert torch.equal(tokens, expected) and len(tokens[:, 45:].unique()) > 10
    torch.testing.assert_close(logits, expected_logits, **LOGITS)
    if cache == "static":
        stock, stock_logits = generate(model, prompts)
        assert torch.equal(tokens, stock)
        torch.testing.assert_close(logits, stock_logits, **LOGITS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", WEIGHTS)
@torch.no_grad()
def test_in_16_bits_logits_are_as_near_as_stocks_other_cache(weights, dtype):
    """One forward over a cached prompt: our distance from float32 is bounded by twice that of stock."""
    model, ids = quantized(weights, dtype), prompt(40)["input_ids"]
    exact = spelled_out(quantized(weights))(ids).logits[:, 32:]

    def error(cache) -> torch.Tensor:
        model(ids[:, :32], past_key_values=cache)
        return (model(ids[:, 32:], past_key_values=cache).logits - exact).abs().mean()

    stock = error(DynamicCache(config=model.config))
    with hf_kvattn.enabled(model):
        assert 0 < error(StaticKVCache(model.config)) < 2 * stock


@pytest.mark.parametrize(("weights", "cache"), [("int8", "static"), ("int8", "int4"), ("int4", "static")])
def test_compiled_steps_give_the_uncompiled_tokens(weights, cache):
    model, prompts = quantized(weights), prompt(40)
    with hf_kvattn.enabled(model):
        expected, logits = generate(model, prompts, 8, past_key_values=CACHES[cache](model.config))
    with hf_kvattn.enabled(model, compile=True):
        tokens, our_logits = generate(model, prompts, 8, past_key_values=CACHES[cache](model.config))
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(our_logits, logits, **LOGITS)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_from_pretrained_quantizes_as_transformers_documents_it(weights, tmp_path):
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path)
    module, config, arguments = inputs.WEIGHTS[weights]
    make = getattr(importlib.import_module(module), config)
    asked = TorchAoConfig(make(set_inductor_config=False, **arguments))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked, dtype=torch.float32)
    assert type(model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    expected, _ = generate(model, prompt(40))
    for cache in ("static", "int8"):
        with hf_kvattn.enabled(model, cache):
            tokens, _ = generate(model, prompt(40))
        assert cache != "static" or torch.equal(tokens, expected)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="no weights of int4 of model.layers.0.self_attn.q_proj"):
        quantized("int4", hidden_size=80, num_attention_heads=5, num_key_value_heads=5)
    with pytest.raises(ValueError, match="int4 are for CPUs here, the model is on meta"):
        inputs.quantize_weights(tiny_model().to("meta"), "int4")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_throughput_measures_stock_and_ours_on_quantized_weights(weights, tmp_path, capsys):
    folder = save_with_tokenizer(tiny_model(), tmp_path / "tiny")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    small = ["--contexts", 24, "--batch-sizes", 1, "--new-tokens", 8, "--rounds", 2, "--variants", "kvattn-static"]
    common = ["--model", folder, "--dtype", "float32", "--text", tmp_path / "text.txt", "--json"]
    assert run("throughput", *common, *small, "--weights", weights, "--out", tmp_path / "out") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["conditions"]["weights"] == weights and found["conditions"]["dtype"] == "float32"
    assert [row["tokens"]["verdict"] for row in found["cells"][0]["rows"]] == ["same", "same"]
    assert f"weights: `{weights}`" in (tmp_path / "out/report.md").read_text()


def test_doctor_measures_weights_of_8_bits():
    sizes = {"outputs": 64, "inputs": 32, "matrices": 2, "prompt_tokens": 4}
    rows = doctor.measure(compiled=False, seconds=0.01, read_bytes=1 << 16, **sizes)["products"]
    assert [row["weights"] for row in rows] == [*doctor.EXACT, doctor.INT8]
    assert rows[-1]["bytes_s"] == pytest.approx(rows[-1]["weights_s"])
