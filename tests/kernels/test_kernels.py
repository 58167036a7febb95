"""Every backend against the fp32 reference, and the reference against a loop that spells attention out."""

import functools
import math
import struct

import pytest
import torch
from problems import RINGS, SHAPES, VARIANTS, problem, ringed
from tolerance import LSE, Expected, assert_close_to_reference, plain_torch

from hf_kvattn.kernels import native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@functools.lru_cache(maxsize=64)
def case(name: str, dtype: torch.dtype = torch.float32, kv_heads: int = 2) -> tuple[AttendCall, Expected]:
    """A problem and what is due. Variants, rings and numbers of threads share it, so nobody may change it."""
    torch.default_generator.manual_seed(0)
    call = problem(name, dtype, kv_heads)
    return call, Expected.of(call)


def spelled_out(call: AttendCall) -> torch.Tensor:
    """Attention one number at a time, in Python floats: `(B, Tq, Hq, D)`."""
    batch, q_heads, q_len, dim = call.q.shape
    kv_len, group = call.k.shape[2], q_heads // call.k.shape[1]
    out = torch.zeros(batch, q_len, q_heads, dim)
    for b in range(batch):
        for h in range(q_heads):
            for i in range(q_len):
                position = kv_len - q_len + i
                low = 0 if call.leftpad is None else int(call.leftpad[b])
                if call.window is not None:
                    low = max(low, position - call.window + 1)
                keys = range(low, position + 1 if call.causal else kv_len)
                pairs = [(call.q[b, h, i], call.k[b, h // group, j], call.v[b, h // group, j]) for j in keys]
                if sinks := call.sinks:
                    left = sinks.evicted + i - (0 if sinks.leftpad is None else int(sinks.leftpad[b]))
                    for j in range(max(0, min(left, sinks.k.shape[2]))):
                        pairs.append((sinks.q[b, h, i], sinks.k[b, h // group, j], sinks.v[b, h // group, j]))
                scores = [float(q.double() @ k.double()) * call.scale for q, k, _ in pairs]
                if call.softcap is not None:
                    scores = [call.softcap * math.tanh(s / call.softcap) for s in scores]
                if call.s_aux is not None:
                    scores.append(float(call.s_aux[h]))
                    pairs.append((None, None, 0.0))
                weights = [math.exp(s - max(scores)) for s in scores]
                for (_, _, v), w in zip(pairs, weights, strict=True):
                    out[b, i, h] += w / sum(weights) * v
    return out


@pytest.mark.parametrize("name", [n for n in SHAPES if SHAPES[n][1] * SHAPES[n][2] * SHAPES[n][0] < 2500])
def test_reference_is_attention_spelled_out(name):
    call = problem(name)
    torch.testing.assert_close(reference.attend(call), spelled_out(call), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_reference_rounds_once(name, dtype):
    call = problem(name, dtype)
    assert_close_to_reference(reference.attend(call), call)


RING_CASES = [(name, *ring) for name, rings in RINGS.items() for ring in rings]


@pytest.mark.parametrize(("name", "slots", "slot"), RING_CASES)
def test_rings_mean_the_same_as_the_tokens_in_order(name, slots, slot):
    call = problem(name)
    torch.testing.assert_close(reference.attend(ringed(call, slots, slot)), reference.attend(call), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("module", [sdpa, native], ids=lambda m: m.__name__.rsplit(".")[-1])
@pytest.mark.parametrize(("name", "slots", "slot"), RING_CASES)
def test_rings(name, slots, slot, module, dtype):
    call, expected = case(name, dtype)
    ring = ringed(call, slots, slot)
    assert module.unsupported(ring) is None
    expected.assert_close(module.attend(ring))


@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize(("name", "slots", "slot"), RING_CASES)
def test_rings_in_every_variant(name, slots, slot, variant):
    call, expected = case(name)
    lse = torch.full(call.q.shape[:3], torch.nan)
    expected.assert_close(native.attend(ringed(call, slots, slot), lse), lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_sdpa(name, dtype):
    call, expected = case(name, dtype)
    assert sdpa.unsupported(call) is None
    expected.assert_close(sdpa.attend(call))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
@pytest.mark.parametrize("name", SHAPES)
def test_native(name, variant, dtype):
    call, expected = case(name, dtype)
    lse = torch.full(call.q.shape[:3], torch.nan)
    assert native.unsupported(call) is None
    expected.assert_close(native.attend(call, lse), lse)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7, 8, 12])
@pytest.mark.parametrize(
    "name", ["long-split", "padded", "one-token", "window-many-queries", "prefill", "padded-prefill"]
)
def test_native_splits_the_work_over_any_number_of_threads(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kv_heads in (1, 2, 5):  # also 2 to 6 threads for each job, so that jobs begin where a thread's share does
            call, expected = case(name, kv_heads=kv_heads)
            lse = torch.full(call.q.shape[:3], torch.nan)
            expected.assert_close(native.attend(call, lse), lse)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("module", [sdpa, native, reference], ids=lambda m: m.__name__.rsplit(".")[-1])
@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_extreme_scores(module, scale):
    """Scores of several hundred: exp overflows without the running maximum, and one key takes all the weight."""
    call = problem("prefill-after-past")
    call.q, call.scale = call.q * scale, 1.0
    assert_close_to_reference(module.attend(call), call)


def test_native_shows_nan_instead_of_hiding_it():
    call = problem("g3-65")
    call.k[0, 1, 13, 5] = torch.nan
    out = native.attend(call)
    assert out[0, :, 3:].isnan().all() and not out[0, :, :3].isnan().any() and not out[1].isnan().any()


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_dense_masks(kind, heads):
    call = problem("short-query")
    mask = torch.rand(2, heads, 5, 77) > 0.4
    call.mask = mask if kind == "bool" else torch.randn(2, heads, 5, 77).masked_fill(~mask, -torch.inf)
    assert_close_to_reference(sdpa.attend(call), call)
    assert "dense mask" in native.unsupported(call)


def test_a_longer_key_range_is_noticed():
    """The bound can fail: one visible key more or less in 3,001 exceeds it."""
    call = problem("long-split")
    shorter = AttendCall(call.q, call.k[:, :, 1:], call.v[:, :, 1:], call.scale)
    lse = [reference.attend_with_lse(c)[1] for c in (call, shorter)]
    assert (lse[0] - lse[1]).abs().max() > 10 * LSE
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_to_reference(plain_torch(shorter), call)


def test_select_variant_refuses_what_the_cpu_lacks():
    with pytest.raises(ValueError, match="'neon512'.*now"):
        native.select_variant("neon512")


def test_a_library_with_other_argument_structs_is_refused_with_the_reason(monkeypatch):
    library, reason = native._load.__wrapped__()
    assert library is not None and reason is None
    sizes = native._ARGS.size + native._PACKED_ARGS.size, native._QUANTIZE_ARGS.size, native._LINEAR_ARGS.size
    monkeypatch.setattr(native, "_QUANTIZE_ARGS", struct.Struct(native._QUANTIZE_ARGS.format + "q"))
    library, reason = native._load.__wrapped__()
    assert library is None and f"takes structs of {sizes} bytes, this package makes" in reason
