"""What is checked and timed: models of random weights made on the device, filled caches, and calls over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel

from hf_kvattn.caches.base import KVCache
from hf_kvattn.evaluation.gpu_check.running import Machine
from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import AttendCall

# Of Llama 3.2 1B and Llama 3.1 8B; the vocabulary of the small one is cut, since its logits are compared.
SHAPES: dict[str, dict[str, int]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 2048, "head_dim": 64},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAX_LENGTH = 1 << 18


def model_config(machine: Machine, shape: str, layers: int | None = None, window: int | None = None, **changes: Any):
    """The config of a Llama, or with `window` of a Mistral; of a rehearsal, of a tiny one."""
    sizes: dict[str, Any] = {**machine.pick(SHAPES[shape], TINY), **machine.pick(HEADS, TINY_HEADS)}
    sizes |= {} if layers is None else {"num_hidden_layers": layers}
    # Queries and keys of about 1.5, so that scores vary and no softmax is flat.
    sizes |= {"initializer_range": 1.5 * sizes["hidden_size"] ** -0.5, "max_position_embeddings": MAX_LENGTH}
    ids: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
    kind: Any = LlamaConfig if window is None else MistralConfig
    return kind(**sizes, **ids, **({} if window is None else {"sliding_window": window}), **changes)


def make_model(machine: Machine, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of random weights, the same ones at each call, made on the device."""
    torch.manual_seed(0)
    with torch.device(machine.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def one_layer(q_heads: int, kv_heads: int, dim: int, layers: int = 1, window: int | None = None) -> PreTrainedConfig:
    """The config of attention alone, which caches are made of."""
    heads: dict[str, Any] = {"num_attention_heads": q_heads, "num_key_value_heads": kv_heads, "head_dim": dim}
    kind: Any = LlamaConfig if window is None else MistralConfig
    more = {} if window is None else {"sliding_window": window}
    return kind(num_hidden_layers=layers, hidden_size=q_heads * dim, **heads, **more)


def fill(machine: Machine, cache: KVCache, shape: tuple[int, int, int, int], then: int = 0) -> None:
    """Stores random tokens `(B, Hkv, T, D)` in each layer, as a prompt; and `then` more, one after the other."""
    batch, heads, tokens, dim = shape
    for layer in cache.kv_layers:
        for new in itertools.chain([tokens], [1] * then):
            layer.append(*(machine.randn(batch, heads, new, dim) for _ in "kv"))
            layer.finish_attention(dispatch.quantize_blocks)


def calls_over(machine: Machine, cache: KVCache, q_heads: int, queries: int = 1) -> list[AttendCall]:
    """Random queries over each layer of a filled cache, laid out as a model's are."""
    calls = []
    for layer in cache.kv_layers:
        q = machine.randn(layer.batch_size, queries, q_heads, layer.head_dim).transpose(1, 2)
        k, v, packed, tokens, slot = layer.stored_kv()
        calls.append(AttendCall(q, k, v, q.shape[-1] ** -0.5, packed=packed, tokens=tokens, slot=slot))
    return calls


def token_ids(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    """Random ids `(B, T)` for a model, the same ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (batch, tokens), generator=generator).to(model.device)


MakeCache = Callable[[PreTrainedConfig, int], Any]  # a model's config and the capacity in tokens
