"""A cache's whole life: transformers' semantics call by call, chats, copies and forks."""

import copy
import functools
import gc
import io
import os
import pickle
import re
import resource
import sys

import pytest
import torch
from cache_table import ALL, EXACT, append, contents, forward, same, tokens
from models import prompt, tiny_config, tiny_model
from transformers import DynamicCache, StaticCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches import fork as fork_module
from hf_kvattn.kernels import dispatch

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
        cache.check_consistent_layers()
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
    assert torch.equal(again, expected[0]) or kind not in EXACT  # a block that was cut keeps its rounded tokens
    assert torch.equal(model.generate(asks[1], **arguments, past_key_values=cache), expected[1])


@pytest.mark.parametrize("kind", ALL)
def test_a_forked_cache_leaves_its_shared_memory_behind_when_it_is_pickled_or_copied(kind):
    """Shared memory is a file of this process: its number means another file in the process that loads the pickle."""
    cache = ALL[kind](tiny_config())
    forward(cache, tokens(50))
    cache.fork()
    for other in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        assert other._shared is None and same(contents(other), contents(cache))
        forward(other.fork(), tokens(3))
        assert same(contents(other), contents(cache))


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
            layer.finish_attention(dispatch.quantize_blocks)

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


@pytest.mark.skipif(sys.platform != "linux", reason="forks share memory on Linux only")
@pytest.mark.parametrize("kind", ALL)
def test_forks_are_copies_where_no_more_files_can_be_opened(kind, caplog):
    fork_module.log_copy.cache_clear()
    caches = [ALL[kind](tiny_config()) for _ in range(2)]
    for cache in caches:
        append(cache, tokens(50))
    forks = [caches[0].fork()]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.dup(0)
    os.close(last)
    try:
        for left in (0, 1, 2):  # none for a new prefix, one that cannot be mapped, one that cannot be forked
            resource.setrlimit(resource.RLIMIT_NOFILE, (last + left, limits[1]))
            forks += [cache.fork() for cache in caches for _ in range(2)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [record.getMessage().startswith("forks are deep copies") for record in caplog.records] == [True]
    expected = contents(caches[0])
    forks += [cache.fork() for cache in caches]
    for i, each in enumerate(forks):
        forward(each, tokens(3, seed=i))
        each.crop(-3)
    assert all(same(contents(each), expected) for each in [*caches, *forks])


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [*ALL, "sinks"])
def test_looking_at_a_layer_changes_nothing_of_it(kind, family):
    cache = (ALL | {"sinks": functools.partial(SlidingWindowKVCache, window=24, sinks=4)})[kind](tiny_config(family))
    forward(cache, tokens(90))
    for layer in cache.layers:
        before = dict(vars(layer))
        layer.stored_kv(), layer.dense(), layer.keys, layer.values, layer.buffers(), layer.filled(), layer.nbytes
        layer.stored, layer.complete_tokens, layer.get_mask_sizes(3), layer.check_crop(0), layer.check_loaded()
        assert vars(layer).keys() == before.keys()
        # `stored_kv` keeps its last answer as long as the arrays in it are the same ones.
        assert all(value is before[name] for name, value in vars(layer).items() if name != "_last_packed")


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
        assert torch.equal(ours, expected) or kind not in EXACT  # a prompt cut in two sees codes, not exact tokens
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
