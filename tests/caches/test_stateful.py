"""Random sequences of everything that can be done to a cache, beside a plain list of tensors.

`HF_KVATTN_SEQUENCES=2000 pytest tests/caches/test_stateful.py --timeout 0` runs more of them, with other seeds each
time.
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
from hf_kvattn import QuantizedKVCache, StaticKVCache
from hf_kvattn.caches.quantized_layer import KVQuantizedLayer
from hf_kvattn.kernels import dispatch, native, reference, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant import few_bits
from hf_kvattn.quant.codecs import CODECS, Codec
from hf_kvattn.quant.layout import BLOCK
from hf_kvattn.quant.rotation import rotate

SEQUENCES = int(os.environ.get("HF_KVATTN_SEQUENCES", "40"))
STEPS = 16
LAYERS, GROUP = 2, 16
BEAM_STEPS = [1, 2, 3, 0, -1, -3, 33, 64]  # tokens stored, or taken back, between two reorderings
MOST_ROWS, MOST_CACHES = 6, 4


class Layer:
    """What one layer must hold: what was appended, and of quantized tokens what they were first read as."""

    def __init__(self):
        self.kv: list[torch.Tensor] = []  # keys and values (B, H, T, D); empty before the first append
        self.packed = 0

    @property
    def length(self) -> int:
        return self.kv[0].shape[2] if self.kv else 0

    def change(self, function) -> None:
        self.kv = [function(t) for t in self.kv]
        if not self.length:
            self.kv = []  # an empty layer takes any batch


class Oracle:
    def __init__(self):
        self.layers = [Layer() for _ in range(LAYERS)]

    def change(self, function) -> None:
        for layer in self.layers:
            layer.change(function)

    @property
    def length(self) -> int:
        return self.layers[0].length

    @property
    def batch(self) -> int:
        return self.layers[0].kv[0].shape[0] if self.length else 0


def bound_of(t: torch.Tensor, dim: int, codec: Codec) -> torch.Tensor:
    """A bound of the error of codes of 8 bits along `dim`: a level, and bf16 scales."""
    size = t.abs().amax(dim, keepdim=True)
    if codec == CODECS["fp8"]:  # a pickled codec is another object
        return t.abs() * 2**-4 + size * 2**-6 + 1e-6
    return 2 * size / (2**codec.bits - 1) + size * 2**-6 + 1e-6


def check_codes(layer: KVQuantizedLayer, exact: list[torch.Tensor], read: list[torch.Tensor]) -> None:
    """Newly packed blocks `(B, H, n * 32, D)` are what they stand for, within the codecs' steps. Codes of few bits may
    be further away: there they are what the layer's table makes of the numbers."""
    settings, mean = layer.settings, layer._packed["k_mean"][:, :, None, None]
    k, k_read = (t.float().unflatten(2, (-1, BLOCK)) - mean for t in (exact[0], read[0]))
    rounded = 2**-7 * exact[0].abs().max()
    if settings.k_codec.by_channel:
        order, *table = layer.packed(0).by_stored_channel()
        stored = k.gather(-1, order.expand_as(k))
        made = few_bits.dequantize_keys(*few_bits.quantize_keys(stored, *table), *table)
        assert ((k_read.gather(-1, order.expand_as(k)) - made).abs() <= rounded + 2**-7 * made.abs().max()).all()
        assert (k_read - k).square().mean() <= k.square().mean() * 1.5 + 1e-6
    else:
        assert ((k_read - k).abs() <= bound_of(k, -2, settings.k_codec) + rounded).all()
    v, v_read = (rotate(t.float()).unflatten(-1, (-1, GROUP)) for t in (exact[1], read[1]))
    bound = 2**-7 * v.abs().amax(-1, keepdim=True)
    if settings.v_codec.by_channel:
        made = few_bits.dequantize_values(*few_bits.quantize_values(v, settings.v_codec.bits), settings.v_codec.bits)
        assert ((v_read - made).abs() <= 2 * bound).all()
    else:
        assert ((v_read - v).abs() <= bound_of(v, -1, settings.v_codec) + bound).all()


class Caches(RuleBasedStateMachine):
    @initialize(
        kind=st.sampled_from(["static", "quantized", "mixed"]),
        bits=st.tuples(*[st.sampled_from([8, "fp8", 4, 3, 2])] * 2),
        sinks=st.sampled_from([0, 3, 4, 32]),
        residual=st.sampled_from([0, 5, 40]),
        limit=st.sampled_from([None, None, 90, 300]),
        heads=st.integers(1, 3),
        dim=st.sampled_from([16, 48]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 2**16),
        first=st.integers(0, 80),
        batch=st.integers(1, 4),
    )
    def start(self, kind, bits, sinks, residual, limit, heads, dim, dtype, seed, first, batch):
        self.heads = heads
        shape = {"hidden_size": 192, "num_attention_heads": 2 * heads, "num_key_value_heads": heads, "head_dim": dim}
        self.config = config = tiny_config(num_hidden_layers=LAYERS, dtype=dtype, **shape)
        self.random = torch.Generator().manual_seed(seed)
        self.dim, self.dtype, self.limit = dim, dtype, limit
        if kind == "static":
            cache = StaticKVCache(config, max_cache_len=limit)
        else:
            cache = QuantizedKVCache(
                config,
                key_bits=bits[0],
                value_bits=bits[1],
                group_size=GROUP,
                residual_length=residual,
                sinks=sinks,
                max_cache_len=limit,
                skip_layers=(0,) if kind == "mixed" else (),
            )
        self.pairs = [(cache, Oracle())]
        if first:
            self.append(0, first, batch, False)

    def tokens(self, batch: int, count: int) -> list[torch.Tensor]:
        shape = (batch, self.heads, count, self.dim)
        return [(torch.randn(shape, generator=self.random) + 0.5).to(self.dtype) for _ in "kv"]

    def store(self, cache, oracle, index: int, new: list[torch.Tensor], by_update: bool) -> None:
        """As a forward on a model that is not enabled does it, or as on one that is."""
        layer, model = cache.layers[index], oracle.layers[index]
        if by_update:
            cache.update(*new, index)
        else:
            cache.layers[index].append(*new)
            layer.finish_attention(dispatch.quantize_blocks)
        model.kv = [torch.cat([old, t], 2) for old, t in zip(model.kv, new, strict=True)] if model.kv else new

    @rule(which=st.integers(0), count=st.integers(1, 70), batch=st.integers(1, 3), by_update=st.booleans())
    def append(self, which, count, batch, by_update):
        cache, oracle = self.pairs[which % len(self.pairs)]
        new = [self.tokens(oracle.batch or batch, count) for _ in range(LAYERS)]
        if self.limit is not None and oracle.length + count > self.limit:
            with pytest.raises(ValueError, match=f"exceed max_cache_len={self.limit}"):
                cache.update(*new[0], 0)
            return
        cache.get_mask_sizes(count, 0)
        for index in range(LAYERS):
            self.store(cache, oracle, index, new[index], by_update)

    @rule(which=st.integers(0), count=st.integers(100, 300))
    def append_a_prompt(self, which, count):
        if self.limit is None or self.limit > 90:
            self.append(which, count, 2, False)

    @rule(which=st.integers(0), share=st.sampled_from([0.9, 0.7, 0.5, 0.2, 0.0]))
    def crop(self, which, share):
        cache, oracle = self.pairs[which % len(self.pairs)]
        kept = round(share * oracle.length)
        cache.crop(kept - oracle.length)
        oracle.change(lambda t: t[:, :, :kept])

    @rule(which=st.integers(0), few=st.integers(0, 5))
    def undo_a_few(self, which, few):
        cache, oracle = self.pairs[which % len(self.pairs)]
        kept = max(0, oracle.length - few)
        cache.crop(kept - oracle.length)
        oracle.change(lambda t: t[:, :, :kept])

    @rule(which=st.integers(0), count=st.integers(1, 40), layers=st.integers(1, LAYERS - 1))
    def interrupt_and_undo(self, which, count, layers):
        cache, oracle = self.pairs[which % len(self.pairs)]
        if self.limit is not None and oracle.length + count > self.limit:
            return
        new = self.tokens(oracle.batch or 2, count)
        for index in range(layers):
            self.store(cache, oracle, index, new, False)
            self.compare(cache.layers[index], oracle.layers[index])
        for use in (
            lambda: cache.get_mask_sizes(1, 0),
            lambda: cache.begin_forward(1),
            lambda: cache.crop(0),
            cache.fork,
        ):
            with pytest.raises(ValueError, match="interrupted|crop takes"):
                use()
        cache.crop(-count)
        for layer in oracle.layers[:layers]:
            layer.change(lambda t: t[:, :, :-count])

    def select(self, cache, oracle, rows: list[int]) -> None:
        if oracle.length:
            oracle.change(lambda t: t[rows])

    @rule(which=st.integers(0), data=st.data())
    def reorder(self, which, data):
        cache, oracle = self.pairs[which % len(self.pairs)]
        batch = oracle.batch or 1
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        cache.reorder_cache(torch.tensor(rows))
        self.select(cache, oracle, rows)

    @rule(which=st.integers(0), data=st.data(), steps=st.lists(st.sampled_from(BEAM_STEPS), min_size=2, max_size=5))
    def search_with_beams(self, which, data, steps):
        """Reorders, and between them tokens that are stored (or taken back): rows share more or less of their past."""
        for count in steps:
            self.reorder(which, data)
            self.append(which, count, 2, False) if count > 0 else self.undo_a_few(which, -count)
            self.all_hold_what_they_should()

    @rule(which=st.integers(0), data=st.data(), as_bools=st.booleans())
    def select_rows(self, which, data, as_bools):
        cache, oracle = self.pairs[which % len(self.pairs)]
        batch = oracle.batch or 1
        rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=MOST_ROWS))
        if as_bools:
            rows = sorted(set(rows))
            cache.batch_select_indices(torch.tensor([i in rows for i in range(batch)]))
        else:
            cache.batch_select_indices(torch.tensor(rows))
        self.select(cache, oracle, rows)

    @rule(which=st.integers(0), repeats=st.integers(1, 3))
    def repeat(self, which, repeats):
        cache, oracle = self.pairs[which % len(self.pairs)]
        if oracle.batch * repeats <= MOST_ROWS:
            cache.batch_repeat_interleave(repeats)
            oracle.change(lambda t: t.repeat_interleave(repeats, 0))

    @rule(which=st.integers(0), bad=st.sampled_from([[7], [-7], [0.5], []]))
    def refuse_rows(self, which, bad):
        cache, oracle = self.pairs[which % len(self.pairs)]
        if oracle.length:
            with pytest.raises(ValueError, match=f"rows of a batch of {oracle.batch}"):
                cache.batch_select_indices(torch.tensor(bad))

    @rule(which=st.integers(0), by_fork=st.booleans())
    def duplicate(self, which, by_fork):
        cache, oracle = self.pairs[which % len(self.pairs)]
        if len(self.pairs) < MOST_CACHES:
            self.pairs.append((cache.fork() if by_fork else copy.deepcopy(cache), copy.deepcopy(oracle)))

    @rule(which=st.integers(0), by_pickle=st.booleans())
    def go_through_a_file(self, which, by_pickle):
        index = which % len(self.pairs)
        cache, oracle = self.pairs[index]
        if by_pickle:
            cache = pickle.loads(pickle.dumps(cache))
        elif oracle.length:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache"
                hf_kvattn.save_cache(cache, path)
                cache = hf_kvattn.load_cache(path, self.config)
        self.pairs[index] = cache, oracle

    @rule(which=st.integers(0))
    def drop(self, which):
        if len(self.pairs) > 1:
            del self.pairs[which % len(self.pairs)]

    @rule(which=st.integers(0), really=st.sampled_from([False, False, True]))
    def reset(self, which, really):
        if not really:
            return
        cache, oracle = self.pairs[which % len(self.pairs)]
        cache.reset()
        oracle.layers = [Layer() for _ in range(LAYERS)]

    @invariant()
    def all_hold_what_they_should(self):
        for cache, oracle in self.pairs:
            cache.check_consistent_layers()
            assert cache.get_seq_length() == oracle.length
            assert cache.get_mask_sizes(3, 0) == (oracle.length + 3, 0)
            for layer, model in zip(cache.layers, oracle.layers, strict=True):
                self.compare(layer, model)

    def compare(self, layer, model: Layer) -> None:
        assert layer.seen == model.length
        if not model.length:
            model.packed = 0
            return
        assert layer.batch_size == model.kv[0].shape[0]
        read, packed = [t.clone() for t in layer.dense()], getattr(layer, "packed_tokens", 0)
        if isinstance(layer, KVQuantizedLayer):
            sinks, model.packed = layer.settings.exact_first, min(model.packed, packed)
            assert 0 <= model.length - packed - layer._least_exact < BLOCK or not packed or packed == model.packed
            if packed > model.packed:
                new = slice(sinks + model.packed, sinks + packed)
                check_codes(layer, [t[:, :, new] for t in model.kv], [t[:, :, new] for t in read])
                model.kv = [t.clone() for t in model.kv]
                for held, seen in zip(model.kv, read, strict=True):
                    held[:, :, new] = seen[:, :, new]
            model.packed = packed
        for held, seen in zip(model.kv, read, strict=True):
            assert torch.equal(held, seen), "exact tokens and codes that were written stay as they are"
        self.attend(layer, model, queries=2)

    @rule(which=st.integers(0), queries=st.integers(1, 80))
    def attend_with_many_queries(self, which, queries):
        cache, oracle = self.pairs[which % len(self.pairs)]
        if oracle.length:
            self.attend(cache.layers[-1], oracle.layers[-1], queries)

    def attend(self, layer, model: Layer, queries: int) -> None:
        """The last queries over all tokens, read as kernels read them, against plain softmax over what is expected."""
        q_len = min(queries, model.length)
        q = torch.randn(model.kv[0].shape[0], 2 * self.heads, q_len, self.dim, generator=self.random).to(self.dtype)
        k, v, packed, *_ = layer.stored_kv()
        call = AttendCall(q, k, v, self.dim**-0.5, packed=packed)
        k, v = (t.float().repeat_interleave(2, 1) for t in model.kv)
        scores = q.float() @ k.transpose(-1, -2) * call.scale
        scores += torch.full((q_len, model.length), -torch.inf).triu(model.length - q_len + 1)
        expected = (scores.softmax(-1) @ v).transpose(1, 2)
        # native splits queries and weights for codes into 16 bits; in bfloat16, `model` holds codes rounded once more.
        largest = float(v.abs().max())
        bounds = {reference: 1e-5}
        if packed is not None and CODECS["fp8"] in (packed.k_codec, packed.v_codec):
            bounds[sdpa] = 1e-5
        else:
            bounds[native] = 1e-4 * largest if packed else 1e-5
        if self.dtype == torch.bfloat16:
            bounds = dict.fromkeys(bounds, 2**-7 * largest)
        for backend, bound in bounds.items():
            if backend.unavailable() is None:
                torch.testing.assert_close(backend.attend(call).float(), expected, rtol=bound, atol=bound)


@pytest.mark.slow
def test_random_sequences():
    # In CI always the same ones; more of them are others each time.
    run_state_machine_as_test(
        Caches,
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="HF_KVATTN_SEQUENCES" not in os.environ,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
