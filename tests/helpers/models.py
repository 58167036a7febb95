"""Tiny random models of every family that is tested, and stock generation to compare with."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-mha": (LlamaForCausalLM, LlamaConfig, {"num_attention_heads": 2, "num_key_value_heads": 2}),
    "llama-g3": (LlamaForCausalLM, LlamaConfig, {"hidden_size": 96, "num_attention_heads": 6}),
    "llama-g4": (LlamaForCausalLM, LlamaConfig, {"num_attention_heads": 8, "head_dim": 16}),
    "llama-g8": (LlamaForCausalLM, LlamaConfig, {"num_attention_heads": 16, "head_dim": 8}),
    "llama-mqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-sliding": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "sliding_window": 8}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 16, "sliding_window": 8}),
    "gpt-oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    ),
    "granite": (GraniteForCausalLM, GraniteConfig, {}),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, {}),
}
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that the greedy tokens wander
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def tiny_config(family: str = "llama", **changes):
    _, config_class, extra = FAMILIES[family]
    return config_class(**{**SMALL, **extra, **changes})


def tiny_model(family: str = "llama", **changes):
    torch.manual_seed(1)
    model_class = FAMILIES[family][0]
    # Stock sdpa refuses softcap and learned sinks, so stock Gemma 2 and gpt-oss run eager.
    options = {"attn_implementation": "eager" if family in ("gemma2", "gpt-oss") else "sdpa"}
    if family == "gpt-oss":
        options["experts_implementation"] = "batched_mm"  # torch.compile takes it whole
    model = model_class._from_config(tiny_config(family, **changes), **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".sinks"):  # some take most of the softmax
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def prompt(length: int = 13, batch: int = 2, left_padding: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens; the first row is padded at the left by `left_padding`."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 128, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, :left_padding], mask[0, :left_padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, new_tokens: int = 24, **kwargs):
    """Greedy tokens `(B, T)` and the logits of every step `(B, new_tokens, vocab)`."""
    out = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences, torch.stack(out.logits, 1)
