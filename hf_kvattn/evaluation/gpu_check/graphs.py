"""Stage `graphs`: steps in CUDA graphs give what eager steps give, in a second cache too, and skip and copy nothing;
how many kernels each layer has in a graph.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_kvattn
from hf_kvattn.compiling.decode_steps import DecodeSteps
from hf_kvattn.evaluation.gpu_check.caches import DTYPE, OURS, RING, enabled_model
from hf_kvattn.evaluation.gpu_check.judging import PLAIN, TRUTH, formulas, logits_compared
from hf_kvattn.evaluation.gpu_check.models import MakeCache, fill, model_config, token_ids
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, Run
from hf_kvattn.evaluation.gpu_check.timing import active_bytes, kernels_of
from hf_kvattn.kernels import dispatch

PROMPT = 90


class Forced(LogitsProcessor):
    """Chooses the tokens `(B, T)` one after the other, and keeps the logits that they were chosen in spite of."""

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens
        self.logits: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self.tokens[:, len(self.logits)][:, None]
        self.logits.append(scores.clone())
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def compile_config(machine: Machine, mode: str | None = "reduce-overhead") -> CompileConfig:
    """How steps are compiled; a rehearsal traces them, and needs no compiler."""
    if machine.rehearsed:
        return CompileConfig(fullgraph=True, mode=None, backend="eager")  # type: ignore[arg-type]  # as below
    return CompileConfig(fullgraph=True, mode=mode)  # type: ignore[arg-type]  # torch.compile takes None


def forced(model: PreTrainedModel, cache: Any, prompt: torch.Tensor, tokens: torch.Tensor, **more: Any) -> Any:
    """The logits `(B, T, V)` with which `generate()` goes over given tokens; its last hidden states if asked for."""
    processor = Forced(tokens)
    out = model.generate(  # type: ignore[operator]  # nn.Module attributes are typed Tensor | Module
        prompt, past_key_values=cache, max_new_tokens=tokens.shape[1], min_new_tokens=tokens.shape[1], do_sample=False,
        logits_processor=LogitsProcessorList([processor]), return_dict_in_generate=True, **more,
    )  # fmt: skip
    hidden = [each[-1] for each in out.hidden_states[1:]] if more.get("output_hidden_states") else [torch.zeros(1)]
    return torch.stack(processor.logits, 1), torch.stack(hidden)


def _replayed(machine: Machine, eager: PreTrainedModel, make: MakeCache) -> Found:
    steps = machine.pick(200, 6)
    room = machine.pick(65536, 128)
    ids = token_ids(eager, 2, PROMPT + steps)
    prompt, tokens, expected = ids[:, :PROMPT], ids[:, PROMPT:], {}
    with formulas():
        for name in (TRUTH, PLAIN):
            with dispatch.backend(name):
                expected[name] = forced(eager, make(eager.config, room), prompt, tokens, output_hidden_states=True)
    compiled = hf_kvattn.enable(copy.deepcopy(eager), compile=True)
    how = {"compile_config": compile_config(machine)}
    counters.clear()
    before = active_bytes()
    cache = make(eager.config, room)
    found: dict[str, Found] = {}

    def compare(name: str, made: tuple[torch.Tensor, torch.Tensor]) -> None:
        pairs = zip(made, expected[TRUTH], expected[PLAIN], strict=True)
        both = [logits_compared(*three, DTYPE) for three in pairs if three[0].numel() > 1]
        found[name] = min(both, key=lambda each: each["ok"])

    compare("a first cache", forced(compiled, cache, prompt, tokens, **how))
    torch.cuda.synchronize()
    kept = active_bytes() - before - cache.nbytes  # a graph that copied its buffers keeps them twice
    second = make(eager.config, room)
    compare("a second cache", forced(compiled, second, prompt, tokens, **how))
    cache.reset()
    compare("the first one, reset", forced(compiled, cache, prompt, tokens, **how))
    cache.reset()
    compare("hidden states", forced(compiled, cache, prompt, tokens, output_hidden_states=True, **how))
    skipped = int(counters["inductor"]["cudagraph_skips"])
    wrong = [name for name, each in found.items() if not each["ok"]]
    if skipped:
        wrong.append(f"{skipped} graphs were skipped")
    if kept > cache.nbytes / 2 + 2**26:  # a graph's own memory, the workspace of products in it
        wrong.append(f"{kept} bytes stay beside a cache of {cache.nbytes}: its buffers are copied")
    errors = {f"{name}: error": each["error"] for name, each in found.items()}
    return {"ok": not wrong, "said": "; ".join(wrong), "steps": steps, "skipped": skipped, "kept_bytes": kept, **errors}


def _launched(machine: Machine, make: MakeCache, window: int | None) -> Found:
    """The kernels and copies of a layer's op by itself, with the arguments of a step: what a graph repeats of it."""
    config, names = model_config(machine, "1B", 1, window), []
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    cache = make(config, 128)
    fill(machine, cache, (2, kv_heads, PROMPT, dim))
    steps = DecodeSteps(cache)

    def step(**given: Any) -> CausalLMOutputWithPast:
        part, (q, k, v) = steps.layers[0], (machine.randn(2, n, 1, dim) for n in (heads, kv_heads, kv_heads))
        tensors, how = (part.k, part.v, q, k, v, *part.numbers), (None, None, "auto")
        action = partial(torch.ops.hf_kvattn.append_attend, *tensors, dim**-0.5, part.wraps, *how)
        if part.packed:
            stored = (part.packed, part.codecs, part.layout)
            action = partial(torch.ops.hf_kvattn.append_attend_packed, *tensors, *stored, dim**-0.5, *how)
        names.extend(kernels_of(machine, action))
        return CausalLMOutputWithPast()

    steps.run(step, step, {"input_ids": torch.ones(2, 1, dtype=torch.long, device=machine.device)})
    return {"kernels": names, "launches": len(names)}


def graphs(run: Run) -> None:
    machine = run.machine
    windows = {"static": None, "int4": None, RING: 96}
    models = {window: enabled_model(machine, window) for window in (None, 96)}
    tasks = {
        name: partial(_replayed, machine, models[windows[name]], OURS[name])
        for name in machine.pick(tuple(windows), ("static",))
    }
    run.over(tasks | {f"{name}, a layer": partial(_launched, machine, OURS[name], windows[name]) for name in windows})
