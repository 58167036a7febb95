"""`torch.compile`: one graph for all lengths, whatever the cache, and the tokens of the uncompiled model."""

import copy
import functools
import gc
import pickle
import shutil

import pytest
import torch
from models import FAMILIES, generate, prompt, tiny_config, tiny_model
from torch._dynamo.exc import TorchDynamoException
from transformers import CompileConfig, DynamicCache, StaticCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches import tickets
from hf_kvattn.compiling.step import checked_config
from hf_kvattn.kernels import reference, sdpa

CACHES = {
    "static": StaticKVCache,
    "sliding": functools.partial(SlidingWindowKVCache, window=24, sinks=4),
    "int8": functools.partial(QuantizedKVCache, bits=8, group_size=16),
}
LOGITS = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting():
    """A list that grows by one for every graph that is made, and the backend that runs graphs as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def config(backend="eager", **kwargs):
    return CompileConfig(fullgraph=True, mode=None, backend=backend, **kwargs)


@pytest.mark.parametrize("kind", CACHES)
def test_generate_makes_one_graph_for_200_steps(kind):
    model, inputs = tiny_model(num_hidden_layers=2), prompt()
    expected, _ = generate(model, inputs, 201)
    with hf_kvattn.enabled(model):
        ours, logits = generate(model, inputs, 201, past_key_values=CACHES[kind](model.config))
    graphs, backend = counting()
    with hf_kvattn.enabled(model, compile=True):
        for _ in range(2):  # another cache does not need another graph
            cache = CACHES[kind](model.config)
            tokens, their_logits = generate(model, inputs, 201, past_key_values=cache, compile_config=config(backend))
            assert torch.equal(tokens, ours)
            torch.testing.assert_close(their_logits, logits, **LOGITS)
            assert cache.get_seq_length() == 13 + 200 and not cache.is_compileable
    assert len(graphs) == 1
    if kind == "static":
        assert torch.equal(tokens, expected) and len(expected[:, 13:].unique()) > 20


@pytest.mark.parametrize("kind", CACHES)
def test_a_forward_compiled_by_hand_makes_one_graph_for_200_steps(kind):
    model, ids = hf_kvattn.enable(tiny_model(num_hidden_layers=2), compile=True), prompt(214)["input_ids"]
    graphs, backend = counting()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    eager, compiled = CACHES[kind](model.config), CACHES[kind](model.config)
    with torch.no_grad():
        for cache in (eager, compiled):
            model(ids[:, :13], past_key_values=cache)
        for i in range(13, 214):
            expected = model(ids[:, i : i + 1], past_key_values=eager).logits
            torch.testing.assert_close(step(ids[:, i : i + 1], past_key_values=compiled).logits, expected, **LOGITS)
    assert len(graphs) == 1 and compiled.get_seq_length() == 214


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("llama-")])
def test_every_family_generates_stock_tokens(family):
    model, inputs = tiny_model(family, num_hidden_layers=2), prompt(left_padding=20, length=40)
    expected, logits = generate(model, inputs)
    graphs, backend = counting()
    with hf_kvattn.enabled(model, "static", compile=True):
        tokens, our_logits = generate(model, inputs, compile_config=config(backend))
    assert torch.equal(tokens, expected) and len(graphs) == 1
    torch.testing.assert_close(our_logits, logits, **LOGITS)


@pytest.mark.parametrize(
    ("kind", "family"), [("static", "mistral"), ("static", "gemma3"), ("sliding", "llama"), ("int8", "llama")]
)
def test_by_hand_with_padding_positions_and_windows(kind, family):
    """A mask over all tokens grows, so that dynamo makes a second graph for any length of it, and no third."""
    model, inputs = hf_kvattn.enable(tiny_model(family, num_hidden_layers=2)), prompt(32, left_padding=5)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    graphs, backend = counting()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    eager, compiled = CACHES[kind](model.config), CACHES[kind](model.config)
    with torch.no_grad():
        for begin, end in ((0, 13), *((i, i + 1) for i in range(13, 32))):
            logits = []
            for cache, forward in ((eager, model), (compiled, model if begin == 0 else step)):
                new = slice(begin, end)
                out = forward(
                    ids[:, new], attention_mask=mask[:, :end], position_ids=positions[:, new], past_key_values=cache
                )
                logits.append(out.logits)
            torch.testing.assert_close(*logits, **LOGITS)
    assert 1 <= len(graphs) <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", CACHES)
def test_inductor_gives_the_uncompiled_tokens(kind):
    model, inputs = tiny_model(num_hidden_layers=1), prompt()
    with hf_kvattn.enabled(model):
        expected, _ = generate(model, inputs, 60, past_key_values=CACHES[kind](model.config))
    with hf_kvattn.enabled(model, CACHES[kind], compile=True):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        tokens, _ = generate(model, inputs, 60)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1, "compiled, by default"
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        ("static", {"num_beams": 3, "num_return_sequences": 2}),
        ("int8", {"num_beams": 3}),
        ("sliding", {"prompt_lookup_num_tokens": 3}),
        ("int8", {"assistant_early_exit": 1}),
        ("sliding", {"prefill_chunk_size": 4}),
        ("int8", {"do_sample": True, "top_k": 20}),
    ],
    ids=lambda k: k if isinstance(k, str) else next(iter(k)),
)
def test_other_ways_of_generating(kind, kwargs):
    model = tiny_model(num_hidden_layers=2)
    single = {"prompt_lookup_num_tokens", "assistant_early_exit"} & set(kwargs)
    inputs, results = prompt(batch=1) if single else prompt(left_padding=4), []
    for compile in (False, True):
        with hf_kvattn.enabled(model, CACHES[kind], compile=compile):
            torch.manual_seed(3)
            extra = {"compile_config": config("aot_eager")} if compile else {}
            asked = {"do_sample": False, "max_new_tokens": 16, **kwargs, **extra}
            results.append(model.generate(**inputs, **asked))
    assert torch.equal(*results)


@pytest.mark.slow
def test_batches_of_other_sizes_and_second_turns():
    model, stock = hf_kvattn.enable(tiny_model(num_hidden_layers=1), compile=True), tiny_model(num_hidden_layers=1)
    for batch, padding in ((1, 0), (3, 2), (2, 0), (1, 0)):
        cache, theirs, inputs = (
            StaticKVCache(model.config),
            DynamicCache(config=stock.config),
            prompt(13, batch, padding),
        )
        for _ in range(2):
            tokens, _ = generate(model, inputs, 9, past_key_values=cache, compile_config=config())
            assert torch.equal(tokens, generate(stock, inputs, 9, past_key_values=theirs)[0])
            mask = torch.cat([inputs["attention_mask"], torch.ones(batch, 9, dtype=torch.long)], 1)
            inputs = {"input_ids": tokens, "attention_mask": mask}


def test_two_models_and_a_copy_keep_to_themselves():
    models = [tiny_model(num_hidden_layers=1), tiny_model("mistral", num_hidden_layers=1)]
    with torch.no_grad():
        models.append(copy.deepcopy(models[0]))
        models[2].lm_head.weight.mul_(-1)
    expected = [generate(m, prompt())[0] for m in models]
    assert not torch.equal(expected[0], expected[2])
    hf_kvattn.enable(models[0], "static", compile=True)
    hf_kvattn.enable(models[1], "static", compile=True)
    for _ in range(2):
        for model, tokens in zip(models, expected, strict=True):
            extra = {"compile_config": config()} if hf_kvattn.is_enabled(model) else {}
            assert torch.equal(generate(model, prompt(), **extra)[0], tokens)
    clone = copy.deepcopy(models[0])  # of a model that has been compiled
    with torch.no_grad():
        clone.lm_head.weight.mul_(-1)
    assert torch.equal(generate(clone, prompt(), compile_config=config())[0], expected[2])


def test_weights_may_change_after_compiling():
    model = hf_kvattn.enable(tiny_model(num_hidden_layers=1), "static", compile=True)
    before, _ = generate(model, prompt(), compile_config=config("aot_eager"))
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    after, _ = generate(model, prompt(), compile_config=config("aot_eager"))
    hf_kvattn.disable(model)
    assert torch.equal(after, generate(model, prompt())[0]) and not torch.equal(after, before)


def test_what_compiles_and_what_does_not():
    model = hf_kvattn.enable(tiny_model(num_hidden_layers=1), compile=True)
    expected, _ = generate(tiny_model(num_hidden_layers=1), prompt())
    graphs, backend = counting()
    run = functools.partial(generate, model, prompt())
    for kwargs in (
        {"past_key_values": StaticKVCache(model.config), "disable_compile": True},
        {"past_key_values": DynamicCache(config=model.config)},
        {"past_key_values": StaticCache(model.config, max_cache_len=40)},
        {"use_cache": False},
    ):
        assert torch.equal(run(compile_config=config(backend), **kwargs)[0], expected)
    assert not graphs
    asked = copy.deepcopy(model.generation_config)
    asked.compile_config = config(backend)
    assert torch.equal(run(past_key_values=StaticKVCache(model.config), generation_config=asked)[0], expected)
    assert len(graphs) == 1
    hf_kvattn.enable(model)
    assert torch.equal(run(past_key_values=StaticKVCache(model.config), compile_config=config(backend))[0], expected)
    assert len(graphs) == 1


def compiling_everywhere(**kwargs):
    """What transformers compiles a StaticCache's steps with on a GPU by itself, on a CPU too."""
    asked = config(**kwargs)
    asked._compile_all_devices = True
    return asked


@pytest.mark.parametrize("left_padding", [0, 4])
@pytest.mark.parametrize("family", ["llama-g4", "mistral", "gemma2"])
def test_stocks_static_cache_compiles_whole(family, left_padding):
    """In as many graphs as stock's, the last step into the last slot too."""
    model, inputs = tiny_model(family, num_hidden_layers=2), prompt(left_padding=left_padding)
    (graphs, backend), (stocks, stocks_backend) = counting(), counting()
    run = functools.partial(generate, model, inputs, 20, cache_implementation="static")
    expected, logits = run(compile_config=compiling_everywhere(backend=stocks_backend))
    torch._dynamo.reset()
    with hf_kvattn.enabled(model):
        tokens, ours = run(compile_config=compiling_everywhere(backend=backend))
    assert torch.equal(tokens, expected) and len(graphs) == len(stocks)
    torch.testing.assert_close(ours, logits, **LOGITS)
    ops = [str(node.target) for node in graphs[0].graph.nodes if "hf_kvattn" in str(node.target)]
    assert ops == ["hf_kvattn.attend"] * 2


def test_the_backend_over_stocks_cache_is_that_of_the_step_and_not_of_the_trace(monkeypatch):
    model, ids = hf_kvattn.enable(tiny_model(num_hidden_layers=1)), prompt()["input_ids"]
    graphs, backend = counting()
    step = torch.compile(model.forward, fullgraph=True, backend=backend)
    served = []
    for name, module in (("reference", reference), ("sdpa", sdpa)):
        attend = module.attend
        monkeypatch.setattr(
            module, "attend", lambda call, name=name, attend=attend: served.append(name) or attend(call)
        )
    cache, eager = (StaticCache(model.config, max_cache_len=30) for _ in range(2))
    with torch.no_grad():
        for each in (cache, eager):
            model(ids, past_key_values=each)
        for position, name in enumerate(("reference", "sdpa", "reference"), 13):
            token = {"input_ids": ids[:, :1], "position_ids": torch.full((2, 1), position)}
            expected = model(**token, past_key_values=eager).logits
            served.clear()
            with hf_kvattn.backend(name):
                torch.testing.assert_close(step(**token, past_key_values=cache).logits, expected, **LOGITS)
            assert served == [name]
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["llama-g4", "mistral", "gemma2"])
def test_a_forward_without_a_cache_compiles_whole(family):
    model, ids = hf_kvattn.enable(tiny_model(family, num_hidden_layers=2)), prompt()["input_ids"]
    graphs, backend = counting()
    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        logits = step(ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(ids, use_cache=False).logits, **LOGITS)
    assert len(graphs) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_steps_over_stocks_static_cache():
    model, inputs = tiny_model(num_hidden_layers=1), prompt(left_padding=4)
    expected, _ = generate(model, inputs, 10)
    with hf_kvattn.enabled(model):
        asked = {"cache_implementation": "static", "compile_config": compiling_everywhere(backend="inductor")}
        assert torch.equal(generate(model, inputs, 10, **asked)[0], expected)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (StaticKVCache, "a cache that does not grow: give StaticKVCache a max_cache_len"),
        (functools.partial(StaticKVCache, max_cache_len=9, offload=True), "StaticKVCache without offload=True"),
        (CACHES["sliding"], "a StaticKVCache or QuantizedKVCache with max_cache_len, not a SlidingWindow"),
        (CACHES["int8"], "a cache that does not grow: give QuantizedKVCache a max_cache_len"),
        (lambda config: QuantizedKVCache(tiny_config("mistral"), 8, group_size=16, max_cache_len=9), "not in rings"),
    ],
)
def test_cuda_graphs_are_refused_where_they_would_be_recorded(mode, make, message):
    cache = make(tiny_model().config)
    with pytest.raises(ValueError, match=f"mode='{mode}', which records CUDA graphs: .*{message}"):
        checked_config(CompileConfig(mode=mode), torch.device("cuda"), cache)
    asked = CompileConfig(mode=mode)
    assert checked_config(asked, torch.device("cpu"), cache) == (asked, None) and asked._compile_all_devices is None
    options = {"triton.cudagraphs": True}
    with pytest.raises(ValueError, match=f"options={options}, which records CUDA graphs"):
        checked_config(CompileConfig(mode=None, options=options), torch.device("cuda"), cache)


@pytest.mark.slow
def test_disable_forgets_what_was_compiled():
    model = tiny_model(num_hidden_layers=1)
    before = sorted(model.__dict__), model.generation_config, model.generation_config.to_dict()
    model.get_compiled_call = mine = lambda config: "mine"
    for _ in range(9):  # more often than dynamo compiles one piece of code
        with hf_kvattn.enabled(model, "static", compile=True):
            generate(model, prompt(), 2, compile_config=config())
    assert model.get_compiled_call is mine
    del model.get_compiled_call
    assert before == (sorted(model.__dict__), model.generation_config, model.generation_config.to_dict())


@pytest.mark.parametrize("kind", ["static", "sliding"])
@pytest.mark.parametrize("twin", [lambda c: c.fork(), copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_of_a_cache_are_stepped_on_their_own(kind, twin):
    model, ids = hf_kvattn.enable(tiny_model(num_hidden_layers=1)), prompt(60)["input_ids"]
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        one = CACHES[kind](model.config)
        model(ids[:, :40], past_key_values=one)
        other = twin(one)
        expected = twin(one)
        for i in range(40, 60):
            logits = model(ids[:, i : i + 1], past_key_values=expected).logits
            torch.testing.assert_close(step(ids[:, i : i + 1], past_key_values=other).logits, logits, **LOGITS)
    assert one.get_seq_length() == 40 and other.get_seq_length() == 60


def test_tickets_do_not_keep_caches_alive():
    cache = StaticKVCache(tiny_model().config)
    ticket = cache.ticket
    assert tickets.cache_of(ticket) is cache
    del cache
    gc.collect()
    with pytest.raises(KeyError):
        tickets.cache_of(ticket)


def test_what_cannot_be_stepped_is_refused_and_harms_nothing():
    model, ids = hf_kvattn.enable(tiny_model()), prompt(20)["input_ids"]
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        full = StaticKVCache(model.config, max_cache_len=14)
        model(ids[:, :13], past_key_values=full)
        step(ids[:, 13:14], past_key_values=full)
        with pytest.raises(ValueError, match="14 stored tokens and 1 new ones exceed max_cache_len=14"):
            step(ids[:, 14:15], past_key_values=full)
        assert full.get_seq_length() == 14
        cache = StaticKVCache(model.config)
        model(ids[:, :13], past_key_values=cache)
        holes = torch.ones(2, 14, dtype=torch.long)
        holes[1, 5] = 0
        with pytest.raises(ValueError, match=r"attention_mask \(2, 14\): a compiled step takes padding at the left"):
            step(ids[:, 13:14], attention_mask=holes, past_key_values=cache)
        cache.layers[1].crop(-1)
        with pytest.raises(ValueError, match="interrupted half way"):
            step(ids[:, 13:14], past_key_values=cache)
        cache.crop(-1)
        step(ids[:, 12:13], past_key_values=cache)
        assert cache.get_seq_length() == 13
    with pytest.raises(TorchDynamoException, match="a compiled step through a cache is for inference"):
        step(ids[:, 13:14], past_key_values=cache)


def test_the_ops_do_what_they_declare():
    ops = hf_kvattn.enable(tiny_model()) and torch.ops.hf_kvattn
    checks = ("test_schema", "test_faketensor")
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16)
    past = torch.randn(2, 2, 9, 24)[..., :16]
    for mask in (None, torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.zeros(2, 5, 1, 2, dtype=torch.uint32)):
        torch.library.opcheck(ops.attend.default, (q, past, past, mask, None, True, None, None, None))
    for kind, make in CACHES.items():
        cache = make(tiny_model().config)
        mask = torch.zeros(2, 1, 1, 2, dtype=torch.uint32)
        for layer in range(3):
            arguments = (cache.ticket, layer, q, k, k, mask, 0.25, True, None, None, None)
            torch.library.opcheck(ops.append_and_attend.default, arguments, test_utils=checks)
        seen = cache.get_seq_length()
        padded = torch.ones(2, seen + 1, dtype=torch.long)
        torch.library.opcheck(ops.leftpad.default, (cache.ticket, padded, 1, False), test_utils=checks)
        if kind == "sliding":  # refuses positions that it was given before, as these checks do
            continue
        for positions in (None, torch.full((2, 1), seen)):
            arguments = (cache.ticket, torch.ones(2, 1, dtype=torch.long), positions, None)
            torch.library.opcheck(ops.begin.default, arguments, test_utils=checks)
