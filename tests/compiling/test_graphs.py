"""Steps that a CUDA graph can hold: recorded on a CPU, replayed without Python, and run with flash-attn's own code.

What needs tensors without memory on a GPU is in `graphs_on_fakes.py`, in a process of its own.
"""

import dataclasses
import functools
import gc
import itertools
import shutil
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from flash_stub import FA2, FA3, flash_libraries
from impostor import Impostor, fake_cuda, on_gpu
from kernel_count import FLASH_KERNELS, launched
from models import generate, prompt, tiny_model
from packed_problems import as_dense, packed_problem
from tolerance import assert_close_to_reference
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map_only
from transformers import CompileConfig, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_kvattn
from hf_kvattn import QuantizedKVCache, StaticKVCache, generation
from hf_kvattn.caches.first_tokens import WARM_UP
from hf_kvattn.caches.quantized_layer import KVQuantizedLayer
from hf_kvattn.compiling import decode_steps
from hf_kvattn.compiling import step as compiled
from hf_kvattn.compiling.append_attend import Numbers
from hf_kvattn.compiling.decode_steps import DecodeSteps
from hf_kvattn.kernels import dispatch, reference, sdpa
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.quant.packed import ARRAYS

RECORDING = CompileConfig(fullgraph=True, mode="reduce-overhead")
LIBRARIES = {"fa2": ((8, 0), FA2), "fa3": ((9, 0), FA3)}
BOOKS = ("seen", "stored", "oldest", "begin", "complete_tokens", "unchanged_prefix", "inconsistent")
LOGITS = {"rtol": 1e-4, "atol": 1e-4}
torch_compile = torch.compile
pytestmark = pytest.mark.usefixtures("fresh_choice")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorded:
    """In the place of `torch.compile`: what a CUDA graph does. A step is traced and run once on tensors that stay.

    Every later step of the same cache copies its inputs into those of the first and runs the traced graph on exactly
    the tensors of the first: no Python of the model, the cache or the package takes part. Outputs overwrite those of
    the step before.
    """

    made: list["Recorded"] = []

    def __init__(self, step, **fields):
        assert fields["mode"] == "reduce-overhead"
        self.traces = self.replays = 0
        self.steps = self.fails = None
        self.compiled = torch_compile(step, fullgraph=True, backend=self.backend)
        self.made.append(self)

    def backend(self, graph, examples):
        self.traces += 1

        def run(*tensors):
            self.graph, self.tensors, self.results = graph, tensors, graph(*tensors)
            return self.results

        return run

    def __call__(self, **kwargs):
        given = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
        if self.steps is None or kwargs["past_key_values"] is not self.steps():
            self.steps, self.given = weakref.ref(kwargs["past_key_values"]), given
            out = self.compiled(**kwargs)
            self.out = {name: value for name, value in out.items() if name != "past_key_values"}
            return out
        assert given.keys() == self.given.keys()
        for name, tensor in given.items():
            self.given[name].copy_(tensor)
        self.replays += 1
        if self.fails is not None and self.replays >= self.fails:
            raise RuntimeError("a replay that fails")
        for tensor, new in zip(self.results, self.graph(*self.tensors), strict=True):  # which lie where they lay
            tensor.copy_(new)
        return CausalLMOutputWithPast(**self.out)


@pytest.fixture
def recordings(monkeypatch):
    """`generate()` on this CPU takes the steps that it takes on a GPU: the list of what is recorded."""
    monkeypatch.setattr(Recorded, "made", made := [])
    monkeypatch.setattr(torch, "compile", Recorded)
    checked = compiled.checked_config
    gpu = torch.device("cuda")
    monkeypatch.setattr(generation, "checked_config", lambda config, device, cache: checked(config, gpu, cache))
    return made


def sized(model, tokens):
    return StaticKVCache(model.config, max_cache_len=tokens)


@pytest.mark.parametrize("left_padding", [0, 5])
@pytest.mark.parametrize("family", ["llama-g4", "mistral", "gemma2", "gemma3"])
def test_a_replayed_step_gives_stocks_tokens_up_to_the_last_slot(family, left_padding, recordings):
    """33 tokens after a prompt of 50: windows of 8 lie in rings of 72 slots, which wrap."""
    model, inputs = tiny_model(family, num_hidden_layers=2), prompt(50, left_padding=left_padding)
    expected, logits = generate(model, inputs, 33)
    with hf_kvattn.enabled(model, compile=True):
        for _ in range(2):  # another cache: recorded anew, not traced anew
            cache = sized(model, 82)
            tokens, ours = generate(model, inputs, 33, past_key_values=cache, compile_config=RECORDING)
            assert torch.equal(tokens, expected) and len(expected[:, 50:].unique()) > 15
            torch.testing.assert_close(ours, logits, **LOGITS)
            assert [layer.seen for layer in cache.layers] == [82, 82]
        (recorded,) = recordings
        assert recorded.traces == 1 and recorded.replays == 2 * 31
        with pytest.raises(ValueError, match="82 stored tokens and 1 new ones exceed max_cache_len=82"):
            generate(model, inputs, 34, past_key_values=(full := sized(model, 82)), compile_config=RECORDING)
        assert [layer.seen for layer in full.layers] == [82, 82] and full.steps is None
        for one, other in zip(full.layers, cache.layers, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.dense(), other.dense(), strict=True))
        full.crop(-10)
    with hf_kvattn.enabled(model):
        generate(model, inputs, 33, past_key_values=(eager := sized(model, 82)))
        for one, other in zip(cache.layers, eager.layers, strict=True):
            assert [getattr(one, name, 0) for name in BOOKS] == [getattr(other, name, 0) for name in BOOKS]
            assert [t.shape for t in one.dense()] == [t.shape for t in other.dense()]
        again = {"input_ids": expected[:, :73], "attention_mask": torch.ones(2, 73, dtype=torch.long)}
        again["attention_mask"][0, :left_padding] = 0
        assert torch.equal(generate(model, again, 10, past_key_values=full)[0], expected)


def test_what_a_graph_is_made_of(recordings):
    model, inputs = tiny_model("mistral", num_hidden_layers=2), prompt()
    with hf_kvattn.enabled(model, lambda config: StaticKVCache(config, max_cache_len=40), compile=True):
        generate(model, inputs, 5, compile_config=RECORDING)
    (recorded,) = recordings
    calls = [node for node in recorded.graph.graph.nodes if "hf_kvattn" in str(node.target)]
    assert [str(node.target) for node in calls] == ["hf_kvattn.append_attend"] * 2
    (op,) = {node.target.default for node in calls}
    assert not [tag for tag in op.tags if "cudagraph_unsafe" in str(tag)]
    mutated = [argument.name for argument in op._schema.arguments if argument.alias_info is not None]
    assert mutated == ["k_buffer", "v_buffer"]
    numbers = [t for t in recorded.tensors if t.dtype == torch.int32]
    assert [t.shape for t in numbers] == [(2,)] * 4, "padding, lengths, counts, begins: one tensor each for all layers"


def test_a_cache_that_is_reset_keeps_its_addresses(recordings):
    model, inputs = tiny_model(num_hidden_layers=2), prompt(left_padding=3)
    expected, _ = generate(model, inputs, 12)
    with hf_kvattn.enabled(model, compile=True):
        cache, buffers = sized(model, 40), []
        for _ in range(2):
            with torch.no_grad():
                cache.reset()
                assert torch.equal(
                    generate(model, inputs, 12, past_key_values=cache, compile_config=RECORDING)[0], expected
                )
            buffers.append([tensor for layer in cache.layers for tensor, _ in layer.buffers().values()])
            for tensor in buffers[-1]:
                assert tensor._dynamo_static_input_type == "unguarded"
                tensor[:, :, 24:] = torch.nan  # what a generation that went wrong leaves
        assert all(one is other for one, other in zip(*buffers, strict=True))
    assert [recorded.traces for recorded in recordings] == [1]


MAKES = {
    "static": functools.partial(StaticKVCache, max_cache_len=120),
    "int4": functools.partial(QuantizedKVCache, bits=4, group_size=16, max_cache_len=120),
    "residual": functools.partial(QuantizedKVCache, bits=8, group_size=16, max_cache_len=120, residual_length=7),
}


@pytest.mark.parametrize(
    ("length", "kind"), [(13, "static"), (70, "static"), (50, "int4"), (70, "int4"), (13, "residual"), (70, "residual")]
)
def test_fresh_caches_lie_where_the_one_before_lay(length, kind, recordings, monkeypatch):
    """Five calls of `generate()`, each with a cache of its own: a graph that knows the addresses serves all of them."""
    model, make = tiny_model("qwen2-sliding" if kind == "static" else "llama", num_hidden_layers=2), MAKES[kind]
    inputs, run_step, found = prompt(length, left_padding=3), DecodeSteps.run, []

    def noting(steps, *args):
        out = run_step(steps, *args)
        found[-1] = [t.data_ptr() for layer in steps.cache.layers for t, _ in layer.buffers().values() if t.numel()]
        return out

    monkeypatch.setattr(DecodeSteps, "run", noting)
    with hf_kvattn.enabled(model), hf_kvattn.backend("sdpa"):
        expected, _ = generate(model, inputs, 30, past_key_values=make(model.config))
    with hf_kvattn.enabled(model, make, compile=True):
        state = getattr(model, generation.STATE)
        run = functools.partial(model.generate, **inputs, max_new_tokens=30, do_sample=False)
        run = functools.partial(run, compile_config=RECORDING)
        for _ in range(5):
            found.append([])
            with hf_kvattn.backend("sdpa"):
                assert torch.equal(run(), expected)
            ((_, layers),) = state.idle
            for layer in layers:
                assert layer.seen == 0
                for tensor, _ in layer.buffers().values():
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 255)  # whatever was left there
        assert all(each == found[0] for each in found) and len(recordings) == 1 and recordings[0].traces == 1
        found.append([])
        kept = run(return_dict_in_generate=True).past_key_values  # it leaves with its buffers
        assert found[5] == found[0] and not state.idle
        found.append([])
        before = [tensor.clone() for layer in kept.layers for tensor in layer.filled().values()]
        run()
        assert not set(found[6]) & set(found[0]), "two caches that live"
        after = [tensor for layer in kept.layers for tensor in layer.filled().values()]
        assert all(map(torch.equal, before, after))
        for each in (inputs, {name: tensor[:1] for name, tensor in inputs.items()}):  # another batch size, and back
            tokens = model.generate(**each, max_new_tokens=9, do_sample=False, compile_config=RECORDING)
            assert tokens.shape == (len(each["input_ids"]), length + 9) and len(state.idle) == 1
        gone = weakref.ref(state.idle[0][1][0])
        del layers, layer, tensor, state
    gc.collect()  # what a compiler left behind
    assert gone() is None, "disable() frees them"


def test_a_cache_that_somebody_keeps_is_nobody_elses(recordings):
    """Such as one that the caller's own function made and noted."""
    model, made = tiny_model(num_hidden_layers=1), []

    def make(config):
        made.append(StaticKVCache(config, max_cache_len=40))
        return made[-1]

    with hf_kvattn.enabled(model, make, compile=True):
        for _ in range(2):
            model.generate(**prompt(), max_new_tokens=5, do_sample=False, compile_config=RECORDING)
        assert [cache.get_seq_length() for cache in made] == [17, 17]
        assert made[0].layers[0]._k.data_ptr() != made[1].layers[0]._k.data_ptr()
        assert not getattr(model, generation.STATE).idle


def test_hidden_states_of_a_step_are_not_those_of_the_next(recordings):
    """Outputs of a graph lie at the same addresses in each step; what `generate()` keeps of them is copied."""
    model, inputs, asked = tiny_model(num_hidden_layers=2), prompt(), {"max_new_tokens": 6, "do_sample": False}
    asked |= {"return_dict_in_generate": True, "output_hidden_states": True, "output_logits": True}
    asked |= {"output_scores": True}
    expected = model.generate(**inputs, **asked)
    with hf_kvattn.enabled(model, lambda config: StaticKVCache(config, max_cache_len=40), compile=True):
        ours = model.generate(**inputs, **asked, compile_config=RECORDING)
    assert recordings[0].replays == 4 and len(ours.hidden_states) == 6
    for name in ("sequences", "logits", "scores", "hidden_states"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), **LOGITS)


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ({"left_padding": 4}, {"num_beams": 3}),
        ({"left_padding": 4}, {"prefill_chunk_size": 1}),
        ({"left_padding": 4}, {"prefill_chunk_size": 6}),
        ({"batch": 1}, {"prompt_lookup_num_tokens": 3}),
        ({"length": 1}, {}),
        ({}, {"do_sample": True, "top_k": 20}),
        ({}, {"disable_compile": True}),
    ],
    ids=str,
)
def test_other_ways_of_generating(shape, kwargs, recordings):
    model, results = tiny_model("qwen2-sliding", num_hidden_layers=2), []  # a window in the second layer alone
    for extra in ({}, {"compile_config": RECORDING}):
        with hf_kvattn.enabled(model, lambda config: StaticKVCache(config, max_cache_len=40), compile=bool(extra)):
            torch.manual_seed(3)
            asked = {"do_sample": False, "max_new_tokens": 14, **kwargs, **extra}
            results.append(model.generate(**prompt(**shape), **asked))
    assert torch.equal(*results)
    assert len(recordings) == (not {"num_beams", "prompt_lookup_num_tokens", "disable_compile"} & set(kwargs))


def test_masks_that_say_more_than_left_padding_are_refused(recordings):
    model, inputs = tiny_model(num_hidden_layers=1), prompt()
    with hf_kvattn.enabled(model, compile=True), torch.no_grad():
        inputs["attention_mask"][1, 5] = 0
        cache = sized(model, 40)
        with pytest.raises(ValueError, match="steps in a CUDA graph take padding at the left"):
            generate(model, inputs, 9, past_key_values=cache, compile_config=RECORDING)
        assert cache.get_seq_length() == 13 and not cache.layers[0].buffers()["k"][0][:, :, 13:].isfinite().any()
    steps = DecodeSteps(cache)
    for wrong, message in (
        ({"attention_mask": torch.ones(1, 14)}, r"attention_mask torch.Size\(\[1, 14\]\): steps in a CUDA graph"),
        ({"attention_mask": torch.ones(2, 13)}, r"attention_mask torch.Size\(\[2, 13\]\): steps in a CUDA graph"),
        ({"attention_mask": torch.ones(2, 1, 1, 14)}, r"attention_mask torch.Size\(\[2, 1, 1, 14\]\): steps in a"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask <class 'dict'>: steps in a CUDA graph"),
        ({"input_ids": torch.ones(3, 1, dtype=torch.long)}, "the cache holds a batch of 2, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            steps.run(model, model, {"input_ids": torch.ones(2, 1, dtype=torch.long), **wrong})
        assert cache.get_seq_length() == 13


def test_a_replay_that_fails_leaves_the_cache_as_it_was(recordings):
    model, inputs = tiny_model("gemma3", num_hidden_layers=2), prompt(left_padding=5)
    expected, _ = generate(model, inputs, 30)
    with hf_kvattn.enabled(model, compile=True):
        generate(model, inputs, 30, past_key_values=(cache := sized(model, 60)), compile_config=RECORDING)
        cache.reset()
        recordings[0].fails = 28 + 20
        with pytest.raises(RuntimeError, match="a replay that fails"):
            generate(model, inputs, 30, past_key_values=cache, compile_config=RECORDING)
        recordings[0].fails = None
        assert cache.get_seq_length() == 13 + 20 and cache.steps is None and not cache.is_compileable
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 21, dtype=torch.long)], 1)
        rest = {"input_ids": expected[:, :34], "attention_mask": mask}
        tokens, _ = generate(model, rest, 9, past_key_values=cache, compile_config=RECORDING)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("make", [StaticKVCache, functools.partial(QuantizedKVCache, bits=8, group_size=16)], ids=str)
def test_every_layer_is_asked_what_layers_may_disagree_in(make, index):
    model, token = hf_kvattn.enable(tiny_model(num_hidden_layers=3)), torch.ones(2, 1, dtype=torch.long)
    cache = make(model.config, max_cache_len=14)
    layer, step = cache.layers[index], {"input_ids": token, "past_key_values": cache}
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
        before = [tensor.clone() for each in cache.layers for tensor in each.filled().values()]

        def refused(message):
            with pytest.raises(ValueError, match=message):
                DecodeSteps(cache).run(model, model, step)

        layer.inconsistent = "crop"
        refused(f"layer {index}: crop was interrupted half way")
        layer.inconsistent, layer.seen = None, 12
        refused("layers hold 12 to 13 tokens")
        layer.seen = 13
        if isinstance(layer, KVQuantizedLayer):
            layer._finite_checks = ((torch.tensor([True, False]), SimpleNamespace(query=lambda: True)),)
            refused(f"layer {index}: values were NaN or infinite when they were quantized")
            layer._finite_checks = ()
        after = [tensor for each in cache.layers for tensor in each.filled().values()]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        DecodeSteps(cache).run(model, model, step)
        refused("layer 0: 14 stored tokens and 1 new ones exceed max_cache_len=14")
    assert [each.seen for each in cache.layers] == [14] * 3


def test_an_interrupt_at_any_line_of_a_step_is_noticed_or_harmless():
    model, ids = hf_kvattn.enable(tiny_model("gemma3", num_hidden_layers=2)), prompt(100)["input_ids"]

    def filled():
        cache = sized(model, 100)
        model(ids[:, :80], past_key_values=cache)
        return cache

    def interrupted(cache, number):
        lines = itertools.count(1)

        def trace(frame, event, argument):
            if not frame.f_code.co_filename.endswith("/hf_kvattn/compiling/decode_steps.py"):
                return None
            if event == "line" and next(lines) == number:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            steps = DecodeSteps(cache)
            for token in (80, 81):
                steps.run(model, model, {"input_ids": ids[:, token : token + 1], "past_key_values": cache})
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return next(lines) - 1

    with torch.no_grad():
        expected = model(ids[:, 80:90], past_key_values=filled()).logits
        count, repaired = interrupted(filled(), 0), 0
        assert count > 80
        for number in range(1, count + 1, 2):
            interrupted(cache := filled(), number)
            try:
                cache.check_consistent_layers()
            except ValueError as error:
                assert "crop(-1) goes back to the last whole step" in str(error)
                cache.crop(-1)
                repaired += 1
            seen = cache.get_seq_length()
            assert 80 <= seen <= 82
            logits = model(ids[:, seen:90], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, seen - 80 :], **LOGITS)
    assert repaired >= 1


def test_stocks_own_static_cache_is_left_to_stock(monkeypatch):
    model, inputs = hf_kvattn.enable(tiny_model(num_hidden_layers=1), compile=True), prompt()
    monkeypatch.setattr(torch, "compile", lambda step, **fields: step)
    cache = StaticCache(model.config, max_cache_len=30)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        token = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
        assert model.get_compiled_call(RECORDING)(**token).logits.shape == (2, 1, 128)
        assert int(cache.get_seq_length()) == 14


# -- the op --------------------------------------------------------------------------------------------------------


def step_problem(length, slots=40, window=None, dtype=torch.float32, leftpad=(0, 0, 0), group=2, **rules):
    """A new token after `length` others in buffers of `slots`: arguments of the op, and the same as an AttendCall."""
    generator = torch.Generator().manual_seed(length)
    k, v = torch.randn(2, 3, 2, length + 1, 16, generator=generator).to(dtype)
    q = torch.randn(3, 2 * group, 1, 16, generator=generator).to(dtype)
    buffers = torch.full((2, 3, 2, slots, 16), 6e4, dtype=dtype)
    for position in range(max(0, length - slots), length):
        buffers[0, :, :, position % slots] = k[:, :, position]
        buffers[1, :, :, position % slots] = v[:, :, position]
    leftpad = torch.tensor(leftpad, dtype=torch.int32)
    call = AttendCall(q, k, v, 0.25, window=window, leftpad=leftpad, **rules)
    wraps = length >= slots or (window is not None and slots < 40)
    begin = leftpad.clamp(0 if window is None else max(0, length - window + 1), length)
    numbers = numbers_of(3, length, length + 1, length % slots, begin)
    arguments = [*buffers, q, k[:, :, -1:].clone(), v[:, :, -1:].clone(), *numbers, 0.25, wraps]
    return [*arguments, rules.get("softcap"), rules.get("s_aux"), "auto"], call


def numbers_of(batch, length, exact, slot, begin, packed=-(2**31)):
    lengths = torch.full((batch,), length, dtype=torch.int32)
    return Numbers(lengths, torch.tensor([packed, exact], dtype=torch.int32), torch.tensor([slot]), begin)


def assert_appended(arguments, before, length):
    """The new token is in its slot, and nothing else has changed."""
    for buffer, old, new in zip(arguments[:2], before, arguments[3:5], strict=True):
        expected = old.clone()
        expected[:, :, length % old.shape[2]] = new[:, :, 0]
        assert torch.equal(buffer, expected)


WRAPS = 10  # which argument of `append_attend` says so

STEPS = {
    "first-token": (0, {}),
    "last-slot": (39, {}),
    "padded": (30, {"leftpad": (0, 30, 7)}),
    "window": (30, {"window": 9, "leftpad": (0, 28, 22)}),
    "window-1": (30, {"window": 1}),
    "ring-not-full": (11, {"slots": 24, "window": 8}),
    "ring-full": (23, {"slots": 24, "window": 8, "leftpad": (20, 3, 0)}),
    "ring-wraps": (24, {"slots": 24, "window": 8}),
    "ring-in-two-pieces": (52, {"slots": 24, "window": 20, "leftpad": (0, 47, 51)}),
    "ring-later": (71, {"slots": 24, "window": 24}),
    "softcap": (30, {"softcap": 1.5}),
    "ring-softcap": (50, {"slots": 24, "window": 20, "softcap": 1.5}),
    "s_aux": (30, {"s_aux": torch.tensor([3.0, -1.0, 0.5, 2.0])}),
    "ring-s_aux": (50, {"slots": 24, "window": 20, "s_aux": torch.tensor([3.0, -1.0, 0.5, 2.0])}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_append_attend_computes_what_the_reference_does(name, dtype):
    hf_kvattn.enable(tiny_model())
    length, rules = STEPS[name]
    arguments, call = step_problem(length, dtype=dtype, **rules)
    before = [t.clone() for t in arguments[:2]]
    out = torch.ops.hf_kvattn.append_attend(*arguments)
    assert out.is_contiguous()
    assert_close_to_reference(out, call)
    assert_appended(arguments, before, length)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", STEPS)
def test_flash_appends_and_attends_in_one_call(name, library, dtype):
    hf_kvattn.enable(tiny_model())
    length, rules = STEPS[name]
    arguments, call = step_problem(length, dtype=dtype, **rules)
    before = [t.clone() for t in arguments[:2]]
    capability, module = LIBRARIES[library]
    with flash_libraries(module) as launches, fake_cuda(capability) as reads:
        out = torch.ops.hf_kvattn.append_attend(*on_gpu(arguments)[:-1], "flash")
        assert not reads, "nothing is read back"
    assert_close_to_reference(out.data_on_cpu, call)
    assert [launch["new"] for launch in launches] == ([1, 0] if arguments[WRAPS] else [1])
    storage = {t.data_on_cpu.untyped_storage().data_ptr() for launch in launches for t in (launch["k"], launch["v"])}
    assert storage == {t.untyped_storage().data_ptr() for t in arguments[:2]}, "buffers are not copied"
    assert_appended(arguments, before, length)


def on_cpu(thing):
    """A copy of an `AttendCall` or `PackedKV`, with the numbers of its tensors."""
    fields = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing) if field.init}
    if fields.get("packed") is not None:
        fields["packed"] = on_cpu(fields["packed"])
    return type(thing)(**tree_map_only(Impostor, lambda t: t.data_on_cpu, fields))


def attend_by_lengths(call, lengths):
    """In the place of Triton's kernel on a GPU, which is checked in Triton's interpreter: the reference."""
    packed, exact = lengths.data_on_cpu.tolist()
    call = on_cpu(call)
    slots = call.k.shape[2]
    order = torch.arange(max(0, exact - slots), exact)  # of a ring all tokens are counted
    assert call.tokens in (None, slots) and (call.tokens or exact <= slots) and call.mask is None
    call = dataclasses.replace(call, k=call.k[:, :, order % slots], v=call.v[:, :, order % slots], tokens=None)
    if call.packed is not None:
        call.packed = dataclasses.replace(call.packed, tokens=packed) if packed else None
    call.leftpad = call.leftpad - order[0].int()
    return Impostor(reference.attend(call), torch.device("cuda", 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_without_flash_triton_reads_the_lengths(name, dtype, monkeypatch):
    hf_kvattn.enable(tiny_model())
    length, rules = STEPS[name]
    arguments, call = step_problem(length, dtype=dtype, **rules)
    before = [t.clone() for t in arguments[:2]]
    monkeypatch.setattr(triton_backend, "attend_lengths", attend_by_lengths)
    with flash_libraries(), fake_cuda() as reads:
        out = torch.ops.hf_kvattn.append_attend(*on_gpu(arguments))
        assert not reads
    assert_close_to_reference(out.data_on_cpu, call)
    assert_appended(arguments, before, length)


@pytest.mark.parametrize(("name", "launched"), [("padded", [1]), ("ring-full", []), ("s_aux", [])])
def test_triton_reads_rings_and_learned_sinks_even_where_flash_could(name, launched, monkeypatch):
    """One kernel with the merge that it needs anyway, where flash would take two calls and a dozen operations."""
    hf_kvattn.enable(tiny_model())
    length, rules = STEPS[name]
    arguments, call = step_problem(length, dtype=torch.float16, **rules)
    monkeypatch.setattr(triton_backend, "attend_lengths", attend_by_lengths)
    with flash_libraries(FA2) as launches, fake_cuda():
        out = torch.ops.hf_kvattn.append_attend(*on_gpu(arguments))
        assert [launch["new"] for launch in launches] == launched
    assert_close_to_reference(out.data_on_cpu, call)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["padded", "window"])
def test_how_many_kernels_a_layer_takes_with_flash(name, library):
    """Those of the library's one call, and nothing else."""
    hf_kvattn.enable(tiny_model())
    length, rules = STEPS[name]
    arguments, _ = step_problem(length, dtype=torch.float16, **rules)
    capability, module = LIBRARIES[library]
    with flash_libraries(module) as launches, fake_cuda(capability):
        on_it = on_gpu(arguments)
        with launched() as operations:
            torch.ops.hf_kvattn.append_attend(*on_it)
            assert not operations
            assert FLASH_KERNELS[launches[0]["library"]] * len(launches) <= 4
            _ = on_it[0] + 1
        assert operations == ["aten::add"], "or nothing would ever be counted"


def test_appending_beyond_the_buffer_would_be_seen():
    """The host has checked the room; that it must is shown by the stand-in's stricter check."""
    hf_kvattn.enable(tiny_model())
    arguments, _ = step_problem(40, dtype=torch.float16)
    arguments[WRAPS] = False
    with flash_libraries(FA2), fake_cuda(), pytest.raises(AssertionError, match="out of bounds: tokens appended at"):
        torch.ops.hf_kvattn.append_attend(*on_gpu(arguments))


def test_fewer_slots_than_query_heads_of_a_group():
    hf_kvattn.enable(tiny_model())
    arguments, call = step_problem(3, slots=4, dtype=torch.float16, group=8)
    with flash_libraries(FA2) as launches, fake_cuda():
        out = torch.ops.hf_kvattn.append_attend(*on_gpu(arguments))
    assert not launches
    assert_close_to_reference(out.data_on_cpu, call)


@pytest.mark.parametrize("name", ["padded", "ring-in-two-pieces", "ring-s_aux"])
def test_the_op_does_what_it_declares(name):
    hf_kvattn.enable(tiny_model())
    length, rules = STEPS[name]
    arguments, _ = step_problem(length, **rules)
    torch.library.opcheck(torch.ops.hf_kvattn.append_attend.default, tuple(arguments))


def test_the_backend_is_the_one_chosen(recordings):
    model, inputs = hf_kvattn.enable(tiny_model(num_hidden_layers=1), compile=True), prompt()
    run = functools.partial(generate, model, inputs, 6, compile_config=RECORDING)
    for name in ("reference", "sdpa", "reference"):
        with hf_kvattn.backend(name):
            run(past_key_values=sized(model, 30))
        constants = [node.args[-1] for node in recordings[0].graph.graph.nodes if "append" in str(node.target)]
        assert constants == [name]
    assert len(recordings) == 1 and recordings[0].traces == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "unsupported", lambda call: "it does not want to")
        with hf_kvattn.backend("sdpa"), pytest.raises(ValueError, match="'sdpa' cannot serve .* does not want to"):
            torch.ops.hf_kvattn.append_attend(*step_problem(5)[0][:-1], "sdpa")


Q, K, V, LENGTHS, COUNTS, SLOT, BEGIN, PACKED = range(2, 10)  # arguments of the ops after the buffers
WRONG_TOKENS = {
    "dtype": lambda t: t.double(),
    "heads": lambda t: t[:, :1],
    "tokens": lambda t: t.expand(-1, -1, 2, -1),
    "rows": lambda t: t[:2],
    "device": lambda t: t.to("meta"),
}
WRONG_NUMBERS = {"dtype": lambda t: t.short(), "2d": lambda t: t[:, None], "device": lambda t: t.to("meta")}
WRONG = [(i, kind, change) for i in (K, V) for kind, change in WRONG_TOKENS.items()]
WRONG += [(i, kind, change) for i in (LENGTHS, COUNTS, SLOT, BEGIN) for kind, change in WRONG_NUMBERS.items()]
WRONG += [(i, "rows", lambda t: t[:1]) for i in (LENGTHS, COUNTS, BEGIN)]
WRONG += [(Q, "rows", lambda t: t[:2]), (Q, "head_dim", lambda t: t[..., 1:])]


def assert_refused(op, arguments, change, index):
    """Before anything is written."""
    before = [t.clone() for t in arguments[:2]]
    arguments[index] = change(arguments[index])
    with pytest.raises((ValueError, NotImplementedError)):
        op(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments[:2], before, strict=True))


@pytest.mark.parametrize(("index", "kind", "change"), WRONG)
def test_tokens_that_do_not_fit_are_refused_before_anything_is_written(index, kind, change):
    hf_kvattn.enable(tiny_model())
    assert_refused(torch.ops.hf_kvattn.append_attend, step_problem(30)[0], change, index)
    assert_refused(torch.ops.hf_kvattn.append_attend_packed, packed_step("padded", 4)[0], change, index)


@pytest.mark.parametrize("array", range(len(ARRAYS)))
def test_blocks_that_do_not_fit_are_refused_before_anything_is_written(array):
    hf_kvattn.enable(tiny_model())
    op = torch.ops.hf_kvattn.append_attend_packed
    assert_refused(op, packed_step("padded", 4)[0], lambda t: [*t[:array], t[array][:2], *t[array + 1 :]], PACKED)


def packed_step(name, bits, start=4):
    """The newest token of a packed problem as a step: arguments of the op, and the problem."""
    call = packed_problem(name, bits, bits, start=start)
    exact = call.k.shape[2]
    exact_buffers = []
    for tokens in (call.k, call.v):
        buffer = torch.full((*tokens.shape[:2], exact + 5, tokens.shape[3]), 6e4)
        buffer[:, :, : exact - 1] = tokens[:, :, :-1]
        exact_buffers.append(buffer)
    packed = call.packed
    for array in (packed.k_codes, packed.v_codes):
        if array.is_floating_point():
            array[:, :, packed.tokens // 32 :] = torch.finfo(array.dtype).max  # not NaN, as the op asks
    arrays = list(packed.arrays())
    leftpad = torch.zeros(len(call.q), dtype=torch.int32) if call.leftpad is None else call.leftpad
    numbers = numbers_of(len(call.q), call.kv_len - 1, exact, exact - 1, leftpad, packed.tokens)
    codecs, layout = [packed.k_codec.name, packed.v_codec.name], [start, packed.k_codes.shape[2] * 32]
    new = [call.q, call.k[:, :, -1:].clone(), call.v[:, :, -1:].clone()]
    return [*exact_buffers, *new, *numbers, arrays, codecs, layout, call.scale, call.softcap, None, "auto"], call


@pytest.mark.parametrize("bits", [8, "fp8", 4, 3, 2])
@pytest.mark.parametrize("name", ["g3-65", "g5-d80", "padded", "long-split", "empty-row"])
def test_a_packed_step_computes_what_the_reference_does(name, bits):
    hf_kvattn.enable(tiny_model())
    arguments, call = packed_step(name, bits)
    before = [t.clone() for t in arguments[:2]]
    out = torch.ops.hf_kvattn.append_attend_packed(*arguments)
    assert_close_to_reference(out, as_dense(call))
    assert_appended(arguments, before, call.k.shape[2] - 1)


@pytest.mark.parametrize("exact", [1, 3, 4, 5, 36])
def test_a_packed_step_before_the_first_block(exact):
    hf_kvattn.enable(tiny_model())
    arguments, call = packed_step("padded", 4)
    begin = torch.tensor([0, exact - 1, 0], dtype=torch.int32)
    arguments[LENGTHS:PACKED] = numbers_of(3, exact - 1, exact, exact - 1, begin, packed=0)
    out = torch.ops.hf_kvattn.append_attend_packed(*arguments)
    k, v = (t[:, :, :exact] for t in arguments[:2])
    assert_close_to_reference(out, AttendCall(call.q, k, v, call.scale, leftpad=begin))


@pytest.mark.parametrize("name", ["padded", "softcap-window"])
def test_triton_is_given_the_counts_and_the_most_there_can_be(name, monkeypatch):
    """Its kernel is checked in Triton's interpreter; here the reference stands in, which reads the counts itself."""
    hf_kvattn.enable(tiny_model())
    arguments, call = packed_step(name, 4)
    call.window = None

    def attend(given, lengths):
        tokens, exact = lengths.tolist()
        assert given.packed.tokens == tokens + 3 * 32 and given.k.shape[2] == exact + 5 and given.mask is None
        packed = dataclasses.replace(given.packed, tokens=tokens)
        found = dataclasses.replace(given, k=given.k[:, :, :exact], v=given.v[:, :, :exact], packed=packed)
        return reference.attend(found)

    monkeypatch.setattr(dispatch, "serving", lambda given, step: triton_backend)
    monkeypatch.setattr(triton_backend, "attend_lengths", attend)
    assert_close_to_reference(torch.ops.hf_kvattn.append_attend_packed(*arguments), as_dense(call))


def test_the_packed_op_does_what_it_declares():
    hf_kvattn.enable(tiny_model())
    op = torch.ops.hf_kvattn.append_attend_packed.default
    torch.library.opcheck(op, tuple(packed_step("padded", 4)[0]))
    assert [a.name for a in op._schema.arguments if a.alias_info is not None] == ["k_exact", "v_exact"]


@pytest.mark.parametrize("left_padding", [0, 5])
@pytest.mark.parametrize(
    "settings", [{"bits": 8}, {"bits": "fp8"}, {"bits": 4, "skip_layers": (0,)}, {"bits": 2, "residual_length": 9}]
)
def test_replayed_steps_of_a_quantized_cache(settings, left_padding, recordings):
    """90 steps: blocks are quantized between replays, three of them; the last token fits in the last slot."""
    model, inputs = tiny_model(num_hidden_layers=2), prompt(left_padding=left_padding)
    make = functools.partial(QuantizedKVCache, **settings, group_size=16, max_cache_len=103)
    with hf_kvattn.enabled(model), hf_kvattn.backend("sdpa"):
        expected, _ = generate(model, inputs, 91, past_key_values=(eager := make(model.config)))
    with hf_kvattn.enabled(model, make, compile=True):
        for _ in range(2):
            cache = make(model.config)
            tokens, _ = generate(model, inputs, 91, past_key_values=cache, compile_config=RECORDING)
            assert torch.equal(tokens, expected)
            quantized = [layer for layer in cache.layers if isinstance(layer, KVQuantizedLayer)]
            assert {layer.packed_tokens for layer in quantized} == {eager.layers[1].packed_tokens} != {0}
        with pytest.raises(ValueError, match="103 stored tokens and 1 new ones exceed max_cache_len=103"):
            generate(model, inputs, 92, compile_config=RECORDING)
    fewer = max(0, warm_up(eager.layers[1]) - inputs["input_ids"].shape[1])
    assert [(recorded.traces, recorded.replays) for recorded in recordings] == [(1, 3 * (89 - fewer))]


def warm_up(layer) -> int:
    """Tokens whose queries choose the layer's table: their steps are not compiled."""
    chooses = layer.settings.k_codec.by_channel
    return layer.settings.exact_first + layer.settings.residual_length + WARM_UP if chooses else 0


def test_an_interrupt_before_a_block_is_quantized():
    """Everything is stored and counted; the next step finds the block due, and has room for its token."""
    model, ids = hf_kvattn.enable(tiny_model(num_hidden_layers=2)), prompt(60)["input_ids"]
    make = functools.partial(QuantizedKVCache, bits=8, group_size=16, max_cache_len=100)
    logits = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for interrupted in (False, True):
            cache = make(model.config)
            model(ids[:, :30], past_key_values=cache)
            steps = DecodeSteps(cache)
            for token in range(30, 60):
                step = {"input_ids": ids[:, token : token + 1], "past_key_values": cache}
                if interrupted and token == 35:  # 36 tokens, 4 of them sinks
                    with patch.context() as inner, pytest.raises(KeyboardInterrupt):
                        inner.setattr(decode_steps, "quantize_due", stop_when_counted)
                        steps.run(model, model, step)
                    cache.check_consistent_layers()
                    assert [layer.packed_tokens for layer in cache.layers] == [0, 0] and cache.get_seq_length() == 36
                    continue
                out = steps.run(model, model, step).logits
            assert [layer.packed_tokens for layer in cache.layers] == [32, 32]
            logits.append(out)
    torch.testing.assert_close(*logits, **LOGITS)


def stop_when_counted(layers, quantize):
    if layers[0].seen == 36:
        raise KeyboardInterrupt


# -- on a GPU that is none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("family", "left_padding"), [("llama-g4", 5), ("mistral", 5), ("gemma2", 0), ("gemma3", 5), ("gpt-oss", 5)]
)
def test_generate_with_flash_gives_the_tokens_of_the_cpu(family, left_padding, library, monkeypatch):
    """Steps as on a GPU, with `torch.compile` left out: every decode step appends in flash's own call, but in rings.

    Rings of 72 slots wrap after 33 steps.
    """
    model = tiny_model(family, num_hidden_layers=2)
    model, inputs = model.half(), prompt(40, left_padding=left_padding)
    n_layers = model.config.num_hidden_layers
    with hf_kvattn.enabled(model), hf_kvattn.backend("reference"):
        expected, _ = generate(model, inputs, 41, past_key_values=sized(model, 80))
    monkeypatch.setattr(torch, "compile", lambda step, **fields: step)
    monkeypatch.setattr(triton_backend, "attend_lengths", attend_by_lengths)
    capability, module = LIBRARIES[library]
    with flash_libraries(module) as launches, fake_cuda(capability):
        on_gpu(model)
        with hf_kvattn.enabled(model, compile=True):
            cache = sized(model, 80)
            tokens, _ = generate(model, on_gpu(inputs), 41, past_key_values=cache, compile_config=RECORDING)
    assert torch.equal(tokens.data_on_cpu, expected)
    pieces = sum(layer.is_sliding or family == "gpt-oss" for layer in cache.layers)  # which Triton reads
    assert sum(launch["new"] for launch in launches) == 40 * (n_layers - pieces)
    assert len(launches) == 41 * n_layers - 40 * pieces


def to_gpu(argument):
    return torch.device("cuda", 0) if argument == torch.device("cpu") else argument


def test_the_graph_traced_on_a_cpu_runs_with_flash(recordings, monkeypatch):
    """The traced graph itself, on the tensors of a GPU: 40 steps, and nothing is read back in any."""
    model, inputs = tiny_model("qwen2-sliding", num_hidden_layers=2).half(), prompt(40, left_padding=5)
    with hf_kvattn.enabled(model, compile=True):
        expected, _ = generate(model, inputs, 3, past_key_values=sized(model, 90), compile_config=RECORDING)
        (recorded,) = recordings
        for node in recorded.graph.graph.nodes:
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), to_gpu)
        recorded.graph.recompile()
        placeholders = [node for node in recorded.graph.graph.nodes if node.op == "placeholder"]
        names = [getattr(node._dynamo_source, "name", None) for node in placeholders]
        names = [name() if callable(name) else name for name in names]
        with hf_kvattn.backend("reference"):
            expected, _ = generate(model, inputs, 42, past_key_values=sized(model, 90), disable_compile=True)
        monkeypatch.setattr(triton_backend, "attend_lengths", attend_by_lengths)
        with flash_libraries(FA2) as launches, fake_cuda() as reads, torch.no_grad():
            on_gpu(model)
            cache, inputs = sized(model, 90), on_gpu(inputs)
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            token = model(**inputs, position_ids=positions, past_key_values=cache).logits[:, -1:].argmax(-1)
            steps, tokens = DecodeSteps(cache), [token.data_on_cpu]
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
            position = mask.sum(1, keepdim=True) - 1
            scope = {"kwargs": {"input_ids": token, "position_ids": position, "past_key_values": steps}}
            scope |= {"model": model, "self": model}

            def replay(**kwargs):
                scope["kwargs"] |= kwargs
                tensors = [eval(name, {"L": scope}) for name in names]
                return CausalLMOutputWithPast(logits=recorded.graph(*tensors)[0])

            for _ in range(41):
                launches.clear()
                reads.clear()
                own = {"input_ids": token, "position_ids": position, "attention_mask": mask}
                logits = steps.run(replay, model, own).logits
                assert [launch["new"] for launch in launches] == [1]  # the other layer is a ring
                assert not reads or len(tokens) == 1, "only the first step looks at the mask"
                token, position = logits[:, -1:].argmax(-1), position + 1
                tokens.append(token.data_on_cpu)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 40:])


def test_layers_on_two_gpus_are_refused():
    model = tiny_model(num_hidden_layers=2)
    with fake_cuda(devices=2), torch.no_grad():
        on_gpu(model)
        cache = sized(model, 40)
        hf_kvattn.enable(model)(on_gpu(torch.ones(2, 9, dtype=torch.long)), past_key_values=cache)
        layer = cache.layers[1]
        layer.device = torch.device("cuda", 1)
        layer.replace_buffers({name: on_gpu(t, "cuda:1") for name, (t, _) in layer.buffers().items()})
        token = {"input_ids": on_gpu(torch.ones(2, 1, dtype=torch.long)), "past_key_values": cache}
        with pytest.raises(ValueError, match="the work of one GPU, the cache lies on cuda:0, cuda:1"):
            DecodeSteps(cache).run(model, model, token)


# -- compilers -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_writes_into_the_buffers_themselves():
    """The op is functional in between: a copy of the cache at every step would be right, and slow."""
    model, inputs = hf_kvattn.enable(tiny_model("gemma3", num_hidden_layers=1)), prompt()
    cache, eager = sized(model, 40), sized(model, 40)
    with torch.no_grad():
        for each in (cache, eager):
            model(inputs["input_ids"], past_key_values=each)
        counters.clear()
        step = {"input_ids": inputs["input_ids"][:, :1], "past_key_values": cache}
        optimized = torch.compile(lambda **kwargs: model(**kwargs), fullgraph=True)
        out, (code,) = run_and_get_code(DecodeSteps(cache).run, optimized, model, step)
        expected = model(inputs["input_ids"][:, :1], past_key_values=eager).logits
    torch.testing.assert_close(out.logits, expected, **LOGITS)
    assert not counters["inductor"]["possibly_missed_reinplacing_bytes"]
    (call,) = [line for line in code.splitlines() if "append_attend.default(" in line]
    k, v = call.split("append_attend.default(")[1].split(", ")[:2]
    assert k.startswith("arg") and v.startswith("arg"), call


def test_another_attention_implementation_is_refused():
    model = hf_kvattn.enable(tiny_model(num_hidden_layers=1))
    cache, token = sized(model, 40), torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        model(token, past_key_values=cache)
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="'sdpa', set after enable.*, has no steps for a CUDA graph"):
            DecodeSteps(cache).run(model, model, {"input_ids": token, "past_key_values": cache})


def test_steps_are_for_inference():
    model = hf_kvattn.enable(tiny_model(num_hidden_layers=1))
    cache, token = sized(model, 40), torch.ones(2, 1, dtype=torch.long)
    with torch.no_grad():
        model(token, past_key_values=cache)
    with pytest.raises(ValueError, match="a compiled step through a cache is for inference"):
        DecodeSteps(cache).run(model, model, {"input_ids": token, "past_key_values": cache})
    assert cache.get_seq_length() == 1
