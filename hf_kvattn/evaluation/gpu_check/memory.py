"""Stage `memory`: how far the GPU's memory rises in the steps that could keep too much."""

from __future__ import annotations

from functools import partial

import torch
from transformers import DynamicCache

import hf_kvattn
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.gpu_check.caches import OURS, forward
from hf_kvattn.evaluation.gpu_check.graphs import compile_config, forced
from hf_kvattn.evaluation.gpu_check.models import fill, make_model, model_config, token_ids
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, Run
from hf_kvattn.evaluation.gpu_check.timing import active_bytes, peak_bytes


def _model(machine: Machine, layers: int, compile: bool = False):
    return hf_kvattn.enable(make_model(machine, model_config(machine, "1B", layers), machine.dtype), compile=compile)


def _offloaded(machine: Machine) -> Found:
    """Layers that are on the GPU at most, while the host runs several steps ahead of it."""
    tokens, layers, steps = machine.pick(32768, 64), 8, 6
    model = _model(machine, layers)
    config, ids = model.config, token_ids(model, 1, steps)

    def decode(cache) -> None:
        for new in ids.split(1, 1):  # nothing reads a result: the host does not wait
            forward(model, cache, new)

    short = StaticKVCache(config, max_cache_len=64)
    decode(short)
    before = active_bytes()
    short.reset()
    of_step = peak_bytes(partial(decode, short)) - before  # what a step takes without any cache to speak of
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    cache = StaticKVCache(config, max_cache_len=tokens + steps, offload=True)
    fill(machine, cache, shape)
    torch.cuda.synchronize()
    layer = cache.nbytes / layers
    rise = peak_bytes(partial(decode, cache)) - before - of_step  # with whatever lies there between two steps
    return {"ok": rise <= 2.02 * layer, "layers": max(0.0, rise) / layer, "layer_bytes": layer}


def _prompt(machine: Machine) -> Found:
    """The peak of a long prompt into an int4 cache, which keeps no exact tokens, against that of stock transformers."""
    model, tokens = _model(machine, 4), machine.pick(16384, 40)
    ids = token_ids(model, 1, tokens)
    found: Found = {}
    caches = {"int4": OURS["int4"](model.config, tokens + 64), "stock": DynamicCache(config=model.config)}
    for name, cache in caches.items():
        before = active_bytes()
        found[f"{name}_peak_bytes"] = peak_bytes(partial(model, ids, past_key_values=cache, logits_to_keep=1)) - before
    return {"ok": found["int4_peak_bytes"] <= 1.1 * found["stock_peak_bytes"], **found}


def _growth(machine: Machine) -> Found:
    """A cache that grows holds one layer twice while it moves, not all of them."""
    model, layers = _model(machine, 8), 8
    config, tokens = model.config, machine.pick(65536, 40)
    heads, dim = config.num_key_value_heads, config.head_dim
    before = active_bytes()
    cache = StaticKVCache(config)
    fill(machine, cache, (1, heads, tokens, dim))
    fill(machine, cache, (1, heads, cache.kv_layers[0].capacity - tokens, dim))
    full = cache.nbytes
    peak = peak_bytes(partial(forward, model, cache, token_ids(model, 1, 1))) - before
    assert cache.nbytes > full
    allowed = cache.nbytes * (1 + 1 / layers) + 2**26  # with what a step takes
    return {"ok": peak <= allowed, "peak_bytes": peak, "cache_bytes": cache.nbytes}


def _many(machine: Machine, graphed: bool) -> Found:
    """What stays behind many generates, each with a fresh cache."""
    model = _model(machine, 2, compile=graphed)
    ids, how = token_ids(model, 1, 40), {"compile_config": compile_config(machine)} if graphed else {}
    levels = []
    cache = None
    for _ in range(machine.pick(20 if graphed else 150, 2)):
        cache = OURS["static"](model.config, machine.pick(8192, 64))
        forced(model, cache, ids[:, :32], ids[:, 32:], **how)
        levels.append(active_bytes())
    assert cache is not None
    behind = levels[-1] - levels[len(levels) // 4]
    return {"ok": behind <= cache.nbytes / 2, "behind_bytes": behind, "generates": len(levels)}


def memory(run: Run) -> None:
    machine = run.machine
    run.over({
        "offloaded steps": partial(_offloaded, machine),
        "a prompt into int4": partial(_prompt, machine),
        "growth": partial(_growth, machine),
        "many generates": partial(_many, machine, False),
        "many generates with graphs": partial(_many, machine, True),
    })  # fmt: skip
