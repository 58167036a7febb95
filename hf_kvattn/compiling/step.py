"""How `generate()` compiles its decode steps: the configuration, and the callable that runs them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from transformers import CompileConfig, PreTrainedModel

from ..caches.base import KVCache
from .decode_steps import DecodeSteps, new_tokens
from .few_rows import few_rows_options


def default_config() -> CompileConfig:
    """The configuration by which `generate()` compiles if the user gives none."""
    return CompileConfig(fullgraph=True, mode=None)  # type: ignore[arg-type]  # torch.compile takes None


def checked_config(
    config: CompileConfig, device: torch.device, cache: KVCache
) -> tuple[CompileConfig, DecodeSteps | None]:
    """A copy of `config` that compiles on every device, and the steps of `cache` where it records CUDA graphs.

    Raises:
        ValueError: a mode that records CUDA graphs, on a GPU, with a cache that they cannot hold.
    """
    steps = None
    graphs = config.mode in ("reduce-overhead", "max-autotune") or (config.options or {}).get("triton.cudagraphs")
    if graphs and device.type == "cuda":
        if obstacle := cache.graph_obstacle():
            asked = f"options={config.options!r}" if config.mode is None else f"mode={config.mode!r}"
            raise ValueError(
                f"compile_config has {asked}, which records CUDA graphs: they require {obstacle}. Without them, as "
                "with mode='default' or 'max-autotune-no-cudagraphs', every cache is served"
            )
        steps = DecodeSteps(cache)
    config = copy.copy(config)
    config._compile_all_devices = True  # type: ignore[assignment]  # a class attribute that is None
    return config, steps


def compiled_step(model: PreTrainedModel, config: CompileConfig) -> Callable:
    """`model` as a callable whose steps of one token are compiled as `config` says; longer ones (prompts) are not.

    Where the cache has `steps`, their tensors stand for it.
    """

    def step(**kwargs):
        return model(**kwargs)

    # A code object of its own: dynamo stores graphs with the code, and would find those of other settings there.
    step.__code__ = step.__code__.replace()
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if model.device.type == "cpu" and config.backend == "inductor" and config.mode in (None, "default"):
        fields |= {"mode": None, "options": few_rows_options() | (config.options or {})}  # torch takes one of the two
    compiled = torch.compile(step, **fields)

    def call(**kwargs):
        steps = getattr(kwargs.get("past_key_values"), "steps", None)  # transformers' StaticCache has none
        if new_tokens(kwargs).shape[1] > 1:
            return model(**kwargs)
        return compiled(**kwargs) if steps is None else steps.run(compiled, model, kwargs)

    return call
