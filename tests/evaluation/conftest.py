"""A tiny random model that the measurements run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stand_ins import save_with_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.4,  # far from uniform predictions, so that a wrong cache changes tokens
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2000,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tiny_folder(model, tmp_path) -> Path:
    """The tiny model saved as a user would have it."""
    return save_with_tokenizer(model, tmp_path / "tiny")
