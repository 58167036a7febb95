"""The flash backend: flash-attn's real Python code over a stand-in of its kernels, on tensors that claim a GPU."""

import dataclasses
import functools
import logging
import re

import pytest
import torch
from flash_stub import FA2, FA3, flash_libraries
from impostor import Impostor, fake_cuda, on_gpu
from models import generate, prompt, tiny_model
from problems import POISON, SHAPES, problem
from tolerance import assert_close_to_reference
from torch.nn.functional import scaled_dot_product_attention

import hf_kvattn
from hf_kvattn import SlidingWindowKVCache, StaticKVCache
from hf_kvattn.kernels import dispatch, flash, reference, sdpa
from hf_kvattn.kernels import flash_libraries as libraries
from hf_kvattn.kernels.call import AttendCall

LIBRARIES = {"fa2": ((8, 0), FA2), "fa3": ((9, 0), FA3)}
HALF = [torch.float16, torch.bfloat16]
pytestmark = pytest.mark.usefixtures("fresh_choice")


def moved(call):
    """An AttendCall, with the SinkKV in it, on the GPU."""
    values = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return dataclasses.replace(
        call, **{n: moved(v) if dataclasses.is_dataclass(v) else on_gpu(v) for n, v in values.items()}
    )


@pytest.fixture(params=LIBRARIES)
def launches(request):
    """A GPU with one of the two libraries: the list of what it launches."""
    capability, name = LIBRARIES[request.param]
    with flash_libraries(name) as calls, fake_cuda(capability):
        yield calls
    assert {call["library"] for call in calls} <= {request.param}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [n for n in SHAPES if SHAPES[n][3] % 8 == 0])
def test_flash_computes_what_the_reference_does(launches, name, dtype):
    call = problem(name, dtype)
    on_it = moved(call)
    if call.sinks is not None and call.q.shape[2] > 1:
        assert "one query at a time" in flash.unsupported(on_it)
        return
    assert flash.unsupported(on_it) is None and dispatch.auto_choice(on_it) == ("flash", None)
    out = dispatch.attend(on_it)
    assert out.device.type == "cuda"
    assert_close_to_reference(out.data_on_cpu, call)
    launch = launches[0]
    for given, stored in ((launch["k"], on_it.k), (launch["v"], on_it.v)):
        given, stored = given.data_on_cpu, stored.data_on_cpu
        assert given.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr(), "keys must not be copied"


@pytest.mark.parametrize("name", ["g3-65", "short-query", "padded-window", "empty-row", "softcap"])
def test_learned_sinks_take_their_share(launches, name):
    call = problem(name, torch.bfloat16)
    call.s_aux = 3 * torch.randn(call.q.shape[1])
    on_it = moved(call)
    assert dispatch.auto_choice(on_it) == ("flash", None)
    out = dispatch.attend(on_it).data_on_cpu
    assert_close_to_reference(out, call)
    call.s_aux = None
    with pytest.raises(AssertionError, match="allowed"):
        assert_close_to_reference(out, call)


def test_the_window_is_converted_once_and_is_a_slice_for_one_query(launches):
    flash.attend(moved(problem("window-many-queries", torch.float16)))
    assert launches[0]["window"] == (32, 0) and launches[0]["k"].shape[1] == 140
    flash.attend(moved(problem("window-crosses-tile", torch.float16)))
    assert launches[1]["window"] == (-1, -1) and launches[1]["k"].shape[1] == 65
    padded = problem("padded", torch.float16)
    padded.window = 30
    flash.attend(moved(padded))  # 100 keys, the first visible ones 0, 37 and 99
    assert launches[2]["leftpad"].data_on_cpu.tolist() == [0, 0, 29]


@pytest.mark.parametrize("slot", [0, 5])
def test_a_full_ring_is_read_as_it_lies(launches, slot):
    call = problem("g3-65", torch.bfloat16)
    call.k, call.v = call.k.clone(), call.v.clone()
    call.tokens, call.slot, call.window = 65, slot, 65
    on_it = moved(call)
    assert flash.unsupported(on_it) is None
    assert_close_to_reference(flash.attend(on_it).data_on_cpu, in_order(call))


def in_order(call: AttendCall) -> AttendCall:
    """The same problem with its ring buffer rolled out."""
    k, v = (t.roll(-call.slot, 2)[:, :, : call.tokens] for t in (call.k, call.v))
    return dataclasses.replace(call, k=k, v=v, tokens=None, slot=0)


def test_a_ring_that_is_not_full_is_a_plain_buffer(launches):
    call = problem("padded-window", torch.bfloat16)
    slots = torch.full((3, 2, 16, 64), POISON[torch.bfloat16], dtype=torch.bfloat16)
    call.k, call.v, call.tokens = torch.cat([call.k, slots], 2), torch.cat([call.v, slots], 2), 150
    assert_close_to_reference(flash.attend(moved(call)).data_on_cpu, in_order(call))


def ring(**changes):
    def change(call):
        call.tokens, call.slot = call.k.shape[2], 5
        for name, value in changes.items():
            setattr(call, name, value)

    return change


def quantized(call):
    call.packed = "whatever they are"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "q", c.q.float()), "not torch.float32"),
        (lambda c: setattr(c, "mask", torch.ones(1, 1, 3, 90, dtype=torch.bool)), "no dense mask"),
        (lambda c: setattr(c, "dropout", 0.1), "no dropout"),
        (lambda c: setattr(c, "q", c.q.detach().requires_grad_()), "no gradients"),
        (quantized, "no quantized tokens"),
        (lambda c: setattr(c, "sinks", "some"), "sinks, .* one query at a time, not for 4"),
        (lambda c: setattr(c, "k", c.k.transpose(2, 3).contiguous().transpose(2, 3)), "side by side"),
        (ring(), "ring buffers that wrap, .* not for 4"),
    ],
)
def test_what_flash_refuses(launches, change, message):
    call = problem("window-1", torch.float16)
    change(call)
    with torch.enable_grad():
        assert re.search(message, flash.unsupported(moved(call)))


@pytest.mark.parametrize("s_aux", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tokens": 97}, {"tokens": 8}, {"window": 64}, {"window": 3}], ids=str)
@pytest.mark.parametrize("slot", [3, 5, 98])
def test_a_ring_that_wraps_is_read_in_two_pieces(launches, slot, changes, s_aux):
    call = problem("padded", torch.float16)  # 100 keys of three rows, the first visible ones 0, 37 and 99
    call.tokens, call.slot = 100, slot
    for name, value in changes.items():
        setattr(call, name, value)
    call.leftpad = call.leftpad.clamp(max=call.tokens)  # a row that sees nothing among them
    call.s_aux = torch.randn(6) if s_aux else None
    on_it = moved(call)
    assert flash.unsupported(on_it) is None
    assert_close_to_reference(flash.attend(on_it).data_on_cpu, in_order(call))
    assert len(launches) <= 2


@pytest.mark.parametrize("empty", ["first piece", "sinks"])
def test_a_piece_in_which_no_row_has_a_key(launches, empty):
    """FA3's scheduler would divide by their number: each row gets one, and the piece has no share."""
    call = problem("padded" if empty == "first piece" else "sinks", torch.float16)
    if empty == "first piece":
        call.tokens, call.slot, call.leftpad = 100, 60, torch.full((3,), 45, dtype=torch.int32)  # 40 up to the end
    else:
        call.sinks.evicted = 0
    assert_close_to_reference(flash.attend(moved(call)).data_on_cpu, in_order(call) if call.tokens else call)
    assert len(launches) == 2


@pytest.mark.parametrize("dim", [7, 33, 130, 264])
def test_head_sizes_that_would_be_padded_are_refused(launches, dim):
    q, k = torch.zeros(1, 4, 1, dim).half(), torch.zeros(1, 2, 9, dim).half()
    assert f"not {dim}" in flash.unsupported(moved(AttendCall(q, k, k, 1.0)))


def test_tensors_elsewhere_are_refused():
    assert "the tensors are on cpu" in flash.unsupported(problem("g3-65", torch.float16))


BOTH = (FA2, FA3)
DECISIONS = [
    ((7, 5), BOTH, None, "flash-attn needs a GPU of compute capability 8.0 or later"),
    ((8, 0), BOTH, FA2, None),
    ((8, 6), (FA2,), FA2, None),
    ((8, 6), (FA3,), None, "flash-attn cannot be loaded (flash_attn:"),
    ((9, 0), BOTH, FA3, None),
    ((9, 0), (FA2,), FA2, None),
    ((9, 0), (FA3,), FA3, None),
    ((9, 0), (), None, "flash-attn cannot be loaded (flash_attn_interface:"),
    ((10, 0), BOTH, FA2, None),
    ((10, 0), (FA3,), None, "flash-attn cannot be loaded (flash_attn:"),
]


@pytest.mark.parametrize(("capability", "installed", "serves", "why_not"), DECISIONS)
def test_the_library_for_each_gpu(capability, installed, serves, why_not, caplog, without_triton):
    call = problem("padded", torch.bfloat16)
    with flash_libraries(*installed) as calls, fake_cuda(capability), caplog.at_level(logging.INFO, "hf_kvattn"):
        on_it = moved(call)
        chosen, reason = dispatch.auto_choice(on_it)
        assert_close_to_reference(dispatch.attend(on_it).data_on_cpu, call)
        description = str(hf_kvattn.describe(on_gpu(tiny_model(num_hidden_layers=1).half())))
        if serves:
            assert (chosen, reason, [c["library"] for c in calls]) == (
                "flash",
                None,
                [{FA2: "fa2", FA3: "fa3"}[serves]],
            )
            assert ["no dense mask" in record.message for record in caplog.records] == [True]  # describe()'s case
            assert "decode, left-padded batch                    flash\n" in description
            return
        assert chosen == "sdpa" and why_not in reason and not calls
        assert len(caplog.records) <= 2 and why_not in caplog.records[0].message
        assert "decode, 1 token                              sdpa  (" in description
        with pytest.raises(ValueError, match="'flash'"), hf_kvattn.backend("flash"):
            dispatch.attend(on_it)


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'flash' in set_backend cannot be used here: PyTorch sees no CUDA GPU"):
        hf_kvattn.set_backend("flash")


WAYS = {
    "greedy": ("llama", {}, {}),
    "left-padded": ("llama-g4", {"left_padding": 5}, {}),
    "beam": ("llama", {}, {"num_beams": 3}),
    "assisted": ("llama", {"batch": 1}, {"prompt_lookup_num_tokens": 3}),
    "sliding": ("mistral", {}, {}),
    "sliding-left-padded": ("mistral", {"left_padding": 5}, {}),
    "softcap": ("gemma2", {"left_padding": 5}, {}),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_generate_on_a_gpu_gives_the_tokens_of_the_cpu(way, dtype):
    """Of stock's attention, where fp16 is fine enough for random models; else of the reference."""
    family, shape, kwargs = WAYS[way]
    model, inputs = tiny_model(family).to(dtype), prompt(**shape)
    if dtype == torch.float16 and family != "gemma2":
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, **kwargs)
    else:
        with hf_kvattn.enabled(model, cache="static"), hf_kvattn.backend("reference"):
            expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, **kwargs)
    with flash_libraries(FA2) as launches, fake_cuda():
        on_gpu(model)
        with hf_kvattn.enabled(model), hf_kvattn.backend("flash"):
            cache = StaticKVCache(model.config, max_cache_len=13 + 12 + 3)
            ours = model.generate(**on_gpu(inputs), max_new_tokens=12, do_sample=False, past_key_values=cache, **kwargs)
        assert {layer.device.type for layer in cache.layers} == {"cuda"}
        assert len(launches) >= 3 * 3, "three layers, and more forwards than one"
    assert torch.equal(ours.data_on_cpu, expected)


def test_logits_of_generate_on_a_gpu():
    model, inputs = tiny_model().half(), prompt(left_padding=4)
    tokens, logits = generate(model, inputs)
    with flash_libraries(FA3), fake_cuda((9, 0)):
        on_gpu(model)
        with hf_kvattn.enabled(model):
            ours, our_logits = generate(model, on_gpu(inputs), past_key_values=StaticKVCache(model.config))
    assert torch.equal(ours.data_on_cpu, tokens)
    torch.testing.assert_close(our_logits.data_on_cpu, logits, rtol=0.02, atol=0.02)


def test_gpt_oss_with_its_learned_sinks():
    model, inputs = tiny_model("gpt-oss"), prompt(left_padding=5)
    with hf_kvattn.enabled(model):
        expected, _ = generate(model.half(), inputs, 12)
        with flash_libraries(FA2) as launches, fake_cuda():
            on_gpu(model)
            with hf_kvattn.backend("flash"):
                ours, _ = generate(model, on_gpu(inputs), 12, past_key_values=StaticKVCache(model.config))
            assert len(launches) == 3 * 12
    assert torch.equal(ours.data_on_cpu, expected)


@pytest.mark.parametrize("sinks", [None, 2])
def test_a_long_sliding_generation_reads_rings_that_wrap(sinks, without_triton):
    family = "mistral" if sinks is None else "llama"
    model, inputs = tiny_model(family, num_hidden_layers=1).half(), prompt(left_padding=5)
    cache = StaticKVCache if sinks is None else functools.partial(SlidingWindowKVCache, window=8, sinks=sinks)
    with hf_kvattn.enabled(model):
        with hf_kvattn.backend("reference"):
            expected, _ = generate(model, inputs, 70, past_key_values=cache(model.config))
        with flash_libraries(FA2) as launches, fake_cuda():
            ours, _ = generate(on_gpu(model), on_gpu(inputs), 70, past_key_values=cache(model.config))
            assert len(launches) > 70 + (0 if sinks is None else 60), "two pieces at times, and sinks"
    assert torch.equal(ours.data_on_cpu, expected)


@pytest.mark.parametrize("left_padding", [0, 9])
def test_a_decode_step_reads_nothing_back_from_the_gpu(left_padding):
    """The mask of a padded batch is looked at once per forward; appending and attention ask the GPU for no number."""
    model, inputs = tiny_model("mistral").half(), prompt(left_padding=left_padding)
    with flash_libraries(FA2) as launches, fake_cuda() as reads, torch.no_grad():
        on_gpu(model)
        with hf_kvattn.enabled(model), hf_kvattn.backend("flash"):
            cache = StaticKVCache(model.config, max_cache_len=40)
            inputs = on_gpu(inputs)
            model(**inputs, past_key_values=cache)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long, device="cuda")], 1)
            launches.clear()
            reads.clear()
            model(inputs["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache)
            in_model = list(reads)
            assert len(launches) == 3 and {launch["leftpad"] is None for launch in launches} == {not left_padding}
        q = on_gpu(torch.zeros(2, 4, 1, 16).half())
        layer = cache.layers[0]
        leftpad = on_gpu(torch.tensor([left_padding, 0], dtype=torch.int32))
        reads.clear()
        layer.append(*on_gpu(torch.zeros(2, 2, 2, 1, 16).half()))
        flash.attend(AttendCall(q, *layer.dense(), 0.25, leftpad=leftpad, window=8))
        assert not reads
    assert len(in_model) <= 2, f"once per forward, not once per layer: {in_model}"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_without_a_library_sdpa_gets_no_mask_and_equal_heads(family, monkeypatch, without_triton):
    """So that PyTorch can take its own flash kernel; which one it takes on a GPU cannot be seen here."""
    model, inputs, given = tiny_model(family).half(), prompt(), []
    expected, _ = generate(model, inputs, 4)

    def record(q, k, v, attn_mask=None, **kwargs):
        given.append((q.shape[2], q.shape[1] // k.shape[1], attn_mask))
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", record)
    with flash_libraries(), fake_cuda():
        on_gpu(model)
        with hf_kvattn.enabled(model):
            ours, _ = generate(model, on_gpu(inputs), 4, past_key_values=StaticKVCache(model.config))
    assert torch.equal(ours.data_on_cpu, expected)
    assert len(given) == 3 * 4
    assert given[3:] == [(2, 1, None)] * 9, "decoding: the two heads of a group are rows, and there is no mask"
    if family == "llama":
        assert given[:3] == [(13, 2, None)] * 3


def test_each_layer_lives_on_its_own_gpu():
    """A model split over two GPUs, as device_map does: caches follow, and attention runs where the layer is."""
    model, inputs = tiny_model(num_hidden_layers=4).half(), prompt()
    expected, _ = generate(model, inputs)

    def enter(module, args, kwargs):
        hidden, *rest = args
        to = "cuda:1"
        kwargs = {k: tuple(t.to(to) for t in v) if isinstance(v, tuple) else v for k, v in kwargs.items()}
        kwargs = {k: v.to(to) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        return (hidden.to(to), *rest), kwargs

    def leave(module, args, out):
        return out.to("cuda:0")

    with flash_libraries(FA2) as launches, fake_cuda(devices=2):
        on_gpu(model)
        for layer in model.model.layers[2:]:
            on_gpu(layer, "cuda:1")
            layer.register_forward_pre_hook(enter, with_kwargs=True)
            layer.register_forward_hook(leave)
        with hf_kvattn.enabled(model):
            cache = StaticKVCache(model.config)
            ours, _ = generate(model, on_gpu(inputs), past_key_values=cache)
        assert [str(layer.device) for layer in cache.layers] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
        assert [str(layer.keys.device) for layer in cache.layers] == [str(layer.device) for layer in cache.layers]
        assert [str(call["q"].device) for call in launches[:4]] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert torch.equal(ours.data_on_cpu, expected)


def test_the_stand_in_notices_what_the_library_does_not():
    """Reads out of bounds, and padding without lengths: the stand-in must fail where the kernels would go on."""
    call = moved(problem("padded", torch.float16))
    with flash_libraries(FA2), fake_cuda():
        attend = libraries.load(FA2)[0]
        q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
        for wrong in ({"cache_seqlens": 101}, {"cache_seqlens": 90, "cache_leftpad": call.leftpad}):
            with pytest.raises(AssertionError, match="out of bounds"):
                attend(q, k, v, **wrong)
        with pytest.raises(AssertionError, match="without cache_seqlens"):
            attend(q, k, v, cache_leftpad=call.leftpad)
        with pytest.raises(NotImplementedError):
            attend(q, k, v, rotary_cos=k, cache_seqlens=3)
        new = {"k": k[:, :1].contiguous(), "v": v[:, :1].contiguous()}
        for wrong, message in (
            ({"cache_seqlens": 100}, "out of bounds: tokens appended"),
            ({"cache_seqlens": -1}, "out of bounds: tokens appended"),
            ({"cache_seqlens": 3, "cache_leftpad": call.leftpad}, "padding beyond the length"),
            ({}, "seqlens_k must also be passed in"),
            ({"cache_seqlens": 3, "v": None}, "value must also be passed in"),
        ):
            before = k.data_on_cpu.clone()
            with pytest.raises(AssertionError, match=message):
                attend(q, k, v, **{**new, **wrong})
            assert torch.equal(k.data_on_cpu, before)
        with pytest.raises(RuntimeError, match="same device"):
            call.k + torch.ones(64)
        assert isinstance(reference.attend(call), Impostor)
