"""What `generate()` of an enabled model makes of its arguments: the cache it takes, and the prompts it refuses."""

import logging

import pytest
import torch
from models import generate, prompt, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache

import hf_kvattn
from hf_kvattn import StaticKVCache, generation, hooks

SHORT = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


@pytest.fixture
def logged(caplog):
    """The lines that are logged, as if none had been before."""
    generation.logger.warning_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="hf_kvattn")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "hf_kvattn"]


def cache_of(model, *args, **kwargs):
    return type(model.generate(*args, **{**prompt(), **SHORT, **kwargs}).past_key_values)


@pytest.mark.parametrize("own_config", [False, True], ids=["default", "own-config"])
@pytest.mark.parametrize("at_model", [None, "hybrid", "static", "dynamic"])
def test_defaults_are_merged_as_transformers_merges_them(at_model, own_config, logged):
    """Gemma's checkpoints say "hybrid", which transformers takes for nothing."""
    model = tiny_model()
    model.generation_config.cache_implementation = at_model
    given = {"generation_config": GenerationConfig(**SHORT)} if own_config else {}
    stock = cache_of(model, **given)
    hf_kvattn.enable(model, cache="static")
    if at_model in (None, "hybrid"):
        assert stock is DynamicCache and cache_of(model, **given) is StaticKVCache and not logged()
    else:
        assert stock is (StaticCache if at_model == "static" else DynamicCache)
        assert cache_of(model, **given) is cache_of(model, **given) is stock
        (line,) = logged()
        assert f"does not use the cache that enable() was given: it runs with cache_implementation='{at_model}'" in line


@pytest.mark.parametrize(
    ("given", "stock", "reason"),
    [
        ({"use_cache": False}, type(None), "use_cache=False"),
        ({"generation_config": GenerationConfig(use_cache=False, **SHORT)}, type(None), "use_cache=False"),
        ({"cache_implementation": "static"}, StaticCache, "cache_implementation='static'"),
        ({"cache_implementation": "hybrid"}, StaticKVCache, None),
        ({"generation_config": GenerationConfig(**SHORT)}, StaticKVCache, None),
        ({"past_key_values": DynamicCache()}, DynamicCache, None),
        ({"past_key_values": None}, StaticKVCache, None),
    ],
)
def test_a_cache_that_is_not_used_is_said_once(given, stock, reason, logged):
    model = hf_kvattn.enable(tiny_model(), cache="static")
    for _ in range(2):
        assert cache_of(model, **given) is stock
        given = given if "past_key_values" not in given else {**given, "past_key_values": None}
        stock = StaticKVCache if "past_key_values" in given else stock
    assert [reason in line for line in logged()] == ([True] if reason else [])


def test_the_configuration_may_be_in_its_place():
    model = hf_kvattn.enable(tiny_model(), cache="static")
    inputs = prompt()
    config = GenerationConfig(**SHORT, cache_implementation="static")
    out = model.generate(inputs["input_ids"], config, attention_mask=inputs["attention_mask"])
    assert isinstance(out.past_key_values, StaticCache) and out.sequences.shape == (2, 16)


@pytest.mark.parametrize("cache", [None, "static"])
def test_prompts_that_do_not_go_on_from_the_cache_are_refused(cache):
    model, ids = hf_kvattn.enable(tiny_model(), cache=cache), prompt(30)["input_ids"]
    held = StaticKVCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=held)
    ones = torch.ones_like
    for given, mask, seen in (
        (ids[:, :20], None, 20),  # as long as what is held
        (ids[:, :12], None, 20),  # a shorter one
        (ids[:, 20:], None, 20),  # new tokens only
        (ids[:, 20:], ones(ids[:, 20:]), 20),
        (ids[:, 20:], ones(ids[:, :29]), 20),
        (ids[:, :25], ones(ids[:, :24]), 20),
        (ids[:, 20:], ones(ids), 0),  # past_key_values forgotten
    ):
        past = {"past_key_values": held} if seen else {}
        total = given.shape[1] if mask is None else mask.shape[1]
        message = rf"got {given.shape[1]} input_ids, a mask over {total}, and past_key_values with {seen} tokens"
        for arguments in ({"input_ids": given}, {"inputs": given}):
            with pytest.raises(ValueError, match=message):
                model.generate(**arguments, attention_mask=mask, **past, **SHORT)
    assert held.get_seq_length() == 20
    expected = model.generate(ids, **SHORT).sequences
    forks = [held.fork() for _ in range(3)]
    assert torch.equal(model.generate(ids, past_key_values=forks[0], **SHORT).sequences, expected)
    assert torch.equal(
        model.generate(ids, past_key_values=forks[1], attention_mask=ones(ids), **SHORT).sequences, expected
    )
    new_only = model.generate(ids[:, 20:], past_key_values=forks[2], attention_mask=ones(ids), **SHORT).sequences
    assert torch.equal(new_only[:, 10:], expected[:, 30:])


def test_embeddings_and_the_caches_own_check(monkeypatch):
    model, inputs = hf_kvattn.enable(tiny_model()), prompt(20)
    ids, asked = inputs["input_ids"], []
    monkeypatch.setattr(StaticKVCache, "check_prompt", lambda cache, given: asked.append(given), raising=False)
    held = StaticKVCache(model.config)
    embeddings = model.get_input_embeddings()(ids)
    by_embeddings = model.generate(inputs_embeds=embeddings, past_key_values=held, **SHORT).sequences
    assert not asked
    expected = model.generate(ids, past_key_values=StaticKVCache(model.config), **SHORT).sequences
    assert torch.equal(by_embeddings, expected[:, 20:]) and len(asked) == 1 and asked[0] is ids
    model.generate(inputs=expected, past_key_values=held, **SHORT)
    assert len(asked) == 2 and asked[1] is expected


def test_a_cache_that_knows_another_prompt_is_asked_before_anything_happens(monkeypatch):
    def refuse(cache, given):
        raise ValueError("another prompt")

    monkeypatch.setattr(StaticKVCache, "check_prompt", refuse, raising=False)
    model, held = hf_kvattn.enable(tiny_model()), StaticKVCache(tiny_model().config)
    with pytest.raises(ValueError, match="another prompt"):
        model.generate(prompt()["input_ids"], past_key_values=held, **SHORT)
    assert held.get_seq_length() == 0


def test_a_long_forward_beside_a_quantized_cache_is_noted_once(logged):
    model, ids = hf_kvattn.enable(tiny_model(), cache="int4"), prompt(hooks.LONG_FORWARD + 1)["input_ids"]
    with torch.no_grad():
        model(ids[:, 1:])  # not long
        model(ids, past_key_values=StaticKVCache(model.config))
        model.generate(ids, max_new_tokens=2)
    model(ids).logits.sum().backward()  # training
    for cache in ("static", None):  # not quantized
        with hf_kvattn.enabled(model, cache=cache), torch.no_grad():
            model(ids)
    assert not logged()
    with torch.no_grad():
        for _ in range(2):
            model(ids)
            model.model(inputs_embeds=model.get_input_embeddings()(ids))
    (line,) = logged()
    assert "a forward of more than 64 tokens without past_key_values" in line
    hf_kvattn.disable(model)
    generation.logger.warning_once.cache_clear()
    with torch.no_grad():
        model(ids)
    assert len(logged()) == 1


def test_compile_config_is_merged_too(monkeypatch):
    """That of the model's defaults counts where the caller gives a configuration without one."""
    taken, model = [], tiny_model()
    checked = generation.checked_config
    monkeypatch.setattr(
        generation, "checked_config", lambda config, *rest: taken.append(config) or checked(config, *rest)
    )
    from transformers import CompileConfig

    mine, theirs = (CompileConfig(fullgraph=True, mode=None, backend="eager", dynamic=d) for d in (True, False))
    model.generation_config.compile_config = theirs
    hf_kvattn.enable(model, cache="static", compile=True)
    for given in ({}, {"generation_config": GenerationConfig(**SHORT)}, {"compile_config": mine}):
        model.generate(**prompt(), **{**SHORT, **given})
        torch._dynamo.reset()
    assert [config.dynamic for config in taken] == [False, False, True]
    tokens, _ = generate(hf_kvattn.disable(model), prompt(), 3)
    assert tokens.shape == (2, 16)
