"""What is said of attention and KV caches, measured on the reader's own machine, with the stated figure beside it.

- Prefill attention of one layer: standard (the T x T scores written to memory), tiled (what this package's dispatch
  takes), and tiled within a sliding window, in chunks that read no more than they see. Time and peak memory.
- Decoding with the real model: a step without a cache (a forward over everything) against steps with one, by
  `throughput.py`.
- One layer's cache with 32, 8 and 1 KV heads for 32 query heads, and with 8 and a window: bytes, and the time of a
  decode step's attention.

Everything is timed in turns within one process. `stated.py` then puts each stated figure beside the measured one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation import stated, throughput
from hf_kvattn.evaluation.variants import PeakMemory, Variant
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.modules import CachedSelfAttention

TURN_S = 0.02  # an action is repeated within its turn until this is over, so that short ones are not one call's luck
LAYERS_BYTES = 256 << 20  # decode attention goes round layers that exceed the CPU's caches together, as a model's do
CHUNK = 1024  # queries at once within a window
CACHE_HEADS, CACHE_DIM = 32, 128  # the layer whose cache is measured: that of 7B Llama-style models
KV_HEADS = {"MHA": 32, "GQA": 8, "MQA": 1, "GQA, window": 8}


def _standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The textbook's causal attention `(B, T, H, D)`, all scores in memory."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    scores = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1] ** -0.5
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)


def _tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return dispatch.attend(AttendCall(q, k, v, q.shape[-1] ** -0.5))


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    parts = []
    for start in range(0, q.shape[2], CHUNK):
        end, begin = min(start + CHUNK, q.shape[2]), max(0, start - window + 1)
        seen_k, seen_v = k[:, :, begin:end], v[:, :, begin:end]
        parts.append(
            dispatch.attend(AttendCall(q[:, :, start:end], seen_k, seen_v, q.shape[-1] ** -0.5, window=window))
        )
    return torch.cat(parts, 1)


def _time_in_turns(
    actions: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[list[float]]]:
    """Milliseconds of the calls of each action, by round; every round starts with another action."""

    def timed(action: Callable[[], Any]) -> float:
        start_s = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start_s)

    names = list(actions)
    times_ms: dict[str, list[list[float]]] = {name: [] for name in names}
    for action in actions.values():
        timed(action)  # warm-up
    for turn in range(rounds):
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            calls_ms = [timed(actions[name])]
            while sum(calls_ms) < 1e3 * TURN_S:
                calls_ms.append(timed(actions[name]))
            times_ms[name].append(calls_ms)
    return times_ms


def _all(rounds_ms: list[list[float]]) -> list[float]:
    return [call_ms for calls_ms in rounds_ms for call_ms in calls_ms]


def measure_attention(
    heads: Sequence[int],
    length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    window: int,
    standard: bool,
    rounds: int,
    memory: PeakMemory,
) -> dict[str, Any]:
    """Causal attention of a whole sequence by each method; `standard` says whether that one is among them.

    Returns:
        `methods`: for each its `ms` (median, p20, p80) and `extra_bytes`, how far memory rose above its level before;
        `speedup` of tiled over standard and of windowed over tiled; `max_difference` of standard and tiled results.
    """
    q_heads, kv_heads, dim = heads
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, q_heads, length, dim, generator=generator).to(device, dtype)
    k, v = (torch.randn(1, kv_heads, length, dim, generator=generator).to(device, dtype) for _ in "kv")
    methods: dict[str, Callable[..., torch.Tensor]] = {"standard": _standard} if standard else {}
    methods |= {"tiled": _tiled, "windowed": functools.partial(_windowed, window=window)}
    actions = {name: functools.partial(method, q, k, v) for name, method in methods.items()}
    difference = (_standard(q, k, v) - _tiled(q, k, v)).abs().max().item() if standard else None
    times_ms = _time_in_turns(actions, rounds, device)
    row: dict[str, Any] = {"tokens": length, "methods": {}, "speedup": {}, "max_difference": difference}
    for name, action in actions.items():
        memory.start()
        action()
        row["methods"][name] = {"ms": throughput.spread(_all(times_ms[name])), "extra_bytes": memory.stop()}
    for slow, fast in (("standard", "tiled"), ("tiled", "windowed")):
        row["speedup"][fast] = throughput.ratio(times_ms[slow], times_ms[fast]) if slow in times_ms else None
    return row


def measure_caches(
    length: int, *, dtype: torch.dtype, device: torch.device, window: int, rounds: int
) -> dict[str, Any]:
    """One layer's cache of `length` tokens for each number of KV heads: bytes, and the attention of a decode step.

    Returns:
        `layouts`: for each its `kv_heads`, `window`, `cache_bytes` and `step_ms`, how many `copies` of the cache a step
        went round, and `faster_than_mha`, the ratio of the times.
    """
    layouts: dict[str, dict[str, Any]] = {}
    actions: dict[str, Callable[[], Any]] = {}
    q = torch.randn(1, CACHE_HEADS, 1, CACHE_DIM).to(device, dtype)
    for name, kv_heads in KV_HEADS.items():
        limit = window if name.endswith("window") else None
        config = CachedSelfAttention(CACHE_HEADS * CACHE_DIM, CACHE_HEADS, kv_heads, window=limit).config
        keys = torch.randn(1, kv_heads, length, CACHE_DIM, dtype=dtype, device=device)
        copies = LAYERS_BYTES // (2 * keys.nbytes) + 1
        caches = [StaticKVCache(config, max_cache_len=length) for _ in range(copies)]
        for cache in caches:
            cache.layers[0].append(keys, keys)
            cache.layers[0].finish_attention()
        layouts[name] = {"kv_heads": kv_heads, "window": limit, "cache_bytes": caches[0].nbytes, "copies": copies}
        stored = [cache.layers[0].dense() for cache in caches]
        calls = [AttendCall(q, k, v, CACHE_DIM**-0.5, window=limit) for k, v in stored]
        actions[name] = functools.partial(_attend_all, calls)
    times_ms = {
        name: [[call_ms / layouts[name]["copies"] for call_ms in calls_ms] for calls_ms in rounds_ms]
        for name, rounds_ms in _time_in_turns(actions, rounds, device).items()
    }
    for name, layout in layouts.items():
        layout["step_ms"] = throughput.spread(_all(times_ms[name]))
        layout["faster_than_mha"] = throughput.ratio(times_ms["MHA"], times_ms[name])
    return {"tokens": length, "layouts": layouts}


def _attend_all(calls: list[AttendCall]) -> None:
    for call in calls:
        dispatch.attend(call)


def _decoding(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell of `throughput.measure`, what decoding without a cache costs against decoding with one."""
    found = []
    for cell in cells:
        rounds_ms = {row["variant"]: [[each] for each in row["round_median_ms"]] for row in cell["rows"]}
        none_ms = rounds_ms.get("none")
        rows = [
            {
                **{key: row[key] for key in ("variant", "hooked", "step_ms")},
                "verdict": row["tokens"]["verdict"],
                "speedup": None if none_ms is None else throughput.ratio(none_ms, rounds_ms[row["variant"]]),
            }
            for row in cell["rows"]
        ]
        found.append({"context": cell["context"], "rows": rows})
    return found


def _standard_bytes(heads: Sequence[int], length: int, dtype: torch.dtype) -> int:
    """What standard attention needs at once, at most: the scores, the masked ones, the weights and a mask."""
    return length * length * (3 * heads[0] * dtype.itemsize + 1)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    contexts: Sequence[int],
    lengths: Sequence[int],
    cache_lengths: Sequence[int],
    heads: Sequence[int],
    window: int,
    standard_bytes: int,
    rounds: int = 5,
    new_tokens: int = 20,
    none_limit_s: float = 60.0,
    progress: bool = False,
) -> dict[str, Any]:
    """All claims on one machine and model, as a dict that JSON can hold.

    Args:
        model: what decodes; its dtype and device are those of the other measurements too.
        token_ids: the text as a 1-D tensor, at least as long as the longest context.
        variants: caches that decode; `none` must be among them.
        contexts: prompt tokens, for decoding.
        lengths: tokens of the prefill attention.
        cache_lengths: tokens of the caches whose bytes and step are measured.
        heads: query heads, KV heads and head_dim of the prefill attention.
        window: visible tokens of the windowed rows.
        standard_bytes: standard attention is skipped where it would need more memory than this.
        rounds: turns that each action gets.
        new_tokens: tokens decoded in all rounds together, a multiple of `rounds`.
        none_limit_s: decoding without a cache is skipped when a step would take longer.
        progress: show bars on stderr.
    """
    q_heads, kv_heads, dim = heads
    if min(heads) < 1 or q_heads % kv_heads:
        raise ValueError(f"impossible heads: {q_heads=}, {kv_heads=}, {dim=}")
    if not lengths or not cache_lengths or min(*lengths, *cache_lengths, window, rounds) < 1:
        raise ValueError(f"sizes start at 1: {lengths=}, {cache_lengths=}, {window=}, {rounds=}")
    if "none" not in (names := [variant.name for variant in variants]):
        raise ValueError(f"decoding without a cache is what caches are compared with: 'none' is not among {names}")
    decoded = throughput.measure(
        model,
        tokenizer,
        token_ids,
        variants=variants,
        contexts=contexts,
        batch_sizes=[1],
        new_tokens=new_tokens,
        rounds=rounds,
        none_limit_s=none_limit_s,
        progress=progress,
    )
    dtype, device, memory = model.dtype, model.device, PeakMemory(model.device)
    skipped: list[dict[str, Any]] = []
    attention: list[dict[str, Any]] = []
    with torch.no_grad():
        for length in tqdm(sorted(set(lengths)), desc="prefill attention", disable=not progress):
            needed = _standard_bytes(heads, length, dtype)
            if needed > standard_bytes:
                reason = (
                    f"the scores would take {needed / 2**30:.1f} GiB, the limit is {standard_bytes / 2**30:.1f} GiB"
                )
                skipped.append({"variant": "standard attention", "context": length, "batch": 1, "reason": reason})
            attention.append(
                measure_attention(
                    heads,
                    length,
                    dtype=dtype,
                    device=device,
                    window=window,
                    standard=needed <= standard_bytes,
                    rounds=rounds,
                    memory=memory,
                )
            )
        layers = [
            measure_caches(length, dtype=dtype, device=device, window=window, rounds=rounds)
            for length in tqdm(sorted(set(cache_lengths)), desc="caches", disable=not progress)
        ]
    results = {
        "kind": "claims",
        "settings": {
            "rounds": rounds,
            "new_tokens": new_tokens,
            "heads": list(heads),
            "window": window,
            "cache_heads": CACHE_HEADS,
            "cache_dim": CACHE_DIM,
            "memory_method": memory.method,
            "near_tie": decoded["settings"]["near_tie"],
        },
        "attention": attention,
        "decoding": _decoding(decoded["cells"]),
        "caches": layers,
        "skipped": skipped + decoded["skipped"],
        "mismatches": decoded["mismatches"],
    }
    return results | {"claims": stated.judge(results)}
