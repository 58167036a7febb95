"""What is refused leaves nothing behind: the cache is the same, byte for byte, and goes on as if nothing had come."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from models import tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

ROWS, HELD, FITS = 3, 46, 96  # tokens that a cache holds, and those that one of a fixed size has room for
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
WINDOWS = {"sliding_window": 24, "head_dim": 16}
KINDS: dict[str, tuple[str, dict, Callable]] = {
    "static": ("llama", {}, StaticKVCache),
    "static-sized": ("llama", {}, functools.partial(StaticKVCache, max_cache_len=FITS)),
    "windows-sized": ("gemma2", WINDOWS, functools.partial(StaticKVCache, max_cache_len=FITS)),
    "sliding": ("llama", {}, functools.partial(SlidingWindowKVCache, window=12)),
    "sliding-sinks": (
        "llama",
        {**DYNAMIC, "max_position_embeddings": 200},
        functools.partial(SlidingWindowKVCache, window=12, sinks=4),
    ),
    "int8": ("llama", {}, functools.partial(QuantizedKVCache, bits=8, group_size=16)),
    "int4-sized": ("llama", {}, functools.partial(QuantizedKVCache, bits=4, group_size=16, max_cache_len=FITS)),
    "int8-windows": (
        "gemma2",
        WINDOWS,
        functools.partial(QuantizedKVCache, bits=8, group_size=16, skip_layers=(0,)),
    ),
}
SLIDING = ("sliding", "sliding-sinks")
SIZED = ("static-sized", "windows-sized", "int4-sized")


@functools.cache
def model_of(kind: str):
    family, changes, _ = KINDS[kind]
    return hf_kvattn.enable(tiny_model(family, **changes))


def inputs(begin: int, end: int, **changes) -> dict:
    """Tokens `begin` to `end` of a text whose first row is padded at the left."""
    ids = torch.randint(3, 128, (ROWS, 300), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
    return given | changes


@torch.no_grad()
def filled(kind: str):
    """A cache of a prompt and a step."""
    model = model_of(kind)
    cache = KINDS[kind][2](model.config)
    for part in ((0, HELD - 1), (HELD - 1, HELD)):
        model(**inputs(*part), past_key_values=cache)
    return cache


@torch.no_grad()
def goes_on(kind: str, cache) -> torch.Tensor:
    """The logits of a step, of the next part of a prompt, and of a step."""
    parts = ((HELD, HELD + 1), (HELD + 1, HELD + 4), (HELD + 4, HELD + 5))
    return torch.cat([model_of(kind)(**inputs(*part), past_key_values=cache).logits for part in parts], 1)


def state(cache) -> dict[str, object]:
    """What the layers hold, tensors as bytes, without spare capacity, and all that they count."""
    found: dict[str, object] = {}
    for i, layer in enumerate(cache.layers):
        counted = (int, str, type(None), torch.dtype, torch.device)
        found |= {f"{i}.{name}": each for name, each in vars(layer).items() if isinstance(each, counted)}
        filled = layer.filled().items()
        found |= {f"{i}.{name}": t.contiguous().view(torch.uint8).numpy().tobytes() for name, t in filled}
    return found


def step(**changes) -> Callable:
    """A step that is wrong in `changes`."""
    return lambda kind, cache: model_of(kind)(**inputs(HELD, HELD + 1, **changes), past_key_values=cache)


def padded_mask(rows: int) -> torch.Tensor:
    mask = torch.ones(rows, HELD + 1, dtype=torch.long)
    mask[0, :5] = 0
    return mask


def another_model(kind: str, **changes):
    family, own, _ = KINDS[kind]
    return hf_kvattn.enable(tiny_model(family, **{**own, **changes}))


def too_many(kind, cache):
    """More than a fixed size, or than the positions at which a model's frequencies change."""
    model_of(kind)(**inputs(HELD, FITS + 1 if kind in SIZED else HELD + 210), past_key_values=cache)


def wrong_batch(kind, cache):
    given = {name: tensor[:2] for name, tensor in inputs(HELD, HELD + 1).items()}
    model_of(kind)(**given, past_key_values=cache)


def wrong_dtype(kind, cache):
    another_model(kind).bfloat16()(**inputs(HELD, HELD + 1), past_key_values=cache)


def wrong_heads(kind, cache):
    another_model(kind, num_key_value_heads=1)(**inputs(HELD, HELD + 1), past_key_values=cache)


def wrong_depth(kind, cache):
    another_model(kind, num_hidden_layers=2)(**inputs(HELD, HELD + 1), past_key_values=cache)


def not_enabled(kind, cache):
    family, own, _ = KINDS[kind]
    tiny_model(family, **own)(**inputs(HELD, HELD + 2), past_key_values=cache)


ANY = tuple(KINDS)
CALLS: dict[str, tuple[tuple[str, ...], Callable]] = {
    "too many tokens": ((*SIZED, "sliding-sinks"), too_many),
    "another batch": (ANY, wrong_batch),
    "another dtype": (ANY, wrong_dtype),
    "other heads": (ANY, wrong_heads),
    "another depth": (ANY, wrong_depth),
    "a model that is not enabled": (SLIDING, not_enabled),
    "attention weights": (ANY, step(output_attentions=True)),
    **{f"a mask of {rows} rows": (ANY, step(attention_mask=padded_mask(rows))) for rows in (1, 2, 4)},
    **{
        f"a mask {name}": (ANY, step(attention_mask=mask))
        for name, mask in {
            "of 2 rows, 4-D": torch.ones(2, 1, 1, HELD + 1, dtype=torch.bool),
            "of 3 heads": torch.ones(ROWS, 3, 1, HELD + 1, dtype=torch.bool),
            "of 2 queries": torch.ones(ROWS, 1, 2, HELD + 1, dtype=torch.bool),
            "of a key too few": torch.ones(ROWS, 1, 1, 7, dtype=torch.bool),
            "of a key too many": torch.ones(ROWS, 1, 1, HELD + 2, dtype=torch.bool),
            "of int64, 4-D": torch.ones(ROWS, 1, 1, HELD + 1, dtype=torch.int64),
            "of int32, 4-D": torch.ones(ROWS, 1, 1, HELD + 1, dtype=torch.int32),
        }.items()
    },
    "positions of 2 tokens": (ANY, step(position_ids=torch.zeros(ROWS, 2, dtype=torch.long))),
    "positions that run backwards": (SLIDING, step(position_ids=torch.full((ROWS, 1), HELD - 1))),
    "positions that jump": (SLIDING, step(position_ids=torch.full((ROWS, 1), HELD + 5))),
    "a crop forwards": (ANY, lambda kind, cache: cache.crop(1)),
    "a crop of too many": (ANY, lambda kind, cache: cache.crop(-HELD - 1)),
    "a crop of a float": (ANY, lambda kind, cache: cache.crop(-2.0)),
    "a row too many": (ANY, lambda kind, cache: cache.batch_select_indices(torch.tensor([0, ROWS]))),
    "rows that are no integers": (ANY, lambda kind, cache: cache.reorder_cache(torch.tensor([0.0, 1.0, 2.0]))),
    "no rows": (ANY, lambda kind, cache: cache.batch_select_indices(torch.zeros(0, dtype=torch.long))),
    "bools for other rows": (ANY, lambda kind, cache: cache.batch_select_indices(torch.tensor([True, False]))),
    "rows repeated 0 times": (ANY, lambda kind, cache: cache.batch_repeat_interleave(0)),
    "a conversion": (ANY, lambda kind, cache: cache.to(torch.bfloat16)),
}
REFUSED = [(call, kind) for call, (kinds, _) in CALLS.items() for kind in kinds]


@pytest.mark.parametrize(("call", "kind"), REFUSED)
def test_a_refused_call_leaves_nothing_behind(call, kind):
    cache = filled(kind)
    twin, before = copy.deepcopy(cache), state(cache)
    # The reference, which cannot read what is not there, as others might if a bad mask came through.
    with hf_kvattn.backend("reference"), torch.no_grad(), pytest.raises(ValueError):
        CALLS[call][1](kind, cache)
    assert state(cache) == before
    assert torch.equal(goes_on(kind, cache), goes_on(kind, twin))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("int")])
@torch.no_grad()
def test_keys_that_cannot_be_quantized_are_taken_back_by_the_crop_that_is_named(kind):
    """They are seen when their block is due: after the attention of their layer, and of all layers before it."""
    model, cache, new = model_of(kind), filled(kind), 40
    twin, text = copy.deepcopy(cache), inputs(HELD, HELD + new)
    embeddings = model.get_input_embeddings()(text.pop("input_ids"))
    embeddings[1, 7] = torch.nan
    with pytest.raises(ValueError, match="keys are NaN or infinite and cannot be quantized"):
        model(inputs_embeds=embeddings, **text, past_key_values=cache)
    with pytest.raises(ValueError, match=rf"layers hold {HELD} to {HELD + new} tokens; crop\(-{new}\) goes back"):
        model(**inputs(HELD, HELD + 1), past_key_values=cache)
    cache.crop(-new)
    assert torch.equal(goes_on(kind, cache), goes_on(kind, twin))
