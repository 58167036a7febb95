"""`torch.autocast`: keys are fp32 from the rotary embedding, values bfloat16. A cache holds what SDPA would get."""

import pytest
import torch
from cache_table import ALL, EXACT, contents, same, tokens
from models import generate, prompt, tiny_config, tiny_model
from transformers import CompileConfig

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.attention import LayerHandle, kvattn_attention


def under_autocast(model, inputs, dtype=torch.bfloat16, **kwargs):
    with torch.autocast("cpu", dtype):
        return generate(model, inputs, 40, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_caches_give_the_tokens_of_the_dynamic_cache(family, dtype):
    model, inputs = tiny_model(family), prompt(21, left_padding=4)
    expected, logits = under_autocast(model, inputs, dtype)
    assert not torch.equal(logits, generate(model, inputs, 40)[1]), "autocast does something"
    for kind, make in EXACT.items():
        with hf_kvattn.enabled(model):
            cache = make(model.config)
            ids, ours = under_autocast(model, inputs, dtype, past_key_values=cache)
        assert {layer.dtype for layer in cache.layers} == {dtype}
        assert torch.equal(ids[:, :41], expected[:, :41])
        torch.testing.assert_close(ours[:, :20], logits[:, :20], rtol=0, atol=0.2 if dtype == torch.bfloat16 else 0.02)
        if "static" in kind:  # not enabled, the cache's dense tensors go where the other cache's do
            ids, ours = under_autocast(model, inputs, dtype, past_key_values=make(model.config))
            assert torch.equal(ids, expected) and torch.equal(ours, logits)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "native"])
@pytest.mark.parametrize("kind", ALL)
def test_a_cache_works_as_without_autocast_on_tensors_in_its_dtype(kind, backend):
    """Bit for bit: neither quantization nor attention is computed under autocast."""
    if kind == "fp8" and backend == "native":
        pytest.skip("native does not read fp8")
    config, module = tiny_config(num_hidden_layers=1), torch.nn.Module()
    q, (k, v) = torch.randn(2, 4, 70, 16).bfloat16(), (t.bfloat16() for t in tokens(70)[0])
    found = []
    with hf_kvattn.backend(backend), torch.no_grad():
        for on in (False, True):
            enabled, plain = ALL[kind](config), ALL[kind](config)
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                new = (k.float(), v) if on else (k, v)
                results = list(plain.update(*new, 0))
                for count in (69, 1):  # a prompt, a step
                    part = slice(69, None) if count == 1 else slice(0, 69)
                    handle = LayerHandle(enabled, 0)
                    handed = handle.update(*(t[:, :, part] for t in new), 0)
                    query = q[:, :, part].float() if on else q[:, :, part]
                    results.append(kvattn_attention(module, query, *handed, None, kv_handle=handle)[0])
            results += [*plain.layers[0].filled().values(), *enabled.layers[0].filled().values()]
            found.append(results)
    assert same(*found) and found[0][0].dtype == torch.bfloat16


def test_float64_stays_as_autocast_leaves_it():
    q = torch.randn(1, 4, 3, 16, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = kvattn_attention(torch.nn.Module(), q, q, q, None)
        stock = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
    assert ours.dtype == stock.dtype == torch.float64
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("kind", ["static", "int8"])
def test_entering_or_leaving_autocast_with_a_filled_cache_is_refused(kind):
    for enabled in (True, False):
        model, ids = tiny_model(), prompt(40)["input_ids"]
        if enabled:
            hf_kvattn.enable(model)
        for first, dtypes in (
            (True, "bfloat16 on cpu, got torch.float32"),
            (False, "float32 on cpu, got torch.bfloat16"),
        ):
            cache = ALL[kind](model.config)
            with torch.no_grad():
                with torch.autocast("cpu", torch.bfloat16, enabled=first):
                    model(ids[:, :39], past_key_values=cache)
                before = contents(cache)
                with torch.autocast("cpu", torch.bfloat16, enabled=not first), pytest.raises(ValueError, match=dtypes):
                    model(ids[:, 39:], past_key_values=cache)
            assert [layer.seen for layer in cache.layers] == [39] * 3 and same(contents(cache), before)


def test_compiled_steps_and_a_dense_mask():
    """A float mask of one's own comes in fp32."""
    model, inputs = tiny_model(), prompt(21)
    expected, logits = under_autocast(model, inputs)
    with hf_kvattn.enabled(model, cache="static", compile=True):
        compile_config = CompileConfig(fullgraph=True, mode=None, backend="eager")
        ids, ours = under_autocast(model, inputs, compile_config=compile_config)
        torch._dynamo.reset()
        assert torch.equal(ids[:, :41], expected[:, :41])
        torch.testing.assert_close(ours[:, :20], logits[:, :20], rtol=0, atol=0.2)
        mask = torch.zeros(2, 1, 21, 21).masked_fill(torch.ones(21, 21).triu(1).bool(), torch.finfo(torch.float32).min)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours = model(inputs["input_ids"], attention_mask=mask, past_key_values=StaticKVCache(model.config)).logits
        torch.testing.assert_close(ours[:, -1].float(), logits[:, 0], rtol=0, atol=0.2)
