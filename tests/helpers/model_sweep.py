"""Every causal language model of transformers, tiny, by every way of generating: as stock transformers, or refused.

    python tests/helpers/model_sweep.py docs/models.md    writes the table of all model types

Each type is built by `AutoModelForCausalLM` from its own config class, with the sizes in `SIZES` and random weights. It
generates greedily, in a left-padded batch, and with two beams. Caches that keep everything exactly must lead to stock
transformers' tokens and logits. With codes, the backend that is chosen must lead to the tokens of `reference`, and to
its logits over the same codes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

LAYERS, WINDOW, VOCAB = 4, 12, 128
PROMPT, PADDING, NEW = 44, 5, 6  # a block of codes is full after the prompt; windows are crossed
# Of the largest logit. Exact: fp32 sums in another order. Codes: the native kernels' queries are rounded to 16 bits.
CLOSE, CLOSE_FROM_CODES = 2e-4, 2e-3
FAR = 10 * CLOSE  # what another token within the window must change, or attention could be wrong unseen

# By field name, for every config that has the field.
SIZES: dict[str, Any] = {
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers".split(), LAYERS),
    **dict.fromkeys("encoder_layers num_encoder_layers".split(), LAYERS),
    **dict.fromkeys("hidden_size n_embd d_model emb_dim embedding_size dim embedding_dim adapter_out_dim".split(), 64),
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
    **dict.fromkeys("mamba_d_state ssm_state_size linear_key_head_dim linear_value_head_dim".split(), 16),
    **dict.fromkeys("mamba_chunk_size chunk_size linear_head_dim mamba_head_dim".split(), 16),
    **dict.fromkeys("mamba_n_heads mamba_num_heads linear_num_value_heads".split(), 8),
    **dict.fromkeys("linear_num_key_heads linear_num_heads".split(), 4),
    "mamba_d_ssm": 128,
    "n_mamba_heads": 2,
    "use_mamba_kernels": False,
    "rotary_dim": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "max_window_layers": 2,
    **dict.fromkeys("use_sliding_window use_qk_norm qk_layernorm scale_attn_by_inverse_layer_idx".split(), True),
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "is_decoder": True,
}

MIXED = {"layer_types": ["full_attention", "sliding_attention"] * 2}  # the default has one kind only
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4}  # keys and values of every query head are computed from latents
# What a type needs beside its fields' usual sizes; the kinds of layers that its checkpoints have, where its default has
# others.
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": MIXED
    | {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in MIXED["layer_types"]}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 96}},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 16},
    "dots1": MIXED,
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {"adapter_in_dim": 64},
        "audio_config": {"adapter_input_size": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": MIXED | {"num_attention_heads_per_layer": [4, 8, 4, 8]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT | {"zero_expert_num": 2},
    "minicpm3": LATENT | {"scale_emb": 1, "dim_model_base": 64},
    "mamba2": {"num_heads": 8},
    "mellum": MIXED,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "qwen4_exp": {"text_config": {"indexer_n_heads": 2}},
    "qwen4_exp_text": {"indexer_n_heads": 2},
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"shape_vocab_size": 64, "pronunciation_vocab_size": 64},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys("axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4".split(), LATENT),
    **dict.fromkeys("youtu bailing_hybrid kimi_linear".split(), LATENT),
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

CACHES: dict[str, Callable[[PreTrainedConfig], Any]] = {
    "static": StaticKVCache,
    "sliding": functools.partial(SlidingWindowKVCache, window=200),
    "int8": functools.partial(QuantizedKVCache, bits=8),
}
EXACT = ("static", "sliding")
WAYS: dict[str, tuple[int, int, dict[str, Any]]] = {  # rows, padding of the first row, arguments of generate()
    "greedy": (1, 0, {}),
    "padded": (2, PADDING, {}),
    "beams": (1, 0, {"num_beams": 2}),
}


def sized(config_class: type[PreTrainedConfig], extra: dict[str, Any]) -> PreTrainedConfig:
    """A small config of `config_class`, and of the configs in it; kinds of layers are those of its default."""
    shaping = {name: part for name, part in extra.items() if isinstance(part, dict) and "model_type" in part}
    default, fields = config_class(**shaping), {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in SIZES.items() if name in fields}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if kinds and name in fields:
            values[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
    parts = {}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            parts[name] = sized(type(part), extra.get(name, {})).to_dict()
    return config_class(**values | extra | parts)


def model_of(model_type: str) -> PreTrainedModel:
    """A tiny model with random weights. None is constant, or a wrong use of it would not show."""
    torch.manual_seed(1)
    config = sized(CONFIG_MAPPING[model_type], EXTRA.get(model_type, {}))
    return varied(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@torch.no_grad()
def varied(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without a parameter that is constant, or that transformers leaves as it was allocated."""
    for parameter in model.parameters():
        if not parameter.isfinite().all():
            parameter.normal_(std=0.2)
        elif (parameter == parameter.flatten()[0]).all():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@dataclass(frozen=True)
class Verdict:
    """What came of a model type. A `kind` that is not in `ALLOWED` is a defect."""

    kind: str
    reason: str = ""


ALLOWED = {
    "equal": "all caches give stock transformers' tokens; codes give the reference backend's",
    "refused": "`enable`, or the making of a cache, raises a `ValueError` that says why",
    "refused in the first forward": "the first forward raises a `ValueError` that says why, and returns nothing",
    "cannot be built": "transformers does not build a tiny one, or does not generate with it",
}


def inputs(way: str) -> dict[str, torch.Tensor]:
    rows, padding, _ = WAYS[way]
    ids = torch.randint(3, VOCAB, (rows, PROMPT), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    ids[0, :padding] = mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(
    model: PreTrainedModel, way: str, cache=None, new: int = NEW, **given
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(B, T)`, and what chose them: the logits `(B, new, vocab)`, or the beams' scores `(B,)`."""
    options = WAYS[way][2]
    out = model.generate(
        **inputs(way) | given,
        **options,
        past_key_values=cache,
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    return out.sequences, out.sequences_scores if "num_beams" in options else torch.stack(out.logits, 1)


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    return float((got - expected).abs().max() / expected.abs().max())


def named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def verdict_of(model_type: str) -> Verdict:
    try:
        model = model_of(model_type)
    except Exception as error:  # whatever keeps transformers from it
        return Verdict("cannot be built", named(error))
    try:
        hf_kvattn.enable(model)
    except ValueError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("crash in enable", named(error))
    finally:
        hf_kvattn.disable(model)
    try:
        stock = {way: generate(model, way) for way in WAYS}
        another = inputs("greedy")["input_ids"].clone()
        another[0, -WINDOW // 2] += 1
        change = far(generate(model, "greedy", new=1, input_ids=another)[1], stock["greedy"][1][:, :1])
    except Exception as error:
        return Verdict("cannot be built", f"stock generate() raises {named(error)}")
    if not change > FAR:
        return Verdict("blind", f"another token changes the logits by {change:.1e} only")
    with hf_kvattn.enabled(model):
        verdicts = {name: verdict_of_cache(model, name, stock) for name in CACHES}
    if len(set(verdicts.values())) == 1:
        return verdicts["static"]
    kinds = {verdict.kind for verdict in verdicts.values()} - {"equal"}
    reasons = "; ".join(f"{name}: {each.kind}: {each.reason}" for name, each in verdicts.items())
    return Verdict(kinds.pop() if len(kinds) == 1 else "several", reasons)


def verdict_of_cache(model: PreTrainedModel, name: str, stock: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Verdict:
    for way, expected in stock.items():
        try:
            cache = CACHES[name](model.config)
        except ValueError as error:
            return Verdict("refused", str(error))
        forwards: list[None] = []
        count = model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(None))
        try:
            got = generate(model, way, cache)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            ours = isinstance(error, ValueError) and Path(hf_kvattn.__file__).parent in Path(last.filename).parents
            if ours and not forwards and not cache.get_seq_length():
                return Verdict("refused in the first forward", str(error))
            place = f"{Path(last.filename).name}:{last.lineno}"
            return Verdict("raised", f"{way}, after {len(forwards)} forwards: {named(error)} ({place})")
        finally:
            count.remove()
        if cache.get_seq_length() != PROMPT + NEW - 1:
            return Verdict("unused", f"{way}: the cache holds {cache.get_seq_length()} tokens")
        if name in EXACT:
            wrong = difference(got, expected, CLOSE)
        else:
            with hf_kvattn.backend("reference"):
                reference = generate(model, way, CACHES[name](model.config))
            wrong = difference(got, reference, torch.inf) or from_same_codes(model, way, cache, got[0])
        if wrong:
            return Verdict("wrong", f"{way}: {wrong}")
    return Verdict("equal")


def difference(
    got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor], close: float
) -> str | None:
    off = far(got[1], expected[1])
    if not torch.equal(got[0], expected[0]):
        return f"other tokens, numbers off by {off:.1e}"
    return None if off <= close else f"numbers off by {off:.1e}"


def from_same_codes(model: PreTrainedModel, way: str, cache, tokens: torch.Tensor) -> str | None:
    """What is wrong with one step over the codes in `cache`, which has seen all of `tokens` but the last."""
    if "num_beams" in WAYS[way][2]:
        return None
    if not any(layer.packed_tokens for layer in cache.kv_layers):
        return "nothing was quantized"
    mask = torch.cat([inputs(way)["attention_mask"], torch.ones(len(tokens), NEW, dtype=torch.long)], 1)
    step = functools.partial(generate, model, way, new=1, input_ids=tokens, attention_mask=mask)
    got = step(copy.deepcopy(cache))
    with hf_kvattn.backend("reference"):
        return difference(got, step(cache), CLOSE_FROM_CODES)


def sweep() -> dict[str, Verdict]:
    verdicts = {}
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        verdicts[model_type] = verdict_of(model_type)
        print(model_type, *dataclasses.astuple(verdicts[model_type]), sep=": ", flush=True)
    return verdicts


def as_page(verdicts: dict[str, Verdict]) -> str:
    counts = Counter(verdict.kind for verdict in verdicts.values())
    kinds = list(ALLOWED) + sorted(set(counts) - set(ALLOWED))
    summary = [f"| {kind} | {counts[kind]} | {ALLOWED.get(kind, 'a defect')} |" for kind in kinds]
    rows = [f"| `{name}` | {v.kind} | {v.reason.replace('|', '/')} |" for name, v in verdicts.items()]
    return "\n".join([PAGE.format(version=transformers.__version__, total=len(verdicts)), *summary, TABLE, *rows, ""])


def read_page(page: str) -> dict[str, Verdict]:
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {name.strip("`"): Verdict(kind, " | ".join(reason)) for name, kind, *reason in rows}


PAGE = """# Models

The {total} model types for which transformers {version} has a causal language model, and what came of each. The command
that made this page:

```
python tests/helpers/model_sweep.py docs/models.md
```

Each type is built with few layers and random weights, and run on a CPU in float32: greedily, in a left-padded batch,
and with two beams; with `StaticKVCache`, `SlidingWindowKVCache` (a window larger than the text), and
`QuantizedKVCache(bits=8)`. Numbers in the reasons are those of the small models.

| verdict | types | meaning |
|---|---|---|"""
TABLE = """
| type | verdict | reason |
|---|---|---|"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in the tests: fills new memory with NaN
    Path(sys.argv[1]).write_text(as_page(sweep()))
