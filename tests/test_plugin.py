"""enable and disable: per model, exact, and right for everything that is not one of our caches."""

import copy

import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model
from transformers import (
    AttentionInterface,
    DeepseekV3Config,
    DynamicCache,
    Gemma3nTextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.attention import kvattn_attention
from hf_kvattn.caches.static_layer import KVStaticLayer


def snapshot(model) -> dict:
    """All that enable may touch."""
    return {
        "implementation": model.config._attn_implementation,
        "configs": [id(m.config) for m in model.modules() if hasattr(m, "config")],
        "hooks": [len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "generate": model.generate.__func__,
        "config": model.config.to_dict(),
        "generation_config": (id(model.generation_config), model.generation_config.to_dict()),
    }


@pytest.mark.parametrize("cache", [None, "static", StaticKVCache])
def test_disable_restores_the_model_exactly(cache):
    model = tiny_model()
    before = snapshot(model)
    assert hf_kvattn.enable(model, cache=cache) is model and hf_kvattn.is_enabled(model)
    assert model.config._attn_implementation == "kvattn" and snapshot(model) != before
    assert hf_kvattn.disable(model) is model and not hf_kvattn.is_enabled(model)
    assert snapshot(model) == before
    hf_kvattn.disable(model)
    assert snapshot(model) == before


def test_disable_restores_a_generate_that_the_user_had_set():
    model = tiny_model()
    mine = lambda *args, **kwargs: "mine"  # noqa: E731  # an instance attribute, as a monkeypatch leaves it
    model.generate = mine
    with hf_kvattn.enabled(model, cache="static"):
        assert model.generate is not mine
    assert model.generate is mine


def test_enable_is_idempotent_and_takes_new_arguments():
    model = tiny_model()
    before = snapshot(model)
    hf_kvattn.enable(model)
    once = snapshot(model)
    hf_kvattn.enable(model)
    assert snapshot(model) == once
    hf_kvattn.enable(model, cache="static")
    assert "generate" in model.__dict__
    hf_kvattn.enable(model)
    assert "generate" not in model.__dict__
    assert sum(snapshot(model)["hooks"]) == 3 + 1  # each attention module, and the decoder for its positions
    hf_kvattn.disable(model)
    assert snapshot(model) == before


def test_enabled_nests_and_survives_an_exception():
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(KeyError), hf_kvattn.enabled(model, cache="static"):
        with hf_kvattn.enabled(model):
            assert "generate" not in model.__dict__
        assert "generate" in model.__dict__
        raise KeyError
    assert snapshot(model) == before


def test_two_models_built_from_one_config_object_do_not_disturb_each_other():
    config = tiny_config()
    torch.manual_seed(1)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert one.config is other.config
    expected = [generate(m, prompt()) for m in (one, other)]
    unchanged_prefix = snapshot(other)
    hf_kvattn.enable(one, cache="static")
    assert snapshot(other) == unchanged_prefix and other.config._attn_implementation == "sdpa"
    for model, (tokens, _) in zip((one, other), expected, strict=True):
        assert torch.equal(generate(model, prompt())[0], tokens)
        cache = StaticKVCache(config)
        assert torch.equal(generate(model, prompt(), past_key_values=cache)[0], tokens)
    hf_kvattn.enable(other)
    hf_kvattn.disable(one)
    assert other.config._attn_implementation == "kvattn" and one.config._attn_implementation == "sdpa"
    assert torch.equal(generate(other, prompt(), past_key_values=StaticKVCache(config))[0], expected[1][0])


def test_our_function_without_the_hook_is_right():
    """A model that shares its config with an enabled one by hand, or is set to kvattn by name."""
    model = tiny_model()
    tokens, _ = generate(model, prompt(left_padding=4))
    hf_kvattn.enable(tiny_model())
    model.set_attn_implementation("kvattn")
    for cache in (None, DynamicCache(config=model.config), StaticKVCache(model.config)):
        assert torch.equal(generate(model, prompt(left_padding=4), past_key_values=cache)[0], tokens)


def test_another_implementation_set_after_enable_gets_dense_tensors():
    model = tiny_model()
    tokens, _ = generate(model, prompt(left_padding=4))
    hf_kvattn.enable(model)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = StaticKVCache(model.config)
        assert torch.equal(generate(model, prompt(left_padding=4), past_key_values=cache)[0], tokens)


def test_the_hook_really_spares_the_gathering(monkeypatch):
    """An enabled model never asks the cache for its dense tensors through update()."""
    model = tiny_model()

    def refuse(*args, **kwargs):
        raise AssertionError("update() was called on the layer")

    monkeypatch.setattr(KVStaticLayer, "update", refuse)
    with hf_kvattn.enabled(model):
        generate(model, prompt(), past_key_values=StaticKVCache(model.config))
    with pytest.raises(AssertionError, match="update"):
        generate(model, prompt(), past_key_values=StaticKVCache(model.config))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_training_forward_and_gradients_equal_stock(padding):
    model = tiny_model(attention_dropout=0.0).train()
    inputs = prompt(left_padding=5 if padding == "left" else 0)
    if padding == "right":
        inputs = {k: v.flip(1) for k, v in prompt(left_padding=5).items()}

    def losses_and_gradients():
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, gradients = losses_and_gradients()
    with hf_kvattn.enabled(model):
        our_loss, our_gradients = losses_and_gradients()
    torch.testing.assert_close(our_loss, loss)
    for ours, stock in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)


def test_dropout_is_honoured_in_training():
    model = tiny_model(attention_dropout=0.9).train()
    with hf_kvattn.enabled(model), torch.no_grad():
        first, second = (model(**prompt()).logits for _ in range(2))
        assert not torch.allclose(first, second)
        model.eval()
        assert torch.equal(model(**prompt()).logits, model(**prompt()).logits)


def test_packed_sequences_and_custom_masks():
    model = tiny_model()
    ids = prompt(12)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]).expand(2, -1)  # three sequences in one row
    custom = torch.rand(2, 1, 12, 12) > 0.3
    custom |= torch.eye(12, dtype=torch.bool)
    additive = torch.zeros(2, 1, 12, 12).masked_fill(~custom, torch.finfo(torch.float32).min)
    for kwargs in ({"position_ids": positions}, {"attention_mask": custom}, {"attention_mask": additive}):
        with torch.no_grad():
            expected = model(ids, use_cache=False, **kwargs).logits
            with hf_kvattn.enabled(model):
                torch.testing.assert_close(model(ids, use_cache=False, **kwargs).logits, expected, rtol=1e-4, atol=1e-4)


def test_generate_without_a_cache_gets_a_fresh_one_each_time():
    model, made = tiny_model(), []

    def make(config):
        made.append(StaticKVCache(config))
        return made[-1]

    tokens, _ = generate(model, prompt())
    with hf_kvattn.enabled(model, cache=make):
        for _ in range(2):
            assert torch.equal(generate(model, prompt())[0], tokens)
        assert len(made) == 2 and all(c.get_seq_length() == 13 + 23 for c in made)
        generate(model, prompt(), past_key_values=DynamicCache(config=model.config))
        generate(model, prompt(), use_cache=False)
        generate(model, prompt(), cache_implementation="static")
        assert len(made) == 2, "a cache that the caller chose is not replaced"


def test_a_deep_copy_of_an_enabled_model_is_its_own():
    model = hf_kvattn.enable(tiny_model(), cache="static")
    clone = copy.deepcopy(model)
    assert clone.generate.__self__ is clone
    hf_kvattn.disable(clone)
    assert hf_kvattn.is_enabled(model) and clone.config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, prompt())[0], generate(clone, prompt())[0])


def refused(config_or_model, message):
    with pytest.raises(ValueError, match=message):
        if hasattr(config_or_model, "modules"):
            hf_kvattn.enable(config_or_model)
        else:
            StaticKVCache(config_or_model)


def test_unsupported_models_say_why():
    t5 = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    refused(T5ForConditionalGeneration(t5), "t5: encoder-decoder")
    refused(t5, "t5: encoder-decoder")
    refused(DeepseekV3Config(), r"deepseek_v3: multi-head latent attention \(kv_lora_rank=512\)")
    refused(Gemma3nTextConfig(), "gemma3n_text: layers that share another layer's KV cache")
    mamba = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)
    refused(MambaForCausalLM(mamba), "mamba")
    with pytest.raises(ValueError, match="takes a transformers PreTrainedModel, got Linear"):
        hf_kvattn.enable(torch.nn.Linear(2, 2))


def test_bad_arguments():
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="unknown cache 'int5'; known: static, int8, fp8, k8v4, int4, int3, int2, or"):
        hf_kvattn.enable(model, cache="int5")
    with pytest.raises(ValueError, match="compile must be True or False, got 'yes'"):
        hf_kvattn.enable(model, compile="yes")
    assert snapshot(model) == before


def test_a_cache_of_another_models_shape_is_refused_and_unharmed():
    model = hf_kvattn.enable(tiny_model())
    for changes, message in (
        ({"num_hidden_layers": 5}, "the cache has 5 layers, the model 3"),
        ({"num_key_value_heads": 1}, "made for 1 KV heads of 16, got 2 of 16"),
        ({"head_dim": 8}, "made for 2 KV heads of 8, got 2 of 16"),
    ):
        cache = StaticKVCache(tiny_config(**changes))
        with pytest.raises(ValueError, match=message):
            generate(model, prompt(), past_key_values=cache)
        assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_arguments_that_would_change_the_result_are_refused():
    module = hf_kvattn.enable(tiny_model()).model.layers[0].self_attn
    function = AttentionInterface()["kvattn"]
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16)
    for name in ("position_bias", "cache"):
        with pytest.raises(ValueError, match=name):
            function(module, q, k, k, None, **{name: torch.ones(4)})
    with pytest.raises(ValueError, match="output_attentions"):
        function(module, q, k, k, None, output_attentions=True)
    with pytest.raises(ValueError, match=r"mask is \(1, 1, 3, 9\) .*, not \(1, 1, 3, 5\)"):
        function(module, q, k, k, torch.ones(1, 1, 3, 9, dtype=torch.bool))


def test_unknown_keywords_are_refused_and_harmless_ones_ignored():
    module, q, k = torch.nn.Module(), torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16)
    expected, weights = kvattn_attention(module, q, k, k, None)
    harmless = {"position_ids": torch.arange(3)[None], "use_cache": True, "output_attentions": False, "indices": None}
    assert torch.equal(kvattn_attention(module, q, k, k, None, **harmless)[0], expected) and weights is None
    for name in ("position_bias", "block_table", "cache", "head_mask", "indices", "block_indices", "sinks", "anything"):
        with pytest.raises(ValueError, match=f"does not serve '{name}'"):
            kvattn_attention(module, q, k, k, None, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match="output_attentions needs 'eager'"):
        kvattn_attention(module, q, k, k, None, output_attentions=True)
