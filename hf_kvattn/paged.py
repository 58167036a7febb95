"""Continuous batching on a CPU: attention of ragged requests over transformers' paged cache, where it lies.

`generate_batch` and `transformers serve --continuous-batching` run one forward over the new tokens of all requests,
prompts and single tokens mixed, `(1, M)`. transformers' own attention on a CPU gathers keys and values of all requests
in every layer and attends under one dense mask over all of them: with B requests, B times the work. Here each request
attends to its own rows of the paged cache.

    decoder's hook -> PagedBatch (once a forward) -> attention module's hook -> PagedHandle -> one AttendCall
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from .attention import NAME, Handle, Rules, scale_of
from .kernels import dispatch
from .kernels.call import AttendCall, Requests
from .masks import compact_mask

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.generation.continuous_batching.cache_allocators import CacheAllocator

logger = logging.get_logger("hf_kvattn")

# What transformers hands to a decoder beside tokens and positions. Attention modules see none of it.
_PAGING = ("cache", "read_index", "write_index", "block_table", "logits_indices", "logits_processor_args")


class PagedBatch:
    """What the layers of one forward share: where each request's tokens lie.

    Args:
        cache: transformers' paged cache.
        read_index: for each allocator, the rows of all requests' keys, `(sum of keys,)` int64; empty where no request
            has a past.
        write_index: for each allocator, the rows of the new tokens, `(M,)` int64.
        q_begin: `(n + 1,)` int32, where the new tokens of each of n requests begin.
        kv_begin: for each type of layer the same of its keys.
    """

    def __init__(
        self,
        cache: PagedAttentionCache,
        read_index: Sequence[torch.Tensor],
        write_index: Sequence[torch.Tensor],
        q_begin: torch.Tensor,
        kv_begin: dict[str, torch.Tensor],
    ):
        self.cache, self.read_index, self.write_index = cache, read_index, write_index
        self.q_begin, self.kv_begin = q_begin.to(torch.int32), kv_begin
        self._requests: dict[int, Requests] = {}

    def requests(self, allocator: CacheAllocator) -> Requests:
        """Where the keys of each request are in what `store` returns, for all layers of this allocator."""
        found = self._requests.get(allocator.index)
        if found is None:
            kv_begin, rows = self.kv_begin[allocator.layer_type].to(torch.int32), None
            if self._reads_in_place(allocator):
                rows = self.read_index[allocator.index]
                if hasattr(allocator, "sliding_window"):  # new tokens are not named there
                    rows = rows.masked_scatter(rows == allocator.sentinel_index, self.write_index[allocator.index])
            found = self._requests[allocator.index] = Requests(self.q_begin, kv_begin, rows)
        return found

    def store(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the new tokens of layer `index`, `(1, Hkv, M, D)`; the keys and values that `requests` is about.

        Raises:
            ValueError: another shape than the cache was made for; nothing has been stored then.
        """
        allocator: Any = self.cache.layer_to_allocator[index]  # the kinds of allocator share no such attributes
        shape = allocator.num_key_value_heads, allocator.head_dim
        if any((t.shape[1], t.shape[3]) != shape for t in (key, value)):
            raise ValueError(
                f"layer {index} of the paged cache holds {shape[0]} KV heads of {shape[1]}, "
                f"got keys {tuple(key.shape)} and values {tuple(value.shape)}"
            )
        new = key[0].transpose(0, 1), value[0].transpose(0, 1)
        rows, into = self.read_index[allocator.index], self.write_index[allocator.index]
        if self._reads_in_place(allocator):
            allocator.update(*new, index, rows[:0], into)  # told of no rows to read, it gathers none
            k, v = allocator._kv_token_views[index]
            k = k[: len(v)]  # views of one tensor from here on: values begin a page later
        else:
            k, v = allocator.update(*new, index, rows, into)
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def _reads_in_place(self, allocator: CacheAllocator) -> bool:
        """Whether all keys lie in the cache once the new ones are stored.

        The first forward of a batch without pasts has them at hand. In a ring of a sliding window several new tokens
        of a request may take the place of some that the first of them sees: such rings are gathered before, as
        transformers does.
        """
        if self.read_index[allocator.index].numel() == 0:
            return False
        single = len(self.write_index[allocator.index]) == len(self.q_begin) - 1
        return single or not hasattr(allocator, "sliding_window")


class PagedHandle(Handle):
    """One layer of transformers' paged cache during the forward of one attention module.

    The module meets no cache: `past_key_values` is None in a continuous batch. So there is no `update` to compare with.
    """

    def __init__(self, index: int, batch: PagedBatch):
        super().__init__(index)
        self._batch = batch

    def take(self, module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        if self.attended:
            raise self.refusal(module)
        self.attended = True

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: Rules) -> torch.Tensor:
        """As `Handle.attend`: `query` is `(1, Hq, M, D)`, the result `(1, M, Hq, D)`."""
        allocator = self._batch.cache.layer_to_allocator[self._index]
        k, v = self._batch.store(self._index, key, value)
        call = AttendCall(query, k, v, scale_of(query, rules), softcap=rules.softcap, s_aux=rules.s_aux)
        call.window, call.requests = getattr(allocator, "sliding_window", None), self._batch.requests(allocator)
        return dispatch.attend(call).contiguous()


def batch_inputs(kwargs: dict) -> dict:
    """The arguments of a decoder's forward over a paged cache, as this package's attention takes them.

    The mask is the compact one that hides nothing, since transformers would build a dense one over all new tokens.
    """
    batch = PagedBatch(
        kwargs["cache"], kwargs["read_index"], kwargs["write_index"], kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    )
    others = {name: given for name, given in kwargs.items() if name not in _PAGING}
    return others | {"kv_batch": batch, "attention_mask": compact_mask(None, 0, 1, batch.q_begin.device)}


def init_continuous_batching(
    model: Any, *args: Any, implementation: str, cache: object = None, compile: bool = False, **kwargs: Any
) -> ContinuousBatchingManager:
    """`init_continuous_batching` of an enabled model: transformers' own, which knows no implementation of this name.

    On a CPU the manager runs with this package's attention. On other devices, for which there is no kernel here, it
    runs with `implementation`, or what transformers chooses in its place.

    Args:
        implementation: of the model's attention, before `enable`.
        cache, compile: what `enable` was told; batches do without.

    Raises:
        ValueError: a transformers version whose paged cache is another, or a compiled batch.
    """
    from transformers.generation.continuous_batching import cache as paged_cache  # takes a while

    if not hasattr(paged_cache, "ATTN_TYPE_TO_ALLOCATOR"):
        raise ValueError("continuous batching of an enabled model needs transformers >= 5.20; disable(model) does not")
    stock = type(model).init_continuous_batching
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation != NAME:  # changed since `enable`
        return stock(model, *args, **kwargs)
    if cache is not None or compile:
        logger.warning_once(
            "a continuous batch keeps exact tokens in transformers' paged cache, and is not compiled: "
            f"enable(cache={cache!r}, compile={compile}) is for generate()"
        )
    here = model.device.type == "cpu"
    config._attn_implementation = "sdpa" if here else implementation
    try:
        manager = stock(model, *args, **kwargs)
    finally:
        if here:
            config._attn_implementation = NAME
    manager._original_attn_impl = None if here else NAME  # what the manager restores when it stops
    if here and manager.continuous_batching_config.varlen_compile_config is not None:
        raise ValueError("continuous batching of an enabled model is not compiled: leave its compile configs out")
    if not here:
        logger.warning_once(f"continuous batching on {model.device.type} runs with {implementation!r}, not {NAME!r}")
    return manager
