"""Stage `steps`: whole decode steps inside `generate()`, first tokens, and how many kernels a step launches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, StoppingCriteriaList

from hf_kvattn.evaluation.common import variants
from hf_kvattn.evaluation.common.memory import cache_bytes
from hf_kvattn.evaluation.common.variants import VARIANTS, Variant
from hf_kvattn.evaluation.gpu_check.bars import COMPILED, GRAPH
from hf_kvattn.evaluation.gpu_check.graphs import compile_config
from hf_kvattn.evaluation.gpu_check.models import make_model, model_config, token_ids
from hf_kvattn.evaluation.gpu_check.running import Found, Machine, NotHere, Run, plain, release
from hf_kvattn.evaluation.gpu_check.timing import Clock, kernels_of

FLASH = "flash_attention_2"


class Way(NamedTuple):
    """One way to decode: a cache of `VARIANTS`, the attention of a stock model, and the mode of compiled steps."""

    variant: str
    attention: str = "sdpa"
    mode: str | None = None


WAYS: dict[str, Way] = {
    GRAPH: Way("kvattn-static-compiled", mode="reduce-overhead"),
    "stock dynamic, flash": Way("stock-dynamic", FLASH),
    COMPILED: Way("stock-static", mode="reduce-overhead"),
    "kvattn int4, graph": Way("kvattn-int4-compiled", mode="reduce-overhead"),
    "stock dynamic, sdpa": Way("stock-dynamic"),
    "kvattn static, eager": Way("kvattn-static-fit"),
    "kvattn static, compiled": Way("kvattn-static-compiled", mode="default"),
    "kvattn int4, eager": Way("kvattn-int4"),
    "kvattn int8, eager": Way("kvattn-int8"),
    "kvattn fp8, eager": Way("kvattn-fp8"),
    "stock quanto int4": Way("stock-quanto-int4"),
    "stock hqq int4": Way("stock-hqq-int4"),
    "stock fp8": Way("stock-fp8"),
}
BARRED = tuple(WAYS)[:4]  # what the bars compare, which comes first
CELLS = (
    (1, 8192, (*BARRED, "stock quanto int4", "stock hqq int4")),
    (8, 8192, BARRED),
    (1, 32768, BARRED),
    (1, 8192, tuple(WAYS)[4:-3] + tuple(WAYS)[-1:]),
)
BLOCK, ROUNDS = 12, 4  # steps of a lane's turn, the first two of which are dropped; turns
# Tokens stored before, and new ones: a prompt, and two turns of a conversation.
TURNS = {"8192": (0, 8192), "2048 after 30720": (30720, 2048), "20 after 30720": (30720, 20)}


def _model(run: Run) -> PreTrainedModel:
    """An 8B, of as many of its 32 layers as leave room for caches and as there is time to compile, 15 s for each."""
    machine, (free, _) = run.machine, torch.cuda.mem_get_info(run.machine.device)
    fitting, left_s = int((0.45 * free - 2.2e9) / 0.44e9), run.end_s - time.monotonic()
    layers = machine.pick(max(4, min(32, fitting, int(left_s / 15))), 2)
    return make_model(machine, model_config(machine, "8B", layers), machine.dtype)


# A model, as None, and its compiled twins by mode: one that changed modes would compile anew each time.
Models = dict[str | None, PreTrainedModel]


class Lane:
    """A way to decode, after its prompt."""

    def __init__(self, machine: Machine, models: Models, way: Way, prompt: torch.Tensor):
        self.machine, self.way, self.ids, self.model = machine, way, prompt, models[None]
        self.variant: Variant = VARIANTS[way.variant]
        room = prompt.shape[1] + BLOCK * (ROUNDS + 3)
        if self.variant.compiled and way.mode not in models:
            models[way.mode] = variants.compiled_twin(self.model)
        self.generator: Any = models[way.mode if self.variant.compiled else None]
        self.cache, reason = variants.try_make(self.variant, self.model.config, room)
        if reason is not None:
            raise NotHere(reason)

    def decode(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` tokens, by the GPU's clock; the first ends the call's own set-up."""
        clock, machine = Clock(), self.machine
        attention = machine.pick(self.way.attention, "sdpa")
        more = {} if self.way.mode is None else {"compile_config": compile_config(machine, self.way.mode)}

        def mark(ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            """A stopping criterion that never stops."""
            clock.mark()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        clock.mark()
        with attending(self.model, attention), variants.running(self.model, self.variant):
            self.ids = self.generator.generate(
                self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, do_sample=False,
                max_new_tokens=steps, min_new_tokens=steps, stopping_criteria=StoppingCriteriaList([mark]), **more,
            )  # fmt: skip
        return clock.between_ms()


@contextlib.contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Another attention of transformers' own, for the body of a `with`."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise NotHere(f"{name}: {plain(error)}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _cell(run: Run, models: Models, batch: int, tokens: int, names: tuple[str, ...]) -> None:
    machine = run.machine
    cell, stored = f"B{batch} x {tokens}", machine.pick(tokens, tokens // 256)
    prompt = token_ids(models[None], batch, stored)
    lanes: dict[str, Callable[[], list[float]]] = {}

    def prepare(name: str) -> Found:
        lane = Lane(machine, models, WAYS[name], prompt)
        first = lane.decode(1)
        lane.decode(machine.pick(BLOCK, 3))  # compiles, records
        launched = kernels_of(machine, partial(lane.decode, 2))
        lanes[f"{cell}: {name}"] = lambda: lane.decode(machine.pick(BLOCK, 4))[2:]
        size = cache_bytes(lane.cache)
        return {"first_token_ms": first[0], "cache_bytes": size, "kernels_of_two_tokens": len(launched)}

    found = run.over({f"{cell}: {name}": partial(prepare, name) for name in names})
    run.in_rounds(found, lanes, machine.pick(ROUNDS, 1))


def _first_tokens(run: Run, model: PreTrainedModel) -> None:
    """Milliseconds until the first token's logits of a prompt, and of a further turn of a conversation."""
    machine = run.machine
    ways = {"kvattn static": "kvattn-static-fit", "kvattn int4": "kvattn-int4", "stock dynamic": "stock-dynamic"}
    lanes: dict[str, Callable[[], list[float]]] = {}

    def prepare(name: str, variant: Variant, stored: int, new: int) -> Found:
        cache, reason = variants.try_make(variant, model.config, stored + new + 8)
        if cache is None or reason is not None:
            raise NotHere(reason or "no cache")
        ids = token_ids(model, 1, stored + new)

        def turn() -> list[float]:
            clock, kept = Clock(), cache.get_seq_length()
            with variants.running(model, variant):
                if kept < stored:
                    model(ids[:, :stored], past_key_values=cache, logits_to_keep=1)
                elif kept > stored:
                    cache.crop(stored - kept)
                clock.mark()
                model(ids[:, stored:], past_key_values=cache, logits_to_keep=1)
                clock.mark()
            return clock.between_ms()

        turn()
        lanes[name] = turn
        return {}

    tasks = {}
    for label, sizes in TURNS.items():
        stored, new = machine.pick(sizes, tuple(-(-n // 512) for n in sizes))
        for way, variant in ways.items():
            name = f"first token, {label}: {way}"
            tasks[name] = partial(prepare, name, VARIANTS[variant], stored, new)
    run.in_rounds(run.over(tasks), lanes, machine.pick(3, 1))


def steps(run: Run) -> Found:
    model = _model(run)
    models: Models = {None: model}
    for batch, tokens, names in run.machine.pick(CELLS, (CELLS[0], CELLS[3])):
        _cell(run, models, batch, tokens, names)
        release()
    _first_tokens(run, model)
    return {"layers": model.config.num_hidden_layers, "parameters": sum(p.numel() for p in model.parameters())}
