"""The compared caches: their names, their sizes, and the memory that is seen."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf_kvattn.evaluation.common import memory, variants
from hf_kvattn.evaluation.common.variants import VARIANTS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_unknown_and_repeated_names_are_refused():
    with pytest.raises(ValueError, match="no-such-cache.*stock-static"):
        variants.select(["none", "no-such-cache"])
    with pytest.raises(ValueError, match="twice"):
        variants.select(["none", "none"])
    assert [variant.name for variant in variants.select(["stock-fp8", "none"])] == ["stock-fp8", "none"]


@pytest.mark.parametrize(
    ("name", "numbers", "bits"), [("stock-dynamic", 20, 32), ("stock-static", 32, 32), ("stock-fp8", 20, 8)]
)
def test_sizes_of_stock_caches(model, tokens, name, numbers, bits):
    cache, reason = variants.try_make(VARIANTS[name], model.config, 32)
    if reason is not None:
        pytest.skip(reason)  # older transformers have no fp8 cache
    with torch.no_grad():
        model(tokens[None, :20], past_key_values=cache)
    exact = 2 * 2 * 2 * 16 * numbers * bits // 8  # layers, K and V, heads, head_dim
    assert exact <= memory.cache_bytes(cache) <= exact + 64  # a few counters and scales
    assert memory.bits_per_element(cache, model.config) == pytest.approx(bits, rel=0.01)
    assert memory.cache_bytes(None) == 0 and memory.bits_per_element(None, model.config) is None


def test_every_storage_is_counted_once(model):
    cache = DynamicCache(config=model.config)
    keys = torch.zeros(1, 2, 5, 16)
    cache.layers[0].keys = cache.layers[0].values = keys
    cache.layers[1].keys, cache.layers[1].values = keys[:, :1], (keys, {"scale": torch.zeros(3)})
    assert memory.cache_bytes(cache) == keys.nbytes + 12


def test_peak_memory_sees_a_transient_copy():
    watched = memory.PeakMemory(torch.device("cpu"))
    if not watched.method.startswith("peak resident"):
        pytest.skip(f"only available here: {watched.method}")
    watched.start()
    torch.ones(2**24)  # 64 MiB, gone at once
    assert 60 * 2**20 < watched.stop() < 90 * 2**20
    watched.start()
    assert watched.stop() < 30 * 2**20
