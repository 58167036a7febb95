"""Random calls, right and wrong ones: no backend sees a wrong one, and all give what the reference gives of the others.

Keys, masks and codes fill their memory to the last byte, so that a library built with AddressSanitizer reports a read
beyond them (`test_sanitizers.py`).
"""

import os
import random
from collections.abc import Callable
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch
from packed_problems import blank, packed_problem
from problems import SHAPES, problem, ringed
from served import served
from tolerance import Expected

import hf_kvattn
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant.blocks import Blocks, quantize_blocks
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.quant.packed import OF_BLOCKS, PackedKV

COUNT = int(os.environ.get("HF_KVATTN_RANDOM_CALLS", 400))
BACKENDS = ("sdpa", "native", "reference")


def exactly(x):
    """A copy of tensors, alone or in a dataclass, each with no more memory than it has numbers."""
    if isinstance(x, torch.Tensor):
        return x.clone(memory_format=torch.contiguous_format)
    if not isinstance(x, AttendCall | PackedKV) and type(x).__name__ != "SinkKV":
        return x
    return replace(x, **{f.name: exactly(getattr(x, f.name)) for f in fields(x) if f.init})


def right_call(chance: random.Random) -> AttendCall:
    """A call that keeps all rules."""
    group, q_len, kv_len = chance.choice((1, 2, 3, 8)), chance.choice((1, 1, 2, 5, 33)), chance.randint(1, 200)
    packed = chance.random() < 0.4 and kv_len > 40
    dim, rules = chance.choice((16, 64, 80) if packed else (1, 7, 16, 33, 64)), {}
    if chance.random() < 0.4:
        rules["window"] = chance.choice((1, 2, 31, 64, kv_len, kv_len + 9, 2**63 - 1))
    if chance.random() < 0.2:
        rules["softcap"] = chance.choice((1.5, 30.0))
    if chance.random() < 0.5:
        near = (-(2**31), -1, 0, 1, kv_len // 2, kv_len - 1, kv_len, kv_len + 1, kv_len + 64, 2**31 - 1)
        rules["leftpad"] = [chance.choice(near) for _ in range(3)]
    if chance.random() < 0.2:
        rules["s_aux"] = True
    if chance.random() < 0.2:
        rules["sinks"] = (chance.choice((1, 4, 64)), chance.choice((-3, 1, 9, 4000)), [0, chance.randint(-9, 99), 7])
        rules.setdefault("leftpad", [0, 0, 0])
    elif chance.random() < 0.2:
        rules["causal"] = False
    with mock.patch.dict(SHAPES, random=(group, q_len, kv_len, dim, rules)):
        if packed:
            bits = [chance.choice((8, 4, 3, 2)) for _ in "kv"]
            call = packed_problem("random", *bits, split=chance.random(), start=chance.choice((0, 4)))
        else:
            dtypes = (torch.float32, torch.float16, torch.bfloat16)
            call = problem("random", chance.choice(dtypes), kv_heads=chance.choice((1, 2)))
    batch, heads = call.q.shape[:2]
    if packed and chance.random() < 0.5:
        blocks = call.packed.tokens // 32
        arrays = {name: getattr(call.packed, name)[:, :, :blocks].contiguous() for name in OF_BLOCKS}
        call.packed = replace(call.packed, **arrays)
    elif not packed and chance.random() < 0.3:
        slots = kv_len + chance.choice((0, 1, 40))
        call = ringed(call, slots, chance.randrange(slots))
    if chance.random() < 0.2 and call.sinks is None:
        mask = torch.rand(chance.choice((1, batch)), chance.choice((1, heads)), q_len, kv_len) < 0.7
        as_float = torch.randn(mask.shape).masked_fill(~mask, -torch.inf).to(call.q.dtype)
        call.mask, call.causal = chance.choice((mask, as_float)), True
    return exactly(call)


# What may become of a tensor.
CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t[:-1],
    lambda t: t[:1],
    lambda t: t[..., :-1],
    lambda t: t[:, :1] if t.ndim > 1 else t[:0],
    lambda t: t[:, :, :-1] if t.ndim > 2 else t.double(),
    lambda t: t[:, :, :0] if t.ndim > 2 else t.bool(),
    lambda t: torch.cat((t, t)),
    lambda t: t[None],
    lambda t: t[0],
    lambda t: t.transpose(0, -1),
    lambda t: t.flatten(),
    lambda t: t.long(),
    lambda t: t.int(),
    lambda t: t.half(),
    lambda t: t.to("meta"),
    lambda t: t.to(torch.complex64),
    lambda t: torch.stack((t, t), -1)[..., 0],
)
NUMBERS = (-(2**63), -1, 0, 1, 2, 31, 32, 33, 64, 2**31, 2**62, 2**63, 0.5, float("nan"), float("inf"), None, True)


def changed(x, chance: random.Random):
    """`x`, a call or a part of one, with one field that is another."""
    given = {f.name: getattr(x, f.name) for f in fields(x) if f.init}
    name = chance.choice([name for name, value in given.items() if value is not None] + ["mask", "leftpad", "tokens"])
    value = given.get(name)
    if name in ("mask", "leftpad") and value is None and isinstance(x, AttendCall):
        shape = [chance.choice((1, 2, 3, n)) for n in (*x.q.shape[:3], x.kv_len)][: chance.choice((1, 1, 2, 3, 4, 4))]
        dtypes = (torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32, torch.float16)
        made = torch.randint(0, 2, shape).to(chance.choice(dtypes))
    elif isinstance(value, torch.Tensor):
        made = chance.choice(CHANGES)(value)
    elif name in ("packed", "sinks"):
        made = changed(value, chance)
    elif name in ("k_codec", "v_codec"):
        made = codec_for(chance.choice((8, 4, 3, 2, "fp8")))
    elif name == "causal":
        made = not value
    else:
        made = chance.choice(NUMBERS)
        if name not in given or (made is None and name not in ("window", "softcap", "tokens")):
            return x
    return replace(x, **{name: made})


def straight(call: AttendCall) -> AttendCall:
    """The same with the tokens of a ring in order."""
    if call.tokens is None:
        return call
    slots = (call.slot + torch.arange(call.tokens)) % call.k.shape[2]
    return replace(call, k=call.k[:, :, slots], v=call.v[:, :, slots], tokens=None, slot=0)


def without_poison(call: AttendCall) -> AttendCall:
    """A change may make slots visible that were not: they hold small numbers here."""
    call.k, call.v = call.k.clamp(-9, 9), call.v.clamp(-9, 9)
    if call.packed is not None:
        for scale in (call.packed.k_scale, call.packed.v_scale):
            scale.clamp_(max=9 if scale.dtype == torch.bfloat16 else 150)
    return call


def outcomes(call: AttendCall) -> tuple[set[str], str]:
    """What became of a call in all backends that have its features: `served`, `refused`; and why."""
    found, why, expected, allowed = set(), "", None, 0.0
    for name in BACKENDS:
        with hf_kvattn.backend(name), served() as calls:
            try:
                out = dispatch.attend(call)
            except ValueError as error:
                assert calls == [], "refused by the backend itself"
                if "cannot serve this call" not in str(error):
                    found.add("refused")
                    why = str(error)
                continue
        found.add("served")
        if call.dropout or abs(call.scale) > call.q.shape[-1] ** -0.5 or (call.softcap or 0) > 64:
            continue  # random, or scores so large (so exact) that roundings decide
        if expected is None:
            expected = dispatch.BACKENDS["reference"].attend(call).float()
            allowed = 3e-4  # of codes
            if call.packed is None:
                # Of few numbers plain PyTorch may round all right: half a unit in the last place more, and twice.
                largest = torch.finfo(call.q.dtype).eps * expected.abs().max().item()
                allowed = max(Expected.of(straight(call)).allowed, 1e-5 + largest)
        assert out.dtype == call.q.dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=allowed)
    return found, why


@pytest.mark.parametrize("seed", range(2))
def test_right_calls_are_served_alike(seed):
    chance = random.Random(seed)
    torch.default_generator.manual_seed(seed)
    natively = 0
    for _ in range(COUNT):
        call = right_call(chance)
        assert outcomes(call) == ({"served"}, "")
        natively += dispatch.auto_choice(call)[0] == "native"
    assert natively > COUNT / 2


@pytest.mark.parametrize("seed", range(2))
def test_calls_with_one_change_are_refused_by_all_or_served_alike(seed):
    chance = random.Random(100 + seed)
    torch.default_generator.manual_seed(seed)
    refused = 0
    for _ in range(COUNT):
        try:
            call = changed(without_poison(right_call(chance)), chance)
        except ValueError:  # blocks that are wrong are not made
            refused += 1
            continue
        found, why = outcomes(call)
        assert len(found) == 1, (found, why)
        refused += found == {"refused"}
    assert COUNT / 4 < refused < COUNT


def test_blocks_are_quantized_alike_or_refused(two_threads):
    chance = random.Random(7)
    served_by = {True: 0, False: 0}
    for _ in range(COUNT // 4):
        bits, dim, slots = (
            [chance.choice((8, 4, 3, 2)) for _ in "kv"],
            chance.choice((16, 48, 64, 80)),
            chance.randint(1, 6),
        )
        ours = blank((2, 3), slots, dim, bits, 16)
        expected = exactly(ours)
        tokens, slot = chance.choice((32, 64, 96, 128, 33)), chance.choice((-1, 0, 1, 2, 5, 2**63 - 1, -(2**63)))
        k, v = torch.randn(2, 2, 3, tokens, dim)
        if chance.random() < 0.3:
            k, v = chance.choice(CHANGES)(k), chance.choice((v, chance.choice(CHANGES)(v)))
        right = k.shape == v.shape == (2, 3, tokens, dim) and tokens % 32 == 0 and 0 <= slot <= slots - tokens // 32
        right = right and k.dtype == v.dtype and k.is_floating_point() and k.device == v.device == torch.device("cpu")
        served_by[right] += 1
        if right:
            quantize_blocks([Blocks(k, v, expected, slot)])
            dispatch.quantize_blocks([Blocks(k, v, ours, slot)])
        else:
            with pytest.raises(ValueError):
                dispatch.quantize_blocks([Blocks(k, v, ours, slot)])
        for array, other in zip(ours.arrays(), expected.arrays(), strict=True):
            assert array is other is None or torch.equal(array, other)
    assert min(served_by.values()) > COUNT / 40
