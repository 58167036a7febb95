"""Stages `caches`, `sync` and `two_gpus`: every cache in a model of two layers, forward by forward.

A forward runs three times from equal caches, which hold the same codes: with what is checked, with the formula in
float64, and with the formula in the model's dtype. Tokens are given, so errors do not choose other ones.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

import hf_kvattn
from hf_kvattn.caches.registry import CACHES
from hf_kvattn.caches.sliding import SlidingWindowKVCache
from hf_kvattn.caches.static import StaticKVCache
from hf_kvattn.evaluation.gpu_check.judging import PLAIN, TRUTH, formulas, logits_compared
from hf_kvattn.evaluation.gpu_check.models import MakeCache, make_model, model_config, token_ids
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, NotHere, Run
from hf_kvattn.kernels import dispatch

DTYPE = torch.float16  # its rounding hides eight times less than bfloat16's
ROOM = 640
RING = "a ring of the model's own"  # a StaticKVCache of a model with sliding windows
OURS: dict[str, MakeCache] = {
    **{name: lambda c, n, kind=CACHES[name]: kind(c, max_cache_len=n)  # type: ignore[misc]  # a default's type
       for name in ("static", "int8", "int4", "int3", "int2", "k8v4", "fp8")},
    "offloaded": lambda config, room: StaticKVCache(config, max_cache_len=room, offload=True),
    "growing": lambda config, room: StaticKVCache(config),
    "sliding": lambda config, room: SlidingWindowKVCache(config, window=96, sinks=4),
    RING: lambda config, room: StaticKVCache(config, max_cache_len=room),
}  # fmt: skip
# What happens to a cache: n new tokens, -n cropped ones, or 0: the rows change places, as beams do.
PROGRAMS: dict[str, tuple[int, ...]] = {
    "greedy": (70, *[1] * 36),
    "padded": (70, *[1] * 36),
    "beams": (70, *[1, 0] * 12),
    "assisted": (70, *[6, -4] * 8),
    "chunked prompt": (64, 64, 33, 1, 1),
    "second turns": (150, 1, 1, 17, 1, 300, 1),
    "crop": (150, 1, -40, 1, 30, 1),
}


def enabled_model(machine: Machine, window: int | None = None) -> PreTrainedModel:
    """A model of two layers, with sliding windows or without."""
    return hf_kvattn.enable(make_model(machine, model_config(machine, "1B", 2, window), DTYPE))


def forward(model: PreTrainedModel, cache: Any, ids: torch.Tensor, padding: int = 0) -> torch.Tensor:
    """The logits `(B, T, V)` of new tokens; with `padding` the last row's first ones are padding."""
    mask = None
    if padding:
        mask = ids.new_ones(len(ids), cache.get_seq_length() + ids.shape[1])
        mask[-1, :padding] = 0
    return model(ids, past_key_values=cache, attention_mask=mask, use_cache=True).logits


def programmed(machine: Machine, model: PreTrainedModel, make: MakeCache, program: str) -> Found:
    """Runs a program, of a rehearsal its beginning, and judges the logits of each forward; what is worst."""
    steps, padding = PROGRAMS[program][: machine.pick(len(PROGRAMS[program]), 7)], 23 if program == "padded" else 0
    cache, ids = make(model.config, ROOM), token_ids(model, 2, sum(n for n in steps if n > 0))
    worst: Found = {"ok": True, "error": 0.0, "allowed": 1.0}
    done = 0
    with formulas():
        for step in steps:
            if step == 0:
                cache.reorder_cache(torch.tensor([1, 0]))
            elif step < 0:
                cache.crop(step)
            else:
                new, done, copies = ids[:, done : done + step], done + step, {}
                for name in (TRUTH, PLAIN):
                    with dispatch.backend(name):
                        copies[name] = forward(model, cache.fork(), new, padding)
                out = forward(model, cache, new, padding)
                found = logits_compared(out, copies[TRUTH], copies[PLAIN], out.dtype) | {"tokens_before": done - step}
                if not found["ok"] or found["error"] / found["allowed"] > worst["error"] / worst["allowed"]:
                    worst = found
                if not worst["ok"]:
                    break
    return worst


def caches(run: Run) -> None:
    machine = run.machine
    models = {window: enabled_model(machine, window) for window in (None, 96)}
    names = machine.pick(list(OURS), ["int4", "sliding", RING])
    programs = machine.pick(list(PROGRAMS), ["padded", "beams", "assisted", "second turns"])
    run.over({
        f"{name}, {program}": partial(programmed, machine, models[96 if name == RING else None], OURS[name], program)
        for name, program in itertools.product(names, programs)
    })  # fmt: skip


def _waits(model: PreTrainedModel, make: MakeCache) -> Found:
    """Whether a decode step waits for the GPU, up to where a block is quantized."""
    cache, ids = make(model.config, ROOM), token_ids(model, 2, 110)
    forward(model, cache, ids[:, :70])
    for new in ids[:, 70:73].split(1, 1):  # what is made at the first steps
        forward(model, cache, new)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for new in ids[:, 73:].split(1, 1):
            forward(model, cache, new)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def sync(run: Run) -> None:
    models = {window: enabled_model(run.machine, window) for window in (None, 96)}
    names = ("static", "int8", "int4", "int2", "offloaded", "sliding", RING)
    run.over({name: partial(_waits, models[96 if name == RING else None], OURS[name]) for name in names})


def _halves(machine: Machine, make: MakeCache) -> Found:
    """A model with one layer on each GPU: the logits are those of one GPU."""
    assert machine.other is not None
    model = enabled_model(machine)
    ids = token_ids(model, 2, 90)

    def logits() -> torch.Tensor:
        cache = make(model.config, ROOM)
        parts = [forward(model, cache, new) for new in ids.split([70, *[1] * 20], 1)]
        return torch.cat(parts, 1).to(machine.device)

    with formulas():
        expected = {}
        for name in (TRUTH, PLAIN):
            with dispatch.backend(name):
                expected[name] = logits()
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    places = dict(zip(parts, [machine.device] * 3 + [machine.other] * 3, strict=True))
    model = dispatch_model(model, device_map={name: str(place) for name, place in places.items()})
    return logits_compared(logits(), expected[TRUTH], expected[PLAIN], DTYPE)


def _elsewhere(machine: Machine) -> Found:
    """A model on one GPU while the other is the current one."""
    model = enabled_model(machine)
    with torch.cuda.device(machine.other):
        return programmed(machine, model, OURS["int4"], "greedy")


def two_gpus(run: Run) -> None:
    machine = run.machine
    if machine.other is None:
        raise NotHere("there is one GPU")
    tasks = {f"halves, {name}": partial(_halves, machine, OURS[name]) for name in ("static", "int4", "offloaded")}
    run.over(tasks | {"the other GPU is the current one": partial(_elsewhere, machine)})
