"""What beam search makes a cache move: bytes written and time, at each step's reordering of the beams."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import Cache, GenerationConfig, PreTrainedModel

from hf_kvattn.evaluation import variants as caches
from hf_kvattn.evaluation.throughput import ratio, spread
from hf_kvattn.evaluation.variants import BASELINE, Variant


class WrittenBytes(TorchDispatchMode):
    """Counts, in `total`, the bytes that PyTorch operations write to memory: results and temporaries, not views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.index_put_:  # `x[rows] = values`: the rows only
            self.total += args[2].nbytes
        elif (
            isinstance(out, torch.Tensor) and not func.is_view and not func.overloadpacket.__name__.startswith("empty")
        ):
            self.total += out.nbytes
        return out


def _watch(cache: Cache, watcher: Callable[[Callable[[], None]], None]) -> None:
    """Has every `reorder_cache` of this cache run through `watcher`."""
    reorder = cache.reorder_cache
    cache.__dict__["reorder_cache"] = lambda beam_idx: watcher(lambda: reorder(beam_idx))


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    context: int,
    batch_size: int = 1,
    beams: int = 4,
    new_tokens: int = 64,
    rounds: int = 3,
    progress: bool = False,
) -> dict[str, Any]:
    """Beam search with each cache in turns; a dict that JSON can hold.

    Args:
        model: any decoder-only model.
        token_ids: the text, 1-D: `batch_size` prompts of `context` tokens.
        variants: caches to compare, generate()'s default (`stock-dynamic`) among them.
        beams: for each prompt, 2 at least.
        new_tokens: steps, and reorderings.
        rounds: of timing, in turns, after one in which bytes are counted.
        progress: show a bar on stderr.

    Returns:
        `settings`, and `rows` with `written_bytes` a reordering (mean), `fewer_bytes` (times fewer than the default),
        `reorder_ms` (spread over all reorderings), `faster` (times faster than the default) and `same_tokens` as it.
    """
    if BASELINE not in [variant.name for variant in variants]:
        raise ValueError(f"{BASELINE} must be among the variants, got {[variant.name for variant in variants]}")
    if len(token_ids) < batch_size * context or min(batch_size, context, new_tokens, rounds) < 1 or beams < 2:
        raise ValueError(
            f"impossible sizes: {len(token_ids)} tokens, {context=}, {batch_size=}, {beams=}, {new_tokens=}, {rounds=}"
        )
    prompt = token_ids[: batch_size * context].view(batch_size, context).to(model.device)
    # A row that is done before the others keeps its beams as they are: without an end, all go on.
    config = GenerationConfig(num_beams=beams, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)

    def generate(variant: Variant, watcher: Callable[[Callable[[], None]], None]) -> torch.Tensor:
        cache = variant.make(model.config, context + new_tokens)
        if cache is None:
            raise ValueError(f"{variant.name} is no cache: there is nothing to reorder")
        _watch(cache, watcher)
        generator: Any = caches.generator(model, variant)  # a model; its methods are typed as tensors
        with caches.running(model, variant):
            return generator.generate(prompt, config, attention_mask=torch.ones_like(prompt), past_key_values=cache)

    def count(reorder: Callable[[], None]) -> None:
        calls.append(1)
        with counter:
            reorder()

    def clock(reorder: Callable[[], None]) -> None:
        start_s = time.perf_counter()
        reorder()
        lap_ms.append(1e3 * (time.perf_counter() - start_s))

    written: dict[str, float] = {}
    tokens: dict[str, torch.Tensor] = {}
    times_ms: dict[str, list[list[float]]] = {variant.name: [] for variant in variants}
    for turn in tqdm(range(rounds + 1), desc="beams", unit="round", disable=not progress):
        for variant in variants:
            if turn == 0:
                calls: list[int] = []
                counter = WrittenBytes()
                tokens[variant.name] = generate(variant, count)
                written[variant.name] = counter.total / len(calls)
            else:
                lap_ms: list[float] = []
                generate(variant, clock)
                times_ms[variant.name].append(lap_ms)
    return {
        "kind": "beams",
        "settings": {
            "context": context,
            "batch": batch_size,
            "beams": beams,
            "new_tokens": new_tokens,
            "rounds": rounds,
        },
        "rows": [
            {
                "variant": variant.name,
                "hooked": variant.hooked,
                "written_bytes": written[variant.name],
                "fewer_bytes": written[BASELINE] / written[variant.name],
                "reorder_ms": spread([lap for laps in times_ms[variant.name] for lap in laps]),
                "faster": ratio(times_ms[BASELINE], times_ms[variant.name]),
                "same_tokens": torch.equal(tokens[variant.name], tokens[BASELINE]) if variant.exact else None,
            }
            for variant in variants
        ],
    }
