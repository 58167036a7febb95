"""llama.cpp beside our caches: the same prompt and as many steps, by `llama-cpp-python`, in `throughput`'s turns.

A row has llama.cpp's own weights, those of a .gguf file, so its tokens may differ from the model's: speed is compared.
"""

from __future__ import annotations

import importlib.util
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Cache, PreTrainedConfig

from hf_kvattn.evaluation.common.variants import Variant

# ggml's types of keys and values, and the bytes of a number in each: blocks of 32 share a scale of 16 bits.
KV_TYPES = {"f16": ("GGML_TYPE_F16", 2.0), "q8_0": ("GGML_TYPE_Q8_0", 34 / 32), "q4_0": ("GGML_TYPE_Q4_0", 18 / 32)}
# As the program `llama-cli` has it. Quantized values need flash attention.
SETTINGS: dict[str, Any] = {"flash_attn": True, "n_batch": 512, "n_ubatch": 512}


class LlamaCpp:
    """A model in llama.cpp with its cache; in a lane of `throughput` it stands in the place of a cache.

    Args:
        path: a .gguf file.
        kv_type: of keys and values, one of `KV_TYPES`.
        capacity: tokens that the cache has room for.

    Raises:
        ValueError: the file cannot be loaded.
    """

    def __init__(self, path: Path, kv_type: str, capacity: int):
        import llama_cpp  # needed here alone

        name, self._number_bytes = KV_TYPES[kv_type]
        threads = torch.get_num_threads()
        self._library, ggml_type = llama_cpp, getattr(llama_cpp, name)
        try:
            self._model = llama_cpp.Llama(
                str(path), n_ctx=capacity, n_threads=threads, n_threads_batch=threads, type_k=ggml_type,
                type_v=ggml_type, verbose=False, **SETTINGS,
            )  # fmt: skip
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"llama.cpp cannot load {path.name}: {error}") from error

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of the whole capacity, as the file's metadata gives them."""
        said = self._model.metadata
        of = partial("{}.{}".format, said["general.architecture"])
        heads = int(said[of("attention.head_count")])
        width = int(said.get(of("attention.key_length"), int(said[of("embedding_length")]) // heads))
        kv_heads = int(said.get(of("attention.head_count_kv"), heads))
        numbers = 2 * int(said[of("block_count")]) * kv_heads * width * self._model.n_ctx()
        return int(numbers * self._number_bytes)

    def decode(self, ids: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[float]]:
        """`ids` `(1, T)` and `steps` greedy tokens after them, and the seconds from the call to each of these.

        Tokens of `ids` that were decoded before are in the cache already.

        Raises:
            ValueError: token ids that the file's vocabulary does not have.
        """
        tokens = ids[0].tolist()
        if max(tokens) >= self._model.n_vocab():
            raise ValueError(f"token {max(tokens)} is beyond the .gguf file's vocabulary of {self._model.n_vocab()}")
        times_s: list[float] = []
        start_s = time.perf_counter()
        for _ in range(steps):
            self._model.eval(tokens[self._model.n_tokens :])
            tokens.append(self._greedy())
            times_s.append(time.perf_counter() - start_s)
        return ids.new_tensor([tokens]), times_s

    def _greedy(self) -> int:
        """The token with the largest logit after the last one that was evaluated."""
        import numpy

        logits = self._library.llama_get_logits_ith(self._model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, shape=(self._model.n_vocab(),)).argmax())


def variants(path: str) -> list[Variant]:
    """A row of `throughput` for each type of keys and values, with the model of a .gguf file.

    Raises:
        ValueError: llama-cpp-python is not installed, or there is no such file.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise ValueError("llama.cpp is measured through llama-cpp-python, which is not installed: pip install it")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no such model file: {path!r}")

    def make(kv_type: str, config: PreTrainedConfig, capacity: int) -> Cache:
        return cast(Cache, LlamaCpp(file, kv_type, capacity))

    return [Variant(f"llama.cpp-{kv_type}", False, partial(make, kv_type), exact=False) for kv_type in KV_TYPES]
