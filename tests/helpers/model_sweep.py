"""Every causal language model of transformers, tiny and with random weights, by every cache: equal to stock, or refused.

    python tests/helpers/model_sweep.py docs/models.md    writes the table of all model types

Each type is built from its own config class with the sizes in `SIZES`, and generates greedily, in a left-padded batch
and with two beams. Caches that keep everything exactly must give stock transformers' tokens and logits. For codes, the
native kernels must give the tokens of the reference backend, and its logits over the same codes.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import importlib
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

LAYERS, WINDOW, VOCAB = 4, 12, 128
PROMPT, PADDING, NEW = 44, 5, 6  # a block of codes is full after the prompt; windows are crossed
CLOSE = 2e-4  # of the largest logit: fp32 sums in another order

# By field name, for every config that has the field.
SIZES: dict[str, Any] = {
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers".split(), LAYERS),
    **dict.fromkeys("encoder_layers num_encoder_layers".split(), 1),
    **dict.fromkeys("hidden_size n_embd d_model emb_dim embedding_size dim embedding_dim".split(), 64),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads".split(),
        4,
    ),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), 2),
    **dict.fromkeys("head_dim kv_channels d_head attention_head_size dim_head global_head_dim".split(), 16),
    **dict.fromkeys(
        "intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size ffn_dim "
        "decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size intermediate_size_mlp expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size dense_intermediate_size feed_forward_size d_inner dff dim_ff".split(),
        96,
    ),
    **dict.fromkeys("vocab_size vocab_size_per_layer_input decoder_vocab_size".split(), VOCAB),
    **dict.fromkeys(
        "num_experts n_routed_experts num_local_experts moe_num_experts moe_num_primary_experts".split(), 4
    ),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k top_k_experts".split(), 2),
    **dict.fromkeys("n_group topk_group n_shared_experts num_shared_experts".split(), 1),
    **dict.fromkeys("first_k_dense_replace num_dense_layers".split(), 1),
    **dict.fromkeys(
        "sliding_window window_size attention_window_size local_attention sliding_window_size attention_chunk_size "
        "keep_window_size".split(),
        WINDOW,
    ),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len context_length".split(), 512),
    **dict.fromkeys("kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim".split(), 16),
    **dict.fromkeys("initializer_range init_std".split(), 0.2),  # wide enough that the tokens wander
    "rotary_dim": 8,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
}

# What a type needs beside its fields' usual sizes.
EXTRA: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 4}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4}},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}

CACHES: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "static": StaticKVCache,
    "sliding": functools.partial(SlidingWindowKVCache, window=200),
    "int8": functools.partial(QuantizedKVCache, bits=8),
}
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {  # rows, padding of the first row, arguments of generate()
    "greedy": (1, 0, {}),
    "padded": (2, PADDING, {}),
    "beams": (1, 0, {"num_beams": 2}),
}


def config_of(model_type: str) -> PreTrainedConfig:
    return sized(CONFIG_MAPPING[model_type], EXTRA.get(model_type, {}))


def sized(config_class: type[PreTrainedConfig], extra: dict[str, Any]) -> PreTrainedConfig:
    """A small config of `config_class`, and of the configs in it; kinds of layers are those of its default."""
    default, fields = config_class(), {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in fields}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if kinds and name in fields:
            values[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            values[name] = sized(type(part), extra.get(name, {})).to_dict()
    return config_class(**{**values, **{k: v for k, v in extra.items() if k not in config_class.sub_configs}})


def model_of(model_type: str) -> PreTrainedModel:
    """A tiny model with random weights. None is constant, or a wrong use of it would not show."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config_of(model_type), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if (parameter == parameter.flatten()[0]).all():
                parameter += 0.2 * torch.randn_like(parameter)
    return model


@dataclass(frozen=True)
class Verdict:
    """What came of a model type; `kind` is one of `ALLOWED`, or a defect."""

    kind: str
    reason: str = ""


ALLOWED = ("equal", "refused", "refused in the first forward", "cannot be built")


def inputs(rows: int, padding: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (rows, PROMPT), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, way: str, cache=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and what chose them: the logits `(B, NEW, vocab)`, or the beams' scores."""
    rows, padding, options = WAYS[way]
    torch.manual_seed(2)
    out = model.generate(
        **inputs(rows, padding),
        **options,
        past_key_values=cache,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    return out.sequences, out.sequences_scores if "num_beams" in options else torch.stack(out.logits, 1)


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((got - expected).abs().max() / expected.abs().max())


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


def verdict_of(model_type: str) -> Verdict:
    try:
        model = model_of(model_type)
    except Exception as error:  # whatever keeps transformers from it
        return Verdict("cannot be built", first_line(error))
    try:
        hf_kvattn.enable(model)
    except ValueError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("crash in enable", first_line(error))
    hf_kvattn.disable(model)
    try:
        stock = {way: generate(model, way) for way in WAYS}
    except Exception as error:
        return Verdict("cannot be built", "stock generate() raises " + first_line(error))
    with hf_kvattn.enabled(model):
        verdicts = {name: verdict_of_cache(model, name, stock) for name in CACHES}
    if len(set(verdicts.values())) == 1:
        return verdicts["static"]
    return Verdict("mixed", "; ".join(f"{name}: {v.kind}: {v.reason}" for name, v in verdicts.items()))


def verdict_of_cache(model: PreTrainedModel, name: str, stock: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Verdict:
    for way, (tokens, numbers) in stock.items():
        try:
            cache = CACHES[name](model.config)
        except ValueError as error:
            return Verdict("refused", str(error))
        forwards: list[None] = []
        count = model.register_forward_hook(lambda *_: forwards.append(None))
        try:
            got, got_numbers = generate(model, way, cache)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = isinstance(error, ValueError) and "hf_kvattn" in frames[-1].filename
            if ours and not forwards and cache.get_seq_length() == 0:
                return Verdict("refused in the first forward", str(error))
            return Verdict("raised", f"{way}, after {len(forwards)} forwards: {first_line(error)} {frames[-1].filename}:{frames[-1].lineno}")
        finally:
            count.remove()
        if name == "int8":
            with hf_kvattn.backend("reference"):
                tokens, numbers = generate(model, way, CACHES[name](model.config))
            print("   int8", way, "vs ref", far(got_numbers, numbers), "vs stock", far(got_numbers, stock[way][1]))
            if not torch.equal(got, tokens):
                return Verdict("wrong", f"{way}: other tokens than the reference {far(got_numbers, numbers):.1e}")
            continue
        if not torch.equal(got, tokens) or not far(got_numbers, numbers) < CLOSE:
            return Verdict("wrong", f"{way}: {'same' if torch.equal(got, tokens) else 'other'} tokens, numbers off by {far(got_numbers, numbers):.1e}")
    return Verdict("equal")
