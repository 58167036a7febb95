"""Stage `attention`: one layer's decode attention by each kernel there is, over more memory than the GPU caches."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_kvattn.caches.quantized import QuantizedKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.gpu_check.bars import median_ms
from hf_kvattn.evaluation.gpu_check.libraries import load
from hf_kvattn.evaluation.gpu_check.models import calls_over, fill, one_layer
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, NotHere, Run, plain
from hf_kvattn.evaluation.gpu_check.timing import captured, time_ms
from hf_kvattn.evaluation.gpu_check.versions import l2_bytes
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.kernels.flash_libraries import LIBRARIES, Library

HEADS, FEW_HEADS = (32, 8, 128), (2, 1, 16)  # query and KV heads and head_dim of Llama 8B, and of a rehearsal
CELLS = tuple(itertools.product((32768, 8192, 2048, 131072), (1, 8)))  # tokens and rows; the bars' first
BITS: dict[str, int | str | None] = {"exact": None, "int8": 8, "int4": 4, "int2": 2, "fp8": "fp8"}


def _calls(machine: Machine, bits: int | str | None, batch: int, tokens: int) -> tuple[list[AttendCall], int]:
    """Calls over as many filled layers as together exceed the GPU's own cache, and the bytes of one of them."""
    q_heads, kv_heads, dim = machine.pick(HEADS, FEW_HEADS)
    width = 16 if bits is None else 8 if isinstance(bits, str) else bits  # fp8 is the one name
    of_token = batch * kv_heads * dim * 2 * width / 8
    past_l2 = 4 * l2_bytes(machine.device)
    layers = machine.pick(max(1, int(-(-past_l2 // (of_token * tokens)))), 1)
    config = one_layer(q_heads, kv_heads, dim, layers)
    cache: Any = StaticKVCache(config, max_cache_len=tokens)
    if bits is not None:
        cache = QuantizedKVCache(config, bits, max_cache_len=tokens)
    fill(machine, cache, (batch, kv_heads, tokens, dim))
    return calls_over(machine, cache, q_heads), cache.nbytes // layers


def _attends(backend: str, call: AttendCall) -> Callable[[], Any]:
    chosen = dispatch.BACKENDS[backend]
    if reason := chosen.unavailable() or chosen.unsupported(call):
        raise NotHere(reason)
    return partial(chosen.attend, call)


def _flash_attn(library: Library, machine: Machine, call: AttendCall) -> Callable[[], Any]:
    attend, _ = load(library, machine)
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    return partial(attend, q, k, v, cache_seqlens=call.kv_len, softmax_scale=call.scale, causal=True)


def _sdpa_flash(machine: Machine, call: AttendCall) -> Callable[[], Any]:
    """The heads of a group as rows of one head: no head is read twice."""
    q = call.q.reshape(len(call.q), call.k.shape[1], -1, call.q.shape[3])

    def attend() -> torch.Tensor:
        with sdpa_kernel(machine.pick(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)):
            return scaled_dot_product_attention(q, call.k, call.v, scale=call.scale)

    return attend


def _flashinfer(call: AttendCall) -> Callable[[], Any]:
    try:
        library = importlib.import_module("flashinfer")
    except ImportError as error:
        raise NotHere(f"flashinfer: {plain(error)}") from error
    if len(call.q) > 1:
        raise NotHere("flashinfer takes batches in pages alone")
    q, k, v = call.q[0, :, 0].contiguous(), *(t[0] for t in (call.k, call.v))
    return partial(library.single_decode_with_kv_cache, q, k, v, kv_layout="HND", sm_scale=call.scale)


def _prepared(
    lanes: dict[str, Callable[[], list[float]]], name: str, machine: Machine,
    make: Callable[[AttendCall], Callable[[], Any]], made: tuple[list[AttendCall], int],
) -> Found:  # fmt: skip
    """Makes a lane of a kernel: all its calls in one CUDA graph, or one after the other where none can be captured."""
    calls, size = made
    actions = [make(call) for call in calls]
    for action in actions:
        action()
    torch.cuda.synchronize()
    found: Found = {"bytes": size, "layers": len(calls)}
    try:
        replay = captured(actions)
    except RuntimeError as error:
        torch.cuda.synchronize()
        lanes[name], found["not_captured"] = partial(time_ms, actions, 3), plain(error)
    else:
        lanes[name] = lambda: [ms / len(calls) for ms in time_ms([replay], 3)]
    return found


def _lengths(machine: Machine, bits: str, tokens: int) -> tuple[Callable[[AttendCall], Callable[[], Any]], Any]:
    """A launch for all lengths up to 16 times `tokens`, with so many there: what a graph of a roomy cache pays."""
    calls, size = _calls(machine, BITS[bits], 1, 16 * tokens)
    backend: Any = dispatch.BACKENDS["triton"]
    if not hasattr(backend, "attend_lengths"):
        raise NotHere("no backend reads lengths from the GPU")
    packed = calls[0].packed
    exact = calls[0].kv_len - (0 if packed is None else packed.tokens)
    counts = [0, tokens] if packed is None else [packed.tokens // 16 // 32 * 32, exact]
    lengths = machine.numbers(counts)
    return lambda call: partial(backend.attend_lengths, call, lengths), (calls, size)


def _cell(run: Run, batch: int, tokens: int) -> None:
    lanes: dict[str, Any] = {}
    machine, cell = run.machine, f"B{batch} x {tokens}"
    made: dict[str, tuple[list[AttendCall], int]] = {}

    def of(bits: str) -> tuple[list[AttendCall], int]:
        if bits not in made:
            made[bits] = _calls(
                machine, BITS[bits], machine.pick(batch, 1), machine.pick(tokens, max(48, tokens // 512))
            )
        return made[bits]

    def lane(name: str, make: Callable[[AttendCall], Callable[[], Any]], bits: str) -> Found:
        return _prepared(lanes, f"{cell}: {name}", machine, make, of(bits))

    def sixteenth(bits: str) -> Found:
        make, calls = _lengths(machine, bits, machine.pick(tokens, 16))
        return _prepared(lanes, f"{cell}: {bits}, a sixteenth filled", machine, make, calls)

    tasks = {bits: partial(lane, bits, partial(_attends, "triton"), bits) for bits in BITS}
    tasks |= {x.name: partial(lane, x.name, partial(_flash_attn, x, machine), "exact") for x in LIBRARIES}
    tasks |= {"SDPA flash": partial(lane, "SDPA flash", partial(_sdpa_flash, machine), "exact")}
    tasks |= {"flashinfer": partial(lane, "flashinfer", _flashinfer, "exact")}
    if (batch, tokens) == (1, 2048):
        tasks |= {f"{bits}, a sixteenth filled": partial(sixteenth, bits) for bits in ("exact", "int4")}
    found = run.over({f"{cell}: {name}": task for name, task in tasks.items()})
    run.in_rounds(found, lanes, machine.pick(5, 1))
    ceilings = [case for case in run.stages.get("versions", {}).get("cases", []) if "read_gb_s" in case]
    for name in lanes:
        if (ms := median_ms(found[name])) is not None and "sixteenth" not in name:
            found[name]["gb_s"] = found[name]["bytes"] / ms / 1e6
            for ceiling in ceilings:
                found[name]["of_peak"] = found[name]["gb_s"] / ceiling["read_gb_s"]


def attention(run: Run) -> None:
    for tokens, batch in run.machine.pick(CELLS, (*CELLS[:2], CELLS[4])):
        _cell(run, batch, tokens)
