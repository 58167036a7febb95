"""Random sequences of what can be done to a cache with sliding windows, beside the whole stream as a plain tensor.

`HF_KVATTN_SEQUENCES=2000 pytest tests/caches/test_stateful_rings.py --timeout 0` runs more of them, with other seeds.
"""

import copy
import os
import pickle
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from models import tiny_config

import hf_kvattn
from hf_kvattn import SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches.ring import SLACK
from hf_kvattn.kernels import dispatch, native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall

SEQUENCES = int(os.environ.get("HF_KVATTN_SEQUENCES", "30"))
LAYERS, HEADS, DIM, MOST_ROWS, MOST_CACHES = 2, 2, 16, 6, 3


class Stream:
    """All that was appended and not taken back, `(B, H, T, D)` of each layer, and what a ring has overwritten."""

    def __init__(self):
        self.kv: list[list[torch.Tensor]] = []
        self.oldest = 0

    @property
    def length(self) -> int:
        return self.kv[0][0].shape[2] if self.kv else 0

    @property
    def batch(self) -> int:
        return self.kv[0][0].shape[0] if self.kv else 0

    def change(self, function) -> None:
        self.kv = [[function(t) for t in layer] for layer in self.kv]
        if not self.length:
            self.kv, self.oldest = [], 0


def filled_in_order(layer) -> list[torch.Tensor]:
    """Keys and values as `filled` gives them, to a file for example: spans of the ring one after the other."""
    filled = layer.filled()
    return [torch.cat([filled[name] for name in (x, f"{x}_wrapped") if name in filled], 2) for x in "kv"]


class Rings(RuleBasedStateMachine):
    @initialize(
        window=st.sampled_from([1, 2, 7, 33, 100]),
        sinks=st.sampled_from([None, 0, 1, 5]),
        seed=st.integers(0, 2**16),
        first=st.integers(0, 250),
    )
    def start(self, window, sinks, seed, first):
        self.window, self.sinks = window, min(sinks or 0, window - 1)
        self.random = torch.Generator().manual_seed(seed)
        self.config = tiny_config(
            "mistral" if sinks is None else "llama", num_hidden_layers=LAYERS, head_dim=DIM, num_key_value_heads=HEADS,
            **({"sliding_window": window} if sinks is None else {}),
        )  # fmt: skip
        native_window = sinks is None
        cache = StaticKVCache(self.config) if native_window else SlidingWindowKVCache(self.config, window, self.sinks)
        self.pairs = [(cache, Stream())]
        if first:
            self.append(0, first, 2)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    @rule(which=st.integers(0), count=st.one_of(st.integers(1, 3), st.integers(1, 70), st.integers(150, 300)),
          batch=st.integers(1, 3))  # fmt: skip
    def append(self, which, count, batch):
        cache, stream = self.pairs[which % len(self.pairs)]
        batch = stream.batch or batch
        new = [[self.normal(batch, HEADS, count, DIM) for _ in "kv"] for _ in range(LAYERS)]
        old = stream.kv or [[t[:, :, :0] for t in layer] for layer in new]
        stream.kv = [[torch.cat(pair, 2) for pair in zip(a, b, strict=True)] for a, b in zip(old, new, strict=True)]
        stream.oldest = max(stream.oldest, stream.length - self.window - SLACK)
        for layer, kv, held in zip(cache.layers, new, stream.kv, strict=True):
            layer.append(*kv)
            self.attend(layer, held, count)
            layer.finish_attention(dispatch.quantize_blocks)

    def attend(self, layer, held, count: int) -> None:
        """The new tokens' queries, as kernels read the ring, against plain softmax over the stream."""
        length = held[0].shape[2]
        q = self.normal(held[0].shape[0], 2 * HEADS, count, DIM)
        k, v, packed, tokens, slot = layer.stored_kv()
        call = AttendCall(q, k, v, 0.25, window=self.window, packed=packed, tokens=tokens, slot=slot)
        layer.sink_inputs(q, None)  # as attention asks
        key, position = torch.arange(length), torch.arange(length - count, length)[:, None]
        wide = [t.repeat_interleave(2, 1) for t in held]
        scores = q @ wide[0].transpose(-1, -2) * call.scale
        scores = scores.masked_fill((key > position) | (key <= position - self.window), -torch.inf)
        expected = (scores.softmax(-1) @ wide[1]).transpose(1, 2)
        for backend in (reference, sdpa, native):
            if backend.unavailable() is None:
                torch.testing.assert_close(backend.attend(call), expected, rtol=1e-4, atol=1e-4)

    @rule(which=st.integers(0), taken=st.one_of(st.integers(0, 5), st.integers(0, 400)))
    def crop(self, which, taken):
        cache, stream = self.pairs[which % len(self.pairs)]
        kept = max(0, stream.length - taken)
        if kept and kept < stream.length and max(0, kept - self.window + 1) < stream.oldest:
            with pytest.raises(ValueError, match="can be taken back, or all"):
                cache.crop(kept - stream.length)
            return
        cache.crop(kept - stream.length)
        stream.change(lambda t: t[:, :, :kept])

    @rule(which=st.integers(0), data=st.data())
    def reorder_rows(self, which, data):
        cache, stream = self.pairs[which % len(self.pairs)]
        batch = stream.batch or 1
        keep = data.draw(st.booleans())
        rows = data.draw(
            st.lists(st.integers(0, batch - 1), min_size=batch if keep else 1, max_size=batch if keep else MOST_ROWS)
        )
        (cache.reorder_cache if keep else cache.batch_select_indices)(torch.tensor(rows))
        stream.change(lambda t: t[rows])

    @rule(which=st.integers(0), repeats=st.integers(1, 3))
    def repeat(self, which, repeats):
        cache, stream = self.pairs[which % len(self.pairs)]
        if stream.batch * repeats <= MOST_ROWS:
            cache.batch_repeat_interleave(repeats)
            stream.change(lambda t: t.repeat_interleave(repeats, 0))

    @rule(which=st.integers(0), by_fork=st.booleans())
    def duplicate(self, which, by_fork):
        cache, stream = self.pairs[which % len(self.pairs)]
        if len(self.pairs) < MOST_CACHES:
            self.pairs.append((cache.fork() if by_fork else copy.deepcopy(cache), copy.deepcopy(stream)))

    @rule(which=st.integers(0), by_pickle=st.booleans())
    def go_through_a_file(self, which, by_pickle):
        index = which % len(self.pairs)
        cache, stream = self.pairs[index]
        if by_pickle:
            cache = pickle.loads(pickle.dumps(cache))
        elif stream.length:
            with tempfile.TemporaryDirectory() as folder:
                hf_kvattn.save_cache(cache, Path(folder) / "cache")
                cache = hf_kvattn.load_cache(Path(folder) / "cache", self.config)
        self.pairs[index] = cache, stream

    @rule(which=st.integers(0), really=st.sampled_from([False, False, True]))
    def reset(self, which, really):
        if really:
            cache, stream = self.pairs[which % len(self.pairs)]
            cache.reset()
            stream.change(lambda t: t[:, :, :0])

    @invariant()
    def all_hold_what_they_should(self):
        for cache, stream in self.pairs:
            cache.check_consistent_layers()
            past = min(stream.length, self.window - 1)
            assert cache.get_seq_length() == stream.length
            assert cache.get_mask_sizes(3, 0) == (past + 3, stream.length - past)
            for layer, held in zip(cache.layers, stream.kv, strict=False):
                assert layer.oldest == stream.oldest
                for read, kept in zip(layer._in_order(layer.oldest), held, strict=True):
                    assert torch.equal(read, kept[:, :, stream.oldest :])
                for saved, kept in zip(filled_in_order(layer), held, strict=True):
                    assert torch.equal(saved, kept[:, :, stream.oldest :])
                known = min(stream.length, self.sinks)
                for read, kept in zip((layer._sink_k, layer._sink_v), held, strict=True):
                    assert torch.equal(read[:, :, :known], kept[:, :, :known])


@pytest.mark.parametrize("length", [1, 7, 7 + SLACK, 8 + SLACK, 100, 2 * (7 + SLACK), 200])
@pytest.mark.parametrize("chunk", [1, 30, 200])
def test_what_is_filled_is_in_order_wherever_the_ring_begins(length, chunk):
    """For windows of the model and forced ones; each number says its own position."""
    numbers = torch.arange(float(length))[None, None, :, None].expand(2, HEADS, -1, DIM)
    config = tiny_config("mistral", sliding_window=7, head_dim=DIM, num_key_value_heads=HEADS)
    for cache in (StaticKVCache(config), SlidingWindowKVCache(config, 5, 2)):
        layer = cache.layers[0]
        for start in range(0, length, chunk):
            new = numbers[:, :, start : start + chunk]
            layer.append(new, -new)
            layer.finish_attention(dispatch.quantize_blocks)
        newest = numbers[:, :, -min(length, layer.sliding_window + SLACK) :]
        for found, expected in zip(filled_in_order(layer), (newest, -newest), strict=True):
            assert torch.equal(found, expected)


def test_random_sequences_of_rings():
    # In CI always the same ones; more of them are others each time.
    run_state_machine_as_test(
        Rings,
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=12,
            deadline=None,
            derandomize="HF_KVATTN_SEQUENCES" not in os.environ,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
