"""The command `chat`: a chat in the terminal. Each turn computes its new tokens alone."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hf_kvattn.caches.base import KVCache
from hf_kvattn.integrations.prefixes import common_length, context_limit, fresh_cache
from hf_kvattn.integrations.serving import add_model_arguments
from hf_kvattn.plugin import enable
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, positive_int

HELP = """A chat in the terminal. Answers go to stdout; what they took, to stderr.

    hf-kvattn chat ./my-model --cache int4
    printf 'Hello.\\nAnd now?\\n' | hf-kvattn chat ./my-model > answers.txt

/reset begins anew, /exit or the end of the input ends, and Ctrl-C takes a turn back.
"""


class Chat:
    """A conversation with a model, and the cache of what was said.

    Args:
        model: an enabled model, with a cache.
        tokenizer: its tokenizer, with a chat template.
        system: what the model is told before all; None for nothing.

    Raises:
        ValueError: no chat template, or a model without a cache of this package.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None = None):
        if not tokenizer.chat_template:
            raise ValueError(f"{tokenizer.name_or_path!r} has no chat template: it is a model for other things")
        self.model: Any = model
        self.tokenizer: Any = tokenizer
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages: list[dict[str, str]] = list(self.first)
        self._forget()

    def _forget(self) -> None:
        self.cache: KVCache = fresh_cache(self.model)
        self._held = torch.empty(0, dtype=torch.long)  # the token ids in it

    def say(self, text: str, max_new_tokens: int) -> str:
        """Streams the answer to stdout, and returns it. A turn that does not come to its end is taken back.

        Raises:
            ValueError: a conversation that is longer than the model or the cache.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        given = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids, limit = given["input_ids"], context_limit(self.model)
        if limit is not None and ids.shape[1] >= limit:
            raise ValueError(f"the chat has {ids.shape[1]} tokens, and {limit} fit, the answer included: /reset")
        left = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[1])
        cache = self._cache_for(ids[0])
        self._forget()  # a turn may be interrupted
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        out = self.model.generate(
            **given.to(self.model.device), past_key_values=cache, max_new_tokens=left, streamer=streamer
        )[0].cpu()
        self.cache, self._held = cache, out[: cache.get_seq_length()]
        answer = self.tokenizer.decode(out[ids.shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self.new_tokens = len(out) - ids.shape[1]
        return answer

    def _cache_for(self, ids: torch.Tensor) -> KVCache:
        """A cache of what `ids` begin with, as far as the chat's own holds it; at least the last is left to compute."""
        seen = len(self._held)
        kept = self.cache.exact_prefix(seen, common_length(self._held, ids[:-1]))
        if not kept:
            return fresh_cache(self.model)
        self.cache.crop(kept - seen)
        return self.cache


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before all")
    parser.add_argument("--max-new-tokens", type=positive_int, default=1024, help="of an answer, at most")


def _lines(prompt: str) -> Any:
    """The lines of stdin, each asked for with `prompt` in a terminal."""
    while True:
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _main(args: argparse.Namespace) -> int:
    model, tokenizer = inputs.load_model(args.model, inputs.DTYPES[args.dtype], args.device)
    chat = Chat(enable(model, args.cache or "int4", args.compile), tokenizer, args.system)
    for line in _lines("> "):
        if line == "/exit":
            break
        if line == "/reset":
            chat.reset()
            continue
        start_s = time.perf_counter()
        try:
            chat.say(line, args.max_new_tokens)
        except ValueError as error:
            print(f"[{error}]", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("\n[taken back]", file=sys.stderr)
            continue
        cache, tok_s = chat.cache, chat.new_tokens / (time.perf_counter() - start_s)
        said = f"[{cache.get_seq_length():,} tokens of context, {cache.nbytes / 2**20:,.1f} MiB of cache, "
        print(f"{said}{tok_s:.1f} tok/s]", file=sys.stderr, flush=True)
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
