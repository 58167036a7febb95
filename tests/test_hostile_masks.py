"""Masks and positions that are easy to misread: refused before anything is stored, or read as stock does."""

import pytest
import torch
from models import prompt, tiny_model
from transformers import DynamicCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

CACHES = {
    "none": lambda config: None,
    "static": StaticKVCache,
    "sliding": lambda config: SlidingWindowKVCache(config, window=64, sinks=2),
    "int8": lambda config: QuantizedKVCache(config, bits=8, group_size=16),
}


def forward(model, ids, cache=None, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **kwargs).logits


def prefix_lm(length: int, prefix: int, q_len: int | None = None) -> torch.Tensor:
    """`(1, 1, Tq, T)`: causal, and the first `prefix` tokens see one another."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    return mask[None, None, -(q_len or length) :]


@pytest.mark.parametrize("backend", ["auto", "native", "sdpa", "reference"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("kind", CACHES)
def test_a_mask_of_another_number_of_rows_is_refused(kind, rows, backend):
    model, inputs = hf_kvattn.enable(tiny_model("mistral")), prompt(12, batch=3)
    mask = torch.ones(rows, 12, dtype=torch.long)
    mask[0, :5] = 0
    cache = CACHES[kind](model.config)
    with hf_kvattn.backend(backend):
        with pytest.raises(ValueError, match=rf"attention_mask \({rows}, 12\) does not fit a batch of 3"):
            forward(model, inputs["input_ids"], cache, attention_mask=mask)
        good = forward(model, inputs["input_ids"], cache)
        assert torch.equal(good, forward(model, inputs["input_ids"], CACHES[kind](model.config)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.int8])
@pytest.mark.parametrize("kind", CACHES)
def test_a_4d_mask_of_integers_is_refused_and_nothing_is_stored(kind, dtype):
    model, ids = hf_kvattn.enable(tiny_model()), prompt(12)["input_ids"]
    cache = CACHES[kind](model.config)
    for length in (12, 3, 2):  # a compact mask has 2 or 3 columns
        mask = torch.ones(2, 1, length, length, dtype=dtype).tril()
        with pytest.raises(ValueError, match=rf"mask is .* {dtype} on cpu, not .* torch.bool or"):
            forward(model, ids[:, :length], cache, attention_mask=mask)
    assert cache is None or cache.get_seq_length() == 0
    assert torch.equal(forward(model, ids, cache), forward(model, ids, CACHES[kind](model.config)))


@pytest.mark.parametrize("shape", [(3, 1, 4, 12), (1, 3, 4, 12), (2, 1, 3, 12), (2, 1, 4, 13), (2, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("kind", CACHES)
def test_a_4d_mask_of_another_shape_is_refused_and_nothing_is_stored(kind, shape):
    model, ids = hf_kvattn.enable(tiny_model()), prompt(12)["input_ids"]
    cache = CACHES[kind](model.config)
    if cache is None:
        shape = (*shape[:2], {4: 12, 3: 11}[shape[2]], shape[3] if shape[3] > 4 else 11)
        begin = 0
    else:
        forward(model, ids[:, :8], cache)
        begin = 8
    with pytest.raises(ValueError, match=r"mask is .*, not "):
        forward(model, ids[:, begin:], cache, attention_mask=torch.ones(shape, dtype=torch.bool))
    if cache is not None:
        assert [layer.seen for layer in cache.layers] == [8, 8, 8]
        again = CACHES[kind](model.config)
        forward(model, ids[:, :8], again)
        assert torch.equal(forward(model, ids[:, 8:], cache), forward(model, ids[:, 8:], again))


@pytest.mark.parametrize("float_mask", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("window", [40, 30, 9])
@pytest.mark.parametrize("backend", ["auto", "sdpa", "reference"])
def test_a_forced_window_keeps_what_the_mask_shows_after_a_query(backend, window, float_mask):
    """A prefix-LM mask shows a query the tokens after it, up to the prefix's end."""
    model, ids = tiny_model(), prompt(31)["input_ids"]
    mask = prefix_lm(30, 12)
    in_window = torch.arange(30) > torch.arange(30)[:, None] - window
    expected = forward(model, ids[:, :30], attention_mask=mask & in_window)
    expected_step = forward(model, ids, attention_mask=torch.cat([
        torch.nn.functional.pad(mask & in_window, (0, 1)),
        (torch.arange(31) > 30 - window)[None, None, None],
    ], 2))[:, -1]  # fmt: skip
    if float_mask:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    hf_kvattn.enable(model)
    with hf_kvattn.backend(backend):
        cache = SlidingWindowKVCache(model.config, window=window)
        torch.testing.assert_close(forward(model, ids[:, :30], cache, attention_mask=mask), expected)
        torch.testing.assert_close(forward(model, ids[:, 30:], cache)[:, -1], expected_step)


@pytest.mark.parametrize("kind", ["static", "sliding"])
def test_bidirectional_models_see_the_same_through_a_cache(kind):
    layers = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    model, ids = tiny_model("gemma3", use_bidirectional_attention=True, **layers), prompt(20)["input_ids"]
    expected = forward(model, ids)
    causal = tiny_model("gemma3", **layers)
    assert (forward(causal, ids) - expected).abs().max() > 0.1
    hf_kvattn.enable(model)
    torch.testing.assert_close(forward(model, ids, CACHES[kind](model.config)), expected)


TURNS = {
    "ragged second turn": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1]],
    "right padding, then more": [[1, 1, 1, 1, 0, 0], [1, 1]],
    "padding inside": [[1, 1, 0, 0, 1, 1], [0, 1, 0, 1]],
    "two ragged turns": [[0, 1, 1, 1], [0, 0, 1], [0, 1, 1]],
}


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["static", "sliding", "sliding-only"])
@pytest.mark.parametrize("turns", TURNS)
def test_padding_anywhere_is_as_in_stock(turns, kind, family):
    """Row 0 is padded as said, row 1 is not; padding has position 1, as `generate` gives it."""
    model = tiny_model(family)
    masks = [torch.tensor([turn, [1] * len(turn)]) for turn in TURNS[turns]]
    mask, ids = torch.cat(masks, 1), prompt(sum(map(len, TURNS[turns])))["input_ids"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)

    def logits(cache) -> torch.Tensor:
        parts, begin = [], 0
        for turn in masks:
            part = slice(begin, begin + turn.shape[1])
            begin = part.stop
            parts.append(
                forward(model, ids[:, part], cache, attention_mask=mask[:, :begin], position_ids=positions[:, part])
            )
        return torch.cat(parts, 1)[mask.bool()]

    expected = logits(DynamicCache(config=model.config))
    hf_kvattn.enable(model)
    made = SlidingWindowKVCache(model.config, window=64) if kind == "sliding-only" else CACHES[kind](model.config)
    torch.testing.assert_close(logits(made), expected)


@pytest.mark.parametrize("sinks", [0, 2])
def test_a_stream_goes_on_after_forwards_that_were_refused_or_interrupted(sinks, monkeypatch):
    model, ids = hf_kvattn.enable(tiny_model()), prompt(40)["input_ids"]
    cache, undisturbed = (SlidingWindowKVCache(model.config, window=8, sinks=sinks) for _ in range(2))
    for cut in (10, 11, 12, 30, 31):
        part = ids[:, cache.get_seq_length() : cut]
        for _ in range(2):
            with pytest.raises(ValueError, match=r"mask is .*, not "):
                forward(model, part, cache, attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(2, 1, 1, 99))
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[0].self_attn.q_proj, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                forward(model, part, cache)
        assert torch.equal(forward(model, part, cache), forward(model, part, undisturbed))


def interrupt(*args):
    raise KeyboardInterrupt
