"""The compared caches: their names, their sizes, and the memory that is seen."""

from __future__ import annotations

import pytest
import torch
from models import tiny_config
from transformers import DynamicCache

from hf_kvattn.convert import calibrate
from hf_kvattn.evaluation.common import fake_quantized, memory, variants
from hf_kvattn.evaluation.common.variants import VARIANTS
from hf_kvattn.quant.calibration import Calibration, file_name

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


def test_kivi_rounds_each_group_between_its_extremes():
    x = torch.randn(1, 1, 64, 64)
    for rounded, group in ((fake_quantized.kivi_keys(x, 2)[0, 0, 32:, 5], x[0, 0, 32:, 5]),
                           (fake_quantized.kivi_values(x, 2)[0, 0, 7, 32:], x[0, 0, 7, 32:])):  # fmt: skip
        low, step = group.min(), (group.max() - group.min()) / 3
        nearest = low + step * ((group - low) / step).round()
        torch.testing.assert_close(rounded, nearest, rtol=0, atol=0.02)  # of scales in bfloat16
        assert len(rounded.unique()) == 4
    assert torch.equal(fake_quantized.kivi_keys(torch.ones(1, 1, 32, 32), 2), torch.ones(1, 1, 32, 32))


def test_kvarn_takes_the_sizes_of_tokens_out():
    """What is left has the error of numbers of one size; 4 bits leave 0.1074 of a normal one's deviation."""
    x = torch.randn(1, 2, 256, 64)
    sized = x * torch.logspace(-2, 2, 256)[:, None]
    error = (fake_quantized.kvarn(sized, 4) - sized).square().mean(-1) / sized.square().mean(-1)
    assert error.max() < 0.06 and 0.09 < error.mean().sqrt() < 0.13
    assert fake_quantized.kvarn(torch.zeros(1, 1, 128, 64), 2).isfinite().all()


@pytest.mark.parametrize(("name", "code_bits"), [("fake-kivi-int2", 3.0), ("fake-kvarn-int4", 4 + 0.125 + 0.5)])
def test_a_fake_cache_rounds_old_tokens_once_and_counts_their_bits(name, code_bits):
    config = tiny_config(head_dim=32)
    cache, reason = variants.try_make(VARIANTS[name], config, 600)
    assert reason is None and cache is not None and VARIANTS[name].fake
    given = torch.randn(2, 1, 2, 600, 32)
    seen = []
    for start, end in ((0, 300), (300, 301), (301, 430), (430, 600)):
        for i in range(3):
            k, v = cache.update(*given[..., start:end, :], i)
        assert torch.equal(k[:, :, start:], given[0, ..., start:end, :])
        seen.append((k.clone(), v.clone()))
    rounded = [int((k != given[0, ..., : k.shape[2], :]).any(-1).any(1).sum()) for k, v in seen]
    assert rounded == [0, 128, 128, 256]
    assert torch.equal(seen[1][0][:, :, :128], seen[3][0][:, :, :128])
    assert torch.equal(seen[1][1][:, :, :128], seen[3][1][:, :, :128])
    expected = (256 * code_bits + 344 * 16) / 600
    assert memory.bits_per_element(cache, config) == pytest.approx(expected)
    assert variants.default_names() == [x for x in variants.default_names(fakes=True) if not VARIANTS[x].fake]


def test_fakes_refuse_windows_and_other_widths():
    for config in (tiny_config("mistral", head_dim=32), tiny_config(head_dim=16)):
        assert "stands for full attention alone" in str(variants.try_make(VARIANTS["fake-kivi-int2"], config, 64)[1])


def test_calibrated_rows_need_a_file_in_the_models_folder(tmp_path):
    config = tiny_config()
    config._name_or_path = str(tmp_path)
    assert "no calibration" in str(variants.try_make(VARIANTS["kvattn-int2-calibrated"], config, 64)[1])
    made = Calibration("llama", 3, 2, 16, 16, (2, 3, 2), (2, 2, 4))
    calibrate.save(made, tmp_path / file_name("int2"))
    cache, reason = variants.try_make(VARIANTS["kvattn-int2-calibrated"], config, 64)
    assert reason is None and cache.settings["calibration"] == made.as_json()
