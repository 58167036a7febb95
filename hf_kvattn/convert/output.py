"""What the converters share: a folder that appears whole or not at all, and a model that is written as it was."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvattn.evaluation import inputs

CHECKED_TOKENS = 64  # whose logits are compared
SAMPLE = "def f(x):\n    return x ** 2  # Größe, 東京, 12 345.6 <|im_end|>"


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that gets its name when the block succeeds, and is removed when it fails.

    Raises ValueError when `path` exists or the folder that it should be in does not, before anything else is done.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already: move it away or choose another output folder")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for the output {path.name}")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone when renamed


def _umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value


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
