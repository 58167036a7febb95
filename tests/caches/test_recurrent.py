"""Recurrent states beside keys and values: every operation of a cache's life means the same for both."""

import copy
import functools
import pickle

import pytest
import torch
from model_sweep import model_of

import hf_kvattn
from hf_kvattn import QuantizedKVCache, StaticKVCache, load_cache, save_cache
from hf_kvattn.convert import calibrate

# Linear attention, convolutions, and layers that have both.
FAMILIES = ("qwen3_next", "lfm2", "falcon_h1")
MAKERS = {"static": StaticKVCache, "int4": functools.partial(QuantizedKVCache, bits=4)}


@functools.cache
def model(family: str):
    torch.use_deterministic_algorithms(True, warn_only=True)
    return hf_kvattn.enable(model_of(family))


def ids(batch: int = 2, count: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def forward(family: str, cache, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(family)(tokens, past_key_values=cache).logits


def filled(family: str, kind: str = "static", batch: int = 2):
    cache = MAKERS[kind](model(family).config)
    forward(family, cache, ids(batch))
    return cache


def through_a_file(cache, family, tmp_path):
    save_cache(cache, tmp_path / "cache")
    return load_cache(tmp_path / "cache", model(family).config)


# Each leads to a cache that goes on as the first one would: for which rows, and what becomes of the cache.
LIFE = {
    "copy": ([0, 1], lambda cache, *_: copy.deepcopy(cache)),
    "fork": ([0, 1], lambda cache, *_: cache.fork()),
    "pickle": ([0, 1], lambda cache, *_: pickle.loads(pickle.dumps(cache))),
    "file": ([0, 1], through_a_file),
    "reorder": ([1, 1], lambda cache, *_: cache.reorder_cache(torch.tensor([1, 1])) or cache),
    "repeat": ([0, 0, 1, 1], lambda cache, *_: cache.batch_repeat_interleave(2) or cache),
    "select": ([1], lambda cache, *_: cache.batch_select_indices(torch.tensor([1])) or cache),
    "move": ([0, 1], lambda cache, *_: cache.to("cpu")),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("operation", LIFE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_goes_on_after(family, operation, kind, tmp_path):
    rows, change = LIFE[operation]
    cache = filled(family, kind)
    untouched = copy.deepcopy(cache)
    more = ids(2, 7, seed=1)
    expected = forward(family, untouched, more)[rows]
    changed = change(cache, family, tmp_path)
    if changed is not cache:  # what happens to the first one is its own affair
        forward(family, cache, ids(2, 5, seed=2))
    torch.testing.assert_close(forward(family, changed, more[rows]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_cache_is_a_new_one_for_any_batch(family):
    cache = filled(family)
    cache.reset()
    assert cache.get_seq_length() == 0
    expected = forward(family, StaticKVCache(model(family).config), ids(3))
    assert torch.equal(forward(family, cache, ids(3)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_batch_size_changes_nothing(family):
    cache = filled(family)
    with pytest.raises(ValueError, match="holds a batch of 2, got 3"):
        forward(family, cache, ids(3, 1))
    expected = forward(family, filled(family), ids(2, 3, seed=4))
    assert torch.equal(forward(family, cache, ids(2, 3, seed=4)), expected)


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1"])
def test_recurrent_states_cannot_go_back(family):
    cache = filled(family)
    cache.activate_past_recording()
    cache.crop(0)
    with pytest.raises(ValueError, match="layer 0: a recurrent state cannot go back by 3 tokens"):
        cache.crop(-3)
    expected = forward(family, filled(family), ids(2, 3, seed=4))
    torch.testing.assert_close(forward(family, cache, ids(2, 3, seed=4)), expected)
    cache.crop(-cache.get_seq_length())
    expected = forward(family, StaticKVCache(model(family).config), ids())
    torch.testing.assert_close(forward(family, cache, ids()), expected)


def test_convolutions_go_back_as_far_as_they_were_recorded():
    cache = filled("lfm2")
    with pytest.raises(ValueError, match="its convolution can go back by 0 tokens, not by 2"):
        cache.crop(-2)
    cache.activate_past_recording()
    forward("lfm2", cache, ids(2, 6, seed=1))
    with pytest.raises(ValueError, match="can go back by 6 tokens, not by 7"):
        cache.crop(-7)
    cache.crop(-4)
    expected = filled("lfm2")
    forward("lfm2", expected, ids(2, 6, seed=1)[:, :2])
    more = ids(2, 3, seed=2)
    torch.testing.assert_close(forward("lfm2", cache, more), forward("lfm2", expected, more))
    with pytest.raises(ValueError, match="can go back by 3 tokens, not by 4"):
        cache.crop(-4)


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_interrupted_forward_is_noticed(family, number):
    """Whichever layer is interrupted: states before it have moved on, and no length need tell."""
    cache, decoder = filled(family), model(family).get_decoder()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = decoder.layers[number].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        forward(family, cache, ids(2, 1))
    hook.remove()
    for use in (
        lambda: forward(family, cache, ids(2, 1)),
        lambda: cache.crop(-1),
        cache.fork,
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        with pytest.raises(ValueError, match=r"interrupted half way.*reset\(\)"):
            use()
    cache.reset()
    assert torch.equal(forward(family, cache, ids()), forward(family, StaticKVCache(model(family).config), ids()))


def test_a_decoder_that_is_called_without_names_comes_to_its_end():
    cache, decoder = StaticKVCache(model("lfm2").config), model("lfm2").get_decoder()
    with torch.no_grad():
        for tokens in (ids(), ids(2, 1), ids(2, 1)):
            decoder(tokens, None, None, cache)
    assert cache.get_seq_length() == 52


def test_a_refused_mask_leaves_no_states_behind_that_go_unnoticed():
    cache = filled("qwen3_next")
    with pytest.raises(ValueError, match=r"mask is \(2, 1, 1, 7\)"):
        model("qwen3_next")(ids(2, 1), attention_mask=torch.ones(2, 1, 1, 7, dtype=torch.bool), past_key_values=cache)
    with pytest.raises(ValueError, match=r"only reset\(\)"):
        forward("qwen3_next", cache, ids(2, 1))


def test_states_count_as_bytes_but_not_as_bits():
    cache = filled("qwen3_next")
    states = sum(state.nbytes for state in cache.states)
    assert states > 0 and cache.nbytes == states + sum(layer.nbytes for layer in cache.kv_layers)
    assert cache.bits_per_element == 32


def say(name: str, value):
    return lambda states: states[0].update({name: value})


HOSTILE = {  # what becomes of the states in a file, and what is said of it
    "another batch": (say("conv_states.0", ["torch.float32", 3, 4, 4]), "no dtype and shape of 2 rows"),
    "an unknown name": (say("conv_states.7", ["torch.float32", 2, 4, 4]), "the states of layer 0 are .*, known are"),
    "an unknown dtype": (say("conv_states.0", ["torch.int8", 2, 4, 4]), "no dtype and shape of 2 rows"),
    "another width": (say("conv_states.0", ["torch.float32", 2, 4, 4]), r"states.0.conv_states.0 is .*, should be"),
    "no list": (say("conv_states.0", 5), "no dtype and shape of 2 rows"),
    "nothing": (lambda states: states[0].clear(), "the states of layer 0 are {}, known are"),
    "one layer less": (lambda states: states.pop(), "the model has 2 layers of them"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_file_that_lies_about_states_is_refused(what, tmp_path, monkeypatch):
    from hf_kvattn.caches import serialize

    (change, message), describe = HOSTILE[what], serialize._describe

    def lie(*args):
        said = describe(*args)
        change(said["states"])
        return said

    monkeypatch.setattr(serialize, "_describe", lie)
    save_cache(filled("qwen3_next"), tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "cache", model("qwen3_next").config)


def test_a_calibration_counts_the_layers_that_have_keys():
    found = calibrate.measure(hf_kvattn.disable(model("qwen3_next")), ids(2, 70), [16])
    made, _ = calibrate.choose(model("qwen3_next"), found, 4.5)
    hf_kvattn.enable(model("qwen3_next"))
    assert found.keys.shape[0] == made.layers == 2 and bool((found.keys > 0).all())
    cache = QuantizedKVCache(model("qwen3_next").config, calibration=made)
    forward("qwen3_next", cache, ids())
    kept = {1: 0, 3: 1}
    for layer in cache.kv_layers:
        assert layer.settings.k_codec.argument == made.key_bits[kept[layer.layer_idx]]
    with pytest.raises(ValueError, match="latents, and layers of unlike shapes, are not calibrated"):
        calibrate.measure(model_of("deepseek_v3"), ids(2, 70), [16])


def test_plan_counts_keys_and_values_of_layers_that_have_them():
    config = model("qwen3_next").config
    rows = hf_kvattn.plan(config, 1, 1000, torch.bfloat16, 1 << 30, weights_bytes=0).rows
    assert rows["static"].cache_bytes == 2 * 2 * 2 * 16 * 1000 * 2  # layers, keys and values, heads of 16, bytes


def test_graphs_name_what_they_cannot_hold():
    config = model("qwen3_next").config
    assert "whose layers all store keys and values" in StaticKVCache(config, max_cache_len=64).graph_obstacle()
