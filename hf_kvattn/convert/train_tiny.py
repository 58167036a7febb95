"""A small Llama-style model, trained on Python's documentation in minutes: something to convert.

Every tenth topic is held out: the folder holds `train.txt` and `heldout.txt` beside model and tokenizer (a byte-level
BPE trained on the same text).
"""

from __future__ import annotations

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_kvattn.convert import training
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.files import new_folder

END = "<|endoftext|>"
HELD_OUT_EVERY = 10


def byte_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of this many tokens, at least the 256 bytes and the end of a text."""
    if vocabulary <= 256:
        raise ValueError(f"a vocabulary of {vocabulary} cannot hold the 256 bytes and the end of a text")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)


HELP = """Train a small Llama-style model with as many KV heads as query heads on Python's documentation in minutes.

    hf-kvattn train-tiny --output tiny-mha
    hf-kvattn train-tiny --output tiny-mqa --kv-heads 1 --steps 300

Something to convert where no such model can be had. Every tenth topic is held out: the folder holds `train.txt` and
`heldout.txt` beside model and tokenizer (a byte-level BPE trained on the same text).
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--steps", type=positive_int, default=600, help="of training")
    parser.add_argument("--layers", type=positive_int, default=4, help="of the model")
    parser.add_argument("--hidden-size", type=positive_int, default=192, help="of the model")
    parser.add_argument("--heads", type=positive_int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=positive_int, help="KV heads; None means as many as query heads")
    parser.add_argument("--vocabulary", type=positive_int, default=1024, help="tokens, bytes included")
    parser.add_argument("--window", type=positive_int, default=192, help="tokens of one training window")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its highest")


def _main(args: argparse.Namespace) -> int:
    from pydoc_data.topics import topics

    kv_heads = args.kv_heads or args.heads
    if args.heads % kv_heads:
        raise ValueError(f"--heads {args.heads} is no multiple of --kv-heads {kv_heads}")
    held_out = sorted(topics)[::HELD_OUT_EVERY]
    text = "\n".join(topics[key] for key in sorted(set(topics) - set(held_out)))
    with new_folder(args.output) as folder:
        tokenizer = byte_tokenizer(text, args.vocabulary)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=3 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = LlamaForCausalLM(config)
        windows = inputs.load_windows(tokenizer, text, args.window)
        losses = training.train(
            model,
            windows,
            steps=args.steps,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            progress=True,
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "train.txt").write_text(text, encoding="utf-8")
        (folder / "heldout.txt").write_text("\n".join(topics[key] for key in held_out), encoding="utf-8")
    print(f"written: {args.output}, {model.num_parameters()} weights, {windows.numel()} tokens of text")
    print(f"training loss: {losses[0]:.3f} nats a token at first, {losses[-1]:.3f} at last")
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
