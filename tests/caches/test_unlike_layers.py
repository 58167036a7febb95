"""Every pair of unlike layers in one cache: full and sliding, exact and quantized, each counting keys from elsewhere.

transformers makes one mask for all sliding layers, from what the first of them answers. So what a layer's mask means
must not depend on how another one stores its tokens.
"""

import functools

import pytest
import torch
from models import tiny_model
from spelled_out import expected_logits
from transformers import DynamicCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

BACKENDS = ["reference", "sdpa", "native"]
WINDOW = 24
S, F = "sliding_attention", "full_attention"
MODELS = {
    "mistral": {},  # all layers slide
    "gemma2": {"layer_types": [S, F, S]},
    "gemma3": {"layer_types": [S, S, F]},
    "qwen2-sliding": {},  # the last two slide
}
# Layers that stay exact, beside quantized ones: every pair of a full and a sliding, exact and quantized layer is here,
# in both orders.
SKIPPED = [("mistral", 0), ("mistral", 1), ("mistral", 2), ("gemma2", 0), ("gemma2", 1), ("gemma2", 2),
           ("gemma3", 0), ("gemma3", 1), ("gemma3", None), ("qwen2-sliding", 0), ("qwen2-sliding", 1),
           ("qwen2-sliding", 2)]  # fmt: skip
# The window is crossed by a prompt, by steps and by parts of a prompt; rings of slots and of blocks wrap.
CHUNKS = [60, 1, 1, 40, 70, 1, 64, 66, 1, 1, 19]
# Of row 0, from one token to another: at the left, longer than the window and than the first part, and inside.
PADDINGS = [(0, 0), (0, 30), (0, 90), (50, 75)]
CLOSE = 1e-3  # of the largest logit: the native kernels round queries for codes to 16 bits


@functools.cache
def stock(family: str):
    return tiny_model(family, sliding_window=WINDOW, head_dim=16, **MODELS[family])


def enabled(family: str):
    return hf_kvattn.enable(tiny_model(family, sliding_window=WINDOW, head_dim=16, **MODELS[family]))


@functools.cache
def text(padding: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions of two rows, the first one padded."""
    ids = torch.randint(3, 128, (2, sum(CHUNKS)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, slice(*padding)] = 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def parts(padding: tuple[int, int]):
    """The text in chunks: what a model is given of each, and which of its tokens are none of padding."""
    ids, mask, positions = text(padding)
    for i, new in enumerate(CHUNKS):
        end = sum(CHUNKS[: i + 1])
        part = slice(end - new, end)
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, part]}
        yield {"input_ids": ids[:, part], **given}, mask[:, part].bool()


def as_stock(cache) -> DynamicCache:
    """What `cache` holds, dense and from the first token on; zeros stand for tokens that a window has left behind."""
    dense = DynamicCache()
    for i, layer in enumerate(cache.layers if cache.get_seq_length() else ()):
        held = layer.dense()
        lost = torch.zeros(*held[0].shape[:2], layer.seen - held[0].shape[2], held[0].shape[3])
        dense.update(*(torch.cat([lost, t], 2) for t in held), i)
    return dense


def assert_close(ours, theirs, seen) -> None:
    """`seen` `(B, T)` bool: what padding computes is nobody's business."""
    assert float((ours - theirs)[seen].abs().max()) <= CLOSE * float(theirs[seen].abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize(("family", "skipped"), SKIPPED)
def test_exact_layers_beside_quantized_ones(family, skipped, padding, backend):
    """Each part has the logits of stock transformers over what the layers held before it."""
    model, skip_layers = enabled(family), () if skipped is None else (skipped,)
    cache = QuantizedKVCache(model.config, bits=8, group_size=16, skip_layers=skip_layers)
    if backend == "native" and padding[0]:
        backend = "auto"  # the native kernels serve no dense mask
    with torch.no_grad(), hf_kvattn.backend(backend):
        for given, seen in parts(padding):
            held = as_stock(cache)
            ours = model(**given, past_key_values=cache).logits
            if seen.any():
                assert_close(ours, stock(family)(**given, past_key_values=held).logits, seen)
    assert cache.layers[1 if skipped == 0 else 0].packed_tokens


@functools.cache
def stock_logits(family: str, padding: tuple[int, int]) -> torch.Tensor:
    ids, mask, positions = text(padding)
    with torch.no_grad():
        return stock(family)(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


# What all of them hold is exact: a quantized cache whose newest tokens are the whole text.
LATE = functools.partial(QuantizedKVCache, group_size=16, residual_length=sum(CHUNKS))


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("make", [StaticKVCache, LATE, *(functools.partial(LATE, skip_layers=(i,)) for i in range(3))],
                         ids=["static", "late", "late-0", "late-1", "late-2"])  # fmt: skip
@pytest.mark.parametrize("family", MODELS)
def test_exact_layers_of_every_kind_give_stock_logits(family, make, padding):
    model = enabled(family)
    cache = make(model.config)
    with torch.no_grad():
        logits = [model(**given, past_key_values=cache).logits for given, _ in parts(padding)]
    assert_close(torch.cat(logits, 1), stock_logits(family, padding), text(padding)[1].bool())


@functools.cache
def oracle_of(family: str, window: int, sinks: int, padding: tuple[int, int]) -> torch.Tensor:
    model = tiny_model(family, sliding_window=WINDOW, head_dim=16, **MODELS[family])
    return expected_logits(model, text(padding)[0], window, sinks, torch.tensor([padding[1], 0]))


@pytest.mark.parametrize("padding", PADDINGS[:3], ids=str)
@pytest.mark.parametrize(("window", "sinks"), [(11, 3), (40, 4), (40, 0)])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen2-sliding"])
def test_forced_windows_beside_the_models_own(family, window, sinks, padding):
    """Of 24: a smaller one is forced on all layers, a larger one on the full ones."""
    model = enabled(family)
    cache = SlidingWindowKVCache(model.config, window, sinks)
    with torch.no_grad():
        ours = torch.cat([model(**given, past_key_values=cache).logits for given, _ in parts(padding)], 1)
    assert_close(ours, oracle_of(family, window, sinks, padding), text(padding)[1].bool())
