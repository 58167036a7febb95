"""The Triton kernels' numbers, in Triton's interpreter on a CPU.

TRITON_INTERPRET=1 pytest tests/jobs/triton_interpreter; with KVATTN_TRITON_ALL=1 every shape meets every mix of bits.
"""

import contextlib
import importlib.util
import itertools
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import bf16_interpreter
import pytest
import torch
import triton
import triton.language as tl
from impostor import fake_cuda, on_gpu
from models import prompt, tiny_model
from packed_problems import PACKED, as_dense, packed_problem
from problems import POISON, RINGS, SHAPES, problem, ringed
from tolerance import FACTOR, FLOOR, plain_torch
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

import hf_kvattn
from hf_kvattn import QuantizedKVCache
from hf_kvattn.caches import quantized_layer
from hf_kvattn.evaluation.codegen import traffic_bytes
from hf_kvattn.kernels import dispatch, reference
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.kernels.triton import attention as triton_attention
from hf_kvattn.kernels.triton import attention_kernels as triton_kernels
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.kernels.triton import dequantize as triton_dequantize
from hf_kvattn.kernels.triton import quantize as triton_quantize
from hf_kvattn.quant import layout
from hf_kvattn.quant.blocks import Blocks, quantize_blocks
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.packed import ARRAYS, OF_BLOCKS, PackedKV, shapes_of
from hf_kvattn.quant.widths import choose

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: without it Triton compiles"

FP8 = "fp8"
MIXES = [(8, 8), (4, 4), (3, 3), (2, 2), (8, 4), (4, 2), (2, 8), (3, 8), (FP8, FP8), (FP8, 4), (3, FP8)]
ALL = os.environ.get("KVATTN_TRITON_ALL") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # float32 shows the algorithm without rounding
ATOL = FLOOR | {torch.float32: 1e-5}  # values are summed rotated, and the sum turned back
MULTIPROCESSORS = 7  # splits that do not come out even
# A key more or less in 300 moves a log-sum-exp by 3e-3. In bfloat16 dequantized keys are rounded, by up to 2**-9. For
# scores of unit variance.
LSE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def every_triton(*values):
    """A case that also runs with each other version of Triton."""
    return pytest.param(*values, marks=pytest.mark.every_triton)


@pytest.fixture(autouse=True)
def bf16(monkeypatch):
    bf16_interpreter.install(monkeypatch)


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """Codes lie as on a GPU, and PyTorch's operations write and read them."""
    monkeypatch.setattr(layout, "in_words", lambda device: True)
    monkeypatch.setattr(dispatch, "QUANTIZERS", {"cuda": "triton"})


def served(name: str) -> bool:
    _, q_len, _, dim, _ = SHAPES[name]
    return q_len <= triton_backend.MAX_QUERIES and dim % 16 == 0


def check(call: AttendCall, multiprocessors: int = MULTIPROCESSORS, made: tuple | None = None) -> tuple:
    """Launches `call`, or takes what was `made` of it, and holds the result against the reference."""
    out, lse = triton_attention.launch(call, multiprocessors) if made is None else made
    exact, exact_lse = reference.attend_with_lse(call)
    assert out.shape == exact.shape and out.dtype == call.q.dtype
    _, keys, values = zip(*call.tiles(call.kv_len), strict=True)
    k, v = (torch.cat(parts, 2).to(call.q.dtype) for parts in (keys, values))
    plain = plain_torch(replace(call, k=k, v=v, packed=None, tokens=None, slot=0))
    error, allowed = (out.float() - exact).abs().max(), FACTOR * (plain.float() - exact).abs().max() + ATOL[plain.dtype]
    assert error <= allowed, f"error {error:.2e}, {allowed:.2e} allowed"  # false for NaN too
    group = call.q.shape[1] // k.shape[1]
    squares = call.q.float().square() * k.float().square().mean(2).repeat_interleave(group, 1)[:, :, None]
    spread = max(1.0, call.scale * squares.sum(-1).max().sqrt().item())  # of a row's scores
    roundings = 2 if call.packed is not None and call.packed.k_codec.by_channel else 1  # of queries: by steps, by units
    torch.testing.assert_close(lse, exact_lse, rtol=0, atol=LSE[call.q.dtype] * spread * roundings)
    return out, lse


def few_blocks_a_split(monkeypatch) -> None:
    """Many splits at lengths that the interpreter can run."""
    monkeypatch.setattr(triton_attention, "_SPLIT_BLOCKS", (1, 1))


SLOW = () if ALL else ("long-split", "rows-cross-chunk")
PACKED_CASES = list(itertools.product([n for n in PACKED if served(n) and n not in SLOW], MIXES, DTYPES, (0, 4)))


@pytest.mark.parametrize(
    ("name", "bits", "dtype", "start"), PACKED_CASES[:: 1 if ALL else 37], ids=lambda value: str(value)
)
def test_packed_tokens(name, bits, dtype, start, monkeypatch):
    few_blocks_a_split(monkeypatch)
    check(packed_problem(name, *bits, dtype, start=start))


@pytest.mark.parametrize("bits", [(3, 3), (3, 8), (4, 3)], ids=str)
@pytest.mark.parametrize("name", ["g5-d80", "g8-d96", "d256"])
def test_three_bits(name, bits):
    """Codes in two planes: every width of a head, channels that fill no power of two, and rules beside."""
    check(packed_problem(name, *bits, torch.float32, start=4))


@pytest.mark.parametrize("bits", [(FP8, FP8), (FP8, 4), (8, FP8)], ids=str)
@pytest.mark.parametrize("name", ["g5-d80", "g8-d96", "d256"])
def test_fp8(name, bits):
    check(packed_problem(name, *bits, torch.float32, start=4))


@pytest.mark.parametrize(
    ("q_len", "group", "rules"),
    [
        (17, 1, {}),
        (20, 8, {"window": 50}),
        (100, 2, {"leftpad": [0, 9, 150]}),
        (128, 4, {"window": 90, "softcap": 2.0}),
    ],
    ids=str,
)
def test_many_query_tokens(q_len, group, rules, monkeypatch):
    """Several tiles of rows; the first queries stand among the packed tokens."""
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "many", (group, q_len, 200, 64, rules))
    call = packed_problem("many", 4, 4, torch.bfloat16, split=0.99, start=4)
    check(one_head(call, 3 if "leftpad" in rules else 1))


@pytest.mark.parametrize("bits", [every_triton((8, 4)), (3, 3), (2, FP8)], ids=str)
@pytest.mark.parametrize("dim", [64, 80])
def test_long_chunks_read_what_one_kernel_wrote_out(bits, dim, monkeypatch):
    """Two sequences with first tokens and newest ones beside a ring of blocks."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setitem(SHAPES, "long", (2, 129, 200, dim, {"window": 90, "leftpad": [0, 9, 150]}))
    call = packed_problem("long", *bits, torch.float16, split=0.9, start=4)
    made = triton_dequantize.dense(call)
    for ours, theirs in zip((made.k, made.v), (as_dense(call).k, as_dense(call).v), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2e-3, atol=1e-3)
    exact, _ = reference.attend_with_lse(call)
    error, plain = ((out.float() - exact).abs().max() for out in (triton_backend.attend(call), plain_torch(made)))
    assert error <= FACTOR * plain + ATOL[torch.float16]


EXACT = ("one-token", "g1-31", "g5-d80", "window-1", "softcap", "not-causal", "padded-window", "s-aux",
         "s-aux-empty-row", "sinks", "sinks-coming-in", "sinks-one", "sinks-padded")  # fmt: skip


@pytest.mark.every_triton
@pytest.mark.parametrize("name", ["padded", "window-crosses-tile"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 3)], ids=str)
def test_packed_tokens_with_every_triton(name, bits, monkeypatch):
    few_blocks_a_split(monkeypatch)
    check(one_head(packed_problem(name, *bits, torch.bfloat16, start=4), 3 if name == "padded" else 1))


@pytest.mark.parametrize(
    "name",
    [name for name in SHAPES if served(name)]
    if ALL
    else [every_triton(name) if name in ("g1-31", "padded-window", "sinks") else name for name in EXACT],
)
def test_exact_tokens_alone(name):
    check(problem(name, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("newest", [0, 1, 31, 32, 33])
def test_short_tails(newest, dtype, monkeypatch):
    monkeypatch.setitem(SHAPES, "tail", (3, 1, 64 + newest, 64, {}))
    call = packed_problem("tail", 4, 8, dtype, split=64 / (64 + newest))
    assert call.k.shape[2] == newest
    check(call)


@pytest.mark.parametrize(("multiprocessors", "q_len"), [(1, 1), (6, 2), (132, 1), (2, 16)])
def test_every_number_of_splits_gives_the_same(multiprocessors, q_len, monkeypatch):
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "splits", (4, q_len, 333, 64, {"leftpad": [0, 200, 330]} if q_len < 16 else {}))
    call = packed_problem("splits", 8, 2, torch.float16, start=4)
    check(call if q_len < 16 else one_head(call), multiprocessors=multiprocessors)


def test_a_row_without_visible_keys_gives_zeros(monkeypatch):
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "nothing", (2, 1, 100, 64, {"leftpad": [0, 100, 99]}))
    for call in (packed_problem("nothing", 4, 4, torch.bfloat16, start=4), problem("nothing", torch.bfloat16)):
        out, lse = check(call)
        assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize(
    ("bits", "slot", "window"),
    [((4, 4), 2, None), every_triton((8, 2), 4, None), ((2, 8), 6, None), every_triton((4, 4), 6, 100)],
)
def test_rings_of_packed_blocks(bits, slot, window, monkeypatch):
    """Six blocks in eight slots, around the end; the other two slots are poison."""
    few_blocks_a_split(monkeypatch)
    call = packed_ring(bits, slot, window, monkeypatch)
    check(call)


def packed_ring(bits, slot, window, monkeypatch) -> AttendCall:
    monkeypatch.setitem(SHAPES, "ring", (3, 2, 201, 64, {"window": window} if window else {}))
    call = packed_problem("ring", *bits, torch.float16, split=0.98, start=4)
    packed, straight = call.packed, reference.attend(call)
    assert packed.tokens == 6 * BLOCK and packed.k_codes.shape[2] == 9
    for name in OF_BLOCKS:
        setattr(packed, name, getattr(packed, name)[:, :, :8].roll(slot, 2).contiguous())
    packed.slot = slot
    torch.testing.assert_close(reference.attend(call), straight)
    return call


def dense_ring(slot: int) -> AttendCall:
    call = problem("window-crosses-tile", torch.float16)
    slots = 150
    buffers = [torch.full((*t.shape[:2], slots, t.shape[3]), POISON[t.dtype], dtype=t.dtype) for t in (call.k, call.v)]
    tokens = slots if slot else 130  # where the first one is not in slot 0, all have been written
    for buffer in buffers:
        buffer[:, :, :tokens] = torch.randn(*buffer.shape[:2], tokens, buffer.shape[3])
    return AttendCall(call.q, *buffers, call.scale, window=call.window, tokens=tokens, slot=slot)


@pytest.mark.parametrize("slot", [0, 1, every_triton(149)])
def test_rings_of_exact_tokens(slot):
    check(dense_ring(slot))


@pytest.mark.parametrize("leftpad", [[-1, 0, -(2**20)], [199, 200, 201], [2**31 - 1, 31, -7]], ids=str)
def test_paddings_before_all_keys_and_behind_them(leftpad, monkeypatch):
    """Nobody reads these numbers before the kernel: it serves all."""
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "hostile", (3, 2, 200, 64, {"leftpad": leftpad, "window": 90}))
    monkeypatch.setitem(SHAPES, "sinks", (3, 3, 200, 64, {"leftpad": leftpad, "window": 90, "sinks": (6, 4, leftpad)}))
    for call in (problem("hostile"), packed_problem("hostile", 4, 8, start=4), packed_problem("sinks", 4, 3)):
        check(call)


@pytest.mark.parametrize("name", ["sinks", "sinks-padded"])
def test_sinks_beside_rings(name, monkeypatch):
    few_blocks_a_split(monkeypatch)
    for slots, slot in RINGS[name]:
        check(ringed(problem(name, torch.float16), slots, slot))


def test_sinks_beside_packed_tokens(monkeypatch):
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(
        SHAPES, "sinks", (3, 3, 200, 64, {"window": 90, "sinks": (6, 4, [0, 5, 9]), "leftpad": [0, 9, 150]})
    )
    check(packed_problem("sinks", 4, 3, torch.float32, start=0))


def test_one_split_more_for_sinks_fits(monkeypatch):
    call = problem("sinks", torch.float16)
    monkeypatch.setattr(triton_attention, "_SPLIT_BLOCKS", (1, 1))
    monkeypatch.setattr(triton_attention, "MAX_SPLITS", 4)
    splits = triton_attention.splits_for(call, 1, 1000, 1)
    assert splits.exact == 1
    call.sinks = None
    assert triton_attention.splits_for(call, 1, 1000, 1).exact == 2


def test_offsets_beyond_32_bits(monkeypatch):
    """Codes that begin 2**31 bytes into their array; only the pages that are touched take memory."""
    slots = 2**31 // (4 * 8 * 96) + 6
    call = one_head(packed_problem("g8-d96", 8, 8, torch.float16))
    packed, torch_empty = call.packed, torch.utils.deterministic.fill_uninitialized_memory
    check(call)
    blocks = packed.tokens // BLOCK
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        for name in OF_BLOCKS:
            small = getattr(packed, name)
            large = torch.empty(1, 1, slots, *small.shape[3:], dtype=small.dtype)
            large[:, :, -blocks:] = small[:, :, :blocks]
            setattr(packed, name, large)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = torch_empty
    packed.slot = slots - blocks
    check(call)


def test_outlier_channels_keep_the_small_ones_exact():
    """Key channels with an offset of 600, as Qwen's have: the mean is added in float32, not to rounded keys."""
    call = packed_problem("g3-65", 8, 8, torch.bfloat16, split=0.99)
    call.packed.k_mean[..., 3] += 600
    call.k = call.k[:, :, :0]
    call.v = call.v[:, :, :0]
    call.q[..., 3] = 0.5
    check(call)


@triton.jit
def _adds_bf16(x_ptr):
    x = tl.load(x_ptr + tl.arange(0, 16))
    tl.store(x_ptr + tl.arange(0, 16), x + x)


@pytest.mark.every_triton
def test_bf16_arithmetic_is_loud():
    with pytest.raises(InterpreterError, match="binary_op of bfloat16"):
        _adds_bf16[(1,)](torch.ones(16, dtype=torch.bfloat16))


NOTHING = 'finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing visible yet: avoids inf - inf\n{}'
RESCALE = "            rescale"
BUGS = {
    "causal mask off by one": ("key[None, :] <= position[:, None]", "key[None, :] < position[:, None]", "queries"),
    "causal mask of blocks off by one": ("tl.minimum(position, start +", "tl.minimum(position - 1, start +", "queries"),
    "window off by one": ("- window + 1, leftpad)", "- window, leftpad)", "ring"),
    "padding off by one": ("(key >= leftpad)", "(key > leftpad)", "padded"),
    "padding of blocks off by one": ("leftpad), start) - start", "leftpad + 1), start) - start", "padded"),
    "end of a split not masked": ("start + end * 32 - 1) if", "start + end * 32 + 31) if", "splits"),
    "sums are not rescaled": ("row_sum = row_sum * rescale +", "row_sum = row_sum +", "exact"),
    "sums of blocks are not rescaled": ("sums = sums * rescale[:, None] +", "sums = sums +", "one split"),
    "results are not rescaled": ("v, acc * rescale[:, None])", "v, acc)", "exact"),
    "results of blocks are not rescaled": ("acc = acc * rescale[:, None]", "acc = acc * 1", "one split"),
    "NaN where nothing is visible": (NOTHING.format("    weights"), "finite_max = new_max\n    weights", "padded"),
    "NaN where no block is visible": (NOTHING.format(RESCALE), "finite_max = new_max\n" + RESCALE, "padded"),
    "an empty split is merged": ("mask = (weight > 0)[:, None] &", "mask = valid[:, None] &", "padded"),
    "NaN in an empty row": ('finite_max = tl.where(row_max == -float("inf"), 0.0, row_max)', "finite_max = row_max",
                            "padded"),
    "wrong KV head": ("kv = batch * KV_HEADS + head\n", "kv = batch * KV_HEADS\n", "splits"),
    "wrong query head": ("(head * HEADS_PER_KV + rows // q_len)", "(head + rows // q_len * KV_HEADS)", "splits"),
    "wrong group of values": ("(run // GROUP * 8)", "(run // GROUP * 0)", "splits"),
    "scales of another token": ("scales_of((words >> (8 * TOKEN))", "scales_of((words >> (24 - 8 * TOKEN))", "splits"),
    "scales of 16 bits of another token": ("(words >> (16 * TOKEN))", "(words >> (16 * (3 - TOKEN)))", "wide"),
    "scales of other channels": ("tl.arange(0, RUNS) * SPAN", "tl.arange(0, RUNS) * 0", "wide"),
    "codes of another token": ("(words >> (BITS * TOKEN))", "(words >> (BITS * (3 - TOKEN)))", "queries"),
    "wrong scale of keys": ("k_at = k_slot[:, None] * D", "k_at = k_slot[:, None] * 0", "wide"),
    "offsets left out": ("scale.to(tl.float32) + zero.to(tl.float32)", "scale.to(tl.float32)", "splits"),
    "offsets of other channels": ("(tl.arange(0, 8) * 4).to", "(tl.arange(0, 8) // 2 * 8).to", "splits"),
    "multipliers of other channels": ("(tl.arange(0, 16) * 2).to", "(tl.arange(0, 16) // 4 * 8).to", "splits"),
    "multipliers exchanged": ("tl.where(which == 1, 0.8,", "tl.where(which == 1, 1.1,", "splits"),
    "offsets of another block": ("slot[:, None] * (3 * D // 16)", "(slot // 2 * 2)[:, None] * (3 * D // 16)", "splits"),
    "half a step left out": ("tl.where(width > 0, 0.5, 0.0)", "tl.where(width > 0, 0.0, 0.0)", "splits"),
    "half the codes is that of a bit less": ("((1 << width) >> 1)", "((1 << width) >> 2)", "splits"),
    "keys in the model's order": ("stored = tl.where(split < packed_splits, stored, d)", "stored = d", "splits"),
    "groups begin at the next": ("tl.where(index < group[:, None],", "tl.where(index <= group[:, None],",
                                 "splits"),
    "two bits at the place of one": (".to(tl.int32) << (width & 4))", ".to(tl.int32) << (width & 6))", "splits"),
    "the plane of two bits first": ("(begin + (width & 4) * 64 + channel)", "(begin + channel)", "splits"),
    "the plane of one bit too early": ("(pair_begin + (pair_width & 6) * 64", "(pair_begin + (pair_width & 4) * 64",
                                       "splits"),
    "bits of the neighbour": ("one = (one >> (channel % 2 * 4)", "one = (one >> (4 - channel % 2 * 4)", "splits"),
    "bytes of scales for another number": ("<< 20).to(tl.float32", "<< 19).to(tl.float32", "splits"),
    "mean of keys left out": ("mean_score * in_powers, 0.0)", "0.0 * in_powers, 0.0)", "splits"),
    "mean of keys left out of the softcap": ("(scores + mean_score[:, None]) * factor", "scores * factor", "softcap"),
    "words of keys exchanged": ("(k_codes, at_slot, index % 8", "(k_codes, at_slot, index % 8 ^ 1", "wide"),
    "channels of values exchanged": ("column = tl.where(split < packed_splits, channel, d)", "column = d", "splits"),
    "values stay rotated": ("rotate(tl.reshape(packed, (1, PADDED)), 1, PADDED, LOG_SIZE)", "packed", "splits"),
    "wrong ring slot": ("tl.where(at_slot >= slots, at_slot - slots, at_slot)\n            k_block",
                        "at_slot % (slots - 1)\n            k_block", "ring"),
    "wrong ring slot of scales": ("tl.where(k_slot >= slots, k_slot - slots, k_slot)", "k_slot % (slots - 1)", "ring"),
    "wrong slot of an exact ring": ("at_slot - ring, at_slot)", "at_slot - ring + 1, at_slot)", "dense ring"),
    "first tokens at the wrong place": ("tl.where(token < start, token, ", "tl.where(token < 0, token, ", "padded"),
    "third bits at the wrong place": ("((third >> TOKEN) & 1) << 2", "((third >> TOKEN) & 1) << 1", "three bits"),
    "third bits of another word": ("(word % 2 * 4)", "(4 - word % 2 * 4)", "three bits"),
    "low bits of another token": ("((low >> (2 * TOKEN)) & 3)", "((low >> (6 - 2 * TOKEN)) & 3)", "three bits"),
    "fp8 taken for whole numbers": ("    if FLOATS:\n", "    if BITS == 0:\n", "fp8"),
    "learned sinks left out": ("row_sum += tl.exp2(aux - finite_max)", "row_sum += 0", "s_aux"),
    "learned sinks of another head": ("tl.load(s_aux_ptr + head)", "tl.load(s_aux_ptr + query)", "s_aux"),
    "padding of sinks left out": ("key += leftpad", "key += 0", "sinks"),
    "a split is not merged": ("valid = split < splits", "valid = split < splits - 1", "splits"),
}  # fmt: skip


def call_that_shows(where: str, monkeypatch) -> AttendCall:
    if where not in ("one split", "exact"):
        few_blocks_a_split(monkeypatch)
    if where == "ring":
        return packed_ring((4, 4), 4, 100, monkeypatch)
    if where == "three bits":
        return packed_problem("g5-d80", 3, 3, torch.float32)
    if where == "fp8":
        return packed_problem("g5-d80", FP8, FP8, torch.float32)
    if where == "s_aux":
        return packed_problem("s-aux-padded", 4, 8, torch.float32)
    if where == "sinks":
        return problem("sinks-padded")
    if where == "dense ring":
        return dense_ring(149)
    if where == "wide":  # two groups of values to a warp
        monkeypatch.setitem(SHAPES, "bug", (2, 1, 70, 256, {}))
        return packed_problem("bug", 8, 8, torch.float32)
    if where == "exact":
        monkeypatch.setitem(SHAPES, "bug", (2, 1, 170, 64, {}))
        return problem("bug")
    rules = {"padded": {"leftpad": [2, 170, 100]}, "softcap": {"softcap": 2.0}}.get(where, {})
    monkeypatch.setitem(SHAPES, "bug", (2, 16 if where == "queries" else 1, 170, 64, rules))
    return packed_problem("bug", 4, 4, torch.float32, start=4, split=0.99)


@pytest.mark.parametrize("where", sorted({where for _, _, where in BUGS.values()}))
def test_without_a_bug_nothing_is_caught(where, monkeypatch):
    check(call_that_shows(where, monkeypatch))


def plant(old: str, new: str, tmp_path, monkeypatch) -> None:
    """Has the package launch kernels in whose source `new` stands for `old`."""
    source = Path(triton_kernels.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, planted)
    spec.loader.exec_module(planted)
    for name in ("decode_attention_kernel", "merge_splits_kernel"):
        monkeypatch.setattr(triton_attention, name, getattr(planted, name))


@pytest.mark.parametrize(
    "bug", [every_triton(bug) if bug in ("window off by one", "values stay rotated") else bug for bug in BUGS]
)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    old, new, where = BUGS[bug]
    plant(old, new, tmp_path, monkeypatch)
    call = call_that_shows(where, monkeypatch)
    with pytest.raises(AssertionError):
        check(call)


RULES = {
    "plain": {},
    "padded": {"leftpad": [37, 150, 0]},
    "window": {"window": 50},
    "padded-window-softcap": {"window": 71, "softcap": 2.0, "leftpad": [3, 100, 0]},
    "not-causal": {"causal": False},
}


def to_lengths(full: AttendCall, packed: int, exact: int) -> tuple[AttendCall, AttendCall, torch.Tensor]:
    """`full` with so many tokens: what the host would launch; the same for every length; the lengths for that one."""
    capacity = 0 if full.packed is None else full.packed.tokens
    every, host = replace(full, packed=None), replace(full, packed=None)
    every.k, every.v = (t.clone() for t in (full.k, full.v))
    for tensor in (every.k, every.v):
        tensor[:, :, exact:] = POISON[tensor.dtype]
    host.k, host.v = every.k[:, :, :exact], every.v[:, :, :exact]
    if full.packed is not None:
        every.packed = replace(full.packed)
        for name in OF_BLOCKS:
            tensor = getattr(full.packed, name)[:, :, : capacity // BLOCK].clone()
            tensor[:, :, packed // BLOCK :] = 255 if tensor.dtype == torch.uint8 else 1e30
            setattr(every.packed, name, tensor)
        host.packed = replace(every.packed, tokens=packed) if packed else None
    return host, every, torch.tensor([packed, exact], dtype=torch.int32)


def check_lengths(full: AttendCall, packed: int, exact: int) -> None:
    host, every, lengths = to_lengths(full, packed, exact)
    made = triton_attention.launch(every, MULTIPROCESSORS, lengths)
    if not packed and not exact:
        assert (made[0] == 0).all() and (made[1] == -torch.inf).all()
        return
    check(host, made=made)
    for mine, theirs in zip(made, triton_attention.launch(host, MULTIPROCESSORS), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2 * ATOL[host.q.dtype])


@pytest.mark.parametrize("rules", RULES if ALL else ["plain", "padded-window-softcap", "not-causal"])
def test_one_launch_serves_every_length(rules, monkeypatch):
    """As a cache fills: all exact, then a block becomes codes whenever 32 tokens have followed the first 4."""
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "lengths", (3, 3 if rules == "plain" else 1, 4 + 160 + 34, 64, RULES[rules]))
    full = one_head(
        packed_problem("lengths", 4, 8, torch.float32, split=160.5 / 194, start=4), 3 if "padded" in rules else 1
    )
    assert full.packed.tokens == 160 and full.k.shape[2] == 38
    around = (0, 1, 4, 5, 31, 32, 33, 35, 36, 68, 69, 99, 100, 131, 132, 164, 197, 198)
    for seen in range(full.kv_len + 1) if ALL else around:
        packed = min(max(0, seen - 4) // BLOCK * BLOCK, full.packed.tokens)
        check_lengths(full, packed, seen - packed)
        if seen - packed in (4, 5, 6) and packed:  # the block may wait
            check_lengths(full, packed - BLOCK, seen - packed + BLOCK)


@pytest.mark.parametrize("rules", ["plain", "padded-window-softcap"])
def test_one_launch_serves_every_length_of_exact_tokens(rules, monkeypatch):
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "lengths", (2, 2, 180, 80, RULES[rules]))
    full = one_head(problem("lengths", torch.bfloat16), 2 if "padded" in rules else 1)
    for seen in range(181) if ALL else (0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 179, 180):
        check_lengths(full, 0, seen)


def test_lengths_do_not_change_the_launch(monkeypatch):
    """What is queued depends on the most that there may be alone: grids, arguments and the sizes of partial results."""
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "lengths", (3, 1, 4 + 160 + 34, 64, {"window": 50}))
    full = packed_problem("lengths", 4, 8, torch.float16, split=160.5 / 194, start=4)
    queued = []
    for packed, exact in ((0, 0), (0, 7), (160, 38)):
        _, every, lengths = to_lengths(full, packed, exact)
        numbers = []
        for name in ("decode_attention_kernel", "merge_splits_kernel"):
            kernel = getattr(triton_kernels, name)

            class Recorded:
                def __getitem__(self, grid, kernel=kernel, numbers=numbers):
                    def run(**arguments):
                        shapes = {n: x.shape if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
                        numbers.append((grid, shapes))
                        kernel[grid](**arguments)

                    return run

            monkeypatch.setattr(triton_attention, name, Recorded())
        triton_attention.launch(every, MULTIPROCESSORS, lengths)
        queued.append(numbers)
    assert queued[0] == queued[1] == queued[2] and len(queued[0]) == 2


def test_what_a_split_without_work_leaves_is_not_merged(monkeypatch):
    """Its log-sum-exp is -inf; its part stays what that memory held before, NaN."""
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "lengths", (3, 1, 4 + 160 + 130, 64, {}))
    full = packed_problem("lengths", 4, 8, torch.float16, split=160.5 / 290, start=4)
    host, every, lengths = to_lengths(full, 64, 5)
    parts, empty = [], torch.empty

    def keeping(*arguments, **options):
        parts.append(empty(*arguments, **options))
        return parts[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", keeping)
        made = triton_attention.launch(every, 64, lengths)
    *_, partial, partial_lse = parts
    holds = partial_lse.isfinite().all(-1).all(0).all(0)
    assert holds.tolist() == [False, True, False, True]  # 128 tokens are not shared out: 2 blocks, and 5 exact ones
    assert (partial_lse[:, :, ~holds] == -torch.inf).all() and partial[:, :, ~holds].isnan().all()
    check(host, made=made)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("exact", "packed"), [(True, 4096), (True, 256), (False, 4096), (False, 512)], ids=str)
def test_all_splits_have_work_however_full_the_cache_is(exact, packed, window, monkeypatch):
    """At 1/16 of what there is room for as at all of it: the splits share out what is visible, not the room.

    Of packed tokens 128 at a time: 1/8 gives each of the four splits as many.
    """
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "room", (1, 1, 4096 if exact else 4 + 4096 + 20, 64, {"window": window}))
    full = problem("room") if exact else packed_problem("room", 4, 4, split=1, start=4)
    host, every, lengths = to_lengths(one_head(full), 0 if exact else packed, packed if exact else 20)
    parts, empty = [], torch.empty
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **options: parts.append(empty(*a, **options)) or parts[-1])
        made = triton_attention.launch(every, 2, lengths)
    *_, partial_lse = parts
    seen = 3 if window and not exact else 4  # of 300 tokens, three parts of 128
    assert partial_lse.shape[2] == 4 + (not exact) and int(partial_lse.isfinite().sum()) == seen + (not exact)
    check(host, made=made)


BUGS_OF_LENGTHS = {
    "exact tokens of the host": ("exact = tl.load(lengths_ptr + 1)", "exact += 0"),
    "packed tokens of the host": ("packed_tokens = tl.load(lengths_ptr)", "packed_tokens += 0"),
    "blocks of the host": ("blocks = packed_tokens // 32", "blocks += 0"),
    "positions of the host": ("kv_len = exact", "kv_len += exact"),
    "packed tokens have no positions": ("kv_len += packed_tokens", "kv_len += 0"),
    "a window begins late": ("kv_len - q_len - window + 1)", "kv_len - q_len - window + 2)"),
    "an exact split begins late": ("first_visible - packed_tokens))", "first_visible - packed_tokens + 1))"),
    "first tokens are passed over": ("tl.where(first_visible < start, first_visible,", "tl.where(False, 0,"),
    "a part ends early": ("(split + 1) // splits * UNIT, end)", "(split + 1) // splits * UNIT, end - 1)"),
    "parts overlap": ("first + units * split // splits", "first + tl.maximum(units * split // splits - 1, 0)"),
    "slots of a ring": ("(token % ring)", "(token % (ring - 1))"),
}


@pytest.mark.parametrize("bug", [every_triton(None), *BUGS_OF_LENGTHS])
def test_planted_bugs_of_lengths_are_caught(bug, tmp_path, monkeypatch):
    few_blocks_a_split(monkeypatch)
    monkeypatch.setitem(SHAPES, "lengths", (3, 1, 4 + 160 + 34, 64, {"window": 20}))
    full = one_head(packed_problem("lengths", 4, 8, torch.float32, split=160.5 / 194, start=4))
    if bug is not None:
        plant(*BUGS_OF_LENGTHS[bug], tmp_path, monkeypatch)
    with pytest.raises(AssertionError) if bug is not None else contextlib.nullcontext():
        check_lengths(full, 96, 38)
        check_lengths(full, 64, 9)
        check_lengths(replace(full, window=None), 96, 38)
        monkeypatch.setitem(SHAPES, "lengths", (3, 1, 4 + 384 + 20, 64, {}))
        check_lengths(one_head(packed_problem("lengths", 4, 8, torch.float32, split=384.5 / 404, start=4)), 384, 24)
        check_ring_step(200, 84, monkeypatch)


def check_ring_step(seen: int, slots: int, monkeypatch, **rules) -> None:
    """A ring of `slots` after `seen` tokens, with lengths, against the tokens in order that it holds."""
    monkeypatch.setitem(SHAPES, "ring step", (2, 1, seen, 64, {"window": 50, "leftpad": [0, 170, seen - 1]} | rules))
    call = problem("ring step", torch.float16)
    rings = [torch.full((*t.shape[:2], slots, 64), POISON[t.dtype], dtype=t.dtype) for t in (call.k, call.v)]
    for position in range(max(0, seen - slots), seen):
        for ring, tokens in zip(rings, (call.k, call.v), strict=True):
            ring[:, :, position % slots] = tokens[:, :, position]
    ring = replace(call, k=rings[0], v=rings[1], tokens=slots)
    lengths = torch.tensor([-(2**31), seen], dtype=torch.int32)
    check(call, made=triton_attention.launch(ring, MULTIPROCESSORS, lengths))


@pytest.mark.parametrize("seen", [171, 173, every_triton(250), 336])
def test_rings_whose_lengths_are_in_a_tensor(seen, monkeypatch):
    """Not full yet, once around, and at the end of a round."""
    few_blocks_a_split(monkeypatch)
    check_ring_step(seen, 84, monkeypatch)
    check_ring_step(seen, 172, monkeypatch, softcap=2.0)
    check_ring_step(seen, 50, monkeypatch, leftpad=[-9, seen, 2**31 - 1])


def test_what_lengths_are_refused():
    call = one_head(packed_problem("g8-d96", 4, 8, torch.float16, start=4))
    good = torch.tensor([64, 20], dtype=torch.int32)
    for bad, message in (
        (good.long(), r"lengths is \(2,\) torch.int64 on cpu, not \(2,\) torch.int32 on cpu"),
        (good[:1], r"lengths is \(1,\) torch.int32"),
        (good.to("meta"), "torch.int32 on meta, not .* on cpu"),
        (torch.zeros(4, dtype=torch.int32)[::2], "lengths are not side by side"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_attention.launch(call, 3, bad)
    with pytest.raises(ValueError, match="not served beside sinks"):
        triton_attention.launch(problem("sinks", torch.float16), 3, good)
    call.packed.slot = 2
    with pytest.raises(ValueError, match=r"in order, or a whole ring, not for .* slots \(0, 2\)"):
        triton_attention.launch(call, 3, good)
    with pytest.raises(ValueError, match=r"a whole ring, not for 150 from slots \(149, 0\)"):
        triton_attention.launch(dense_ring(149), 3, good)
    with pytest.raises(ValueError, match=r"a whole ring, not for 130 from slots \(0, 0\)"):
        triton_attention.launch(dense_ring(0), 3, good)


@pytest.mark.parametrize("bits", [(4, 4), (8, 2), (3, 3)], ids=str)
def test_bytes_moved(bits, monkeypatch):
    """What the kernels load and store, number by number, is what `traffic_bytes` says: 1.11 times the least at most.

    The splits are those of 8,192 tokens and 8 KV heads: as small as they ever are.
    """
    monkeypatch.setitem(SHAPES, "traffic", (4, 1, 2048 + 40, 128, {}))
    call = one_head(packed_problem("traffic", *bits, torch.bfloat16, split=2048 / 2084, start=4))
    assert call.packed.tokens == 2048
    moved = traced_bytes(call, monkeypatch)
    expected, least = traffic_bytes(call, 132)
    assert moved == expected
    assert moved <= 1.11 * least, f"{moved / least:.3f} times"


def test_bytes_outside_a_window_are_not_moved(monkeypatch):
    monkeypatch.setitem(SHAPES, "traffic", (2, 1, 2000, 64, {"window": 100}))
    call = packed_problem("traffic", 4, 4, torch.bfloat16, split=0.99, start=4)
    moved = traced_bytes(call, monkeypatch)
    assert moved == traffic_bytes(call, 132)[0]
    call.window = None
    assert moved < 0.2 * traffic_bytes(call, 132)[1]


def one_head(call: AttendCall, rows: int = 1) -> AttendCall:
    """The first KV head of a call's first `rows` rows, and the query heads that read it."""
    group = call.q.shape[1] // call.k.shape[1]
    call.q, call.k, call.v = call.q[:rows, :group], call.k[:rows, :1], call.v[:rows, :1]
    call.leftpad = None if call.leftpad is None else call.leftpad[:rows]
    for name in ARRAYS if call.packed else ():
        if (tensor := getattr(call.packed, name)) is not None:
            setattr(call.packed, name, tensor[:rows, :1].contiguous())
    return call


def traced_bytes(call: AttendCall, monkeypatch) -> int:
    counted = []
    builder = interpreter.InterpreterBuilder
    load_tile, store_tile = builder.create_masked_load, builder.create_masked_store

    def counting_load(self, pointers, mask, *rest):
        counted.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
        return load_tile(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        counted.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
        return store_tile(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counting_load)
    monkeypatch.setattr(builder, "create_masked_store", counting_store)
    check(call, multiprocessors=132)
    return sum(counted)


def arrays_of(packed: PackedKV) -> list[str]:
    """The names of the tensors that there are."""
    return [field.name for field in fields(packed) if isinstance(getattr(packed, field.name), torch.Tensor)]


def empty(k: torch.Tensor, bits: tuple, group: int, slots: int) -> PackedKV:
    """Room for `slots` blocks of tokens such as `k`, and its table; every byte that a quantizer writes is 255."""
    codecs, (batch, heads, _, dim) = list(map(codec_for, bits)), k.shape
    arrays = dict.fromkeys(ARRAYS)
    for name, (shape, dtype) in shapes_of(*codecs, dim, group).items():
        blocks = (slots,) if name in OF_BLOCKS else ()
        arrays[name] = (
            torch.full((batch, heads, *blocks, *shape), -1, dtype=dtype).view(torch.uint8).fill_(255).view(dtype)
        )
    arrays["k_mean"] = k.float().mean(2)
    if codecs[0].by_channel:
        importance = torch.linspace(-12, 12, dim).exp2()[torch.randperm(dim)]
        table = choose(k[:, :, : k.shape[2] // BLOCK * BLOCK], importance.expand(batch, heads, dim), codecs[0].bits)
        arrays |= {f"k_{name}": array for name, array in table._asdict().items()}
    return PackedKV(0, 0, *codecs, **arrays)


def also_by_torch(k, v, into: PackedKV, slot: int) -> PackedKV:
    """Another `into`, to which PyTorch's operations wrote."""
    expected = replace(into, **{name: getattr(into, name).clone() for name in OF_BLOCKS})
    quantize_blocks([Blocks(k, v, expected, slot)])
    return expected


def check_same(ours: PackedKV, expected: PackedKV) -> None:
    for name in OF_BLOCKS:
        mine, theirs = (getattr(each, name).view(torch.uint8) for each in (ours, expected))
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(
    ("kind", "bits", "dim", "group"),
    [
        ("normal", (8, 4), 16, 16),
        every_triton("normal", (4, 8), 80, 16),
        every_triton("normal", (4, 4), 128, 32),
        ("normal", (8, 8), 256, 256),
    ]
    + [(kind, bits, 96, 48) for kind in ("outliers", "constant", "ties") for bits in ((8, 8), (4, 4))],
)
def test_blocks_are_quantized_bit_for_bit_as_quant_does(dim, group, bits, kind):
    k, v = made_of(kind, dim)
    into = empty(k, bits, group, 5)
    expected = also_by_torch(k, v, into, 3)
    triton_quantize.launch([Blocks(k, v, into, 3)])
    check_same(into, expected)


def made_of(kind: str, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.randn(2, 3, 64, dim).bfloat16().transpose(0, 1) for _ in "kv")
    if kind == "outliers":
        k[..., 3] += 600
        v[..., 5, :] *= 1e4
    if kind == "constant":
        k[:], v[:] = k[:, :, :1], 0
    if kind == "ties":  # halves between two codes
        k[:], v[:] = torch.randint(0, 31, k.shape) / 2, torch.randint(0, 31, v.shape) / 2
    return k, v


@pytest.mark.parametrize(("bits", "window"), [((4, 8), None), ((8, 4), 50), ((4, 4), None)], ids=str)
def test_a_cache_on_a_gpu_holds_the_codes_of_one_on_a_cpu(bits, window, monkeypatch):
    """Through the cache's own steps: a prompt, growth, a ring that wraps; and nothing is read back meanwhile."""
    monkeypatch.setattr(quantized_layer, "_CHUNK_BLOCKS", 2)
    launched, launch = [], triton_quantize.launch

    def launch_on_cpu(jobs):  # the interpreter reads memory
        on_cpu = []
        for k, v, into, slot in jobs:
            arrays = {name: getattr(into, name).data_on_cpu for name in arrays_of(into)}
            on_cpu.append(Blocks(k.data_on_cpu, v.data_on_cpu, replace(into, **arrays), slot))
        launched.append(launch(on_cpu))
        return on_gpu(launched[-1])

    monkeypatch.setattr(triton_quantize, "launch", launch_on_cpu)
    settings = quantized_layer.QuantSettings(
        *map(codec_for, bits), group_size=32, residual_length=0, exact_first=0 if window else 4
    )
    here, there = (quantized_layer.KVQuantizedLayer(settings, None, 0, 2, 64, window) for _ in "ab")
    with fake_cuda() as reads:
        for count in (150, 1, 40, 33, 100):
            k, v = torch.randn(2, 1, 2, count, 64).bfloat16()
            for layer, tokens in ((here, (k, v)), (there, on_gpu((k, v)))):
                layer.append(*tokens)
                layer.finish_attention(dispatch.quantize_blocks)
        assert reads == []
        ours = there.filled()
    assert launched and here.packed_tokens == there.packed_tokens and bool(here.dropped) == bool(window)
    for name, tensor in here.filled().items():
        assert torch.equal(ours[name].data_on_cpu, tensor), name


def test_one_launch_quantizes_the_blocks_of_many_layers_and_says_which_are_not_finite(monkeypatch):
    queued, queue = [], triton_quantize._queue
    monkeypatch.setattr(
        triton_quantize, "_queue", lambda tensors, *rest: queued.append(tensors) or queue(tensors, *rest)
    )
    bits, layers = [(4, 8), (8, 4), (4, 8), (4, 8)], [made_of("normal", 32) for _ in range(4)]
    layers[2][0][1, 1, 40, 7], layers[3][1][0, 1, 63, 0] = torch.nan, -torch.inf
    jobs = [Blocks(k, v, empty(k[:, :, :32], widths, 16, 4), 2) for (k, v), widths in zip(layers, bits, strict=True)]
    expected = [also_by_torch(*job) for job in jobs]
    finite = triton_quantize.launch(jobs)
    assert finite.tolist() == [[1, 1], [1, 1], [0, 1], [1, 0]]
    assert [len(tensors) for tensors in queued] == [3, 1]
    for job, theirs in zip(jobs[:2], expected, strict=False):
        check_same(job.into, theirs)


def test_keys_and_values_of_any_strides_are_quantized():
    k, v = made_of("normal", 32)
    into = empty(k, (4, 4), 32, 3)
    expected = also_by_torch(k, v, into, 0)
    apart = [torch.stack((t, torch.full_like(t, 7)), -1)[..., 0] for t in (k, v)]
    assert apart[0].stride(-1) == 2
    triton_quantize.launch([Blocks(*apart, into, 0)])
    check_same(into, expected)


@pytest.mark.every_triton
def test_append_quantize_and_attend():
    """Blocks quantized by one kernel are read by the other, step by step, as a cache does it."""
    k, v, q = (torch.randn(1, heads, 100, 64).bfloat16() for heads in (2, 2, 6))
    into = empty(k, (4, 4), 32, 3)
    for step in (40, 64, 70, 99):
        packed = step // BLOCK * BLOCK
        for block in range(packed // BLOCK):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            triton_quantize.launch([Blocks(k[:, :, part], v[:, :, part], into, block)])
        tail = slice(packed, step)
        call = AttendCall(q[:, :, step : step + 1], k[:, :, tail], v[:, :, tail], 0.125)
        call.packed = replace(into, tokens=packed)
        check(call)


def apart(leftpad: torch.Tensor) -> torch.Tensor:
    return torch.stack((leftpad, torch.full_like(leftpad, 77)), -1)[:, 0]


def test_the_backend_launches_the_kernels_on_what_a_call_holds(monkeypatch):
    """With and without lengths, and with sinks; rows' paddings may lie apart, as in masks that were repeated."""
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    call = packed_problem("padded", 4, 8, torch.float16, start=4)
    lengths = torch.tensor([call.packed.tokens, call.k.shape[2]], dtype=torch.int32)
    for more in ((None,), (lengths,)):
        direct, _ = triton_attention.launch(call, 3, *more)
        assert torch.equal(triton_backend.attend_lengths(call, *more), direct)
        assert torch.equal(triton_backend.attend_lengths(replace(call, leftpad=apart(call.leftpad)), *more), direct)
    sinks = problem("sinks-padded", torch.float16)
    made = triton_attention.launch(sinks, 3)
    check(sinks, made=made)
    sinks.leftpad, sinks.sinks.leftpad = apart(sinks.leftpad), apart(sinks.sinks.leftpad)
    assert torch.equal(triton_backend.attend(sinks), made[0])


def test_a_model_decodes_through_the_backend(monkeypatch):
    """The whole way, with what asks for a GPU answered in its place."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    monkeypatch.setattr(triton_backend, "unsupported", lambda call: None)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 4)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    model, inputs = tiny_model("llama-g3"), prompt(75, left_padding=5)
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], {}
    for backend in ("triton", "reference"):
        with torch.no_grad(), hf_kvattn.enabled(model):
            cache = QuantizedKVCache(model.config, bits=4, value_bits=8, group_size=16)
            with hf_kvattn.backend("reference"):
                model(ids[:, :70], attention_mask=mask[:, :70], past_key_values=cache)
            with hf_kvattn.backend(backend):
                logits[backend] = torch.cat(
                    [model(ids[:, 70 + a : 70 + b], attention_mask=mask[:, : 70 + b], past_key_values=cache).logits
                     for a, b in ((0, 1), (1, 5))], 1,
                )  # fmt: skip
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=1e-2, atol=1e-2)
