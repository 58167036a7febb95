"""Stages `flash` and `sdpa`: what flash-attn's kernels and PyTorch's compute, and which of PyTorch's are taken."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hf_kvattn.evaluation.common.timing import spread
from hf_kvattn.evaluation.gpu_check.judging import judged
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, NotHere, Run
from hf_kvattn.evaluation.gpu_check.timing import kernels_of
from hf_kvattn.kernels import dispatch, flash_libraries
from hf_kvattn.kernels.call import AttendCall, Feature, SinkKV
from hf_kvattn.kernels.flash_libraries import LIBRARIES, Library

# Query heads, KV heads, head_dim.
HEADS = {"GQA": (32, 8, 128), "MHA": (8, 8, 64), "MQA": (8, 1, 128), "D 256": (8, 2, 256), "D 80": (8, 2, 80)}
# Query tokens, stored tokens, and the rules of a call.
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "decode": (1, 700, {}),
    "decode, padded": (1, 700, {"leftpad": [0, 431]}),
    "decode, an empty row": (1, 700, {"leftpad": [3, 700]}),
    "decode, window": (1, 700, {"window": 99}),
    "decode, padded window": (1, 700, {"window": 99, "leftpad": [0, 650]}),
    "decode, softcap": (1, 700, {"softcap": 3.0}),
    "decode, learned sinks": (1, 700, {"s_aux": True}),
    "decode, sinks": (1, 700, {"window": 99, "sinks": True}),
    "decode, a ring": (1, 700, {"tokens": 700, "slot": 300, "leftpad": [0, 431]}),
    "decode, a ring with an empty piece": (1, 700, {"tokens": 700, "slot": 300, "leftpad": [0, 500]}),
    "prompt": (300, 300, {}),
    "prompt, padded": (300, 300, {"leftpad": [0, 211]}),
    "prompt, window": (300, 300, {"window": 99}),
    "continued": (130, 700, {}),
    "continued, padded": (130, 700, {"leftpad": [0, 640]}),
    "17 queries": (17, 700, {}),
}


def make_call(machine: Machine, heads: str, shape: str) -> AttendCall:
    """A call over buffers with room, in whose spare slots is NaN."""
    torch.manual_seed(0)
    (q_heads, kv_heads, dim), (queries, tokens, rules) = HEADS[heads], SHAPES[shape]
    given: dict[str, Any] = dict(rules)
    q = machine.randn(2, queries, q_heads, dim).transpose(1, 2)
    room = 0 if "slot" in given else 24
    buffers = machine.randn(2, 2, kv_heads, tokens + room, dim)
    buffers[..., tokens:, :] = float("nan")
    k, v = buffers[..., :tokens, :]
    if "leftpad" in given:
        given["leftpad"] = machine.numbers(given["leftpad"])
    if given.pop("s_aux", None):
        given["s_aux"] = 2 * machine.randn(q_heads)
    if given.pop("sinks", None):
        first_k, first_v = machine.randn(2, 2, kv_heads, 4, dim)
        given["sinks"] = SinkKV(first_k, first_v, torch.randn_like(q), 7)
    return AttendCall(q, k, v, dim**-0.5, **given)


def _through(backend: str, machine: Machine, heads: str, shape: str) -> Found:
    call, chosen = make_call(machine, heads, shape), dispatch.BACKENDS[backend]
    if reason := chosen.unavailable() or chosen.unsupported(call):
        raise NotHere(reason)
    return judged(chosen.attend(call), call)


def load(library: Library, machine: Machine) -> tuple[Callable[..., Any], str]:
    """A flash library's `flash_attn_with_kvcache`, and its version."""
    if not library.is_for(machine.device):
        raise NotHere(f"the library {library.name} is for other GPUs")
    function, text = flash_libraries.load(library.name)
    if function is None:
        raise NotHere(text)
    return function, text


def _appends(library: Library, machine: Machine) -> Found:
    """The library's own way to append: two rows, of which one is padded and one has no earlier token at all."""
    attend, version = load(library, machine)
    if not library.serves & Feature.LEFT_PADDING:
        raise NotHere(f"the library {library.name} is not used with left padding")
    torch.manual_seed(0)
    q, (k, v) = machine.randn(2, 1, 8, 128), machine.randn(2, 2, 90, 2, 128)
    new_k, new_v = machine.randn(2, 2, 1, 2, 128)
    lengths, leftpad = (machine.numbers(each) for each in ([64, 64], [11, 64]))
    out = attend(q, k, v, k=new_k, v=new_v, cache_seqlens=lengths, cache_leftpad=leftpad, softmax_scale=0.1)
    k[:, 64:65], v[:, 64:65] = new_k, new_v
    q, k, v = (t.transpose(1, 2) for t in (q, k[:, :65], v[:, :65]))
    return judged(out, AttendCall(q, k, v, 0.1, leftpad=leftpad)) | {"version": version}


def flash(run: Run) -> None:
    machine = run.machine
    heads = machine.pick(list(HEADS), ["GQA", "MQA"])
    shapes = machine.pick(list(SHAPES), ["decode, padded", "decode, a ring with an empty piece", "17 queries"])
    tasks = {f"{library.name} appends": partial(_appends, library, machine) for library in LIBRARIES}
    for each, shape in itertools.product(heads, shapes):
        tasks[f"{each}: {shape}"] = partial(_through, "flash", machine, each, shape)
    run.over(tasks)


def _taken(machine: Machine, shape: str) -> Found:
    """What SDPA gives, whether rows that see nothing are finite, and the kernels that it launches."""
    found = _through("sdpa", machine, "GQA", shape)
    call = make_call(machine, "GQA", shape)
    names = kernels_of(machine, lambda: dispatch.BACKENDS["sdpa"].attend(call))
    return found | {"kernels": sorted(set(names)), "launches": len(names)}


def _grows(machine: Machine, backend: str | None) -> Found:
    """Microseconds of a decode step of one layer whose length was never met before, and of one met before."""
    q_heads, kv_heads, dim = HEADS["GQA"]
    q = machine.randn(1, q_heads, 1, dim)
    k, v = machine.randn(2, 1, kv_heads, 4500, dim)
    attend = dispatch.attend if backend is None else dispatch.BACKENDS[backend].attend
    times_us: dict[str, list[float]] = {"new": [], "met": []}
    for length, kind in itertools.product(range(4001, 4001 + machine.pick(64, 2)), times_us):
        call = AttendCall(q, k[:, :, :length], v[:, :, :length], dim**-0.5)
        torch.cuda.synchronize()
        start_s = time.perf_counter()  # the host's time counts: it is the host that makes plans
        attend(call)
        torch.cuda.synchronize()
        times_us[kind].append(1e6 * (time.perf_counter() - start_s))
    return {f"{kind}_us": spread(times[len(times) // 4 :]) for kind, times in times_us.items()}


def sdpa(run: Run) -> Found:
    machine = run.machine
    shapes = machine.pick(list(SHAPES), ["decode", "prompt, padded", "continued"])
    run.over(
        {shape: partial(_taken, machine, shape) for shape in shapes}
        | {f"{name or 'auto'} at 64 growing lengths": partial(_grows, machine, name) for name in (None, "sdpa")}
    )
    return {}
