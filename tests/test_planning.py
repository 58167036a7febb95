"""`plan`: the bytes it says against those that caches really allocate, and its answers against each other."""

import functools
import json
import re
import sys

import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import planning
from hf_kvattn.caches.first_tokens import WARM_UP
from hf_kvattn.caches.registry import CACHES, COMPLETE
from hf_kvattn.planning import Plan, cache_bytes, model_bytes
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.tools import commands as command_line

BIG = {"num_hidden_layers": 2, "hidden_size": 128}  # heads of 32: groups of 32 divide them
MODELS = {
    "llama": tiny_config(**BIG),
    "llama-d64": tiny_config("qwen3", **{**BIG, "head_dim": 64}),
    "mha": tiny_config("llama-mha", **BIG, head_dim=96),
    "mistral": tiny_config("mistral", **BIG),
    "gemma2": tiny_config("gemma2", **{**BIG, "head_dim": 32}),
    "mostly-sliding": tiny_config("gemma3", **{**BIG, "num_hidden_layers": 7, "head_dim": 32}),
}


def real_cache(name: str, config, batch: int, dtype: torch.dtype, context: int, chunks: list[int]):
    """The cache of that name on the CPU, filled to the last token in these chunks."""
    cache = CACHES[name](config, max_cache_len=context)
    heads, dim = config.num_key_value_heads, config.head_dim
    for count in chunks:
        for layer in range(config.num_hidden_layers):
            cache.update(
                torch.randn(batch, heads, count, dim).to(dtype), torch.randn(batch, heads, count, dim).to(dtype), layer
            )
    assert cache.get_seq_length() == context
    return cache


@pytest.mark.parametrize("shape", [(1, 1, [1]), (3, 36, [36]), (2, 37, [5, 32]), (1, 300, [260, 1, 1, 38])], ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", COMPLETE)
def test_bytes_are_those_that_the_cache_allocates(name, model, shape):
    batch, context, chunks = shape
    for dtype in (torch.bfloat16, torch.float32):
        cache = real_cache(name, MODELS[model], batch, dtype, context, chunks)
        more = 0
        for layer in cache.kv_layers:
            least = layer.settings.exact_first if layer.wants_queries else 0
            if layer.wants_queries and context > least + BLOCK:  # a table is chosen when there are WARM_UP tokens
                assert layer.stored == context < least + WARM_UP
                more += 2 * batch * layer.kv_heads * (WARM_UP - BLOCK) * layer.head_dim * dtype.itemsize
        assert cache_bytes(CACHES[name], MODELS[model], batch, dtype, context) == cache.nbytes - more


def test_bytes_of_generate_with_an_enabled_model():
    model = tiny_model(**BIG)
    for make in map(CACHES.get, COMPLETE):
        cache = make(model.config, max_cache_len=13 + 60)
        with hf_kvattn.enabled(model):
            generate(model, prompt(), new_tokens=60, past_key_values=cache)
        assert cache.nbytes == cache_bytes(make, model.config, 2, torch.float32, 73)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_of_the_model(tied):
    model = tiny_model("qwen2", tie_word_embeddings=tied)
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}.values()
    real = sum(t.untyped_storage().nbytes() for t in tensors)
    assert model_bytes(model.config, torch.float32) == real
    half = model_bytes(model.config, torch.bfloat16)
    assert real / 2 <= half <= real / 2 + 256, "only the rotary frequencies stay in float32"


@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_the_longest_context_is_the_last_that_fits(model):
    config, budget = MODELS[model], 20_000_000
    result = hf_kvattn.plan(config, 3, 100, torch.float16, budget)
    left = budget - result.weights_bytes
    for name, row in result.rows.items():
        size = functools.partial(cache_bytes, CACHES[name], config, 3, torch.float16)
        assert size(row.longest_context) <= left < size(row.longest_context + 1)
        assert row.cache_bytes == size(100) and row.fits
    sizes = [row.longest_context for row in result.rows.values()]
    assert sizes == sorted(sizes), "from static to int2 more and more tokens fit"


def test_a_model_of_windows_alone_has_no_longest_context():
    result = asked(MODELS["mistral"])
    assert {row.longest_context for row in result.rows.values()} == {planning.LONGEST}
    assert result.rows["static"].cache_bytes == asked(MODELS["mistral"], context=10**6).rows["static"].cache_bytes


def test_the_choice_is_the_most_exact_that_fits():
    config = MODELS["llama"]
    longest = {n: r.longest_context for n, r in asked(config, context=1).rows.items()}
    assert asked(config, context=longest["static"]).choice == "static"
    assert longest["int8"] == longest["fp8"], "of equal size, so the one that keeps more is taken"
    for better in (name for name in COMPLETE if longest[name] < longest["int2"]):
        next_one = next(name for name in COMPLETE if longest[name] > longest[better])
        assert asked(config, context=longest[better] + 1).choice == next_one
    nothing = asked(config, context=longest["int2"] + 1)
    assert nothing.choice is None and "nothing here fits" in str(nothing)
    without_weights = asked(config, weights_bytes=10**9)
    assert {row.longest_context for row in without_weights.rows.values()} == {0} and without_weights.choice is None
    assert asked(config, weights_bytes=0).weights_bytes == 0
    assert f"{planning.LONGEST:,}+" in str(asked(config, gpu_bytes=1 << 50))


def asked(config, batch=1, context=1000, dtype=torch.bfloat16, gpu_bytes=10_000_000, **more) -> Plan:
    return hf_kvattn.plan(config, batch, context, dtype, gpu_bytes, **more)


def test_a_cache_that_the_model_cannot_have_says_why():
    result = asked(tiny_config(head_dim=24))
    assert result.rows["int4"].reason == "group_size=16 does not divide head_dim=24"
    assert result.rows["int4"].cache_bytes is None and not result.rows["int4"].fits
    assert result.rows["static"].fits and "does not divide" in str(result)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 0}, "batch must be an int of at least 1, got 0"),
        ({"context": 2.5}, "context must be .* got 2.5"),
        ({"gpu_bytes": -1}, "gpu_bytes must be .* got -1"),
        ({"dtype": torch.int8}, "dtype must be a floating one, got torch.int8"),
        ({"weights_bytes": -1}, "weights_bytes must be .* got -1"),
    ],
)
def test_impossible_wishes(wrong, message):
    with pytest.raises(ValueError, match=message):
        asked(MODELS["llama"], **wrong)


def test_what_is_proposed_can_be_enabled():
    model = tiny_model(**BIG)
    for name in asked(model.config).rows:
        hf_kvattn.enable(model, cache=name)
        assert generate(model, prompt(), new_tokens=2)[0].shape == (2, 15)
        hf_kvattn.disable(model)


def test_models_that_cannot_be_planned():
    config = tiny_config()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantized: pass weights_bytes"):
        asked(config)
    assert asked(config, weights_bytes=1000).weights_bytes == 1000
    config = tiny_config()
    config.kv_lora_rank, config.qk_rope_head_dim = 16, 7
    with pytest.raises(ValueError, match=r"latents of \(16, 7\) numbers"):
        asked(config)


def test_the_command_line(tmp_path, capsys):
    MODELS["mistral"].save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path / "config.json"), "--batch", "2", "--context", "5000", "--gpu-gib", "0.01"]
    assert command_line.main([*arguments, "--dtype", "float16", "--json"]) == 0
    text, _, last = capsys.readouterr().out.strip().rpartition("\n")
    result = asked(MODELS["mistral"], 2, 5000, torch.float16, int(0.01 * (1 << 30)))
    assert text == str(result)
    answer = json.loads(last)
    assert (
        answer["rows"]["int4"]["cache_bytes"] == result.rows["int4"].cache_bytes and answer["choice"] == result.choice
    )
    command_line.main([*arguments, "--weights-gib", "0.009"])
    assert "weights 0.01 GiB of 0.01 GiB" in capsys.readouterr().out


def test_the_command_line_ends_with_one_line_on_bad_input(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["hf_kvattn", "plan", str(tmp_path), "--context", "9", "--gpu-gib", "1"])
    assert command_line.main() == 2
    assert re.fullmatch("hf_kvattn: error: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("wrong", [["--gpu-gib", "-1"], ["--gpu-gib", "1", "--batch", "0"], []], ids=str)
def test_arguments_are_checked(wrong, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.main(["plan", "x", "--context", "9", *wrong])
    assert end.value.code == 2 and "error: " in capsys.readouterr().err
