"""enable and disable: per model, exact, and right for everything that is not one of our caches."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models import generate, prompt, tiny_config, tiny_model
from transformers import (
    AttentionInterface,
    CompileConfig,
    DynamicCache,
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
        "configs": [m.config is model.config for m in model.modules() if hasattr(m, "config")],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "generate": getattr(model.generate, "__func__", None),
        "config": model.config.to_dict(),
        "generation_config": (id(model.generation_config), model.generation_config.to_dict()),
    }


def default_cache(model):
    """The kind of cache that `generate()` gets without being given one."""
    out = model.generate(**prompt(), max_new_tokens=2, return_dict_in_generate=True)
    return out.past_key_values


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
    assert isinstance(default_cache(model), StaticKVCache)
    hf_kvattn.enable(model)
    assert isinstance(default_cache(model), DynamicCache)
    assert snapshot(model) == once
    hf_kvattn.disable(model)
    assert snapshot(model) == before


def test_enabled_nests_and_survives_an_exception():
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(KeyError), hf_kvattn.enabled(model, cache="static"):
        with hf_kvattn.enabled(model):
            assert isinstance(default_cache(model), DynamicCache)
        assert isinstance(default_cache(model), StaticKVCache)
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
    assert clone.generate.args == (clone,)
    hf_kvattn.disable(clone)
    assert hf_kvattn.is_enabled(model) and clone.config._attn_implementation == "sdpa"
    assert torch.equal(generate(model, prompt())[0], generate(clone, prompt())[0])


def test_edits_of_the_config_survive_and_the_shared_config_is_left_alone(tmp_path):
    config = tiny_config()
    model, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config)
    hf_kvattn.enable(model)
    model.resize_token_embeddings(140)
    hf_kvattn.enable(model, cache="static")
    model.config.rms_norm_eps = 1e-3
    with hf_kvattn.enabled(model, cache="int8"):
        model.config.tie_word_embeddings = True
    assert hf_kvattn.is_enabled(model) and isinstance(default_cache(model), StaticKVCache)
    hf_kvattn.disable(model)
    with hf_kvattn.enabled(model):
        model.config.tie_word_embeddings = False
    assert (model.config.vocab_size, model.config.rms_norm_eps, model.config.tie_word_embeddings) == (140, 1e-3, False)
    assert model.config is model.model.config and model.config._attn_implementation == "sdpa"
    assert other.config is config and (config.vocab_size, config._attn_implementation) == (128, "sdpa")
    model.save_pretrained(tmp_path)
    assert LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (140, 64)


def test_an_implementation_set_by_hand_is_noticed():
    model = hf_kvattn.enable(tiny_model())
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert not hf_kvattn.is_enabled(model)
        hf_kvattn.enable(model)  # with the same arguments
        assert hf_kvattn.is_enabled(model) and model.config._attn_implementation == "kvattn"
        assert {len(m._forward_pre_hooks) for m in model.modules()} == {0, 1}
        hf_kvattn.disable(model)
        assert model.config._attn_implementation == implementation
        hf_kvattn.enable(model)
    model.set_attn_implementation("sdpa")
    hf_kvattn.disable(model)
    assert model.config._attn_implementation == "sdpa", "what the user set stays"


PICKLED = """
import sys
{imports}
import torch
model, inputs, expected = torch.load(sys.argv[1], weights_only=False)
import hf_kvattn
assert hf_kvattn.is_enabled(model)
def tokens():
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    return type(out.past_key_values).__name__, out.sequences
for kind in ("{cache}", "{cache}"):
    found, ids = tokens()
    assert found == kind and torch.equal(ids, expected)
hf_kvattn.disable(model)
assert model.config._attn_implementation == "sdpa"
found, ids = tokens()
assert found == "DynamicCache" and torch.equal(ids, expected)
"""


@pytest.mark.parametrize("imports", ["", "import hf_kvattn", "import transformers"])
@pytest.mark.parametrize(
    ("arguments", "cache"),
    [
        ({}, "DynamicCache"),
        ({"cache": "static"}, "StaticKVCache"),
        ({"cache": StaticKVCache, "compile": True}, "StaticKVCache"),
    ],
)
def test_an_enabled_model_is_loaded_in_another_process(arguments, cache, imports, tmp_path):
    model, inputs = hf_kvattn.enable(tiny_model(), **arguments), prompt(left_padding=3)
    if "compile" in arguments:
        backend = CompileConfig(fullgraph=True, mode=None, backend="eager")
        model.generation_config.compile_config = backend
        model.get_compiled_call(backend)  # which cannot be pickled
    expected, _ = generate(model, inputs, 12)
    torch.save((model, inputs, expected), tmp_path / "model.pt")
    code = PICKLED.format(imports=imports, cache=cache)
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for clone in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert clone.config is not model.config and torch.equal(generate(clone, inputs, 12)[0], expected)
        hf_kvattn.disable(clone)
        assert hf_kvattn.is_enabled(model)


def run_in_a_process(model, inputs, results):
    results.put(generate(model, inputs, 12)[0].tolist())


def test_an_enabled_model_is_an_argument_of_a_spawned_process():
    model, context = hf_kvattn.enable(tiny_model(), cache="int8"), torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=run_in_a_process, args=(model, prompt(), results))
    process.start()
    assert results.get(timeout=120) == generate(model, prompt(), 12)[0].tolist()
    process.join()


BY_NAME = """
import sys
import hf_kvattn, torch
from transformers import AutoModelForCausalLM
stock, named = (AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation=n) for n in ("sdpa", "kvattn"))
set_later = AutoModelForCausalLM.from_pretrained(sys.argv[1])
set_later.set_attn_implementation("kvattn")
ids = torch.arange(3, 63).reshape(2, 30)
mask = torch.ones_like(ids)
mask[0, :5] = 0
expected = stock.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
for model in (named, set_later):
    assert model.config._attn_implementation == "kvattn" and not hf_kvattn.is_enabled(model)
    sliding = hf_kvattn.SlidingWindowKVCache(model.config, window=64)
    for cache in (None, hf_kvattn.StaticKVCache(model.config), sliding):
        out = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, past_key_values=cache)
        assert torch.equal(out, expected)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(got, stock(ids).logits, rtol=1e-4, atol=1e-4)
    hf_kvattn.enable(model, cache="static")
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False), expected)
    assert hf_kvattn.disable(model).config._attn_implementation == "kvattn"
"""


def test_kvattn_by_name_works_after_the_import(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    run = subprocess.run([sys.executable, "-c", BY_NAME, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class Wrapped(torch.nn.Module):
    """What a peft model is, as far as it matters here."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


def test_a_peft_model_is_enabled_through_its_base_model():
    base = tiny_model()
    expected, before = generate(base, prompt())[0], snapshot(base)
    model = Wrapped(base)
    assert hf_kvattn.enable(model, cache="static") is model
    assert hf_kvattn.is_enabled(model) and hf_kvattn.is_enabled(base)
    assert isinstance(default_cache(model), StaticKVCache)
    assert torch.equal(generate(model, prompt())[0], expected)
    with hf_kvattn.enabled(model) as inner:
        assert inner is model and isinstance(default_cache(model), DynamicCache)
    assert isinstance(default_cache(model), StaticKVCache)
    assert hf_kvattn.disable(model) is model
    assert not hf_kvattn.is_enabled(model) and snapshot(base) == before


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
    mamba = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32)
    refused(MambaForCausalLM(mamba), "mamba: its layers, .* store no keys and values")
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
