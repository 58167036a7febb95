"""Sliding windows: rings that wrap many times, sinks, positions of endless streams, against attention spelled out."""

import copy
import functools

import pytest
import torch
from models import FAMILIES, SMALL, generate, prompt, tiny_config, tiny_model
from spelled_out import expected_logits
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches.ring import SLACK
from hf_kvattn.caches.rope import Rope

BACKENDS = ["reference", "sdpa", "native"]
NATIVE = ["mistral", "gemma2", "gemma3", "qwen2-sliding", "gpt-oss"]  # families with a window of their own
SERVED = [(f, b) for f in NATIVE for b in BACKENDS]
LENGTH = 330  # tokens of a stream: a ring of a window of 8 has 72 slots
# How a stream arrives: token by token after a prompt, chunks around the slack and the ring, one long prompt.
CHUNKS = {
    "steps": [20] + [1] * 230 + [80],
    "odd": [3, 70, 1, 64, 65, 66, 1, 1, 40, 19],
    "prompt": [300] + [1] * 30,
    "whole": [330],
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


def stream(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    """The first tokens of the same stream, whatever the length."""
    longest = max(length, LENGTH)
    return torch.randint(3, 128, (batch, longest), generator=torch.Generator().manual_seed(3))[:, :length]


def padded(first: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the positions of a stream whose rows begin there, each `(B, LENGTH)`."""
    positions = torch.arange(LENGTH) - torch.tensor(first)[:, None]
    return (positions >= 0).long(), positions.clamp(min=0)


def streamed_logits(model, ids, cache, chunks, mask=None, positions=None, seen: int = 0) -> torch.Tensor:
    """Logits of a stream through a cache that holds `seen` tokens of it, in chunks of so many tokens."""
    logits = []
    for new in chunks:
        part = slice(seen, seen + new)
        given = {"attention_mask": mask[:, : part.stop]} if mask is not None else {}
        if positions is not None:
            given["position_ids"] = positions[:, part]
        with torch.no_grad():
            logits.append(model(ids[:, part], past_key_values=cache, **given).logits)
        seen = part.stop
    return torch.cat(logits, 1)


def assert_same_logits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))
    top = theirs.topk(2, -1).values
    decided = (top[..., 0] - top[..., 1]) > 1e-2 * float(theirs.abs().max())
    assert decided.float().mean() > 0.5  # or the next line would say nothing
    assert torch.equal(ours.argmax(-1)[decided], theirs.argmax(-1)[decided])


@functools.lru_cache
def oracle_of(family: str, window: int, sinks: int, rope: str | None = None, padding: tuple = (0, 0)):
    changes = {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}} if rope else {}
    ids = stream()
    return expected_logits(tiny_model(family, **changes), ids, window, sinks, torch.tensor(padding))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_a_forced_window_is_attention_under_its_mask(backend, chunks, sinks):
    model = hf_kvattn.enable(tiny_model("llama-g3"))
    with hf_kvattn.backend(backend):
        ours = streamed_logits(model, stream(), SlidingWindowKVCache(model.config, 8, sinks), CHUNKS[chunks])
    assert_same_logits(ours, oracle_of("llama-g3", 8, sinks))


@pytest.mark.parametrize(
    "family", ["phi3", "qwen3", "smollm3", "granite", "mistral", "gemma2", "gemma3", "qwen2-sliding"]
)
def test_every_family_with_sinks(family):
    model = hf_kvattn.enable(tiny_model(family))
    cache = SlidingWindowKVCache(model.config, 11, 3)
    assert_same_logits(streamed_logits(model, stream(), cache, CHUNKS["odd"]), oracle_of(family, 11, 3))


@pytest.mark.parametrize("rope", ROPES)
def test_every_scaling_of_positions(rope):
    model = tiny_model("llama", rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    cache = SlidingWindowKVCache(hf_kvattn.enable(model).config, 8, 4)
    assert_same_logits(streamed_logits(model, stream(), cache, CHUNKS["odd"]), oracle_of("llama", 8, 4, rope))


@pytest.mark.parametrize(("family", "rope"), [("llama", None), ("gemma3", None), ("llama", "dynamic")])
def test_positions_stay_where_the_model_was_trained(family, rope, monkeypatch):
    """A model trained to 160 positions: the oracle's own go to 330, without frequencies that change."""
    changes = {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}} if rope else {}
    model = hf_kvattn.enable(tiny_model(family, max_position_embeddings=160, **changes))
    asked = []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs.get("position_ids", args[-2 if "gemma" in family else -1])),
        with_kwargs=True,
    )
    cache = SlidingWindowKVCache(model.config, 8, 4)
    ours = streamed_logits(model, stream(), cache, CHUNKS["odd"])
    assert max(int(p.max()) for p in asked) < 160 and min(int(p.min()) for p in asked) >= 0
    assert cache.layers[0].rebased >= 100
    assert_same_logits(ours, oracle_of(family, 8, 4, rope))


def test_a_stream_may_begin_anywhere():
    """At 4,000,000 angles in float32 are wrong by a tenth of a turn; here nothing changes, to the bit."""
    model, ids = hf_kvattn.enable(tiny_model()), stream()
    far = 4_000_000 + torch.arange(LENGTH)[None]
    ours = [
        streamed_logits(model, ids, SlidingWindowKVCache(model.config, 8, 4), CHUNKS["odd"], positions=p)
        for p in (None, far)
    ]
    assert torch.equal(*ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [(0, 5), (90, 0), (2, 1)])
@pytest.mark.parametrize("chunks", ["odd", "prompt"])
def test_left_padding(backend, padding, chunks):
    """Sinks are each row's own first tokens, also where the padding is longer than window and chunk."""
    model, ids, first = hf_kvattn.enable(tiny_model()), stream(), torch.tensor(padding)
    mask = (torch.arange(LENGTH) >= first[:, None]).long()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with hf_kvattn.backend(backend):
        cache = SlidingWindowKVCache(model.config, 8, 4)
        ours = streamed_logits(model, ids, cache, CHUNKS[chunks], mask, positions)
    theirs = oracle_of("llama", 8, 4, None, padding)
    for row, begin in enumerate(padding):
        assert_same_logits(ours[row, begin:], theirs[row, begin:])


def test_sinks_change_what_is_computed():
    """The oracle can tell: other sinks, none, or sinks that are not turned give other logits."""
    theirs = oracle_of("llama", 8, 4)
    for other in (oracle_of("llama", 8, 3), oracle_of("llama", 8, 0), oracle_of("llama", 9, 4)):
        assert (other - theirs)[:, 20:].abs().max() > 0.05 * theirs.abs().max()


@functools.cache
def stock(family: str, length: int, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    return generate(tiny_model(family), prompt(length, left_padding=padding), 90)


@pytest.mark.parametrize(("family", "backend"), SERVED)
@pytest.mark.parametrize(("length", "padding"), [(5, 0), (5, 2), (30, 0), (150, 90)])
def test_native_windows_generate_stock_tokens(backend, family, length, padding):
    inputs = prompt(length, left_padding=padding)
    tokens, logits = stock(family, length, padding)
    model = hf_kvattn.enable(tiny_model(family))
    for cache in (
        StaticKVCache(model.config),
        StaticKVCache(model.config, 260),
        SlidingWindowKVCache(model.config, 400),
    ):
        with hf_kvattn.backend(backend):
            ours, our_logits = generate(model, inputs, 90, past_key_values=cache)
        assert torch.equal(ours, tokens)
        torch.testing.assert_close(our_logits, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_native_windows_sample_stock_tokens(family):
    ids = prompt(11)
    sampled = []
    for model, make in ((tiny_model(family), None), (hf_kvattn.enable(tiny_model(family)), StaticKVCache)):
        torch.manual_seed(5)
        cache = {} if make is None else {"past_key_values": make(model.config)}
        sampled.append(model.generate(**ids, max_new_tokens=120, do_sample=True, top_k=20, **cache))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("family", NATIVE)
def test_native_windows_on_a_model_that_is_not_enabled(family):
    inputs = prompt(100, left_padding=30)
    tokens, _ = generate(tiny_model(family), inputs, 90)
    model = tiny_model(family)
    assert torch.equal(generate(model, inputs, 90, past_key_values=StaticKVCache(model.config))[0], tokens)


def test_a_forced_window_on_a_model_that_is_not_enabled():
    model, ids = tiny_model(), stream(length=100)
    cache = SlidingWindowKVCache(model.config, 8)
    ours = streamed_logits(model, ids, cache, [6] + [1] * 94)
    torch.testing.assert_close(ours, oracle_of("llama", 8, 0)[:, :100], rtol=1e-3, atol=1e-3)
    for window, sinks in ((8, 0), (8, 2)):
        cache = SlidingWindowKVCache(model.config, window, sinks)
        with pytest.raises(ValueError, match=f"window of {window} with {sinks} sinks.*enable"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize(("family", "backend"), SERVED)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_quantized_windows(backend, family, bits):
    """Codes in a ring: every backend reads what the layer itself dequantizes, and 8 bits are close to exact."""
    model, ids = hf_kvattn.enable(tiny_model(family, head_dim=16)), stream()
    *before, last = CHUNKS["odd"]
    exact = streamed_logits(model, ids, StaticKVCache(model.config), [*before, last])
    cache, made = QuantizedKVCache(model.config, bits=bits, group_size=16), {}
    with hf_kvattn.backend(backend):
        first = streamed_logits(model, ids, cache, before)
    for name in {backend, "reference"}:  # from the same codes on
        own = copy.deepcopy(cache)
        with hf_kvattn.backend(name):
            made[name] = torch.cat([first, streamed_logits(model, ids, own, [last], seen=sum(before))], 1)
        rings = [layer for layer in own.layers if layer.sliding_window is not None]
        assert rings and all(layer.dropped >= 128 and layer.packed_tokens > 64 for layer in rings)
    spread = float(exact.std())
    assert (made[backend] - made["reference"]).abs().max() < 2e-3 * float(exact.abs().max())
    assert (made[backend] - exact).pow(2).mean().sqrt() < {8: 0.05, 4: 0.4, 2: 1.0}[bits] * spread


def test_quantized_windows_hold_their_memory():
    model = hf_kvattn.enable(tiny_model("mistral", head_dim=16))
    cache = QuantizedKVCache(model.config, bits=4, group_size=16)
    sizes = []
    for _ in range(6):
        streamed_logits(model, stream(), cache, [110] * 3)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1


def buffers(cache):
    return [(layer._k.data_ptr(), layer._v.data_ptr(), layer._k.shape) for layer in cache.layers]


@pytest.mark.parametrize("make", [lambda c: SlidingWindowKVCache(c, 8, 4), StaticKVCache], ids=["forced", "native"])
def test_memory_is_constant_to_the_byte(make):
    model = hf_kvattn.enable(tiny_model("mistral"))
    cache = make(model.config)
    streamed_logits(model, stream(), cache, [1])
    before, where = cache.nbytes, buffers(cache)
    for _ in range(3):
        streamed_logits(model, stream(), cache, [300, 1, 1, 28])
        assert cache.nbytes == before
    assert before == sum(2 * 4 * 16 * 2 * 2 * (8 + SLACK + (4 if layer.forces_window else 0)) for layer in cache.layers)
    if make is StaticKVCache:
        assert buffers(cache) == where  # nothing has moved


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("taken", [1, 7, SLACK, 0])
def test_rollback_after_a_wrap_goes_on_as_if_nothing_had_been_there(sinks, taken):
    model, ids = hf_kvattn.enable(tiny_model()), stream()
    cache = SlidingWindowKVCache(model.config, 8, sinks)
    ours = streamed_logits(model, ids, cache, [150, 50])
    if taken:
        model(torch.full((2, taken), 5), past_key_values=cache)
    cache.crop(-taken)
    assert cache.get_seq_length() == 200
    with torch.no_grad():
        rest = model(ids[:, 200:], past_key_values=cache).logits
    assert_same_logits(torch.cat([ours, rest], 1), oracle_of("llama", 8, sinks))


@pytest.mark.parametrize("make", [lambda c: SlidingWindowKVCache(c, 8, 4), StaticKVCache, QuantizedKVCache])
def test_rollback_past_the_slack_is_refused_before_harm(make):
    model, ids = hf_kvattn.enable(tiny_model("gemma3", head_dim=32)), stream()
    whole = streamed_logits(model, ids, make(model.config), [300, 30])
    cache = make(model.config)
    streamed_logits(model, ids, cache, [300])
    with pytest.raises(ValueError, match=r"crop\(-290\).*can be taken back"):
        cache.crop(-290)
    with torch.no_grad():
        assert torch.equal(model(ids[:, 300:], past_key_values=cache).logits, whole[:, 300:])
    cache.crop(-LENGTH)
    assert torch.equal(streamed_logits(model, ids, cache, [300, 30]), whole)  # all of it can always be forgotten


def test_quantized_windows_roll_back():
    model, ids = hf_kvattn.enable(tiny_model("mistral", head_dim=16)), stream()
    cache = QuantizedKVCache(model.config, bits=8, group_size=16)
    ours = streamed_logits(model, ids, cache, [150, 50])
    streamed_logits(model, ids, cache, [50])
    cache.crop(-50)
    rest = streamed_logits(model, ids[:, 200:], cache, [1, 60, 69])
    exact = streamed_logits(model, ids, StaticKVCache(model.config), [330])
    assert (torch.cat([ours, rest], 1) - exact).pow(2).mean().sqrt() < 0.03 * float(exact.std())


def test_chat_of_many_turns_and_reset():
    model = hf_kvattn.enable(tiny_model())
    cache = SlidingWindowKVCache(model.config, 16, 4)
    texts = []
    for _ in range(2):
        ids = prompt(9, batch=1)["input_ids"]
        for turn in range(6):
            given = {"attention_mask": torch.ones_like(ids)}  # else a 0 among the tokens is taken for padding
            ids = model.generate(ids, max_new_tokens=40, do_sample=False, past_key_values=cache, **given)
            ids = torch.cat([ids, torch.full((1, 3), 10 + turn)], 1)
        texts.append(ids)
        cache.reset()
    assert torch.equal(*texts)
    logits = expected_logits(tiny_model(), texts[0][:, :-1], 16, 4)[0]
    for i in range(9, 49):  # of the first turn: each token is the oracle's choice
        top = logits[i - 1].topk(2)
        assert texts[0][0, i] == top.indices[0] or top.values[0] - top.values[1] < 1e-3


@pytest.mark.parametrize("make", [lambda c: SlidingWindowKVCache(c, 8, 4), StaticKVCache], ids=["forced", "native"])
def test_assisted_decoding_and_beams(make):
    model = hf_kvattn.enable(tiny_model("mistral"))
    inputs = prompt(150, batch=1)
    plain = model.generate(**inputs, max_new_tokens=90, do_sample=False, past_key_values=make(model.config))
    for how in ({"prompt_lookup_num_tokens": 6}, {"assistant_model": hf_kvattn.enable(tiny_model("mistral"))}):
        assert torch.equal(
            model.generate(**inputs, max_new_tokens=90, do_sample=False, past_key_values=make(model.config), **how),
            plain,
        )
    beams = {"num_beams": 3, "max_new_tokens": 90, "do_sample": False}
    ours = model.generate(**inputs, **beams, past_key_values=make(model.config))
    with hf_kvattn.backend("reference"):
        assert torch.equal(model.generate(**inputs, **beams, past_key_values=make(model.config)), ours)
    if make is StaticKVCache:
        assert torch.equal(tiny_model("mistral").generate(**inputs, **beams), ours)


@pytest.mark.parametrize("rows", [[1, 0], [1, 1, 0], [0]])
def test_rows_of_a_batch_move_with_their_sinks(rows):
    model, ids, (mask, positions) = hf_kvattn.enable(tiny_model()), stream(), padded([0, 5])
    whole = streamed_logits(model, ids, SlidingWindowKVCache(model.config, 8, 4), [200, 130], mask, positions)
    cache = SlidingWindowKVCache(model.config, 8, 4)
    streamed_logits(model, ids, cache, [200], mask, positions)
    cache.batch_select_indices(torch.tensor(rows))
    with torch.no_grad():
        rest = model(
            ids[rows, 200:], attention_mask=mask[rows], position_ids=positions[rows, 200:], past_key_values=cache
        ).logits
    torch.testing.assert_close(rest, whole[rows, 200:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", [[0, 0], [0, 5]], ids=str)
def test_angles_are_computed_once_a_step_and_for_the_rows_as_they_are(padding, monkeypatch):
    """A cache and a fork of it with other rows share what computes angles, and take steps in turns."""
    model, ids, (mask, positions) = hf_kvattn.enable(tiny_model()), stream(), padded(padding)
    whole = streamed_logits(model, ids, SlidingWindowKVCache(model.config, 8, 4), [200, 130], mask, positions)
    cache, computed, angles = SlidingWindowKVCache(model.config, 8, 4), [], Rope._angles
    streamed_logits(model, ids, cache, [200], mask, positions)
    twin = cache.fork()
    twin.batch_select_indices(torch.tensor([1, 0]))
    assert cache.layers[0].rope is twin.layers[0].rope and len(cache.layers) > 1
    monkeypatch.setattr(Rope, "_angles", lambda *args: computed.append(args) or angles(*args))
    for i in range(200, 220):
        for each, rows in ((cache, [0, 1]), (twin, [1, 0])):
            count, masks = len(computed), {"attention_mask": mask[rows, : i + 1]}
            masks["position_ids"] = positions[rows, i : i + 1]
            with torch.no_grad():
                logits = model(ids[rows, i : i + 1], **masks, past_key_values=each).logits
            torch.testing.assert_close(logits[:, 0], whole[rows, i], rtol=1e-4, atol=1e-4)
            assert len(computed) - count == (padding != [0, 0] or each is cache)


def test_an_interrupt_before_the_attention_loses_no_sinks(monkeypatch):
    """Layer by layer: the tokens are stored, and what their attention should have kept of them is not."""
    model, ids = hf_kvattn.enable(tiny_model()), stream()
    whole = streamed_logits(model, ids, SlidingWindowKVCache(model.config, 8, 4), [2, 60, 100])
    for broken in range(3):
        cache = SlidingWindowKVCache(model.config, 8, 4)
        streamed_logits(model, ids, cache, [2])

        def interrupt(q, first):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache.layers[broken], "sink_inputs", interrupt)
            model(ids[:, 2:62], past_key_values=cache)
        with pytest.raises(ValueError, match=r"crop\(-60\) goes back"):
            model(ids[:, 62:], past_key_values=cache)
        cache.crop(-60)
        rest = streamed_logits(model, ids[:, 2:], cache, [60, 100])
        torch.testing.assert_close(rest, whole[:, 2:], rtol=1e-5, atol=1e-5)


def test_custom_masks_are_cut_by_the_window():
    model, ids = hf_kvattn.enable(tiny_model()), stream(length=60)
    causal = torch.ones(60, 60, dtype=torch.bool).tril().expand(2, 1, 60, 60)
    cache = SlidingWindowKVCache(model.config, 8)
    with torch.no_grad():
        theirs = oracle_of("llama", 8, 0)[:, :60]
        assert_same_logits(model(ids, attention_mask=causal, past_key_values=cache).logits, theirs)
        added = torch.zeros(2, 1, 60, 60).masked_fill(~causal, -torch.inf)
        cache.reset()
        assert_same_logits(model(ids, attention_mask=added, past_key_values=cache).logits, theirs)


def test_positions_that_do_not_go_on_are_refused_before_harm():
    model, ids = hf_kvattn.enable(tiny_model()), stream(length=60)
    cache = SlidingWindowKVCache(model.config, 8, 2)
    streamed_logits(model, ids, cache, [40])
    for wrong, said in (
        (39, "backwards: they end at 39"),
        (41, "at 41, a jump ahead of 40"),
        (7, "end at 7, and ended"),
    ):
        with pytest.raises(ValueError, match=said):
            model(ids[:, 40:41], past_key_values=cache, position_ids=torch.tensor([[wrong]]))
    with pytest.raises(ValueError, match="run backwards"):
        model(ids[:, 40:43], past_key_values=cache, position_ids=torch.tensor([[40, 44, 42]]))
    with pytest.raises(ValueError, match=r"\(2, 3\) must be \(B, 1\)"):
        model(ids[:, 40:41], past_key_values=cache, position_ids=torch.zeros(2, 3, dtype=torch.long))
    rest = streamed_logits(model, ids[:, 40:], cache, [20])
    assert_same_logits(rest, oracle_of("llama", 8, 2)[:, 40:60])


@pytest.mark.parametrize(
    ("window", "sinks", "said"),
    [(0, 0, "window.*got 0"), (-3, 0, "got -3"), (2.5, 0, "got 2.5"), (True, 0, "got True"), (8, 8, "window=8, got 8"),
     (8, 9, "got 9"), (8, -1, "got -1"), (200, 65, "got 65"), (8, None, "got None")],
)  # fmt: skip
def test_impossible_settings(window, sinks, said):
    with pytest.raises(ValueError, match=said):
        SlidingWindowKVCache(tiny_config(), window, sinks)


@pytest.mark.parametrize("config", [GPT2Config(n_layer=2, n_embd=32, n_head=2), OPTConfig(num_hidden_layers=2)])
def test_sinks_need_a_rotary_embedding(config):
    with pytest.raises(ValueError, match=f"{config.model_type}: sinks=2 are rotated with"):
        SlidingWindowKVCache(config, 8, 2)
    assert SlidingWindowKVCache(config, 8).settings == {"window": 8, "sinks": 0}


def test_a_window_on_learned_positions():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=128, n_positions=256, n_layer=2, n_embd=32, n_head=2)
    model = hf_kvattn.enable(GPT2LMHeadModel._from_config(config).eval())
    ids = stream(length=200)
    ours = streamed_logits(model, ids, SlidingWindowKVCache(config, 8), [60, 1, 1, 100, 38])
    key = torch.arange(200)
    mask = (key <= key[:, None]) & (key > key[:, None] - 8)
    with torch.no_grad():
        theirs = GPT2LMHeadModel._from_config(config).eval()
        theirs.load_state_dict(model.state_dict())
        assert_same_logits(ours, theirs(ids, attention_mask=mask.expand(2, 1, 200, 200)).logits)


def test_windows_longer_than_changing_frequencies_allow():
    rope = {"rope_theta": 10000.0, **ROPES["dynamic"]}
    with pytest.raises(ValueError, match="504 tokens in all.*exceed the 500 positions"):
        SlidingWindowKVCache(tiny_config(rope_parameters=rope, max_position_embeddings=500), 500 - SLACK, 4)
    model = hf_kvattn.enable(tiny_model(rope_parameters=rope, max_position_embeddings=200))
    cache = SlidingWindowKVCache(model.config, 8, 4)
    with pytest.raises(ValueError, match="210 tokens at once.*prefill_chunk_size"):
        model(stream(length=210), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_a_refused_chunk_leaves_a_stream_where_it_stood():
    rope = {"rope_theta": 10000.0, **ROPES["dynamic"]}
    model, ids = hf_kvattn.enable(tiny_model(rope_parameters=rope, max_position_embeddings=200)), stream(length=300)
    cache, unchanged_prefix = (SlidingWindowKVCache(model.config, 8, 4) for _ in range(2))
    for each in (cache, unchanged_prefix):
        streamed_logits(model, ids, each, [10])
    with pytest.raises(ValueError, match="210 tokens at once"):
        model(ids[:, 10:220], past_key_values=cache)
    positions = torch.arange(10, 300).expand(2, -1)
    ours, theirs = (
        streamed_logits(model, ids[:, 10:], c, [5, 1], positions=positions) for c in (cache, unchanged_prefix)
    )
    assert torch.equal(ours, theirs)


def test_keys_of_a_torn_cache_are_not_turned():
    """Turning marks all layers and takes the marks off again: those that were there must not go with them."""
    model, ids = hf_kvattn.enable(tiny_model(max_position_embeddings=160)), stream()
    cache = SlidingWindowKVCache(model.config, 8, 4)
    streamed_logits(model, ids, cache, [100, 60])
    cache.layers[1].inconsistent = "crop"
    keys = [layer.keys.clone() for layer in cache.layers]
    for _ in range(2):
        with pytest.raises(ValueError, match="crop was interrupted half way; only reset"):
            model(ids[:, 160:200], past_key_values=cache)
    assert all(torch.equal(layer.keys, k) and not layer.rebased for layer, k in zip(cache.layers, keys, strict=True))


@pytest.mark.parametrize("saved_at", [1, 3, 5, 7, 9, 30])
def test_rows_saved_before_all_their_sinks_have_come_go_on_collecting_them(saved_at, tmp_path):
    model, ids, (mask, positions) = hf_kvattn.enable(tiny_model()), stream(), padded([0, 5])
    cache = SlidingWindowKVCache(model.config, 8, 4)
    streamed_logits(model, ids, cache, [saved_at], mask, positions)
    hf_kvattn.save_cache(cache, tmp_path / "cache")
    for each in (cache, hf_kvattn.load_cache(tmp_path / "cache", model.config)):
        rest = streamed_logits(model, ids, each, [1, 1, 1, 90, 1], mask, positions, saved_at)
        expected = oracle_of("llama", 8, 4, padding=(0, 5))[:, saved_at : saved_at + 94]
        ours, theirs = ((t[0], t[1, max(0, 5 - saved_at) :]) for t in (rest, expected))
        for row, other in zip(ours, theirs, strict=True):  # what comes before a row's first token is nobody's
            assert_same_logits(row, other)


def test_a_prompt_is_prefilled_in_linear_memory():
    """No array of length times length: at 4,096 tokens one would have 16 million entries."""
    model = hf_kvattn.enable(tiny_model("llama", max_position_embeddings=8192))
    cache = SlidingWindowKVCache(model.config, 32, 4)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.untyped_storage().nbytes() for t in [out] if isinstance(t, torch.Tensor))
            return out

    for backend in ("sdpa", "native"):
        cache.reset()
        with torch.no_grad(), Watch(), hf_kvattn.backend(backend):
            model(stream(1, 4096), past_key_values=cache, logits_to_keep=1)
    assert max(largest) < 4 * 4096 * 1024


def test_small_settings_are_in_the_tables():
    assert set(NATIVE) <= set(FAMILIES) and SMALL["max_position_embeddings"] > LENGTH
