"""What the converters share: a model that is written as it was."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvattn.tools import inputs

CHECKED_TOKENS = 64  # whose logits are compared
SAMPLE = "def f(x):\n    return x ** 2  # Größe, 東京, 12 345.6 <|im_end|>"


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits of one fixed input, (1, CHECKED_TOKENS, vocabulary)."""
    ids = torch.arange(CHECKED_TOKENS)[None] * 7919 % model.config.get_text_config().vocab_size
    return model(ids, use_cache=False).logits


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the weights another dtype, in place, as loading does: `to` would round the frequencies of RoPE as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str) -> None:
    """Write model and tokenizer, and raise ValueError unless they load back with equal logits and ids, bit by bit."""
    logits = _logits(model)
    if not torch.isfinite(logits).all():
        raise ValueError(f"the model gives logits that are not finite in {model.dtype}")
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    written, written_tokenizer = inputs.load_model(str(folder), model.dtype)
    difference = (_logits(written) - logits).abs().max().item()
    if difference:
        raise ValueError(f"the written model's logits differ by up to {difference:.3g}")
    if written_tokenizer(SAMPLE)["input_ids"] != tokenizer(SAMPLE)["input_ids"]:
        raise ValueError("the written tokenizer splits text in another way")
    if written_tokenizer.chat_template != tokenizer.chat_template:
        raise ValueError("the written tokenizer has another chat template")
