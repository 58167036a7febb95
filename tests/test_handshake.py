"""A module that does more with its new keys, values and masks than to hand them on is refused, not served wrong."""

import functools

import pytest
import torch
from models import SMALL, generate, prompt, tiny_model
from torch._dynamo.exc import TorchDynamoException
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
)

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.compiling.decode_steps import DecodeSteps

CACHES = {
    "static": functools.partial(StaticKVCache, max_cache_len=64),
    "int8": functools.partial(QuantizedKVCache, bits=8, group_size=16),
    "sliding": functools.partial(SlidingWindowKVCache, window=48),
}
# They repeat or split keys and values between `update` and their attention.
CHANGING = {
    "jetmoe": (JetMoeForCausalLM, JetMoeConfig, {"num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 16}),
    "diffllama": (DiffLlamaForCausalLM, DiffLlamaConfig, {}),
}


class Listener:
    """A streamer that keeps what it is handed."""

    def __init__(self):
        self.handed = []

    def put(self, tokens):
        self.handed.append(tokens)

    def end(self):
        pass


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", CHANGING)
def test_models_that_change_keys_and_values_are_refused_in_their_first_forward(family, kind):
    model_class, config_class, extra = CHANGING[family]
    torch.manual_seed(1)
    model = model_class._from_config(config_class(**SMALL | extra), attn_implementation="eager").eval()
    inputs = prompt(batch=1)
    expected, _ = generate(model, inputs, 8)
    cache = CACHES[kind](model.config)
    if kind == "static":  # as the error says
        assert torch.equal(generate(model, inputs, 8, past_key_values=cache)[0], expected)
        cache.reset()
    hf_kvattn.enable(model)
    streamer = Listener()
    with pytest.raises(ValueError, match=r"(JetMoe|DiffLlama)Attention, layer 0: 'kvattn' serves modules that"):
        model.generate(**inputs, past_key_values=cache, streamer=streamer)
    assert len(streamer.handed) == 1, "the prompt, and no token"
    assert [layer.seen for layer in cache.layers] == [0, 0, 0]
    assert torch.equal(generate(model, inputs, 8)[0], expected), "without one of our caches it is served"


class Between:
    """In the place of a handle: the module then deals with its cache as `update` does."""

    def __init__(self, handle, update):
        self.handle, self.how = handle, update

    def update(self, k, v, index):
        return self.how(self.handle, k, v, index)

    def __getattr__(self, name):
        return getattr(self.handle, name)


def stored_twice(handle, k, v, index):
    handle.update(k, v, index)
    return handle.update(k, v, index)


UPDATES = {
    "copied keys": lambda handle, k, v, index: (handle.update(k, v, index)[0].clone(), v),
    "changed values": lambda handle, k, v, index: (handle.update(k, v, index)[0], v * 2),
    "a view of values": lambda handle, k, v, index: (handle.update(k, v, index)[0], v[:]),
    "not stored": lambda handle, k, v, index: (k, v),
    "stored twice": stored_twice,
    "another layer": lambda handle, k, v, index: handle.update(k, v, index + 1),
}


def attends_itself(forward, hidden_states, past_key_values, **kwargs):
    past_key_values.update(*torch.zeros(2, 2, 2, hidden_states.shape[1], 16), 1)
    return hidden_states, None


FORWARDS = {  # of a module whose own is `forward`
    "no handle for its attention": lambda forward, kv_handle=None, **kwargs: forward(**kwargs),
    "an attention of its own": attends_itself,
    "no attention": lambda forward, hidden_states, **kwargs: (hidden_states, None),
    "a mask of its own": lambda forward, attention_mask, **kwargs: forward(
        attention_mask=attention_mask.clone(), **kwargs
    ),
    "attention twice": lambda forward, **kwargs: (forward(**kwargs), forward(**kwargs))[1],
}


def tampered(model, how):
    """Lets the attention module of layer 1 do as `how` says; returns it, and a function that undoes it."""
    module = model.model.layers[1].self_attn
    if how in FORWARDS:
        module.forward = functools.partial(FORWARDS[how], module.forward)
        return lambda: module.__dict__.pop("forward")

    def put_between(module, args, kwargs):
        return args, kwargs | {"past_key_values": Between(kwargs["past_key_values"], UPDATES[how])}

    return module.register_forward_pre_hook(put_between, with_kwargs=True).remove


REFUSED = r"LlamaAttention, layer 1: 'kvattn' serves modules that|layer 1 of the cache was asked to store"


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("how", [*UPDATES, *FORWARDS])
def test_no_token_is_stored_without_its_attention(how, kind):
    model, inputs = hf_kvattn.enable(tiny_model()), prompt(14, left_padding=3)
    expected, _ = generate(model, inputs, 12, past_key_values=CACHES[kind](model.config))
    cache, mask = CACHES[kind](model.config), torch.ones(2, 26, dtype=torch.long)
    mask[:, :14] = inputs["attention_mask"]

    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def forward(start, end):
        new = {"input_ids": expected[:, start:end], "position_ids": positions[:, start:end]}
        model(**new, attention_mask=mask[:, :end], past_key_values=cache)

    with torch.no_grad():
        for start, end in ((0, 13), (13, 14)):  # a prompt, a step
            undo = tampered(model, how)
            with pytest.raises(ValueError, match=REFUSED):
                forward(start, end)
            undo()
            with pytest.raises(ValueError, match=rf"{start} to {end} tokens; crop\({start - end}\)"):
                cache.check_consistent_layers()
            cache.crop(start - end)
            forward(start, end)
    cache.crop(-1)
    assert torch.equal(generate(model, inputs, 12, past_key_values=cache)[0], expected)


@pytest.mark.parametrize("how", [*UPDATES, *FORWARDS])
@pytest.mark.parametrize("handle", ["traced", "steps"])
def test_compiled_steps_are_refused_while_they_are_traced(how, handle):
    torch._dynamo.reset()
    model, inputs = hf_kvattn.enable(tiny_model()), prompt(14)
    cache = StaticKVCache(model.config, max_cache_len=32)
    step = torch.compile(model, fullgraph=True, backend="eager") if handle == "traced" else model
    run = step if handle == "traced" else lambda **kwargs: DecodeSteps(cache).run(step, model, kwargs)
    with torch.no_grad():
        model(inputs["input_ids"][:, :13], past_key_values=cache)
        arguments = {"input_ids": inputs["input_ids"][:, 13:], "past_key_values": cache}
        arguments["attention_mask"] = inputs["attention_mask"]
        undo = tampered(model, how)
        with pytest.raises((ValueError, TorchDynamoException), match=REFUSED):
            run(**arguments)
        assert [layer.seen for layer in cache.layers] == [13, 13, 13]
        undo()
        expected = model(**arguments | {"past_key_values": cache.fork()}).logits
        torch.testing.assert_close(run(**arguments).logits, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KeyError("caught by the module's caller")], ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_an_interrupt_between_update_and_attention_is_repaired_as_any_other(kind, error):
    model, inputs = hf_kvattn.enable(tiny_model()), prompt(14)
    expected, _ = generate(model, inputs, 12, past_key_values=CACHES[kind](model.config))
    cache = CACHES[kind](model.config)

    def interrupted(handle, k, v, index):
        handle.update(k, v, index)
        raise error

    UPDATES["interrupted"] = interrupted
    with torch.no_grad():
        model(inputs["input_ids"][:, :12], past_key_values=cache)
        for repair in (lambda: cache.crop(-1), cache.reset):
            undo = tampered(model, "interrupted")
            with pytest.raises(type(error)):
                model(inputs["input_ids"][:, 12:13], past_key_values=cache)
            undo()
            assert [layer.seen for layer in cache.layers] == [13, 12, 12]
            repair()
            if cache.get_seq_length():
                model(inputs["input_ids"][:, 12:13], past_key_values=cache)
                cache.crop(-1)
    del UPDATES["interrupted"]
    assert torch.equal(generate(model, inputs, 12, past_key_values=cache)[0], expected)
