"""What the Triton kernels compile to, through the package's own host code, without a GPU.

pytest tests/jobs/triton_codegen; with KVATTN_TRITON_ALL=1 all of `model_cards/kernels/triton.json` is compiled anew.
"""

import ast
import contextlib
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from triton.backends.amd.compiler import HIPBackend

from hf_kvattn.evaluation import codegen
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.triton import attention as triton_attention
from hf_kvattn.kernels.triton import attention_kernels as triton_kernels
from hf_kvattn.kernels.triton import backend as triton_backend

assert os.environ.get("TRITON_INTERPRET", "0") == "0", "leave TRITON_INTERPRET unset: with it Triton compiles nothing"

ALL = os.environ.get("KVATTN_TRITON_ALL") == "1"
RECORDED = json.loads((Path(__file__).parents[3] / "model_cards/kernels/triton.json").read_text())
CASES = [codegen.Case(**row["case"]) for row in RECORDED["kernels"]]
SAMPLE = CASES if ALL else [
    codegen.Case("decode", "sm_80", 128, 16, 4, 4),
    codegen.Case("decode", "sm_80", 256, 16, 4, 4),
    codegen.Case("decode", "sm_90", 128, 16, 4, 4),
    codegen.Case("decode", "sm_90", 64, 32, 8, 4),
    codegen.Case("decode", "sm_90", 128, 32, "fp8", "fp8"),
    codegen.Case("decode", "sm_100", 128, 16, 4, 4),
    codegen.Case("decode", "gfx942", 128, 16, 4, 4),
    codegen.Case("decode", "sm_90", 128, 16, 3, 3),
    codegen.Case("decode", "sm_90", 256, 16, 8, 4, lengths=True),
    codegen.Case("decode", "sm_80", 64, 32, sinks=True),
    codegen.Case("decode", "gfx942", 128, 16, 0, 0),
    codegen.Case("quantize", "sm_90", 128, 0, 4, 4),
    codegen.Case("dequantize", "sm_90", 128, 0, 4, 4),
    codegen.Case("merge", "sm_90", 128),
]  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_recorded_resources_are_those_of_this_code(case):
    (row,) = (row for row in RECORDED["kernels"] if codegen.Case(**row["case"]) == case)
    assert codegen.compile_case(case) == row["resources"]


# That of 3.3.1 asks for ROCm's linker, which its wheel does not bring.
LINKS_FOR_AMD = not hasattr(HIPBackend, "path_to_rocm_lld")
EVERY_TRITON = [
    codegen.Case(kernel, target, 128, 16 if kernel == "decode" else 0, *bits, lengths=lengths)
    for target in ("sm_80", "sm_90", "sm_120", *["gfx942"] * LINKS_FOR_AMD)
    for kernel, bits, lengths in (
        ("decode", (4, 4), False), ("decode", (8, 8), False), ("decode", (0, 0), False), ("decode", (4, 4), True),
        ("merge", (0, 0), False), ("quantize", (4, 4), False), ("dequantize", (4, 4), False),
    )
]  # fmt: skip


@pytest.mark.every_triton
@pytest.mark.parametrize("case", EVERY_TRITON, ids=str)
def test_no_spills_with_this_version_of_triton(case):
    """Numbers are not compared: those that are recorded are of one version."""
    found = codegen.compile_case(case)
    most_bytes, most_in_loops = spills_of(case)
    assert found["spilled_bytes"] <= most_bytes and sum(found["loop_spills"]) <= most_in_loops
    assert (found["tensor_core_instructions"] > 0) == (case.kernel == "decode")


def fours(ttgir: str) -> list[tuple[int, str]]:
    """Of each inline assembly that takes four numbers at a time: how many they are of, and their layout."""
    found = []
    for line in re.findall(r"elementwise_inline_asm .*packed_element = 4.*", ttgir):
        operands, layout = re.search(r" : (.*) -> tensor<\d+x\d+x\w+, (#ttg\.dot_op<\{.*?\}>|#\w+)>", line).groups()
        if not layout.startswith("#ttg"):
            layout = re.search(rf"^{layout} = (.*)$", ttgir, re.MULTILINE)[1]
        found.append((operands.count("tensor<"), layout))
    return found


@pytest.mark.every_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dim", [64, 128])
def test_four_numbers_that_are_made_at_once_lie_as_the_assembly_takes_them(dim, target, monkeypatch):
    """A thread's registers hold two neighbours after each other, channels of keys or words of values, that share a byte
    of single bits; of keys the next two are of the same group. Whatever layout Triton chooses."""
    compiled = []
    monkeypatch.setattr(codegen, "_resources", lambda made, target: compiled.append(made.asm["ttgir"]))
    codegen.compile_case(codegen.Case("decode", target, dim, 16, 3, 3))
    found = fours(compiled[0])
    assert len(found) == 8  # of four tokens each, keys and values
    for operands, layout in found:
        of_keys = operands > 5
        if "dot_op" in layout:  # an operand's first registers lie along the sum
            assert not of_keys and "opIdx = 1" in layout and int(re.search(r"kWidth = (\d+)", layout)[1]) >= 2
        elif "linear" in layout:  # (word, channel)
            first, second = ast.literal_eval(re.search(r"register = (\[\[.*?\]\])", layout)[1])[:2]
            assert (first, second) in (([0, 1], [0, 2]), ([0, 1], [0, 8])) if of_keys else first == [1, 0], layout
        else:
            words, channels = map(int, re.search(r"sizePerThread = \[(\d+), (\d+)\]", layout).groups())
            if of_keys:
                assert "order = [1, 0]" in layout and words == 1 and channels % 4 == 0, layout
            else:
                assert "order = [0, 1]" in layout and words % 2 == 0, layout


def test_everything_that_is_shipped_is_recorded():
    assert sorted(map(str, CASES)) == sorted(map(str, codegen.all_cases()))


def spills_of(case: codegen.Case) -> tuple[int, int]:
    """The most spilled bytes, and spill instructions in loops, that are stood for."""
    if case.kernel == "quantize" and (case.target, case.head_dim) == ("sm_90", 256) and case.k_bits in (2, 3, 4):
        return 8, 0  # two registers, once in 32 steps
    if case.kernel != "decode":
        return 0, 0
    if case.target == "gfx1100":  # 256 registers a thread, half of what gfx942 has, hold no tile of tokens beside it
        return SPILLED_ON_GFX1100[case.head_dim, case.rows, case.k_bits, case.v_bits], 0
    if case.target.startswith("sm") and case.head_dim == 256:  # what is used behind the loop over packed tokens
        return SPILLED_AT_256.get((case.k_bits, case.v_bits), (0, 0))
    if case.target.startswith("sm") and case.k_bits in (2, 3, 4):  # before the loop, which reads its table anew
        return 64, 0
    if (case.target, case.head_dim, case.rows, case.k_bits) == ("sm_80", 80, 32, 8):
        return 16, 0
    return 0, 0


SPILLED_ON_GFX1100 = {(128, 16, 0, 0): 96, (128, 16, 4, 4): 1240, (128, 32, 8, 8): 1172, (256, 16, 4, 4): 2652}
SPILLED_AT_256 = {
    (8, 8): (48, 0), (8, 4): (48, 1), ("fp8", "fp8"): (48, 0), ("fp8", 4): (64, 6),
    # Scales and offsets of 256 channels, and the words of three planes, are more than there are registers beside.
    (4, 4): (576, 219), (3, 3): (504, 156), (2, 2): (512, 159),
}  # fmt: skip


def takes_all(case: codegen.Case) -> bool:
    """Whether one program may fill a multiprocessor."""
    if case.kernel == "quantize":  # once in 32 steps
        return True
    if case.kernel != "decode":
        return False
    if case.target == "gfx942":  # loads wait in registers
        return case.head_dim == 256 and case.k_bits != 0
    return case.target in ("sm_86", "sm_89", "sm_120") and case.head_dim >= 128 and case.k_bits != 0  # 100 KB shared


@pytest.mark.parametrize("target", codegen.TARGETS)
def test_no_spills_tensor_cores_and_two_blocks_a_multiprocessor(target):
    rows = [row for row in RECORDED["kernels"] if row["case"]["target"] == target]
    assert len(rows) == sum(case.target == target for case in codegen.all_cases())
    for row in rows:
        case, found = codegen.Case(**row["case"]), row["resources"]
        most_bytes, most_in_loops = spills_of(case)
        assert found["spilled_bytes"] <= most_bytes and sum(found["loop_spills"]) <= most_in_loops, case
        assert (found["spill_instructions"] > 0) <= (most_bytes > 0), case
        if case.kernel == "decode":
            assert found["tensor_core_instructions"] > 0, case
        assert found["blocks_per_multiprocessor"] >= (1 if takes_all(case) else 2), case
        if target.startswith("sm") and case.kernel == "decode":
            assert found["asynchronous_copies"] > 0, case


def exact_of(case: codegen.Case) -> codegen.Case:
    return replace(case, k_bits=0, v_bits=0)


PACKED = [case for case in CASES if (case.kernel, case.k_bits, case.v_bits) == ("decode", 4, 4)]
PACKED = [case for case in PACKED if case.target.startswith("sm") and exact_of(case) in CASES]


TIMES_EXACT = {64: 1.9, 80: 1.6, 96: 1.6, 128: 1.5, 256: 2.3}  # by head_dim


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_tokens_take_few_more_instructions_than_exact_ones(case):
    """Of 4 bits, whose keys are put together from three planes, in the loops that each warp executes, for the same 32
    tokens: as recorded. They are a quarter of the bytes."""
    found = {codegen.Case(**row["case"]): row["resources"] for row in RECORDED["kernels"]}
    packed, exact = (codegen.per_32_tokens(each, found[each]) for each in (case, exact_of(case)))
    assert packed <= TIMES_EXACT[case.head_dim] * exact


def test_instructions_are_compared_for_every_head():
    sizes = itertools.product(("sm_80", "sm_90"), (64, 128, 256), (16, 32))
    sizes = {size for size in sizes if size[1:] not in ((128, 32), (256, 32))}
    assert sizes <= {(c.target, c.head_dim, c.rows) for c in PACKED}


def test_a_loop_is_counted_from_its_backward_branch():
    """Not what is loaded ahead of it, nor loops without tensor-core instructions."""
    code = """
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/                   LDGSTS.E [R1], desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
        /*0050*/                   FADD R1, R1, R2 ;
.L_x_2:
        /*0060*/               @P2 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""
    assert [len(body) for body in codegen._loops(code)] == [4]


def test_reading_a_number_on_the_host_would_raise_and_the_kernels_read_none():
    with codegen.compile_only("sm_90") as recorder:
        with pytest.raises(DataDependentOutputException):
            torch.ones(1, device="cuda").item()
        call = codegen.fake_call(128, 4, 4, query_heads=32, kv_heads=8, tokens=8192, padded=True)
        out, lse = triton_attention.launch(call, 132)
        assert (out.shape, out.device.type, lse.shape) == ((1, 1, 32, 128), "cuda", (1, 32, 1))
    (decode, grid), (merge, merge_grid) = recorder.launches
    assert (decode, merge) == ("decode_attention_kernel", "merge_splits_kernel")
    assert grid == (17, 8, 1) and merge_grid == (1, 32, 1)


@pytest.mark.parametrize("q_len", [300, 2000])
def test_a_chunk_of_a_prompt_over_32_k_takes_one_launch_beside_sdpa(q_len, monkeypatch):
    monkeypatch.setattr(triton_backend, "_too_old", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    ran = []
    monkeypatch.setattr(triton_backend.sdpa, "attend", lambda call: ran.append(call) or call.q.transpose(1, 2))
    with codegen.compile_only("sm_90") as recorder:
        call = codegen.fake_call(128, 4, 4, query_heads=8, tokens=32768)
        call.q = torch.empty(1, 8, q_len, 128, dtype=torch.bfloat16, device="cuda")
        assert triton_backend.unsupported(call) is None
        assert triton_backend.attend(call).shape == (1, q_len, 8, 128)
    assert recorder.launches == [("dequantize_kernel", (1024 + 2, 2, 1))]
    (dense,) = ran
    assert dense.packed is None and dense.k.shape == dense.v.shape == (1, 2, 32768 + 40, 128)


@pytest.mark.parametrize(("heads", "tokens", "splits"), [((32, 8), 512, 1), ((32, 8), 65536, 33), ((8, 8), 2**20, 33),
                                                         ((8, 1), 2**20, 126)])  # fmt: skip
def test_splits_fill_the_multiprocessors(heads, tokens, splits):
    with codegen.compile_only("sm_90"):
        call = codegen.fake_call(128, 4, 4, query_heads=heads[0], kv_heads=heads[1], tokens=tokens)
        made = triton_attention.splits_for(call, heads[1], 132, 1)
    assert made.packed == splits and made.exact == 1
    assert made.packed * made.blocks * 32 >= tokens and made.packed + made.exact <= triton_attention.MAX_SPLITS


def test_one_variant_serves_every_length():
    with codegen.compile_only("sm_90"):
        kernel = triton_kernels.decode_attention_kernel
        kernel.device_caches.pop("sm_90", None)
        for tokens in (32, 64, 4096, 4128, 100_000 // 32 * 32):
            triton_attention.launch(codegen.fake_call(64, 4, 4, tokens=tokens), 132)
        assert len(kernel.device_caches["sm_90"][0]) == 1


def test_one_launch_serves_every_length():
    """What is queued for a graph: nothing in it depends on the lengths, nor does the host read them."""
    with codegen.compile_only("sm_90") as recorder:
        call = codegen.fake_call(64, 4, 4, tokens=8192)
        lengths = torch.empty(2, dtype=torch.int32, device="cuda")
        call.window = 100  # from the host's lengths it would leave two splits
        out, _ = triton_attention.launch(call, 132, lengths)
        assert out.shape == (1, 1, 8, 64)
        with pytest.raises(ValueError, match="not .* on cuda:0"):
            triton_attention.launch(call, 132, torch.empty(2, dtype=torch.int32, device="cpu"))
    assert [grid for _, grid in recorder.launches] == [(17, 2, 1), (1, 8, 1)]


def test_results_are_on_the_device_of_the_queries_and_padding_comes_along():
    with codegen.compile_only("sm_90"):
        call = codegen.fake_call(64, 4, 8, tokens=256, padded=True)
        call.leftpad = torch.zeros(1, dtype=torch.long, device="cpu")
        out, lse = triton_attention.launch(call, 132)
        assert (out.shape, lse.dtype, out.device.type) == ((1, 1, 8, 64), torch.float32, "cuda")


def test_auto_takes_it_for_packed_tokens_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    monkeypatch.setattr(triton_backend, "_too_old", lambda device: None)
    monkeypatch.setattr(triton_backend, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    with codegen.compile_only("sm_90"):
        call = codegen.fake_call(64, 4, 8, tokens=256)
        assert dispatch.auto_choice(call) == ("triton", None)
        assert triton_backend.attend(call).shape == (1, 1, 8, 64)
        call.q = torch.empty(1, 8, 128, 64, dtype=torch.bfloat16, device="cuda")
        assert dispatch.auto_choice(call) == ("triton", None)
        call.softcap, call.q = 2.0, torch.empty(1, 8, 129, 64, dtype=torch.bfloat16, device="cuda")
        module, reason = dispatch.auto_choice(call)
        assert module == "sdpa" and "beyond 128 query tokens blocks are dequantized" in reason
        dense = codegen.fake_call(64, 0, 0, tokens=0)
        assert dispatch.auto_choice(dense)[0] == "triton"  # one query: before SDPA
        dense.q = torch.empty(1, 8, 17, 64, dtype=torch.bfloat16, device="cuda")
        assert dispatch.auto_choice(dense)[0] == "sdpa" and triton_backend.unsupported(dense) is None
