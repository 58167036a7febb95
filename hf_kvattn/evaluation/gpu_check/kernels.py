"""Stages `kernels` and `memcheck`: every Triton kernel by itself.

`python -m hf_kvattn.evaluation.gpu_check.kernels FIRST STEP LIMIT` launches every STEP-th case from FIRST on, at most
LIMIT: processes beside each other compile them so, and NVIDIA's memcheck watches one.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.gpu_check.judging import UNITS, compared, judged
from hf_kvattn.evaluation.gpu_check.models import calls_over, fill, one_layer
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, NotHere, Run, plain
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall, SinkKV
from hf_kvattn.quant import blocks
from hf_kvattn.quant.blocks import Blocks
from hf_kvattn.quant.codecs import codec_for
from hf_kvattn.quant.layout import BLOCK, by_width_to, keys_to, planes_of, values_to
from hf_kvattn.quant.packed import ARRAYS, OF_BLOCKS

BITS: tuple[int | str, ...] = ("exact", 8, 4, 3, 2, "fp8")
DIMS, GROUPS = (128, 64, 80, 256), (4, 1, 8)
KV_HEADS, BATCH = 2, 2


def _padded(machine: Machine, call: AttendCall) -> None:
    call.leftpad = machine.numbers([0, call.kv_len * 2 // 3])


def _empty_row(machine: Machine, call: AttendCall) -> None:
    call.leftpad = machine.numbers([3, call.kv_len])


def _sinks(machine: Machine, call: AttendCall) -> None:
    k, v = (machine.randn(*call.k.shape[:2], 4, call.k.shape[3]) for _ in "kv")
    call.window, call.sinks = 60, SinkKV(k, v, torch.randn_like(call.q), 7)


# What a case adds to its call. A ring, several queries and lengths change how it is made.
RULES: dict[str, Callable[[Machine, AttendCall], None]] = {
    "plain": lambda machine, call: None,
    "padded": _padded,
    "an empty row": _empty_row,
    "window": lambda machine, call: setattr(call, "window", 45),
    "softcap": lambda machine, call: setattr(call, "softcap", 3.0),
    "s_aux": lambda machine, call: setattr(call, "s_aux", 2 * machine.randn(call.q.shape[1])),
    "sinks": _sinks,
    "ring": lambda machine, call: setattr(call, "window", 70),
    "5 queries": lambda machine, call: None,
    "16 queries, padded": _padded,
    "20 queries, padded": _padded,  # more query rows than a program takes
    "150 queries": lambda machine, call: None,  # so many that blocks are dequantized first
    "lengths": lambda machine, call: None,
}


class Case(NamedTuple):
    """One call: bits of the codes, head_dim, query heads a KV head, and one of `RULES`."""

    bits: int | str
    dim: int
    group: int
    rule: str

    def __str__(self) -> str:
        return f"{self.bits} D{self.dim} G{self.group} {self.rule}"


def cases(machine: Machine) -> list[Case]:
    """All bits, head_dims and groups with each other; all bits and rules; all head_dims and rules."""
    if machine.rehearsed:
        groups = (1 if "queries" in rule else GROUPS[i % 3] for i, rule in enumerate(RULES))  # the interpreter is slow
        return [Case(BITS[i % 6], (64, 80)[i % 2], next(groups), rule) for i, rule in enumerate(RULES)]
    found = [Case(bits, dim, group, "plain") for bits, dim, group in itertools.product(BITS, DIMS, GROUPS)]
    found += [Case(bits, 128, 4, rule) for bits, rule in itertools.product(BITS, RULES)]
    found += [Case(bits, dim, 8, rule) for dim, rule in itertools.product(DIMS[1:], RULES) for bits in ("exact", 4)]
    found = [case for case in found if (case.bits, case.rule) != ("exact", "150 queries")]  # nothing to dequantize
    return list(dict.fromkeys(found))


def make_call(case: Case, machine: Machine) -> AttendCall:
    """The call of a case over a layer of a cache, whose slots without a token hold NaN or the largest codes."""
    torch.manual_seed(0)
    window = 70 if case.rule == "ring" else None
    config = one_layer(KV_HEADS * case.group, KV_HEADS, case.dim, window=window)
    tokens, then = machine.pick((1185, 40), (150 if case.rule == "ring" else 120, 4))  # so that a ring wraps
    made: Any = {"max_cache_len": tokens + then + 40}
    cache: Any = StaticKVCache(config, **made) if case.bits == "exact" else QuantizedKVCache(config, case.bits, **made)
    fill(machine, cache, (BATCH, KV_HEADS, tokens, case.dim), then)
    for tensor, filled in cache.kv_layers[0].buffers().values():
        tensor[:, :, filled:] = float("nan") if tensor.is_floating_point() else 255
    queries = int(case.rule.split()[0]) if "queries" in case.rule else 1
    (call,) = calls_over(machine, cache, KV_HEADS * case.group, queries)
    RULES[case.rule](machine, call)
    return call


def attended(machine: Machine, case: Case, call: AttendCall) -> tuple[torch.Tensor, AttendCall]:
    """What the kernels give, and the call that this should be the attention of."""
    backend: Any = dispatch.BACKENDS["triton"]
    if reason := backend.unavailable() or backend.unsupported(call):
        raise NotHere(reason)
    if case.rule != "lengths":
        return backend.attend(call), call
    if not hasattr(backend, "attend_lengths"):
        raise NotHere("this backend reads no lengths from the GPU")
    packed, exact, done = call.packed, call.k.shape[2] - 3, 0
    if packed is not None:
        done = packed.tokens - 2 * BLOCK
        packed = replace(packed, tokens=done)
    lengths = machine.numbers([done, exact])
    shorter = replace(call, k=call.k[:, :, :exact], v=call.v[:, :, :exact], packed=packed)
    return backend.attend_lengths(call, lengths), shorter


def _checked(case: Case, machine: Machine) -> Found:
    return judged(*attended(machine, case, make_call(case, machine)))


def _quantizes(machine: Machine, bits: int | str, dim: int) -> Found:
    """Whether codes mean, bit for bit, what those of PyTorch on a CPU (fp8: on the device itself) mean; two layers'
    blocks in one launch."""
    place = machine.device if bits == "fp8" else torch.device("cpu")
    torch.manual_seed(1)
    cache = QuantizedKVCache(one_layer(KV_HEADS, KV_HEADS, dim), bits, max_cache_len=256)
    fill(machine, cache, (BATCH, KV_HEADS, 140, dim))  # room for blocks, and what all of them share
    packed = cache.kv_layers[0].stored_kv().packed
    assert packed is not None
    k, v = machine.randn(2, BATCH, KV_HEADS, 4 * BLOCK, dim)
    k[..., 0] += 100  # a channel apart
    k[:, :, :BLOCK, 1] = 0  # and a scale of zero
    arrays: dict[str, Any] = dict(zip(ARRAYS, packed.arrays(), strict=True))
    copies: dict[str, Any] = {name: arrays[name].clone() for name in OF_BLOCKS}
    twin = replace(packed, **copies)
    finite = dispatch.quantize_blocks([Blocks(k, v, packed, 0), Blocks(k, v, twin, 0)])
    pairs = ((arrays[name][:, :, :4], copies[name][:, :, :4]) for name in OF_BLOCKS)
    alike = all(torch.equal(*pair) for pair in pairs)
    if finite is not None:  # a GPU says so itself
        flagged = dispatch.quantize_blocks([Blocks(k, v * float("nan"), twin, 0)])
        alike &= flagged is not None and bool(finite.all()) and flagged.cpu().bool().tolist() == [[True, False]]
    here: dict[str, Any] = {name: None if array is None else array.to(place) for name, array in arrays.items()}
    if packed.k_widths is None:
        here["k_codes"] = keys_to(packed.k_codes, planes_of(packed.k_codec.bits), place)
    else:
        here["k_codes"] = by_width_to(packed.k_codes, packed.k_widths, place)
    here["v_codes"] = values_to(packed.v_codes, planes_of(packed.v_codec.bits), place)
    made, expected = (replace(packed, tokens=4 * BLOCK, **copy.deepcopy(here)) for _ in range(2))
    blocks.quantize_blocks([Blocks(k.to(place), v.to(place), expected, 0)])
    both = zip(made.dense(0, 4), expected.dense(0, 4), strict=True)
    return {"ok": alike and all(torch.equal(own, other) for own, other in both)}


def _dequantizes(machine: Machine, bits: int | str, dim: int) -> Found:
    """Keys and values as the kernel for many queries writes them, all tokens in order."""
    call = make_call(Case(bits, dim, 1, "150 queries"), machine)
    backend: Any = dispatch.BACKENDS["triton"]
    if not hasattr(backend, "attend_lengths"):
        raise NotHere("this backend dequantizes nothing")
    if reason := backend.unavailable() or backend.unsupported(call):
        raise NotHere(reason)
    from hf_kvattn.kernels.triton import dequantize  # triton is an optional dependency

    dense = dequantize.dense(call)
    _, keys, values = zip(*call.tiles(call.kv_len), strict=True)
    truth = torch.stack([torch.cat(parts, 2).float() for parts in (keys, values)])
    out, least = torch.stack([dense.k, dense.v]), UNITS * torch.finfo(machine.dtype).eps
    return compared(out, truth, truth.to(machine.dtype), least)


def _far(machine: Machine) -> Found:
    """Tokens that begin more than 2**31 numbers into their memory."""
    far, dim = machine.pick(2**31 + 2**20, 2**12), 128
    memory = torch.empty(
        far + 2**18, dtype=machine.dtype, device=machine.device
    )  # two rows: at the beginning, and at its end
    k, v = (memory.as_strided((2, 1, 500, dim), (far, 1, dim, 1), offset) for offset in (0, 2**17))
    for tensor in (k, v):
        tensor.normal_()
    call = AttendCall(machine.randn(2, 1, 4, dim).transpose(1, 2), k, v, dim**-0.5)
    return judged(*attended(machine, Case("exact", dim, 4, "plain"), call))


def _command(machine: Machine, first: int, step: int, limit: int) -> list[str]:
    more = ["--rehearse"] if machine.rehearsed else []
    return [sys.executable, "-m", __name__, *map(str, (first, step, limit)), *more]


def _warm_up(run: Run) -> None:
    """Compiles all cases in processes beside each other: Triton keeps what they compile in its cache on the disk."""
    count = run.machine.pick(min(8, os.cpu_count() or 1), 0)
    started = [
        subprocess.Popen(_command(run.machine, i, count, 1000), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(count)
    ]
    until_s = time.monotonic() + 0.7 * max(0.0, run.end_s - time.monotonic())
    for process in started:
        try:
            process.wait(max(0.1, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def kernels(run: Run) -> Found:
    _warm_up(run)
    machine = run.machine
    bits = machine.pick((8, 4, 3, 2, "fp8"), (8, 4))
    tasks = {str(case): partial(_checked, case, machine) for case in cases(machine)}
    for b, dim in itertools.product(bits, machine.pick(DIMS, (64,))):
        tasks[f"quantizes {b} D{dim}"] = partial(_quantizes, machine, b, dim)
        tasks[f"dequantizes {b} D{dim}"] = partial(_dequantizes, machine, b, dim)
    run.over(tasks | {"offsets beyond 2**31": partial(_far, machine)})
    return {"codecs": [codec_for(b).name for b in bits]}


def memcheck(run: Run) -> Found:
    """Some of the cases under compute-sanitizer, in a process without PyTorch's own allocator."""
    machine = run.machine
    tool = machine.pick(shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", "env")
    watch = machine.pick([tool, "--tool", "memcheck", "--error-exitcode", "9"], [tool])
    if shutil.which(tool) is None:
        raise NotHere("there is no compute-sanitizer")
    count = machine.pick(20, 1)
    command = [*watch, *_command(machine, 0, max(1, len(cases(machine)) // count), count)]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    left_s = max(1.0, run.end_s - time.monotonic())
    try:
        ended = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=left_s)
    except subprocess.TimeoutExpired:
        run.left_out.append(f"memcheck of {count} cases, after {left_s:.0f} s")
        return {}
    said = (ended.stdout + ended.stderr).strip().splitlines()
    return {"ok": ended.returncode == 0, "cases_run": count, "said": [plain(line) for line in said[-5:]]}


def _main(first: int, step: int, limit: int, machine: Machine) -> int:
    """The exit status: 3 where a case raised."""
    run = Run(machine, {}, math.inf)
    with torch.no_grad():
        chosen = cases(machine)[first::step][:limit]
        run.over({str(case): partial(_checked, case, machine) for case in chosen})
    torch.cuda.synchronize()
    wrong = [case for case in run.cases if not case.get("ok", "not_here" in case)]
    print(*wrong, sep="\n")
    return 3 if wrong else 0


if __name__ == "__main__":
    from hf_kvattn.evaluation.gpu_check.rehearsal import MACHINE, stand_ins

    first, step, limit = (int(each) for each in sys.argv[1:4])
    rehearsed = sys.argv[4:] == ["--rehearse"]
    with stand_ins() if rehearsed else contextlib.nullcontext():
        sys.exit(_main(first, step, limit, MACHINE if rehearsed else Machine(torch.device("cuda"), None)))
