"""What a saved prefix saves: the time to compute it against the time to load it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.serialize import load_cache, save_cache
from hf_kvattn.evaluation import variants as caches
from hf_kvattn.evaluation.throughput import ratio, spread
from hf_kvattn.evaluation.variants import Variant


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    *,
    variants: Sequence[Variant],
    rounds: int = 5,
    new_tokens: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Computes, saves and loads a prefix with each cache in turns; a dict that JSON can hold.

    Args:
        model: on the CPU, where files are loaded to.
        token_ids: the prefix and one token more, 1-D.
        variants: caches of this package.
        rounds: turns of each cache, after one that is not measured. Files are loaded from the page cache.
        new_tokens: decoded greedily after the prefix with the loaded cache and with the one that was saved.
        progress: show a bar on stderr.
    """
    foreign = [variant.name for variant in variants if not variant.hooked]
    if foreign or not variants:
        raise ValueError(f"only caches of hf_kvattn can be saved, got {foreign}")
    if len(token_ids) < 2 or rounds < 1 or new_tokens < 1:
        raise ValueError(f"impossible sizes: {len(token_ids)} tokens, {rounds=}, {new_tokens=}")
    times_ms: dict[str, dict[str, list[list[float]]]] = {
        variant.name: {part: [] for part in ("prefill", "save", "load")} for variant in variants
    }
    found: dict[str, dict[str, Any]] = {}
    prompt = token_ids[None].to(model.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        for turn in tqdm(range(rounds + 1), desc="prefix", unit="round", disable=not progress):
            for variant in variants:
                with caches.running(model, variant):
                    lap_ms, found[variant.name] = _round(model, prompt, variant, path, new_tokens)
                for part, part_ms in lap_ms.items() if turn else ():
                    times_ms[variant.name][part].append([part_ms])
    return {
        "kind": "prefix",
        "settings": {"context": prompt.shape[1] - 1, "rounds": rounds, "new_tokens": new_tokens},
        "rows": [
            {"variant": name}
            | {f"{part}_ms": spread([value for (value,) in values]) for part, values in parts.items()}
            | {"speedup": ratio(parts["prefill"], parts["load"])}
            | found[name]
            for name, parts in times_ms.items()
        ],
    }


def _round(
    model: PreTrainedModel, prompt: torch.Tensor, variant: Variant, path: Path, new_tokens: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The milliseconds of each part, and what does not depend on time."""
    prefix, last = prompt[:, :-1], prompt[:, -1:]
    cache: Any = variant.make(model.config, prompt.shape[1] + new_tokens)
    marks_s = [time.perf_counter()]
    model(prefix, past_key_values=cache, logits_to_keep=1)
    marks_s.append(time.perf_counter())
    save_cache(cache, path, prefix)
    marks_s.append(time.perf_counter())
    loaded = load_cache(path, model.config, prefix)
    marks_s.append(time.perf_counter())
    lap_ms = [(end - start) * 1e3 for start, end in zip(marks_s, marks_s[1:], strict=False)]
    ids = [_continue(model, last, each, new_tokens) for each in (cache, loaded)]
    return dict(zip(("prefill", "save", "load"), lap_ms, strict=True)), {
        "file_bytes": path.stat().st_size,
        "cache_bytes": cache.nbytes,
        "same_tokens": ids[0] == ids[1],
    }


def _continue(model: PreTrainedModel, ids: torch.Tensor, cache: KVCache, new_tokens: int) -> list[int]:
    """Greedy tokens after `ids`, `(1, 1)`."""
    out = []
    for _ in range(new_tokens):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out
