"""Exceptions and interrupts, anywhere: what they leave in a cache is noticed, and repaired or forgotten."""

import copy
import functools
import itertools
import pickle
import re
import sys

import pytest
import torch
from cache_table import ALL, EXACT, append, contents, forward, same, tokens
from models import prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches.layer import KVLayer

SHORT = {"max_new_tokens": 12, "do_sample": False}


class Stop(Exception):
    pass


def interrupt(model, where: int, error: BaseException, after_the_cache: bool):
    """Raises in the forward of decoder layer `where`, before or after its cache is written, from the second call on."""
    calls = []

    def hook(module, *args):
        calls.append(1)
        if len(calls) > 2:
            raise error

    attention = model.model.layers[where].self_attn
    if after_the_cache:
        return attention.o_proj.register_forward_pre_hook(hook)
    return attention.q_proj.register_forward_pre_hook(hook)


@functools.cache
def uninterrupted(kind: str, enabled: bool) -> torch.Tensor:
    model = hf_kvattn.enable(tiny_model()) if enabled else tiny_model()
    return model.generate(**prompt(33, left_padding=3), **SHORT, past_key_values=ALL[kind](model.config))


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("where", [(0, True), (1, False), (1, True), (2, False), (2, True)], ids=str)
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "not-enabled"])
@pytest.mark.parametrize("kind", ALL)
def test_an_interrupted_forward_is_noticed_and_repaired_by_crop(kind, enabled, where, error):
    model, inputs = tiny_model(), prompt(33, left_padding=3)
    if enabled:
        hf_kvattn.enable(model)
    expected = uninterrupted(kind, enabled)
    cache = ALL[kind](model.config)
    handle = interrupt(model, where[0], error, where[1])
    with pytest.raises(type(error)):
        model.generate(**inputs, **SHORT, past_key_values=cache)
    handle.remove()
    lengths = [layer.seen for layer in cache.layers]
    assert lengths == [35] * (where[0] + where[1]) + [34] * (3 - where[0] - where[1])  # the third forward
    if min(lengths) != max(lengths):
        for use in (
            lambda: model.generate(expected, max_new_tokens=2, past_key_values=cache),
            lambda: cache.crop(0),
            cache.fork,
            lambda: cache.reorder_cache(torch.tensor([1, 0])),
        ):
            with pytest.raises(ValueError, match=r"34 to 35 tokens; crop\(-1\) goes back|crop takes .* to -1, got 0"):
                use()
        assert [layer.seen for layer in cache.layers] == lengths
    cache.crop(-1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
    again = model.generate(
        expected[:, :35], attention_mask=mask, **SHORT | {"max_new_tokens": 10}, past_key_values=cache
    )
    assert torch.equal(again, expected)


def interrupt_at_line(number: int, function) -> int:
    """Calls `function`, with a KeyboardInterrupt before the `number`-th line of the caches' code; the lines run."""
    lines = itertools.count(1)

    def trace(frame, event, argument):
        if "/hf_kvattn/caches/" not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == number:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return next(lines) - 1


APPENDS = {"token": 1, "block": 30, "prompt": 60}
CHANGES = {
    name: lambda cache, count=count: forward(cache, tokens(count, seed=1)) for name, count in APPENDS.items()
} | {
    "crop": lambda cache: cache.crop(-30),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "fork": lambda cache: cache.fork(),
    "reset": lambda cache: cache.reset(),
}


def with_a_fork(kind: str):
    """A cache of 53 tokens, and a fork of its first 50."""
    cache = ALL[kind](tiny_config())
    forward(cache, tokens(50))
    fork = cache.fork()
    forward(cache, tokens(3, seed=5))
    return cache, fork


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupt_at_any_line_leaves_a_cache_whole_or_marked(change, kind):
    """Whole: as before, as after, or back to before by the `crop` that the error names. Marked: `reset` helps."""
    cache, fork = with_a_fork(kind)
    before, forked = contents(cache), contents(fork)
    count = interrupt_at_line(0, functools.partial(CHANGES[change], cache))
    after = contents(cache) if cache.get_seq_length() else []
    allowed = [before, [t[:, :, :53] for t in after]]  # cut blocks keep their rounded tokens
    if change in APPENDS:  # a layer may not have come to its quantization
        new = [t for pair in tokens(APPENDS[change], seed=1) for t in pair]
        allowed += [after, [torch.cat(pair, 2) for pair in zip(before, new, strict=True)]]
    marks = set()
    for number in range(1, count + 1, 1 + count // 25):
        cache, fork = with_a_fork(kind)
        interrupt_at_line(number, functools.partial(CHANGES[change], cache))
        try:
            cache.check_consistent_layers()
        except ValueError as error:
            mark = re.search(r"crop\((-\d+)\)|only reset\(\)", str(error))
            marks.add(mark[0].split("(")[0])
            cache.crop(int(mark[1])) if mark[1] else cache.reset()
        length = cache.get_seq_length()
        if length:
            found = contents(cache)
            wholes = [whole for whole in allowed if whole and whole[0].shape == found[0].shape]
            assert kind not in EXACT or any(same(found, whole) for whole in wholes), number
            for f, *one_of in zip(found, *wholes, strict=True):
                assert any(torch.equal(f, t) for t in one_of), number
        more = tokens(40, cache.layers[0].batch_size if length else 3, seed=2)
        for each in (cache.fork(), cache):  # both go on as if nothing had been
            forward(each, more)
            assert each.get_seq_length() == length + 40
            if kind in EXACT:
                old = found if length else [t[:, :, :0] for pair in more for t in pair]
                new = [t for pair in more for t in pair]
                assert same(contents(each), [torch.cat(pair, 2) for pair in zip(old, new, strict=True)])
        assert same(contents(fork), forked)
    expected = {"crop"} if change in {*APPENDS, "reset"} else set() if change == "fork" else {"only reset"}
    assert expected <= marks <= expected | ({"only reset"} if kind not in EXACT else set())


@pytest.mark.parametrize("kind", ALL)
def test_the_first_forward_interrupted(kind):
    """Layers that hold nothing at all beside layers that hold the prompt."""
    model = hf_kvattn.enable(tiny_model())
    cache, other, inputs = ALL[kind](model.config), ALL[kind](model.config), prompt(60)
    handle = model.model.layers[1].register_forward_pre_hook(raise_stop)
    with pytest.raises(Stop):
        model(**inputs, past_key_values=cache)
    handle.remove()
    with pytest.raises(ValueError, match=r"0 to 60 tokens; crop\(-60\)"), torch.no_grad():
        model(**inputs, past_key_values=cache)
    cache.crop(-60)
    cache = cache.fork()
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(**arguments, past_key_values=cache), model.generate(**arguments, past_key_values=other)
    )


def raise_stop(*args):
    raise Stop


@pytest.mark.parametrize(
    ("kind", "change"),
    [*itertools.product(ALL, ["crop", "reorder_cache", "batch_select_indices"])]
    + [(kind, "finish_attention") for kind in ALL if kind not in EXACT],
)
def test_changes_interrupted_between_layers_leave_only_reset(kind, change, monkeypatch):
    cache = ALL[kind](tiny_config())
    append(cache, tokens(50))
    layer_type = type(cache.layers[1])
    inner = {"reorder_cache": "copy_rows", "batch_select_indices": "select", "finish_attention": "_fit_exact"}
    name = inner.get(change, change)
    method = getattr(layer_type, name)

    def once(layer, *args):
        if layer.layer_idx == 1:
            raise KeyboardInterrupt
        return method(layer, *args)

    monkeypatch.setattr(layer_type, name, once)
    with pytest.raises(KeyboardInterrupt):
        if change == "finish_attention":
            cache.layers[1]._exact_k = cache.layers[1]._exact_k.repeat(1, 1, 3, 1)  # as after a long prompt
            cache.layers[1]._exact_v = cache.layers[1]._exact_v.repeat(1, 1, 3, 1)
            append(cache, tokens(40))
        else:
            getattr(cache, change)(-3 if change == "crop" else torch.tensor([1, 0, 0][: 3 - (change[0] == "r")]))
    monkeypatch.undo()
    for use in (
        lambda: cache.get_mask_sizes(1, 0),
        lambda: cache.crop(-1),
        lambda: cache.crop(0),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
        lambda: cache.layers[1].append(*tokens(1)[1]),
        cache.fork,
        cache.check_consistent_layers,
    ):
        with pytest.raises(ValueError, match="interrupted"):
            use()
    cache.reset()
    append(cache, tokens(40, batch=3))
    assert cache.get_seq_length() == 40 and isinstance(cache.layers[0], KVLayer) and cache.batch_size == 3


def causal(batch: int, new: int, seen: int) -> torch.Tensor:
    return torch.ones(seen + new, seen + new, dtype=torch.bool).tril()[seen:].expand(batch, 1, -1, -1)


WAYS_IN = {  # of a forward's tokens into a cache: whether the model is enabled, and what else it is given
    "enabled": (True, lambda ids, seen: {}),
    "enabled-padded": (True, lambda ids, seen: {"attention_mask": torch.ones(2, seen + ids.shape[1])}),
    "enabled-own-mask": (True, lambda ids, seen: {"attention_mask": causal(2, ids.shape[1], seen)}),
    "not-enabled": (False, lambda ids, seen: {}),
    "not-enabled-padded": (False, lambda ids, seen: {"attention_mask": torch.ones(2, seen + ids.shape[1])}),
}


@pytest.mark.parametrize("inconsistent", [True, False], ids=["inconsistent", "uneven"])
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2-sliding"])  # windows: none, all, first, last
def test_every_way_in_notices_what_an_interrupt_left(family, way, inconsistent):
    """In the last layer, which masks and the first attention module do not ask; before anything is stored."""
    (enabled, given), model, ids = WAYS_IN[way], tiny_model(family), prompt(30)["input_ids"]
    if enabled:
        hf_kvattn.enable(model)
    cache = StaticKVCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        if inconsistent:
            cache.layers[2].inconsistent = "crop"
        else:
            cache.layers[2].crop(-1)
        for new in (1, 10):
            with pytest.raises(ValueError, match="interrupted half way"):
                model(ids[:, 20 : 20 + new], past_key_values=cache, **given(ids[:, 20 : 20 + new], 20))
    assert [layer.seen for layer in cache.layers] == [20, 20, 20 - (not inconsistent)]


@pytest.mark.parametrize("kind", ALL)
def test_a_compiled_step_notices_what_an_interrupt_left(kind):
    hf_kvattn.enable(tiny_model())  # which defines the ops
    cache = ALL[kind](tiny_config())
    append(cache, tokens(20))
    cache.layers[2].crop(-1)
    with pytest.raises(ValueError, match=r"19 to 20 tokens; crop\(-1\)"):
        torch.ops.hf_kvattn.begin(cache.ticket, torch.ones(2, 1, dtype=torch.long), None, None)


@pytest.mark.parametrize("kind", ALL)
def test_a_repaired_cache_leaves_the_tensors_of_the_prompt_alone(kind):
    """A prompt is attended to in the caller's own tensors; after an interrupted one they must not become a buffer."""
    cache, prompt_kv = ALL[kind](tiny_config()), tokens(100)
    copies = [t.clone() for pair in prompt_kv for t in pair]
    for index in (0, 1):  # the third layer never comes to it, and nobody settles
        cache.layers[index].append(*prompt_kv[index])
    cache.crop(-100)
    append(cache, tokens(5, seed=1))
    for index in range(3):  # all layers come to it
        cache.layers[index].append(*prompt_kv[index])
    cache.crop(-2)
    append(cache, tokens(1, seed=2))
    cache.reset()
    append(cache, tokens(5, seed=3))
    assert same([t for pair in prompt_kv for t in pair], copies)
    assert same(contents(cache), [t for pair in tokens(5, seed=3) for t in pair])


def test_a_forks_frozen_prefix_is_not_taken_for_one_that_was_written_anew():
    """An interrupt between the look at the layers and the change of them (found by interrupting at every line)."""
    cache = StaticKVCache(tiny_config())
    append(cache, tokens(50))
    cache.fork()
    append(cache, tokens(3, seed=1))
    before = contents(cache)
    cache._note_changes()  # where the change stopped
    assert same(contents(cache.fork()), before)


RINGS = {  # that have wrapped: model family, and cache
    "window": ("llama", functools.partial(SlidingWindowKVCache, window=24)),
    "sinks": ("llama", functools.partial(SlidingWindowKVCache, window=24, sinks=4)),
    "native": ("mistral", StaticKVCache),
    "native-int8": ("mistral", functools.partial(QuantizedKVCache, bits=8, group_size=16)),
}


@pytest.mark.parametrize("kind", RINGS)
def test_rings_are_forked_copied_reordered_and_repaired_after_they_wrapped(kind):
    family, make = RINGS[kind]
    model, inputs = hf_kvattn.enable(tiny_model(family)), prompt(150)
    cache = make(model.config)
    with torch.no_grad():
        model(inputs["input_ids"][:, :140], past_key_values=cache)
    arguments = {"max_new_tokens": 90, "do_sample": False}
    before = contents(cache)
    expected = model.generate(**inputs, **arguments, past_key_values=copy.deepcopy(cache))
    for each in (cache.fork(), pickle.loads(pickle.dumps(cache.fork()))):
        assert torch.equal(model.generate(**inputs, **arguments, past_key_values=each), expected)
        assert same(contents(cache), before)

    swapped = cache.fork()
    swapped.reorder_cache(torch.tensor([1, 0]))
    ids = inputs["input_ids"].flip(0)
    ours = model.generate(ids, **arguments, past_key_values=swapped, attention_mask=torch.ones_like(ids))
    assert torch.equal(ours.flip(0), expected)

    broken = cache.fork()
    handle = interrupt(model, 1, KeyboardInterrupt(), True)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**inputs, **arguments, past_key_values=broken)
    handle.remove()
    with pytest.raises(ValueError, match=r"151 to 152 tokens; crop\(-1\)"):
        model.generate(expected[:, :153], past_key_values=broken)
    broken.crop(-1)
    again = model.generate(expected[:, :152], **arguments | {"max_new_tokens": 88}, past_key_values=broken)
    assert torch.equal(again, expected)
