"""A tokenizer of characters, and caches that are wrong on purpose."""

from __future__ import annotations

import math
from pathlib import Path

from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from hf_kvattn.evaluation import throughput
from hf_kvattn.evaluation.common.variants import Variant

CONDITIONS = {"model": "tiny", "dtype": "float32", "device": "cpu", "cpu": "a CPU", "threads": 2, "describe": "| a |"}


class CharTokenizer:
    """One token a character; only what the evaluation asks of a tokenizer."""

    pad_token_id = None

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 128 for character in text]}


class ScaledValues(DynamicCache):
    """A cache that is wrong: the past comes back with larger values."""

    factor = 3.0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, self.factor * values


class NanValues(ScaledValues):
    factor = math.nan


def save_with_tokenizer(model: PreTrainedModel, folder: Path) -> Path:
    """`folder` with the model and a tokenizer of characters that AutoTokenizer loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {character: i for i, character in enumerate(map(chr, range(128)))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


def planted(name: str, cache: type[DynamicCache], exact: bool = True) -> Variant:
    return Variant(name, False, lambda config, capacity: cache(config=config), exact=exact)


def measured(model, tokens, chosen, **settings):
    """`throughput.measure` at small sizes."""
    settings = {"contexts": [12], "batch_sizes": [1], "new_tokens": 8, "rounds": 2} | settings
    return throughput.measure(model, CharTokenizer(), tokens, variants=chosen, **settings)
