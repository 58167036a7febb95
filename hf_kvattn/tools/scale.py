"""The command `scale`: what a decode step must read of weights and caches, on paper, for large models on many GPUs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from hf_kvattn.caches.registry import CACHES
from hf_kvattn.planning import cache_bytes, model_bytes
from hf_kvattn.tools.command_line import Command
from hf_kvattn.tools.planning import gib
from hf_kvattn.tools.tables import markdown_table

HELP = """What a decode step reads of weights, keys and values, for Llama 3.1 of 8B, 70B and 405B on 1 to 64 GPUs.

    hf-kvattn scale
    hf-kvattn scale --gpu-gib 141 --gpu-tb-s 4.8

Prints the tables of docs/scale.md. Nothing is measured: weights are in bfloat16 and split evenly, KV heads too, as
tensor parallelism splits them. There are 8 of them; of more than 8 GPUs, several hold the same head.
"""

KV_HEADS = 8
COMMON: dict[str, Any] = {
    "vocab_size": 128256,
    "head_dim": 128,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": False,
}
LLAMA_3_1: dict[str, dict[str, Any]] = {  # as in the config.json of each
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
GPUS = (1, 2, 4, 8, 16, 32, 64)
NAMES = ("static", "int8", "int4", "int2")
SHAPES = ((1, 131072), (8, 32768), (64, 8192))  # rows, and tokens of each
LONG = 1 << 20  # tokens: so many that what a cache keeps exact counts for nothing
DTYPE = torch.bfloat16


class Shape(NamedTuple):
    """One model: the bytes of its weights, and of those that a step reads (of the embeddings it reads a row)."""

    config: LlamaConfig
    weights_bytes: int
    read_bytes: int


def shape(name: str) -> Shape:
    config = LlamaConfig(**COMMON, **LLAMA_3_1[name])
    weights_bytes = model_bytes(config, DTYPE)
    return Shape(config, weights_bytes, weights_bytes - config.vocab_size * config.hidden_size * DTYPE.itemsize)


def kv_bytes(model: Shape, gpus: int, batch: int, context: int, cache: str) -> int:
    """Bytes of keys and values on one of `gpus`: what each of its steps reads. All layers are alike."""
    heads = max(1, KV_HEADS // gpus)
    layer = LlamaConfig(**{**model.config.to_dict(), "num_key_value_heads": heads, "num_hidden_layers": 1})
    return cache_bytes(CACHES[cache], layer, batch, DTYPE, context) * model.config.num_hidden_layers


def token_table(models: dict[str, Shape]) -> str:
    """Weights, and the bytes of one token, in the whole model."""
    rows = []
    for name, model in models.items():
        tokens = [f"{kv_bytes(model, 1, 1, LONG, cache) / LONG / 1024:.1f}" for cache in NAMES]
        rows.append([name, f"{model.weights_bytes / 2**30:.1f}", *tokens])
    return markdown_table(["model", "weights GiB", *(f"{cache}, KiB a token" for cache in NAMES)], rows)


def even_table(models: dict[str, Shape]) -> str:
    """How many tokens, of all rows together, are as many bytes as the weights that the same GPU reads."""
    rows = []
    for name, model in models.items():
        for gpus in (n for n in GPUS if n >= KV_HEADS):  # on fewer, both are split alike
            tokens = [model.read_bytes / gpus * LONG / kv_bytes(model, gpus, 1, LONG, cache) for cache in NAMES]
            rows.append([f"{name} on {f'1 to {gpus}' if gpus == KV_HEADS else gpus}", *(f"{n:,.0f}" for n in tokens)])
    return markdown_table(["model, GPUs", *NAMES], rows)


def room_table(models: dict[str, Shape], gpu_bytes: int) -> str:
    """How many tokens fit beside the weights; numbers of GPUs that the weights alone do not fit into are left out."""
    rows = []
    for name, model in models.items():
        for gpus in GPUS:
            left = gpu_bytes - model.weights_bytes // gpus
            if left <= 0:
                continue
            tokens = [left * LONG / kv_bytes(model, gpus, 1, LONG, cache) for cache in NAMES]
            weights = f"{model.weights_bytes / gpus / 2**30:.1f}"
            rows.append([f"{name} on {gpus}", weights, *(f"{n:,.0f}" for n in tokens)])
    return markdown_table(["model, GPUs", "weights GiB a GPU", *(f"{cache}, tokens" for cache in NAMES)], rows)


def step_table(models: dict[str, Shape], gpu_bytes: int, bytes_s: float, shapes: Sequence[tuple[int, int]]) -> str:
    """The least time of a step: its bytes over the memory's speed; a dash where weights and cache do not fit."""
    rows = []
    for name, model in models.items():
        enough = [n for n in GPUS if model.weights_bytes // n < gpu_bytes]
        for gpus in (n for n in enough if n in (enough[0], 8, 64)):
            for batch, context in shapes:
                cells = []
                for cache in NAMES:
                    kv = kv_bytes(model, gpus, batch, context, cache)
                    fits = model.weights_bytes // gpus + kv <= gpu_bytes
                    share = kv / (kv + model.read_bytes / gpus)
                    ms = 1000 * (model.read_bytes / gpus + kv) / bytes_s
                    cells.append(f"{ms:.1f} ({share:.0%})" if fits else "-")
                rows.append([f"{name} on {gpus}, {batch} x {context:,}", *cells])
    return markdown_table(["model, GPUs, rows x tokens", *NAMES], rows)


def positive(text: str) -> float:
    """An argparse type."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu-gib", type=gib, default=gib("76"), metavar="GIB", help="memory for weights and cache")
    parser.add_argument("--gpu-tb-s", type=positive, default=3.35, metavar="TB", help="the memory's speed, TB a second")


def _main(args: argparse.Namespace) -> int:
    models = {name: shape(name) for name in LLAMA_3_1}
    print(token_table(models))
    print(even_table(models))
    print(room_table(models, args.gpu_gib))
    print(step_table(models, args.gpu_gib, args.gpu_tb_s * 1e12, SHAPES), end="")
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
