"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, tensor-core instructions.

`compile_only` stands in for the GPU's driver: the package's own host code runs on fake CUDA tensors (shapes and strides
without memory), each launch is compiled to machine code by the assembler in triton's wheel, and recorded instead of
launched. Reading a tensor's numbers from the host, which would wait for the GPU, raises there.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ..kernels.call import AttendCall, PackedKV, SinkKV
from ..kernels.triton import attention as triton_attention
from ..kernels.triton import attention_kernels as triton_kernels
from ..kernels.triton import backend as triton_backend
from ..kernels.triton import dequantize as triton_dequantize
from ..kernels.triton import quantize as triton_quantize
from ..quant.blocks import Blocks
from ..quant.codecs import codec_for
from ..quant.layout import BLOCK
from ..quant.packed import ARRAYS, OF_BLOCKS, shapes_of
from ..tools.tables import Column, digits, table_of

# Each GPU, and the bytes of shared memory that a block may ask for, and that a multiprocessor has.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912, 167936),
    "sm_86": (GPUTarget("cuda", 86, 32), 101376, 102400),
    "sm_89": (GPUTarget("cuda", 89, 32), 101376, 102400),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448, 233472),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448, 233472),
    "sm_120": (GPUTarget("cuda", 120, 32), 101376, 102400),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536, 65536),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), 65536, 65536),
}
Bits = int | str  # of a code, or "fp8"
_RESERVED = 1024  # shared bytes that CUDA takes for itself in each block
_REGISTERS = 65536  # of a multiprocessor
# Registers that the waves of a SIMD share, in steps of how many, and SIMDs of a compute unit.
_AMD_REGISTERS = {"gfx942": (512, 8, 4), "gfx1100": (1536, 24, 2)}
_TENSOR_CORE = r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b"  # NVIDIA's instructions
_SPILL = r"\b(STL|LDL)\b"  # NVIDIA's


def _is_amd(target: str) -> bool:
    return target.startswith("gfx")


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[SimpleNamespace]:
    """Compiles for `target` instead of launching, on CUDA tensors that are fake.

    Gives what stands in for the GPU's driver: its `launches` are (kernel's name, grid).
    """
    gpu, block_bytes, _ = TARGETS[target]
    launches: list[tuple[str, tuple[int, int, int]]] = []

    def launcher(source, metadata):
        return lambda x, y, z, *arguments: launches.append((metadata.name, (x, y, z)))

    active = "_active" if "_active" in vars(driver) else "active"  # of triton up to 3.3
    properties = {"max_shared_mem": block_bytes, "multiprocessor_count": 1, "warpSize": 32}
    stand_in = SimpleNamespace(
        launches=launches,
        launcher_cls=launcher,
        get_current_target=lambda: gpu,
        get_current_device=lambda: target,  # a kernel keeps what it compiled by device
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024)[: 4 if active == "active" else 5],
        ),
    )
    before, hip = vars(driver)[active], torch.version.hip
    driver.set_active(stand_in)
    torch.version.hip = "none" if _is_amd(target) else None  # what tells a ROCm build of PyTorch
    try:
        with FakeTensorMode():
            yield stand_in
    finally:
        torch.version.hip = hip
        setattr(driver, active, before)  # reset_active() raises where there is no GPU


def _resources(compiled: Any, target: str) -> dict[str, Any]:
    """What a kernel takes that was compiled for `target`."""
    warps, shared, copies = compiled.metadata.num_warps, compiled.metadata.shared, 0
    loops: list[list[str]] = []
    if _is_amd(target):
        code, taken = compiled.asm["amdgcn"], shared
        names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        registers, spilled, spills = (_number(rf"\.{name}:\s+(\d+)", code) for name in names)
        tensor_core, instruction = r"\bv_(mfma|wmma)_\w+", r"^\s+[a-z]+_\w+"
        of_simd, granule, simds = _AMD_REGISTERS[target]
        by_registers = of_simd // (-(-registers // granule) * granule) * simds // warps
    else:
        usage, code = _disassembled(compiled.asm["cubin"])
        registers, stack, local = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
        spilled, spills, taken = stack + local, _count(_SPILL, code), shared + _RESERVED
        tensor_core, instruction = _TENSOR_CORE, r"^\s+/\*[0-9a-f]+\*/"
        copies, loops = _count(r"\b(LDGSTS|UTMALDG)\b", code), _loops(code)
        by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return {
        "warps": warps,
        "registers": registers,
        "spilled_bytes": spilled,
        "spill_instructions": spills,
        "shared_bytes": shared,
        "tensor_core_instructions": _count(tensor_core, code),
        "asynchronous_copies": copies,
        "instructions": _count(instruction, code),
        "loop_instructions": [len(body) for body in loops],
        "loop_spills": [_count(_SPILL, "\n".join(body)) for body in loops],
        "blocks_per_multiprocessor": min(by_registers, TARGETS[target][2] // max(taken, 1)),
    }


def _disassembled(cubin: bytes) -> list[str]:
    """What NVIDIA's tools say of a kernel: its resources, and its instructions."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = [f"{tools}/cuobjdump", "-res-usage", file.name], [f"{tools}/nvdisasm", "-c", file.name]
        return [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]


def _loops(code: str) -> list[list[str]]:
    """The instructions of each loop that multiplies on tensor cores, the packed tokens' before the exact ones'.

    A loop is what lies between a backward branch and its target: what is loaded ahead before it is not counted.
    """
    found: list[list[str]] = []
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
            branch = re.search(r"\bBRA\b.*(\.L_x_\d+)", instruction[1])
            if branch and branch[1] in labels:
                body = instructions[labels[branch[1]] :]
                if any(re.search(_TENSOR_CORE, each) for each in body):
                    found.append(body)
    return found


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in what the tool printed"
    return int(found[1])


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.M))


@dataclass(frozen=True)
class Case:
    """One variant of a kernel: `decode`, `merge`, `quantize` or `dequantize`, of bfloat16 heads of `head_dim`.

    Attributes:
        rows: query rows of a tile (decode).
        k_bits, v_bits: of the codes, or "fp8"; 0 where no token is packed.
        lengths: whether they are in a tensor (decode).
        sinks: whether the tokens are sinks (decode).
    """

    kernel: str
    target: str
    head_dim: int
    rows: int = 0
    k_bits: Bits = 0
    v_bits: Bits = 0
    lengths: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        name = f"{self.kernel} {self.target} D{self.head_dim} rows{self.rows} k{self.k_bits}v{self.v_bits}"
        return name + " lengths" * self.lengths + " sinks" * self.sinks


MIXES: tuple[tuple[Bits, Bits], ...] = ((8, 8), (4, 4), (3, 3), (2, 2), (8, 4))
FP8_MIXES: tuple[tuple[Bits, Bits], ...] = (("fp8", "fp8"), ("fp8", 4))
FP8_TARGETS = ("sm_90",)  # which converts it in hardware
# All mixes of bits, with these heads; of the other heads and GPUs a sample.
GRID = {"sm_80": (64, 128, 256), "sm_90": (64, 128, 256)}
SAMPLE: tuple[tuple[int, int, tuple[Bits, Bits]], ...] = (  # head_dim, rows, bits
    (128, 16, (4, 4)), (128, 16, (0, 0)), (128, 32, (8, 8)), (256, 16, (4, 4)),
)  # fmt: skip
UNEVEN = ((80, 16, (4, 4)), (80, 32, (8, 8)), (96, 16, (4, 4)), (96, 16, (0, 0)))  # not powers of two, on those of GRID


def all_cases() -> list[Case]:
    """What `hf-kvattn triton-resources` compiles."""
    cases = []
    for target, dim in ((target, dim) for target, dims in GRID.items() for dim in dims):
        for mix in (*MIXES, *(FP8_MIXES if target in FP8_TARGETS else ()), (0, 0)):
            padded = triton.next_power_of_2(dim)
            bits = [8 if each == "fp8" else int(each) for each in mix if each]
            most = triton_attention.tile_for(triton_backend.MAX_QUERIES * 8, padded, bits, _is_amd(target)).rows
            cases += [Case("decode", target, dim, rows, *mix) for rows in sorted({16, most})]
            if mix in ((8, 4), (0, 0)):  # which take most and least registers
                cases.append(Case("decode", target, dim, most, *mix, lengths=True))
            if mix == (0, 0):
                cases.append(Case("decode", target, dim, most, sinks=True))
        cases += [Case("quantize", target, dim, 0, *mix) for mix in MIXES]
        cases += [Case("merge", target, dim), Case("dequantize", target, dim, 0, 8, 4)]
    for target in TARGETS:
        uneven = UNEVEN if target in GRID else ()
        sample = [Case("decode", target, dim, rows, *mix) for dim, rows, mix in (*SAMPLE, *uneven)]
        sample += [Case("quantize", target, 128, 0, 4, 4), Case("merge", target, 128)]
        sample += [Case("dequantize", target, 128, 0, 4, 4)]
        cases += [case for case in sample if case not in cases]
    return sorted(cases, key=lambda case: list(TARGETS).index(case.target))


def compile_case(case: Case) -> dict[str, Any]:
    """Compiles the case as the package would launch it, and says what it takes."""
    kernel = {
        "decode": triton_kernels.decode_attention_kernel,
        "merge": triton_kernels.merge_splits_kernel,
        "quantize": triton_quantize.quantize_blocks_kernel,
        "dequantize": triton_dequantize.dequantize_kernel,
    }[case.kernel]
    kernel.device_caches.pop(case.target, None)
    bits = (case.k_bits, case.v_bits) if case.k_bits or case.kernel == "decode" else (4, 4)
    with compile_only(case.target):
        call = fake_call(case.head_dim, *bits, query_heads=2 * max(case.rows, 8), padded=True)
        if case.sinks:
            call.sinks = SinkKV(call.k, call.v, call.q, 9, call.leftpad)
        if case.kernel == "quantize":
            assert call.packed is not None
            new = torch.empty(1, 2, 64, case.head_dim, dtype=torch.bfloat16, device="cuda")
            triton_quantize.launch([Blocks(new, new, call.packed, 0)])
        elif case.kernel == "dequantize":
            triton_dequantize.dense(call)
        else:
            lengths = torch.empty(2, dtype=torch.int32, device="cuda") if case.lengths else None
            triton_attention.launch(call, 132, lengths)
    *others, compiled = kernel.device_caches[case.target][0].values()
    assert len(others) == case.sinks  # which are queued after the window's tokens
    return _resources(compiled, case.target)


def fake_call(
    dim: int,
    k_bits: Bits,
    v_bits: Bits,
    query_heads: int = 8,
    kv_heads: int = 2,
    tokens: int = 8192,
    padded: bool = False,
) -> AttendCall:
    """One bfloat16 query over `tokens` packed and 40 exact tokens (0 bits: exact ones alone), on a GPU; no numbers.

    Only inside `compile_only`. Values share a scale in groups of 32 channels, or 16 where 32 does not divide `dim`.
    """

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    packed = None
    if k_bits:
        codecs, lead = (codec_for(k_bits), codec_for(v_bits)), (1, kv_heads)
        shapes = shapes_of(*codecs, dim, 16 if dim % 32 else 32)
        arrays = dict.fromkeys(ARRAYS) | {
            name: make(*lead, *((tokens // BLOCK,) if name in OF_BLOCKS else ()), *shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        packed = PackedKV(4, tokens, *codecs, **arrays)  # type: ignore[arg-type]  # of ARRAYS, some None
    k, v = make(1, kv_heads, 40, dim), make(1, kv_heads, 40, dim)
    leftpad = make(1, dtype=torch.int32) if padded else None
    return AttendCall(make(1, 1, query_heads, dim).transpose(1, 2), k, v, dim**-0.5, leftpad=leftpad, packed=packed)


def traffic_bytes(call: AttendCall, multiprocessors: int) -> tuple[int, int]:
    """Bytes that the kernels load and store for `call`, and the least that any kernel must.

    The least: visible blocks and exact tokens with all that belongs to them, the queries and the result, once each.
    """
    batch, q_heads, q_len, dim = call.q.shape
    kv_heads, item = call.k.shape[1], call.q.element_size()
    rows = q_heads // kv_heads * q_len
    bits = () if call.packed is None else (call.packed.k_codec.bits, call.packed.v_codec.bits)
    tile = triton_attention.tile_for(rows, max(16, triton.next_power_of_2(dim)), bits, amd=False)
    row_tiles = triton.cdiv(rows, tile.rows)
    at_once = tile.blocks if bits else tile.exact_blocks
    splits = triton_attention.splits_for(call, batch * kv_heads * row_tiles, multiprocessors, at_once)
    packed, exact = call.packed, call.kv_len
    of_blocks = of_head = again = 0
    if packed is not None:
        exact -= packed.tokens
        sizes = {
            n: t.nbytes // (batch * kv_heads) for n, t in zip(ARRAYS, packed.arrays(), strict=True) if t is not None
        }
        block = sum(sizes.pop(name) for name in OF_BLOCKS) // packed.k_codes.shape[2]
        again = 0 if packed.k_widths is None else dim + dim // 2 + dim // 16  # of widths: by channel, pair and group
        of_blocks, of_head = (packed.tokens // BLOCK - splits.block_begin) * block, sum(sizes.values())
    keys = of_blocks + (exact - splits.exact_begin) * 2 * dim * item
    queries, n_splits = rows * dim * item, max(1, splits.packed + splits.exact)
    leftpad = 0 if call.leftpad is None else 4
    result = rows * (dim * item + 4)
    merging = n_splits * rows * (2 * dim * 4 + 3 * 4)  # stored, and loaded again: the log-sum-exps twice
    moved = row_tiles * keys + n_splits * (queries + row_tiles * (of_head + again + leftpad)) + merging + result
    heads = batch * kv_heads
    return heads * moved, heads * (keys + queries + of_head + result) + (0 if call.leftpad is None else 4 * batch)


TRAFFIC = (  # query heads, KV heads, head_dim, packed tokens, bits
    *((32, 8, 128, tokens, bits) for tokens in (8192, 32768) for bits in (8, 4, 3, 2)),
    *((9, 3, 64, 8192, bits) for bits in (8, 4, 2)),
    *((64, 8, 128, 32768, bits) for bits in (8, 4, 2)),
)


def measure(targets: Sequence[str]) -> dict[str, Any]:
    """All cases of `targets`, compiled, and the bytes a decode step moves: what `triton.json` holds."""
    cases = [case for case in all_cases() if case.target in targets]
    kernels = [
        {"case": asdict(case), "resources": compile_case(case)} for case in tqdm(cases, desc="compiling", unit="kernel")
    ]
    traffic = []
    with compile_only("sm_90"):
        for q_heads, kv_heads, dim, tokens, bits in TRAFFIC:
            moved, least = traffic_bytes(fake_call(dim, bits, bits, q_heads, kv_heads, tokens), 132)
            traffic.append(
                {"query_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim, "packed_tokens": tokens, "bits": bits}
                | {"multiprocessors": 132, "moved_bytes": moved, "least_bytes": least}
            )
    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": kernels, "traffic": traffic}


def _bits(case: dict[str, Any]) -> str:
    if case["kernel"] == "decode" and not case["k_bits"]:
        return "sinks" if case["sinks"] else "exact"
    return f"{case['k_bits']}/{case['v_bits']}" if case["k_bits"] else ""


COLUMNS: list[Column] = [
    ("kernel", "case.kernel", str),
    ("GPU", "case.target", str),
    ("head_dim", "case.head_dim", str),
    ("rows", "case.rows", lambda rows: str(rows or "")),
    ("bits", "case", _bits),
    ("lengths", "case", lambda case: "tensor" if case["lengths"] else "host" if case["kernel"] == "decode" else ""),
    ("warps", "resources.warps", str),
    ("registers a thread", "resources.registers", str),
    ("spilled bytes", "resources.spilled_bytes", str),
    ("spill instructions in loops", "resources.loop_spills", lambda spills: str(sum(spills))),
    ("shared bytes", "resources.shared_bytes", str),
    ("tensor-core instructions", "resources.tensor_core_instructions", str),
    ("asynchronous copies", "resources.asynchronous_copies", str),
    ("blocks a multiprocessor", "resources.blocks_per_multiprocessor", str),
    ("instructions for 32 tokens", "per_32_tokens", digits(".0f")),
    ("times exact", "times_exact", digits(".2f")),
]


def per_32_tokens(case: Case, resources: dict[str, Any]) -> float | None:
    """Instructions that each warp executes for 32 packed tokens (exact ones where none are packed); None on AMD's."""
    if not resources["loop_instructions"]:
        return None
    bits = [8 if each == "fp8" else int(each) for each in (case.k_bits, case.v_bits) if each]
    tile = triton_attention.tile_for(case.rows, triton.next_power_of_2(case.head_dim), bits, _is_amd(case.target))
    return resources["loop_instructions"][0] / (tile.blocks if bits else tile.exact_blocks)


def _with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with `per_32_tokens`, and `times_exact`: against exact tokens on that GPU, of those sizes."""
    found = {Case(**row["case"]): per_32_tokens(Case(**row["case"]), row["resources"]) for row in rows}
    made = []
    for row, (case, count) in zip(rows, found.items(), strict=True):
        exact = found.get(replace(case, k_bits=0, v_bits=0)) if case.kernel == "decode" else None
        times = count / exact if count and exact else None
        made.append({**row, "per_32_tokens": count, "times_exact": times})
    return made


def table(found: dict[str, Any]) -> str:
    """`triton.json` as a page to read."""
    columns: list[Column] = [(name.replace("_", " "), name, str) for name in found["traffic"][0]]
    traffic = [{**row, "times the least": row["moved_bytes"] / row["least_bytes"]} for row in found["traffic"]]
    columns.append(("times the least", "times the least", digits(".3f")))
    return f"""# The Triton kernels, compiled

Compiled for these GPUs with triton {found["triton"]} (torch {found["torch"]}), through the package's own host code, and
checked numerically in Triton's interpreter. **Never run on a GPU:** nothing here is a time.

`python scripts/triton_resources.py --output model_cards/kernels` writes this file and `triton.json`, which it is made
from. bfloat16 models; `rows` are the query rows of a tile (query tokens times query heads of a KV head), `bits` those
of keys and values, `lengths` says where the numbers of tokens are: with the host, or in a tensor that a captured launch
reads anew. Registers and shared memory bound the blocks that a multiprocessor holds at once (on AMD's, a compute unit,
whose loads wait in registers: no asynchronous copies there). What spills outside the loops is moved once a program;
loops are told apart in NVIDIA's instructions only. `instructions for 32 tokens` is what each warp executes in
the loop over the tokens, packed ones where there are any, and `times exact` is that against the loop over exact tokens
of the same sizes (NVIDIA). float32 models are left to other backends: without tensor
cores the kernels spill.

{table_of(COLUMNS, _with_ratios(found["kernels"]))}
## Bytes of a decode step

What the loads and stores of one layer's step move, batch 1, counted number by number (the tests hold this count against
every load and store that the interpreter makes), against the least possible: visible codes, scales and exact
tokens, queries and the result, once each. The rest is the splits' partial results.

{table_of(columns, traffic)}"""
