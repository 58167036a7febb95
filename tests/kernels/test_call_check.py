"""What does not fit is refused once, before any backend: `AttendCall.check`, `PackedKV`, and the steps of graphs."""

import copy
import itertools
from dataclasses import fields, replace

import pytest
import torch
from packed_problems import packed_problem
from problems import problem, ringed
from served import served
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_kvattn
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall, SinkKV
from hf_kvattn.quant.blocks import Blocks
from hf_kvattn.quant.codecs import CODECS
from hf_kvattn.quant.packed import ARRAYS, OF_BLOCKS, PackedKV

BACKENDS = ["auto", "reference", "sdpa", "native"]


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def shape(t: torch.Tensor) -> str:
    return str(tuple(t.shape))


torch.default_generator.manual_seed(0)  # tests are collected before the fixture does so
PADDED = problem("padded")  # q (3, 6, 1, 64), k (3, 2, 100, 64)
RING = ringed(problem("g3-65"), 70, 69)
SINKS = problem("sinks-padded")
PACKED = packed_problem("padded", 4, 8, start=4)
MASKED = replace(problem("short-query"), mask=torch.ones(2, 6, 5, 77, dtype=torch.bool))

# A call that is served, what changes, and words of the refusal.
WRONG = {
    "q-3d": (PADDED, {"q": PADDED.q[0]}, ["(6, 1, 64)"]),
    "k-5d": (PADDED, {"k": PADDED.k[None], "v": PADDED.v[None]}, ["(1, 3, 2, 100, 64)"]),
    "rows": (PADDED, {"k": PADDED.k[:2], "v": PADDED.v[:2]}, ["(3, 6, 1, 64)", "(2, 2, 100, 64)"]),
    "one-row-of-keys": (PADDED, {"k": PADDED.k[:1], "v": PADDED.v[:1]}, ["(3, 6, 1, 64)", "(1, 2, 100, 64)"]),
    "head-dim": (PADDED, {"q": PADDED.q[..., :32]}, ["(3, 6, 1, 32)"]),
    "fewer-values": (PADDED, {"v": PADDED.v[:, :, :99]}, ["(3, 2, 99, 64)"]),
    "narrower-values": (PADDED, {"v": PADDED.v[..., :32]}, ["(3, 2, 100, 32)"]),
    "heads": (PADDED, {"q": PADDED.q[:, :5]}, ["(3, 5, 1, 64)"]),
    "no-query-heads": (PADDED, {"q": PADDED.q[:, :0]}, ["(3, 0, 1, 64)"]),
    "no-kv-heads": (PADDED, {"k": PADDED.k[:, :0], "v": PADDED.v[:, :0]}, ["(3, 0, 100, 64)"]),
    "no-queries": (PADDED, {"q": PADDED.q[:, :, :0]}, ["(3, 6, 0, 64)"]),
    "no-keys": (PADDED, {"k": PADDED.k[:, :, :0], "v": PADDED.v[:, :, :0]}, ["(3, 2, 0, 64)"]),
    "no-rows": (PADDED, {name: getattr(PADDED, name)[:0] for name in "qkv"}, ["(0, 6, 1, 64)"]),
    "dtype-of-k": (PADDED, {"k": PADDED.k.half()}, ["torch.float16", "torch.float32"]),
    "dtype-of-v": (PADDED, {"v": PADDED.v.bfloat16()}, ["torch.bfloat16"]),
    "dtype-of-q": (PADDED, {"q": PADDED.q.double()}, ["torch.float64"]),
    "integers": (PADDED, {name: getattr(PADDED, name).int() for name in "qkv"}, ["torch.int32"]),
    "device-of-q": (PADDED, {"q": PADDED.q.to("meta")}, ["on meta", "on cpu"]),
    "device-of-v": (PADDED, {"v": PADDED.v.to("meta")}, ["on meta", "on cpu"]),
    "leftpad-short": (PADDED, {"leftpad": ints(0, 5)}, ["leftpad is (2,)", "not (3,)"]),
    "leftpad-of-one": (PADDED, {"leftpad": ints(5)}, ["leftpad is (1,)"]),
    "leftpad-2d": (PADDED, {"leftpad": ints(0, 0, 0)[:, None]}, ["leftpad is (3, 1)"]),
    "leftpad-long": (PADDED, {"leftpad": ints(0, 5, 9).long()}, ["torch.int64", "not (3,) torch.int32"]),
    "leftpad-float": (PADDED, {"leftpad": torch.zeros(3)}, ["torch.float32", "torch.int32"]),
    "leftpad-elsewhere": (PADDED, {"leftpad": ints(0, 5, 9).to("meta")}, ["on meta, not"]),
    "s_aux-short": (PADDED, {"s_aux": torch.zeros(5)}, ["s_aux is (5,)", "not (6,)"]),
    "s_aux-of-kv-heads": (PADDED, {"s_aux": torch.zeros(2)}, ["s_aux is (2,)"]),
    "s_aux-2d": (PADDED, {"s_aux": torch.zeros(6, 1)}, ["s_aux is (6, 1)"]),
    "s_aux-ints": (PADDED, {"s_aux": torch.zeros(6, dtype=torch.int64)}, ["s_aux", "torch.int64"]),
    "scale-nan": (PADDED, {"scale": float("nan")}, ["scale", "nan"]),
    "scale-inf": (PADDED, {"scale": float("-inf")}, ["scale", "-inf"]),
    "scale-huge": (PADDED, {"scale": 1e39}, ["scale", "1e+39"]),
    "softcap-0": (PADDED, {"softcap": 0.0}, ["softcap", "got 0.0"]),
    "softcap-negative": (PADDED, {"softcap": -30.0}, ["softcap", "got -30.0"]),
    "softcap-nan": (PADDED, {"softcap": float("nan")}, ["softcap", "nan"]),
    "softcap-zero-in-float32": (PADDED, {"softcap": 1e-60}, ["softcap", "1e-60"]),
    "window-0": (PADDED, {"window": 0}, ["window", "got 0"]),
    "window-negative": (PADDED, {"window": -1}, ["window", "got -1"]),
    "window-float": (PADDED, {"window": 8.0}, ["window", "got 8.0"]),
    "window-bool": (PADDED, {"window": True}, ["window", "got True"]),
    "window-beyond-64-bits": (PADDED, {"window": 2**63}, ["window", str(2**63)]),
    "dropout-1": (PADDED, {"dropout": 1.0}, ["dropout", "got 1.0"]),
    "dropout-negative": (PADDED, {"dropout": -0.1}, ["dropout", "got -0.1"]),
    "dropout-nan": (PADDED, {"dropout": float("nan")}, ["dropout", "nan"]),
    "slot-without-a-ring": (PADDED, {"slot": 3}, ["tokens=None", "slot=3", shape(PADDED.k)]),
    "ring-of-more-tokens": (RING, {"tokens": 71}, ["tokens=71", "slot=69", shape(RING.k)]),
    "ring-without-tokens": (RING, {"tokens": 0}, ["tokens=0"]),
    "ring-negative-tokens": (RING, {"tokens": -1}, ["tokens=-1"]),
    "ring-float": (RING, {"tokens": 65.0}, ["tokens=65.0"]),
    "ring-slot-behind": (RING, {"slot": 70}, ["slot=70"]),
    "ring-slot-before": (RING, {"slot": -1}, ["slot=-1"]),
    "ring-beside-blocks": (PACKED, {"tokens": PACKED.k.shape[2]}, ["tokens=36", "beside blocks"]),
    "slot-beside-blocks": (PACKED, {"slot": 1}, ["slot=1"]),
    "mask-rows": (MASKED, {"mask": MASKED.mask.repeat(2, 1, 1, 1)[:3]}, ["mask is (3, 6, 5, 77)", "(2, 6, 5, 77)"]),
    "mask-heads": (MASKED, {"mask": MASKED.mask[:, :2]}, ["mask is (2, 2, 5, 77)"]),
    "mask-queries": (MASKED, {"mask": MASKED.mask[:, :, :1]}, ["mask is (2, 6, 1, 77)"]),
    "mask-keys": (MASKED, {"mask": MASKED.mask[..., :1]}, ["mask is (2, 6, 5, 1)"]),
    "mask-2d": (MASKED, {"mask": MASKED.mask[0, 0]}, ["mask is (5, 77)"]),
    "mask-1d": (MASKED, {"mask": MASKED.mask[0, 0, 0]}, ["mask is (77,)"]),
    "mask-3d": (MASKED, {"mask": MASKED.mask[0]}, ["mask is (6, 5, 77)"]),
    "mask-5d": (MASKED, {"mask": MASKED.mask[None]}, ["mask is (1, 2, 6, 5, 77)"]),
    "mask-int64": (MASKED, {"mask": MASKED.mask.long()}, ["torch.int64", "not (2, 6, 5, 77) torch.bool"]),
    "mask-int32": (MASKED, {"mask": MASKED.mask.int()}, ["torch.int32"]),
    "mask-uint8": (MASKED, {"mask": MASKED.mask.to(torch.uint8)}, ["torch.uint8"]),
    "mask-complex": (MASKED, {"mask": MASKED.mask.to(torch.complex64)}, ["torch.complex64"]),
    "mask-elsewhere": (MASKED, {"mask": MASKED.mask.to("meta")}, ["on meta"]),
    "mask-of-the-slots": (RING, {"mask": torch.ones(2, 1, 1, 70, dtype=torch.bool)}, ["(2, 1, 1, 70)", "1, 1, 65)"]),
    "blocks-of-fewer-rows": (PACKED, {name: getattr(PACKED, name)[:2] for name in ("q", "k", "v", "leftpad")},
                             ["k_mean is (3, 2, 64)", "not (2, 2, 64)"]),
    "blocks-of-other-heads": (PACKED, {name: getattr(PACKED, name)[:, :1] for name in "kv"}, ["not (3, 1, 64)"]),
    "blocks-of-other-channels": (PACKED, {name: getattr(PACKED, name)[..., :32] for name in "qkv"}, ["not (3, 2, 32)"]),
    "blocks-elsewhere": (PACKED, {name: getattr(PACKED, name).to("meta") for name in ("q", "k", "v", "leftpad")},
                         ["k_mean", "on cpu, not", "on meta"]),
    "too-few-before-blocks": (PACKED, {name: getattr(PACKED, name)[:, :, :3] for name in "kv"}, ["(3, 2, 3, 64)"]),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_reaches_no_backend(name, backend):
    good, changes, words = WRONG[name]
    with hf_kvattn.backend(backend), served() as calls, pytest.raises(ValueError) as refusal:
        dispatch.attend(replace(good, **changes))
    assert calls == []
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize("good", [PADDED, RING, SINKS, PACKED, MASKED])
def test_the_calls_that_are_changed_here_are_served(good):
    assert dispatch.attend(good).isfinite().all()


SINK = SINKS.sinks  # k (3, 2, 6, 64), q (3, 4, 5, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": SINK.q[:, :, :4]}, ["(3, 4, 4, 64)", "(3, 4, 5, 64)"]),
        ({"q": SINK.q[:, :2]}, ["(3, 2, 5, 64)"]),
        ({"q": SINK.q.half(), "k": SINK.k.half(), "v": SINK.v.half()}, ["torch.float16"]),
        ({"k": SINK.k.half()}, ["torch.float16"]),
        ({"v": SINK.v[:, :, :5]}, ["(3, 2, 5, 64)"]),
        ({"k": SINK.k[:, :1], "v": SINK.v[:, :1]}, ["(3, 1, 6, 64)", "(3, 2, 6, 64)"]),
        ({"k": SINK.k[:2], "v": SINK.v[:2]}, ["(2, 2, 6, 64)"]),
        ({"k": SINK.k[:, :, :0], "v": SINK.v[:, :, :0]}, ["(3, 2, 0, 64)"]),
        ({"k": SINK.k.repeat(1, 1, 11, 1), "v": SINK.v.repeat(1, 1, 11, 1)}, ["(3, 2, 66, 64)", "(3, 2, 64, 64)"]),
        ({"k": SINK.k.to("meta"), "v": SINK.v.to("meta"), "q": SINK.q.to("meta"), "leftpad": None}, ["on meta"]),
        ({"leftpad": ints(0)}, ["leftpad is (1,)"]),
        ({"leftpad": ints(0, 1, 2).long()}, ["torch.int64"]),
        ({"evicted": 4.0}, ["4.0"]),
        ({"evicted": 2**62}, [str(2**62)]),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_that_do_not_fit_reach_no_backend(changes, words, backend):
    call = replace(SINKS, sinks=replace(SINK, **changes))
    with hf_kvattn.backend(backend), served() as calls, pytest.raises(ValueError) as refusal:
        dispatch.attend(call)
    assert calls == []
    assert all(word in str(refusal.value) for word in words), refusal.value


BLOCKS = PACKED.packed  # int4 keys, int8 values, 1 head each of (3, 2), 5 slots, D = 64 in groups of 32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k_codes": BLOCKS.k_codes[..., :128].contiguous()}, ["k_codes is", "1024"]),
        ({"v_codes": BLOCKS.v_codes[:, :, :2].contiguous()}, ["v_codes is (3, 2, 2, 2048)", "(3, 2, 5, 2048)"]),
        ({"k_codes": BLOCKS.k_codes.view(torch.int8)}, ["torch.int8"]),
        ({"v_codes": BLOCKS.v_codes.view(torch.float8_e4m3fn)}, ["torch.float8_e4m3fn", "torch.uint8"]),
        ({"k_scale": BLOCKS.k_scale.float()}, ["k_scale", "torch.float32", "torch.uint8"]),
        ({"k_scale": BLOCKS.k_scale[:, :, :4].contiguous()}, ["(3, 2, 4, 48)", "(3, 2, 5, 48)"]),
        ({"k_step": None}, ["k_step goes with key codecs by channel", "int4"]),
        ({"k_unit": BLOCKS.k_unit[:2].contiguous()}, ["k_unit is (2, 2, 64)"]),
        ({"k_order": BLOCKS.k_order.long()}, ["k_order", "torch.int64", "torch.int16"]),
        ({"k_widths": BLOCKS.k_widths[..., :3].contiguous()}, ["k_widths is (3, 2, 3)", "(3, 2, 4)"]),
        ({"v_scale": BLOCKS.v_scale[..., :16].contiguous()}, ["v_scale is (3, 2, 5, 2, 16)"]),
        ({"v_scale": BLOCKS.v_scale[:, :, :, :0].contiguous()}, ["(3, 2, 5, 0, 32)"]),
        ({"v_scale": BLOCKS.v_scale.repeat(1, 1, 1, 4, 1)}, ["(3, 2, 5, 8, 32)", "16"]),
        ({"v_scale": BLOCKS.v_scale[:, :, :, 0].contiguous()}, ["(3, 2, 5, 32)"]),
        ({"k_mean": BLOCKS.k_mean.half()}, ["k_mean", "torch.float16"]),
        ({"k_mean": BLOCKS.k_mean[:, :1].contiguous()}, ["k_codes is (3, 2, 5, 1024)", "(3, 1, 5, 1024)"]),
        ({"k_mean": BLOCKS.k_mean.to("meta")}, ["on meta"]),
        ({"k_codes": BLOCKS.k_codes.transpose(0, 1).contiguous().transpose(0, 1)}, ["k_codes must be contiguous"]),
        ({"v_scale": BLOCKS.v_scale.mT.contiguous().mT}, ["v_scale must be contiguous"]),
        ({"start": -1}, ["start=-1"]),
        ({"start": 33}, ["start=33"]),
        ({"start": 4.0}, ["start=4.0"]),
        ({"tokens": 33}, ["tokens=33"]),
        ({"tokens": -32}, ["tokens=-32"]),
        ({"tokens": 6 * 32}, ["tokens=192", "5 blocks"]),
        ({"slot": -2}, ["slot=-2"]),
        ({"slot": 2}, ["slot=2", "5 blocks"]),  # an odd number of slots
        ({"k_codec": CODECS["int3"]}, ["k_codes", "768"]),
        ({"v_codec": CODECS["fp8"]}, ["torch.uint8", "torch.float8_e4m3fn"]),
    ],
)
def test_blocks_that_do_not_fit_are_not_made(changes, words):
    with pytest.raises(ValueError) as refusal:
        replace(BLOCKS, **changes)
    assert all(word in str(refusal.value) for word in words), refusal.value


def with_slots(count: int) -> PackedKV:
    """`BLOCKS` in so many slots."""
    arrays = {name: getattr(BLOCKS, name) for name in OF_BLOCKS}
    return replace(BLOCKS, **{name: t[:, :, :1].repeat_interleave(count, 2) for name, t in arrays.items()})


def test_rings_of_blocks_begin_at_even_slots():
    ring = with_slots(6)
    for slot in (0, 2, 4):
        assert replace(ring, slot=slot).slot == slot
    for slot in (1, 3, 5, 6, -2):
        with pytest.raises(ValueError, match=f"slot={slot} do not fit 6 blocks"):
            replace(ring, slot=slot)


@pytest.mark.parametrize(
    ("shape", "slot", "words"),
    [
        ((3, 2, 33, 64), 0, ["33 tokens"]),
        ((3, 2, 0, 64), 0, ["0 tokens"]),
        ((3, 2, 6 * 32, 64), 0, ["192 tokens", "5 slots"]),
        ((3, 2, 64, 64), 4, ["from slot 4", "5 slots"]),
        ((3, 2, 32, 64), 5, ["from slot 5"]),
        ((3, 2, 32, 64), -1, ["from slot -1"]),
        ((3, 2, 32, 64), 2**63 - 1, [str(2**63 - 1)]),
        ((1, 2, 32, 64), 0, ["k is (1, 2, 32, 64)", "(3, 2, 32, 64)"]),
        ((3, 1, 32, 64), 0, ["k is (3, 1, 32, 64)"]),
        ((3, 2, 32, 48), 0, ["k is (3, 2, 32, 48)"]),
        ((2, 32, 64), 0, ["k is (2, 32, 64)"]),
    ],
)
def test_blocks_are_quantized_where_they_fit_only(shape, slot, words):
    into = copy.deepcopy(BLOCKS)
    k = torch.randn(shape)
    with pytest.raises(ValueError) as refusal:
        dispatch.quantize_blocks([Blocks(k, k, into, slot)])
    assert all(word in str(refusal.value) for word in words), refusal.value
    unchanged = zip(into.arrays(), BLOCKS.arrays(), strict=True)
    assert all(a is b is None or torch.equal(a, b) for a, b in unchanged)


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda v: v[:, :, :32], lambda v: v[:2], lambda v: v.to("meta")])
def test_values_are_quantized_beside_their_keys_only(change):
    into, k = copy.deepcopy(BLOCKS), torch.randn(3, 2, 64, 64)
    with pytest.raises(ValueError, match="v is .*, not "):
        dispatch.quantize_blocks([Blocks(k, change(k), into, 0)])
    assert torch.equal(into.k_codes, BLOCKS.k_codes) and torch.equal(into.k_scale, BLOCKS.k_scale)


class Elsewhere(torch.Tensor):
    """Says that it is on another device; its memory is the CPU's."""

    device = torch.device("mps")


NAMES = ("q", "k", "v", "leftpad")


@pytest.mark.parametrize("moved", [names for n in (1, 2, 3) for names in itertools.combinations(NAMES, n)], ids=str)
@pytest.mark.parametrize("good", [PADDED, PACKED], ids=["dense", "packed"])
def test_tensors_of_two_devices_are_refused(good, moved):
    changes = {name: getattr(good, name).as_subclass(Elsewhere) for name in moved}
    for backend in BACKENDS:
        with hf_kvattn.backend(backend), pytest.raises(ValueError, match="on mps.*on cpu|on cpu.*on mps"):
            dispatch.attend(replace(good, **changes))


def test_native_is_given_memory_of_the_cpu_alone():
    """Not of a device whose tensors hand out addresses too; packed or not."""
    for good in (PADDED, PACKED):
        changes = {name: getattr(good, name).as_subclass(Elsewhere) for name in NAMES}
        call = replace(good, **changes)
        if good is PACKED:
            with pytest.raises(ValueError, match="k_mean .* on cpu, not .* on mps"):
                dispatch.attend(call)
            elsewhere = {n: t.as_subclass(Elsewhere) for n in ARRAYS if (t := getattr(BLOCKS, n)) is not None}
            call.packed = replace(BLOCKS, **elsewhere)
        with hf_kvattn.backend("native"), pytest.raises(ValueError, match="run on the CPU, the tensors are on mps"):
            dispatch.attend(call)
        assert dispatch.auto_choice(call)[0] == "sdpa"


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("good", [PADDED, PACKED], ids=["dense", "packed"])
def test_tensors_without_memory_are_not_read(good):
    """As a tracer has them: on the CPU by their own account, at the address 0."""
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(getattr(good, name)) for name in NAMES}
        if good is PACKED:
            arrays = {f.name: getattr(BLOCKS, f.name) for f in fields(BLOCKS)}
            made = {n: mode.from_tensor(t) for n, t in arrays.items() if isinstance(t, torch.Tensor)}
            fake["packed"] = replace(BLOCKS, **made)
            k = mode.from_tensor(torch.zeros(3, 2, 32, 64))
            with pytest.raises(RuntimeError, match="bad argument"):
                dispatch.quantize_blocks([Blocks(k, k, fake["packed"], 0)])
        with pytest.raises(RuntimeError, match="bad argument"):
            dispatch.attend(replace(good, **fake))


# Nothing here is wrong: what was served before stays so.
SHORT = AttendCall(torch.randn(2, 4, 9, 32), *torch.randn(2, 2, 2, 4, 32), 0.2)
SERVED = {
    "float64": replace(PADDED, **{name: getattr(PADDED, name).double() for name in "qkv"}),
    "one-mask-for-all": replace(MASKED, mask=MASKED.mask[:1, :1]),
    "float-mask": replace(MASKED, mask=torch.randn(2, 1, 5, 77)),
    "mask-of-another-float": replace(MASKED, mask=torch.randn(1, 6, 5, 77).bfloat16()),
    "leftpad-apart": replace(PADDED, leftpad=torch.stack((PADDED.leftpad, ints(7, 7, 7)), 1)[:, 0]),
    "leftpad-before": replace(PADDED, leftpad=ints(-1, -(2**31), 0)),
    "leftpad-behind": replace(PADDED, leftpad=ints(100, 2**31 - 1, 64)),
    "leftpad-behind-a-tile": replace(problem("g2-64"), leftpad=ints(64, 65)),
    "leftpad-behind-blocks": replace(PACKED, leftpad=ints(100, 101, 68)),
    "leftpad-behind-a-ring": replace(RING, leftpad=ints(65, 2**31 - 1)),
    "window-of-all": replace(PADDED, window=2**63 - 1),
    "integer-scale": replace(PADDED, q=PADDED.q / 8, scale=1),
    "s_aux-of-another-float": replace(PADDED, s_aux=torch.zeros(6, dtype=torch.bfloat16)),
    "blocks-alone": replace(PACKED, packed=replace(BLOCKS, start=0), k=PACKED.k[:, :, :0], v=PACKED.v[:, :, :0]),
    "no-blocks-yet": replace(PACKED, packed=replace(BLOCKS, tokens=0)),
    "more-queries-than-keys": SHORT,
    "more-queries-than-keys-in-a-window": replace(SHORT, window=3),
    "more-queries-than-keys-both-ways": replace(SHORT, causal=False),
    "sinks-before-all": replace(SINKS, sinks=replace(SINK, leftpad=ints(-9, 2**31 - 1, 3))),
    "sinks-never": replace(SINKS, sinks=replace(SINK, evicted=-(2**60))),
    "sinks-apart": replace(SINKS, sinks=SinkKV(SINK.k.mT.contiguous().mT, SINK.v, SINK.q, SINK.evicted, SINK.leftpad)),
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_odd_calls_that_are_right_are_served_alike(name):
    call = SERVED[name]
    expected = dispatch.BACKENDS["reference"].attend(call)
    assert expected.isfinite().all()
    for backend in BACKENDS:
        with hf_kvattn.backend(backend):
            if backend == "auto" or dispatch.BACKENDS[backend].unsupported(call) is None:
                out = dispatch.attend(call)
                assert out.dtype == call.q.dtype
                torch.testing.assert_close(out, expected, rtol=0, atol=2e-4 if call.packed else 2e-6, msg=backend)
