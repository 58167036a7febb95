"""The table of few-bit codes in padded batches: what padding holds has no part in it."""

import pytest
import torch
from models import tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.caches.first_tokens import WARM_UP, FirstTokens
from hf_kvattn.quant import widths

TABLE = [f"k_{name}" for name in widths.KeyTable._fields]


def fed(model, padding: list[int], tokens: int, chunk: int, pad_token: int, **settings) -> QuantizedKVCache:
    """A cache that has been given rows of random tokens, of each the first `padding` ones `pad_token`."""
    ids = torch.randint(10, 120, (len(padding), tokens), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(tokens) >= torch.tensor(padding)[:, None]).long()
    ids = torch.where(mask.bool(), ids, pad_token)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = QuantizedKVCache(model.config, bits=2, group_size=16, **settings)
    with torch.no_grad():
        for begin in range(0, tokens, chunk):
            part = slice(begin, begin + chunk)
            mine = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            model(ids[:, part], past_key_values=cache, **mine)
    return cache


# Not one by one in Gemma 2: its layers with windows have codes first. Those of a block that is partly padding depend on
# it a little, and so do the next layer's keys.
@pytest.mark.parametrize(("family", "chunk"), [(f, n) for f in ("llama", "mistral") for n in (1, 9, 50, 200)]
                         + [("gemma2", n) for n in (9, 50, 200)])  # fmt: skip
@pytest.mark.parametrize("padding", [[0, 50, 61], [40], [3, 90], [130, 131]], ids=str)
def test_what_padding_holds_has_no_part_in_a_table(family, padding, chunk):
    model = hf_kvattn.enable(tiny_model(family))
    one, other = (fed(model, padding, 200, chunk, pad_token) for pad_token in (1, 7))
    for layer, its in zip(one.layers, other.layers, strict=True):
        assert layer.packed_tokens == its.packed_tokens > 0 and layer.exact_prefix(200, 200) == 200
        for name in TABLE:
            assert torch.equal(layer._packed[name], its._packed[name]), name


def test_a_long_row_is_not_touched_by_a_padded_one_beside_it():
    model = hf_kvattn.enable(tiny_model())
    both, alone = fed(model, [0, 150], 200, 200, 1), fed(model, [0], 200, 200, 1)
    for layer, its in zip(both.layers, alone.layers, strict=True):
        assert torch.equal(layer._packed["k_order"][:1], its._packed["k_order"])
        assert torch.equal(layer._packed["k_widths"][:1], its._packed["k_widths"])


@pytest.mark.parametrize("settings", [{}, {"residual_length": 5}, {"max_cache_len": 300}], ids=str)
def test_rows_of_padding_wait_for_tokens(settings):
    """180 tokens are padding: nothing is a code until there are 64 others, and then all whole blocks are."""
    model = hf_kvattn.enable(tiny_model())
    least = 4 + settings.get("residual_length", 0)
    for tokens in (200, 180 + WARM_UP + least - 5, 180 + WARM_UP + least + 28):
        cache = fed(model, [180], tokens, 10, 1, **settings)
        due = tokens - least
        enough = tokens - settings.get("residual_length", 0) - 180 >= WARM_UP
        assert {layer.packed_tokens for layer in cache.layers} == {due // 32 * 32 if enough else 0}
        assert cache.get_seq_length() == tokens
    assert enough


def test_samples():
    k = torch.arange(3 * 20.0).view(3, 1, 20, 1)
    for padding, expected in (
        (None, [[0, 1, 2, 3, 4, 5], [20, 21, 22, 23, 24, 25], [40, 41, 42, 43, 44, 45]]),
        ([4, 2, 2], [[0, 1, 2, 3, 4, 5], [20, 21, 22, 23, 24, 25], [40, 41, 42, 43, 44, 45]]),
        ([23, 6, 21], [[19, 22, 23, 24, 25, 26], [22, 23, 24, 25, 26, 27], [57, 58, 59, 22, 23, 24]]),
        ([90, 21, 90], [[37, 38, 39, 37, 38, 39], [37, 38, 39, 37, 38, 39], [37, 38, 39, 37, 38, 39]]),
        ([90, 90, 91], [[19] * 6] * 3),
    ):
        first = FirstTokens(None, None if padding is None else torch.tensor(padding, dtype=torch.int32))
        assert first.sample(k, 4, 6).flatten(1).tolist() == expected
    first = FirstTokens(None, torch.tensor([23, 6, 21]))
    assert first.enough(4, 70) and not first.enough(4, 69) and not first.enough(9, 72) and FirstTokens().enough(4, 68)


def test_queries_of_padding_do_not_count_and_rows_move():
    query = torch.ones(3, 4, 5, 2)
    noted = FirstTokens().noted(query, 2, 10, torch.tensor([0, 8, 11]))
    assert noted.importance[:, :, 0].tolist() == [[10, 10], [4, 4], [0, 0]]
    noted = noted.noted(query[:, :, :1], 2, 11, None).noted(query[:, :, :1], 2, 12, torch.tensor([0, 0, 0]))
    assert noted.importance[:, :, 0].tolist() == [[14, 14], [8, 8], [2, 2]] and noted.padding.tolist() == [0, 8, 11]
    assert noted.rows(torch.tensor([2, 0])).padding.tolist() == [11, 0]
    copied = noted.rows_copied(torch.tensor([2, 0]), torch.tensor([0, 1]))
    assert copied.padding.tolist() == [8, 8, 0] and copied.importance[:, 0, 0].tolist() == [8, 8, 14]
    assert noted.padding.tolist() == [0, 8, 11]
