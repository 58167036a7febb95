"""A cache's whole life: transformers' semantics call by call, chats, forks, and what an exception leaves behind."""

import copy
import functools
import gc
import io
import itertools
import pickle
import re
import sys

import pytest
import torch
from cache_table import ALL, EXACT, ROUNDED
from models import prompt, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches.layer import KVLayer


def tokens(count: int, batch: int = 2, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values for each of three layers."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(batch, 2, count, 16, generator=generator) for _ in "kv") for _ in range(3)]


def append(cache, new) -> None:
    for index, (k, v) in enumerate(new):
        cache.update(k, v, index)


def contents(cache) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.layers for t in layer.dense()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# What generate() and its users do to caches: method and arguments, or tokens to append and the batch they come in.
SCRIPTS = {
    "assisted": [("activate_past_recording",), 7, ("crop", -3), ("crop", 0), 4, ("crop", -4), 1],
    "beams": [5, ("reorder_cache", [1, 1]), 1, ("reorder_cache", [1, 0]), 1, ("reorder_cache", [0, 1]), 2],
    "repeat": [3, ("batch_repeat_interleave", 3), (2, 6), ("reorder_cache", [5, 4, 3, 2, 1, 0]), (1, 6)],
    "select": [6, ("batch_select_indices", [1]), (2, 1), ("batch_repeat_interleave", 2), 1],
    "select-bools": [6, ("batch_select_indices", [True, False]), (2, 1)],
    "select-negative": [6, ("batch_select_indices", [-1, 0, -2]), (2, 3)],
    "empty": [("crop", 0), ("reorder_cache", [1, 0]), ("batch_repeat_interleave", 2), ("batch_select_indices", [0]), 3],
    "reset": [5, ("reset",), 4, ("reset",), ("crop", 0), 1],
    "reset-to-another-batch": [5, ("batch_repeat_interleave", 2), ("reset",), (4, 3), ("reset",), (2, 1)],
}


def play(cache, script) -> list:
    """The script on a cache: after each call, what it answers and holds."""
    seen = []
    for i, step in enumerate(script):
        if isinstance(step, int) or isinstance(step[0], int):
            count, batch = (step, 2) if isinstance(step, int) else step
            append(cache, tokens(count, batch, seed=i))
        else:
            name, *args = step
            getattr(cache, name)(*[torch.tensor(a) if isinstance(a, list) else a for a in args])
        length = int(cache.get_seq_length())
        seen.append(
            {
                "lengths": [int(cache.get_seq_length(layer)) for layer in range(3)],
                "contents": [t[:, :, :length].clone() for x in cache.layers for t in (x.keys, x.values)]
                if length
                else [],
                "mask": cache.get_mask_sizes(3, 1),
                "max": cache.get_max_length(),
                "flags": (len(cache), cache.is_sliding, cache.is_croppable, cache.is_recording_past(0)),
            }
        )
    return seen


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_calls_do_what_they_do_to_transformers_dynamic_cache(script, kind):
    config = tiny_config()
    ours, stock = EXACT[kind](config), DynamicCache(config=config)
    for a, b in zip(play(ours, SCRIPTS[script]), play(stock, SCRIPTS[script]), strict=True):
        assert same(a.pop("contents"), b.pop("contents"))
        assert a.pop("max") == (160 if kind == "static-sized" else b.pop("max"))
        b.pop("max", None)
        assert a == b


@pytest.mark.parametrize("script", ["beams", "reset"])
def test_and_to_its_static_cache(script):
    config = tiny_config()
    steps = [step for step in SCRIPTS[script] if isinstance(step, int) or step[0] != "crop"]  # it has no crop
    ours, stock = StaticKVCache(config, max_cache_len=40), StaticCache(config, max_cache_len=40)
    for a, b in zip(play(ours, steps), play(stock, steps), strict=True):
        assert same(a["contents"], b["contents"])
        assert (a["lengths"], a["max"]) == (b["lengths"], b["max"])


@pytest.mark.parametrize("kind", ALL)
def test_early_initialization_is_transformers(kind):
    cache = ALL[kind](tiny_config())
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0 and cache.batch_size == 2
    append(cache, tokens(5))
    assert same(contents(cache), [t for pair in tokens(5) for t in pair])


@pytest.mark.parametrize("kind", ALL)
def test_what_cannot_be_done_is_refused_and_changes_nothing(kind):
    cache = ALL[kind](tiny_config())
    append(cache, tokens(50))
    before = contents(cache)
    for call, message in (
        (lambda: cache.crop(1), "from -50 .* to 0, got 1"),
        (lambda: cache.crop(-51), "from -50 .* to 0, got -51"),
        (lambda: cache.reorder_cache(torch.tensor([0, 2])), "rows of a batch of 2, got .*0, 2"),
        (lambda: cache.batch_select_indices(torch.tensor([-3])), "rows of a batch of 2, got .*-3"),
        (lambda: cache.batch_select_indices(torch.tensor([True])), "rows of a batch of 2, got .*True"),
        (lambda: cache.batch_select_indices(torch.tensor([[0]])), "rows of a batch of 2"),
        (lambda: cache.batch_repeat_interleave(0), "repeats .* got 0"),
        (lambda: append(cache, tokens(1, batch=3)), "holds a batch of 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        cache.check_whole()
        assert same(contents(cache), before)


def turns(model, cache, edit: bool) -> list[torch.Tensor]:
    """Three turns of a padded batch on one cache, the second said anew if `edit`."""
    first = prompt(left_padding=4)
    ids, mask, replies = first["input_ids"], first["attention_mask"], []
    for turn in range(3):
        for _ in range(2 if edit and turn == 1 else 1):
            said = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(10 * turn + len(replies)))
            now, seen = torch.cat([ids, said], 1), torch.cat([mask, torch.ones_like(said)], 1)
            if len(replies) > turn:  # the turn before is taken back
                cache.crop(ids.shape[1] - 1 - cache.get_seq_length())
            out = model.generate(
                now, attention_mask=seen, max_new_tokens=6, do_sample=False, past_key_values=cache, pad_token_id=0
            )
            replies.append(out[:, now.shape[1] :])
        ids, mask = out, torch.cat([seen, torch.ones_like(replies[-1])], 1)
    assert cache.get_seq_length() == ids.shape[1] - 1
    return replies


@pytest.mark.parametrize("edit", [False, True], ids=["straight", "edited"])
@pytest.mark.parametrize("kind", EXACT)
def test_a_chat_of_several_turns_and_its_edits(kind, edit):
    model = tiny_model()
    expected = turns(model, DynamicCache(config=model.config), edit)
    for enabled in (False, True):
        if enabled:
            hf_kvattn.enable(model)
        cache = EXACT[kind](model.config)
        for _ in range(2):  # and again after a reset
            assert same(turns(model, cache, edit), expected)
            cache.reset()


@pytest.mark.parametrize("kind", ALL)
def test_a_cache_is_reused_after_a_reset_in_another_batch(kind):
    model = hf_kvattn.enable(tiny_model())
    cache = ALL[kind](model.config)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    for inputs, extra in ((prompt(), {}), (prompt(20, 3, 2), {}), (prompt(), {"num_beams": 3}), (prompt(), {})):
        cache.reset()
        ours = model.generate(**inputs, **arguments, **extra, past_key_values=cache)
        fresh = model.generate(**inputs, **arguments, **extra, past_key_values=ALL[kind](model.config))
        assert torch.equal(ours, fresh)


@pytest.mark.parametrize("kind", ALL)
def test_forks_continue_one_prefix_each_in_its_way(kind):
    model, prefix = hf_kvattn.enable(tiny_model()), prompt(60)["input_ids"]
    cache = ALL[kind](model.config)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    before = contents(cache)
    questions = [torch.randint(3, 128, (2, 4), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    asks = [torch.cat([prefix, question], 1) for question in questions]
    arguments = {"max_new_tokens": 40, "do_sample": False}  # further than an unlimited static cache's capacity
    expected = [model.generate(a, **arguments, past_key_values=copy.deepcopy(cache)) for a in asks]
    forks = [cache.fork() for _ in asks]
    ours = [model.generate(a, **arguments, past_key_values=fork) for a, fork in zip(asks, forks, strict=True)]
    assert same(ours, expected)
    assert same(contents(cache), before)
    grandchild, twin = forks[0].fork(), copy.deepcopy(forks[0])
    forks[0].reset()
    for each in (grandchild, twin):
        each.crop(60 - each.get_seq_length())
    again = model.generate(asks[0], **arguments, past_key_values=grandchild)
    assert torch.equal(again, model.generate(asks[0], **arguments, past_key_values=twin))
    assert torch.equal(again, expected[0]) or kind in ROUNDED  # a block that was cut keeps its rounded tokens
    assert torch.equal(model.generate(asks[1], **arguments, past_key_values=cache), expected[1])


def resident_bytes() -> int:
    """Of this process, shared pages counted once."""
    with open("/proc/self/smaps_rollup") as file:
        return 1024 * int(re.search(r"^Pss:\s+(\d+)", file.read(), re.M)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared, and measured, on Linux only")
@pytest.mark.parametrize("kind", ["static", "int8"])
def test_eight_forks_take_the_memory_of_one_prefix(kind):
    make = {
        "static": functools.partial(StaticKVCache, max_cache_len=10_000),
        "int8": functools.partial(QuantizedKVCache, bits=8, max_cache_len=10_000),
    }[kind]

    def store(cache, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in cache.layers:  # not by update(), which would leave large temporary tensors behind
            layer.append(*(torch.randn(1, 2, count, 64, generator=generator) for _ in "kv"))
            layer.settle()

    cache = make(tiny_config(head_dim=64))
    store(cache, 10_000 - 40, 0)
    gc.collect()
    alone = resident_bytes()
    forks = [cache.fork() for _ in range(8)]
    for i, fork in enumerate(forks):
        store(fork, 5, i)
        for layer in fork.layers:
            assert all(int(t.view(torch.uint8).max()) > 0 for t, _ in layer.buffers().values())  # all pages are read
    more = resident_bytes() - alone
    # Eight copies would be eight times as much; what the parent's own memory was may stay with the allocator.
    assert more < 1.5 * cache.nbytes < sum(fork.nbytes for fork in forks) / 5, (more, cache.nbytes)


@pytest.mark.parametrize("kind", ALL)
def test_copies_and_pickles_of_a_fork_own_their_memory(kind):
    cache = ALL[kind](tiny_config())
    append(cache, tokens(50))
    plain = len(pickle.dumps(copy.deepcopy(cache)))
    fork = cache.fork()
    assert len(pickle.dumps(fork)) < 1.1 * plain + 4096
    twin, loaded = copy.deepcopy(fork), pickle.load(io.BytesIO(pickle.dumps(fork)))
    append(fork, tokens(3, seed=1))
    for each in (twin, loaded):
        assert same(contents(each), contents(cache))
        tensors = [t for layer in each.layers for t, _ in layer.buffers().values()]
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


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


@pytest.mark.parametrize("error", [Stop(), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("where", [(0, True), (1, False), (1, True), (2, False), (2, True)], ids=str)
@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "not-enabled"])
@pytest.mark.parametrize("kind", ALL)
def test_an_interrupted_forward_is_noticed_and_repaired_by_crop(kind, enabled, where, error):
    model, inputs = tiny_model(), prompt(33, left_padding=3)
    if enabled:
        hf_kvattn.enable(model)
    arguments = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**inputs, **arguments, past_key_values=ALL[kind](model.config))
    cache = ALL[kind](model.config)
    handle = interrupt(model, where[0], error, where[1])
    with pytest.raises(type(error)):
        model.generate(**inputs, **arguments, past_key_values=cache)
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
        expected[:, :35], attention_mask=mask, **arguments | {"max_new_tokens": 10}, past_key_values=cache
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


def forward(cache, new) -> None:
    """As on an enabled model: the layer's writer, what attention reads, and the compression after it."""
    cache.get_mask_sizes(new[0][0].shape[2], 0)
    for index, (k, v) in enumerate(new):
        cache.writer(index).update(k, v, index)
        cache.layers[index].kv()
        cache.layers[index].settle()


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
            cache.check_whole()
        except ValueError as error:
            mark = re.search(r"crop\((-\d+)\)|only reset\(\)", str(error))
            marks.add(mark[0].split("(")[0])
            cache.crop(int(mark[1])) if mark[1] else cache.reset()
        length = cache.get_seq_length()
        if length:
            found = contents(cache)
            wholes = [whole for whole in allowed if whole and whole[0].shape == found[0].shape]
            assert kind in ROUNDED or any(same(found, whole) for whole in wholes), number
            for f, *one_of in zip(found, *wholes, strict=True):
                assert any(torch.equal(f, t) for t in one_of), number
        more = tokens(40, cache.layers[0].batch_size if length else 3, seed=2)
        for each in (cache.fork(), cache):  # both go on as if nothing had been
            forward(each, more)
            assert each.get_seq_length() == length + 40
            if kind not in ROUNDED:
                old = found if length else [t[:, :, :0] for pair in more for t in pair]
                new = [t for pair in more for t in pair]
                assert same(contents(each), [torch.cat(pair, 2) for pair in zip(old, new, strict=True)])
        assert same(contents(fork), forked)
    expected = {"crop"} if change in {*APPENDS, "reset"} else set() if change == "fork" else {"only reset"}
    assert expected <= marks <= expected | ({"only reset"} if kind in ROUNDED else set())


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


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("change", ["crop", "reorder_cache", "batch_select_indices", "settle"])
def test_changes_interrupted_between_layers_leave_only_reset(kind, change, monkeypatch):
    if change == "settle" and kind not in ROUNDED:
        pytest.skip("nothing is quantized")
    cache = ALL[kind](tiny_config())
    append(cache, tokens(50))
    layer_type = type(cache.layers[1])
    inner = {"crop": "crop", "reorder_cache": "copy_rows", "batch_select_indices": "select", "settle": "_resize_exact"}[
        change
    ]
    method = getattr(layer_type, inner)

    def once(layer, *args):
        if layer.layer_idx == 1:
            raise KeyboardInterrupt
        return method(layer, *args)

    monkeypatch.setattr(layer_type, inner, once)
    with pytest.raises(KeyboardInterrupt):
        if change == "settle":
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
        cache.check_whole,
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


@pytest.mark.parametrize("torn", [True, False], ids=["torn", "uneven"])
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen2-sliding"])  # windows: none, all, first, last
def test_every_way_in_notices_what_an_interrupt_left(family, way, torn):
    """In the last layer, which masks and the first attention module do not ask; before anything is stored."""
    (enabled, given), model, ids = WAYS_IN[way], tiny_model(family), prompt(30)["input_ids"]
    if enabled:
        hf_kvattn.enable(model)
    cache = StaticKVCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        if torn:
            cache.layers[2].torn = "crop"
        else:
            cache.layers[2].crop(-1)
        for new in (1, 10):
            with pytest.raises(ValueError, match="interrupted half way"):
                model(ids[:, 20 : 20 + new], past_key_values=cache, **given(ids[:, 20 : 20 + new], 20))
    assert [layer.seen for layer in cache.layers] == [20, 20, 20 - (not torn)]


@pytest.mark.parametrize("kind", ALL)
def test_a_compiled_step_notices_what_an_interrupt_left(kind):
    hf_kvattn.enable(tiny_model())  # which defines the ops
    cache = ALL[kind](tiny_config())
    append(cache, tokens(20))
    cache.layers[2].crop(-1)
    with pytest.raises(ValueError, match=r"19 to 20 tokens; crop\(-1\)"):
        torch.ops.hf_kvattn.begin(cache.ticket, torch.ones(2, 1, dtype=torch.long), None, None)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [*ALL, "sinks"])
def test_looking_at_a_layer_changes_nothing_of_it(kind, family):
    cache = (ALL | {"sinks": functools.partial(SlidingWindowKVCache, window=24, sinks=4)})[kind](tiny_config(family))
    forward(cache, tokens(90))
    for layer in cache.layers:
        before = dict(vars(layer))
        layer.kv(), layer.dense(), layer.keys, layer.values, layer.buffers(), layer.filled(), layer.nbytes
        layer.stored, layer.whole, layer.get_mask_sizes(3), layer.check_crop(0), layer.verify()
        assert vars(layer).keys() == before.keys()
        assert all(value is before[name] for name, value in vars(layer).items())


@pytest.mark.parametrize("kind", ALL)
def test_a_repaired_cache_leaves_the_tensors_of_the_prompt_alone(kind):
    """A prompt is attended to in the caller's own tensors; after an interrupted one they must not become a buffer."""
    cache, prompt_kv = ALL[kind](tiny_config()), tokens(100)
    copies = [t.clone() for pair in prompt_kv for t in pair]
    for index in (0, 1):  # the third layer never comes to it, and nobody settles
        cache.writer(index).update(*prompt_kv[index], index)
    cache.crop(-100)
    append(cache, tokens(5, seed=1))
    for index in range(3):  # all layers come to it
        cache.writer(index).update(*prompt_kv[index], index)
    cache.crop(-2)
    append(cache, tokens(1, seed=2))
    cache.reset()
    append(cache, tokens(5, seed=3))
    assert same([t for pair in prompt_kv for t in pair], copies)
    assert same(contents(cache), [t for pair in tokens(5, seed=3) for t in pair])


@pytest.mark.parametrize("kind", ALL)
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(kind):
    model = hf_kvattn.enable(tiny_model())
    inputs = prompt(60)
    arguments = {"max_new_tokens": 40, "do_sample": False}
    expected = model.generate(**inputs, **arguments, past_key_values=ALL[kind](model.config))
    with torch.inference_mode():
        cache = ALL[kind](model.config)
        model(inputs["input_ids"][:, :55], past_key_values=cache)
        copies = [cache.fork(), copy.deepcopy(cache), cache.to("cpu")]
        rows = cache.fork()
        rows.batch_select_indices(torch.tensor([0, 1, 0]))
    for each in copies:
        ours = model.generate(**inputs, **arguments, past_key_values=each)
        assert torch.equal(ours, expected) or kind in ROUNDED  # a prompt cut in two sees codes instead of exact tokens
    append(rows, tokens(40, batch=3))


def test_a_fork_made_after_growth_and_crop_has_the_room_it_says():
    cache = StaticKVCache(tiny_config())
    append(cache, tokens(50))
    cache.fork()
    append(cache, tokens(500, seed=1))
    cache.crop(-500)
    fork = cache.fork()
    append(fork, tokens(600, seed=2))
    assert same(contents(cache), [t for pair in tokens(50) for t in pair])
    first, then = ([t for pair in tokens(*args) for t in pair] for args in ((50,), (600, 2, 2)))
    assert same(contents(fork), [torch.cat(pair, 2) for pair in zip(first, then, strict=True)])


def test_a_forks_frozen_prefix_is_not_taken_for_one_that_was_written_anew():
    """An interrupt between the look at the layers and the change of them (found by interrupting at every line)."""
    cache = StaticKVCache(tiny_config())
    append(cache, tokens(50))
    cache.fork()
    append(cache, tokens(3, seed=1))
    before = contents(cache)
    cache._look()  # where the change stopped
    assert same(contents(cache.fork()), before)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("then", [(), (1,), (90,), (30, -20), (90, -60), (40, -1, 40)], ids=str)
@pytest.mark.parametrize("before", [20, 70], ids="after-{}".format)
def test_rows_with_a_common_past_stay_what_they_are(before, then, kind):
    """A row becomes another's copy, both go on, and again: what is compressed meanwhile is not common any more."""
    cache, late = ALL[kind](tiny_config()), QuantizedKVCache(tiny_config(), group_size=16, residual_length=40)
    for each in (cache, late):
        forward(each, tokens(before))
        each.reorder_cache(torch.tensor([0, 0]))
        for seed, count in enumerate(then):
            forward(each, tokens(count, seed=seed)) if count > 0 else each.crop(count)
        expected = [t[[1, 1]] for t in contents(each)]
        each.reorder_cache(torch.tensor([1, 1]))
        assert same(contents(each), expected)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("then", [(-1,), (-20,), (-40,), (-20, 20), (1, -1), (60, -60)], ids=str)
def test_each_fork_is_what_the_cache_is_then(then, kind):
    """Forks of a cache that was cut or went on since its last fork, and came back to the same length maybe."""
    cache = ALL[kind](tiny_config())
    forward(cache, tokens(90))
    for seed, count in enumerate((0, *then)):
        forward(cache, tokens(count, seed=seed)) if count > 0 else cache.crop(count)
        before = contents(cache)
        fork = cache.fork()
        assert same(contents(fork), before)
        forward(fork, tokens(3, seed=9))
        assert same(contents(cache), before)


@pytest.mark.parametrize("kind", ALL)
def test_a_fork_knows_what_its_rows_do_not_share_any_more(kind):
    """What the parent cut off and stored anew since it last looked counts for the fork too (found by hypothesis)."""
    cache = ALL[kind](tiny_config())
    forward(cache, tokens(33))
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.crop(-1)
    forward(cache, tokens(40, seed=1))
    fork = cache.fork()
    expected = [t[[1, 1]] for t in contents(fork)]
    fork.reorder_cache(torch.tensor([1, 1]))
    assert same(contents(fork), expected)


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
