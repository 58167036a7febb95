"""lm-evaluation-harness through a cache: its model `hf-kvattn`.

    python -m hf_kvattn.integrations.lm_eval --model hf-kvattn --model_args pretrained=./my-model,kv_cache=int4 \
        --tasks lambada_openai

lm-eval's own model `hf` scores a continuation in the forward that computes its context. No cache is met there, so a
quantized one would seem to cost nothing. Here a context fills a fresh cache, as the prompt of a `generate()` does, and
the continuation is scored by later forwards, which read that cache. `generate_until` is the model's own `generate()`,
enabled.

lm-eval finds models of other packages only once they are imported. This command does that; all its arguments are
lm-eval's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.registry import COMPLETE
from hf_kvattn.plugin import enable, new_cache

STRIDE = 32  # tokens of a continuation that are scored at once

Tokens = tuple[int, ...]


@register_model("hf-kvattn")
class KVAttnLM(HFLM):
    """lm-eval's `HFLM` with a cache between a context and its continuation.

    Contexts of different lengths that share a batch are padded at the left, as `generate()` pads prompts, and padding
    lies in the blocks of a quantized cache: its scores depend a little on the batch size, as its tokens do. Requests of
    one context share its prefill.

    Args:
        pretrained: as in `HFLM`.
        kv_cache: what `enable(cache=)` takes: a name, or (from Python) a callable `config -> KVCache`.
        kv_stride: tokens of a continuation that are scored by one forward, which sees those before them through the
            cache. 1 is exact decoding. Rolling log-likelihoods have no context: all their tokens go in strides.
        compile: as in `enable`; only `generate_until` compiles.
        batch_size: contexts in a prefill, and continuations in a forward; a number.
        more: as in `HFLM`.

    Raises:
        ValueError: arguments that are not served, or a model that cannot be enabled with this cache.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        kv_cache: str | Callable[[Any], KVCache] = "static",
        kv_stride: int = STRIDE,
        compile: bool = False,
        batch_size: int | str = 1,
        **more: Any,
    ):
        if not callable(kv_cache) and kv_cache not in COMPLETE:  # before the model is loaded
            raise ValueError(f"unknown kv_cache {kv_cache!r}; known: {', '.join(COMPLETE)}")
        if type(kv_stride) is not int or kv_stride < 1:
            raise ValueError(f"kv_stride must be an int of at least 1, got {kv_stride!r}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:  # "auto" would try a forward without the cache
            raise ValueError(f"batch_size must be a number of at least 1, got {batch_size!r}")
        super().__init__(pretrained, batch_size=batch_size, **more)
        if self.backend != "causal":
            raise ValueError(f"backend={self.backend!r} is not served: the caches are for decoder-only models")
        if callable(kv_cache) and not isinstance(made := kv_cache(self.model.config), KVCache):
            raise ValueError(f"kv_cache must make a KVCache, it made a {type(made).__name__}")
        enable(self.model, kv_cache, compile)
        self.kv_stride = kv_stride

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Of each request (texts, context, continuation) the continuation's log-likelihood, and whether it is greedy.

        As in `HFLM`, tokens at the left that the model has no room for are left out, and log-probabilities are those of
        `softmax_dtype`.
        """
        size = override_bs or int(self.batch_size)
        # Of each context, what is read after it, and the requests that this answers: requests that differ in their last
        # token alone need the same logits.
        readings: dict[Tokens, dict[tuple, list[int]]] = {}
        for i, (_, context, target) in enumerate(requests):
            if not context or not 0 < len(target) <= self.max_length:
                raise ValueError(
                    f"a request has {len(context)} tokens of context and {len(target)} of continuation; at least 1 of "
                    f"each is needed, and of the latter at most {self.max_length}"
                )
            room = self.max_length + 1 - len(target)  # the last token is not read
            key = (*target[:-1],) if self.logits_cache else (*target[:-1], i)
            readings.setdefault((*context[-room:],), {}).setdefault(key, []).append(i)
        scores: dict[int, tuple[float, bool]] = {}
        contexts = sorted(readings, key=len, reverse=True)  # those of about one length together: little padding
        off = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), disable=off, desc="Running loglikelihood requests") as bar:
            for batch in _parts(contexts, size):
                cache, leftpad = self._prefilled(batch)
                rows = [(row, asked) for row, context in enumerate(batch) for asked in readings[context].values()]
                for part in _parts(rows, size):
                    own = cache if part[-1] is rows[-1] else cache.fork()
                    which = torch.tensor([row for row, _ in part])
                    own.batch_select_indices(which)
                    read = [(batch[row][-1], *requests[asked[0]][2][:-1]) for row, asked in part]
                    owners = [(row, i) for row, (_, asked) in enumerate(part) for i in asked]
                    targets = [(row, requests[i][2]) for row, i in owners]
                    found = self._score(own, leftpad[which.to(leftpad.device)], read, targets)
                    for (_, i), scores[i] in zip(owners, found, strict=True):
                        if requests[i][0] is not None:  # None: a window of a rolling request, which notes their sum
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], scores[i])
                    bar.update(len(owners))
        return [scores[i] for i in range(len(requests))]

    def _prefilled(self, contexts: Sequence[Tokens]) -> tuple[KVCache, torch.Tensor]:
        """A fresh cache with all but the last token of each context, and how far each row is padded at the left."""
        cache = new_cache(self.model)
        width = max(map(len, contexts)) - 1
        leftpad = torch.tensor([width + 1 - len(context) for context in contexts], device=self.device)
        if width:
            rows = [[0] * (width + 1 - len(context)) + list(context[:-1]) for context in contexts]
            self._forward(cache, leftpad, torch.tensor(rows, device=self.device), keep=1)
        return cache, leftpad

    def _score(
        self,
        cache: KVCache,
        leftpad: torch.Tensor,
        read: Sequence[Tokens],
        targets: Sequence[tuple[int, Sequence[int]]],
    ) -> list[tuple[float, bool]]:
        """Log-likelihood, and whether it is greedy, of each of `targets` (row, tokens), which `read` predicts."""
        width = max(map(len, read))
        ids = _padded(read, width).to(self.device)
        row = torch.tensor([row for row, _ in targets], device=self.device)[:, None]
        wanted = _padded([tokens for _, tokens in targets], width).to(self.device)
        scored = torch.arange(width) < torch.tensor([len(tokens) for _, tokens in targets])[:, None]
        scored = scored.to(self.device)
        total, greedy = torch.zeros(len(targets), device=self.device), scored.any(dim=1)
        for start in range(0, width, self.kv_stride):
            now = slice(start, start + self.kv_stride)
            logits = self._forward(cache, leftpad, ids[:, now])
            log_p = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            place = torch.arange(log_p.shape[1], device=self.device)
            total += torch.where(scored[:, now], log_p[row, place, wanted[:, now]].float(), 0).sum(dim=1)
            greedy &= ((log_p.argmax(dim=-1)[row, place] == wanted[:, now]) | ~scored[:, now]).all(dim=1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    @torch.no_grad()
    def _forward(self, cache: KVCache, leftpad: torch.Tensor, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Logits `(B, T, vocabulary)` of `ids` `(B, T)` after what `cache` holds; of the last `keep`, or of all (0)."""
        past, padded = cache.get_seq_length(), {}
        if leftpad.any():
            place = torch.arange(past + ids.shape[1], device=ids.device) - leftpad[:, None]
            padded = {"attention_mask": (place >= 0).long(), "position_ids": place[:, past:].clamp(min=0)}
        mixed = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep, **padded).logits


def _parts(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _padded(rows: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """`(B, width)` ids, with zeros at the right, which nothing before them sees."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
