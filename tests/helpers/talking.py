"""A tiny model with a tokenizer and a chat template, saved as a user has it. A token is a character, both ways."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from models import tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = string.printable[:95] + "\n"
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<e>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talking_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<pad>", "<e>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("<e>", special=True), AddedToken("<pad>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<pad>", eos_token="<e>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    return fast


def save_talking_model(folder: Path, family: str = "llama", **changes) -> Path:
    """A model in float32, whose greedy answers end only with their number of tokens."""
    tokenizer = talking_tokenizer()
    model = tiny_model(family, vocab_size=len(tokenizer), eos_token_id=1, bos_token_id=None, **changes)
    with torch.no_grad():
        model.lm_head.weight[:2] = 0  # neither special token is the likeliest
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
