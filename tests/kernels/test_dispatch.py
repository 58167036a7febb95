"""Backends: the choice, its scope, its refusals, and what describe() says of it."""

import logging
import subprocess
import sys
import threading
from dataclasses import replace
from enum import IntFlag

import pytest
import torch
from flash_stub import FA2, flash_libraries
from impostor import fake_cuda, on_gpu
from models import prompt, tiny_model
from packed_problems import packed_problem
from problems import problem
from tolerance import assert_close_to_reference

import hf_kvattn
from hf_kvattn.kernels import dispatch, flash, native, reference
from hf_kvattn.kernels.call import AttendCall, Feature, SinkKV
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.quant.blocks import Blocks, quantize_blocks
from hf_kvattn.quant.codecs import CODECS

pytestmark = pytest.mark.usefixtures("fresh_choice")


def taken(call) -> str:
    return dispatch.auto_choice(call)[0]


@pytest.mark.parametrize(
    ("queries", "slot", "sinks", "expected"),
    [
        (1, 0, False, "flash"),
        (1, 3, False, "flash"),
        (1, 3, True, "flash"),
        (2, 0, False, "flash"),
        (2, 3, False, "triton"),
        (2, 0, True, "triton"),
        (128, 3, True, "triton"),
        (129, 3, False, "sdpa"),
        (129, 0, True, "sdpa"),
    ],
)
def test_on_a_gpu_triton_joins_what_flash_cannot(queries, slot, sinks, expected, monkeypatch):
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    q, k, leftpad = (torch.randn(1, heads, n, 16).half() for heads, n in ((4, queries), (2, 32), (2, 4)))
    with flash_libraries(FA2), fake_cuda():
        q, k, leftpad = on_gpu((q, k, leftpad))
        call = AttendCall(q, k, k, 0.25, window=32, tokens=32, slot=slot)
        call.sinks = SinkKV(leftpad, leftpad, q, evicted=3) if sinks else None
        assert taken(call) == expected


@pytest.mark.parametrize(
    ("queries", "change", "expected"),
    [
        (1, {}, "triton"),
        (16, {}, "triton"),
        (17, {}, "sdpa"),
        (1, {"tokens": 32, "slot": 3}, "triton"),
        (1, {"leftpad": torch.ones(1, dtype=torch.int32)}, "triton"),
        (1, {"window": 5}, "triton"),
        (1, {"mask": torch.ones(1, 1, 1, 32, dtype=torch.bool)}, "sdpa"),
        (1, {"dropout": 0.5}, "sdpa"),
    ],
)
def test_on_a_gpu_without_a_library_triton_takes_few_queries(queries, change, expected, monkeypatch):
    """cuDNN, which SDPA takes first on some GPUs, makes a plan for each new length."""
    monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
    q, k = torch.randn(1, 4, queries, 16).half(), torch.randn(1, 2, 32, 16).half()
    with flash_libraries(), fake_cuda():
        q, k = on_gpu((q, k))
        call = AttendCall(q, k, k, 0.25, **{name: on_gpu(value) for name, value in change.items()})
        assert taken(call) == expected
        call = AttendCall(q.float(), k.float(), k.float(), 0.25)
        assert taken(call) == "sdpa"


def test_auto_takes_the_fast_one_for_each_case():
    assert taken(problem("long-split")) == "native"
    assert taken(problem("padded")) == "native"
    assert taken(problem("short-query")) == "native"
    assert taken(problem("prefill")) == ("sdpa" if native.variant().startswith("portable") else "native")
    assert taken(problem("softcap-window")) == "native"
    softcapped_prefill = problem("prefill")
    softcapped_prefill.softcap = 5.0
    assert taken(softcapped_prefill) == "native"
    softcapped_prefill.softcap, softcapped_prefill.s_aux = None, torch.zeros(6)
    assert taken(softcapped_prefill) == "native"
    training = problem("prefill")
    training.q = training.q.detach().requires_grad_()
    training.softcap = 5.0
    assert taken(training) == "reference"


@pytest.mark.parametrize(
    ("variant", "amx", "dtype", "expected"),
    [("avx2", False, torch.bfloat16, "native"), ("avx2", True, torch.bfloat16, "sdpa"),
     ("avx2", True, torch.float32, "native"), ("portable", False, torch.float32, "sdpa")],
    indirect=["variant"],
)  # fmt: skip
def test_who_takes_prompts_depends_on_the_cpu(variant, amx, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert taken(problem("prefill", dtype)) == taken(problem("padded-prefill", dtype)) == expected
    assert taken(problem("long-split", dtype)) == "native"


def test_auto_falls_back_with_one_logged_reason(monkeypatch, caplog):
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler was found")
    with caplog.at_level(logging.INFO, logger="hf_kvattn"):
        for _ in range(3):
            call = problem("long-split")
            assert_close_to_reference(dispatch.attend(call), call)
    assert [r.message for r in caplog.records] == ["auto backend: sdpa, because no compiler was found"]


def test_explicit_choices_raise_where_they_cannot_serve(monkeypatch):
    masked = problem("g1-31")
    masked.mask = torch.ones(1, 1, 1, 31, dtype=torch.bool)
    with hf_kvattn.backend("native"), pytest.raises(ValueError, match="'native' cannot serve.*dense mask"):
        dispatch.attend(masked)
    training = problem("softcap")
    training.q = training.q.detach().requires_grad_()
    with (
        hf_kvattn.backend("sdpa"),
        pytest.raises(ValueError, match="'sdpa' cannot serve.*no gradients; softcap.*in inference only"),
    ):
        dispatch.attend(training)
    call = problem("g1-31")
    call.q, call.k, call.v = (t.to("meta") for t in (call.q, call.k, call.v))
    with hf_kvattn.backend("native"), pytest.raises(ValueError, match="run on the CPU, the tensors are on meta"):
        dispatch.attend(call)
    model = tiny_model()
    mask = torch.rand(2, 1, 13, 13) < 0.5
    with hf_kvattn.enabled(model), hf_kvattn.backend("native"), pytest.raises(ValueError, match="dense mask"):
        model(prompt()["input_ids"], attention_mask=mask)
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler was found")
    for choose in (hf_kvattn.set_backend, lambda name: hf_kvattn.backend(name).__enter__()):
        with pytest.raises(ValueError, match="'native' .* cannot be used here: no compiler was found"):
            choose("native")


def test_every_backend_refuses_a_feature_that_it_does_not_list(monkeypatch):
    """A feature of tomorrow is the next bit."""
    tomorrow = 2 * max(Feature)
    monkeypatch.setattr(AttendCall, "features", lambda self: tomorrow)
    monkeypatch.setattr("hf_kvattn.kernels.call.Feature", IntFlag("Feature", {"RULES_OF_TOMORROW": tomorrow}))
    call = problem("g1-31")
    for name in ("reference", "sdpa", "native"):
        assert "no rules of tomorrow" in dispatch.BACKENDS[name].unsupported(call), name
        with hf_kvattn.backend(name), pytest.raises(ValueError, match="no rules of tomorrow"):
            dispatch.attend(call)
    for backend in (flash, triton_backend):  # whose devices are not here
        assert call.beyond(backend.SERVED) == "no rules of tomorrow"


def test_features_are_those_that_a_call_uses():
    assert problem("long-split").features() == 0
    assert problem("padded-window").features() == Feature.WINDOW | Feature.LEFT_PADDING
    assert problem("sinks-one").features() == Feature.WINDOW | Feature.SOFTCAP | Feature.WINDOW_SINKS
    assert problem("s-aux").features() == Feature.LEARNED_SINKS
    assert problem("not-causal").features() == Feature.BIDIRECTIONAL_ATTENTION
    call = problem("g1-31")
    for name, value, feature in (
        ("mask", torch.ones(1), Feature.DENSE_MASK),
        ("dropout", 0.5, Feature.DROPOUT),
        ("packed", object(), Feature.QUANTIZED_TOKENS),
        ("tokens", 3, Feature.RING_BUFFERS),
        ("requests", object(), Feature.REQUESTS),
        ("q", call.q.detach().requires_grad_(), Feature.GRADIENTS),
    ):
        assert replace(call, **{name: value}).features() == feature
    assert call.beyond(0) is None
    assert replace(call, softcap=1.0, window=3).beyond(Feature.WINDOW) == "no softcap"
    assert replace(call, softcap=1.0, window=3).beyond(0) == "no window, no softcap"


def test_priorities_name_backends_and_end_with_one_that_serves_everything():
    for kind, names in dispatch.PRIORITIES.items():
        assert set(names) <= set(dispatch.BACKENDS) and names[-1] == "reference", kind
    assert set(dispatch.QUANTIZERS.values()) <= set(dispatch.BACKENDS)
    assert reference.SERVED == sum(Feature)


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_blocks_on_other_devices_are_quantized_with_pytorch(device, monkeypatch):
    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    k = torch.zeros(1, 1, 32, 64).as_subclass(Elsewhere)
    Elsewhere.device = torch.device(device)
    assert dispatch.quantizer(k, CODECS["int4"], CODECS["int4"]) is quantize_blocks
    assert native.cannot_quantize(k, CODECS["int4"], CODECS["int4"]) == (
        f"native kernels quantize on the CPU, the tensors are on {device}"
    )
    monkeypatch.setattr(dispatch, "QUANTIZERS", {device: "native"})
    assert dispatch.quantizer(k, CODECS["int4"], CODECS["int4"]) is quantize_blocks, "whatever the table says"


@pytest.mark.parametrize("name", ["k_codes", "v_scale", "v_codes"])
def test_a_pointer_of_another_device_never_gets_into_c(name):
    """Of what a call holds, `check` compares the devices; of blocks, this is where they are made."""
    call = packed_problem("g3-65", 8, 4)
    moved = getattr(call.packed, name).to("meta")
    with hf_kvattn.backend("native"), pytest.raises(ValueError, match=f"{name} .*on meta"):
        dispatch.attend(replace(call, packed=replace(call.packed, **{name: moved})))
    into = packed_problem("g3-65", 8, 4).packed
    k = torch.zeros(2, 2, 32, 64, device="meta")
    with pytest.raises(ValueError, match="on meta"):
        dispatch.quantize_blocks([Blocks(k, k, into, 0)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "q", c.q.double()), "float64"),
        (lambda c: setattr(c, "dropout", 0.5), "no dropout"),
        (lambda c: setattr(c, "q", c.q.detach().requires_grad_()), "no gradients"),
        (lambda c: setattr(c, "sinks", SinkKV(c.k, c.v[:, :, ::2], c.q, 0)), "channels side by side"),
        (lambda c: setattr(c, "sinks", SinkKV(c.k[..., ::2], c.v[..., ::2], c.q, 0)), "channels side by side"),
    ],
)
def test_what_native_refuses(change, message):
    call = problem("g1-31")
    change(call)
    assert message in native.unsupported(call)


def test_unknown_names_are_refused_everywhere(monkeypatch):
    with pytest.raises(
        ValueError, match="unknown backend 'cuda9' in set_backend; known: auto, reference, sdpa, native, flash, triton"
    ):
        hf_kvattn.set_backend("cuda9")
    with pytest.raises(ValueError, match="unknown backend 'x' in backend"), hf_kvattn.backend("x"):
        pass
    monkeypatch.setenv("HF_KVATTN_BACKEND", "quick")
    with pytest.raises(ValueError, match="unknown backend 'quick' in HF_KVATTN_BACKEND"):
        dispatch.attend(problem("g1-31"))


def test_context_goes_before_set_backend_goes_before_environment(monkeypatch):
    assert dispatch.chosen_backend() == "auto"
    monkeypatch.setenv("HF_KVATTN_BACKEND", "reference")
    assert dispatch.chosen_backend() == "reference"
    hf_kvattn.set_backend("sdpa")
    assert dispatch.chosen_backend() == "sdpa"
    seen = []
    with hf_kvattn.backend("native"):
        with hf_kvattn.backend("reference"):
            assert dispatch.chosen_backend() == "reference"
        assert dispatch.chosen_backend() == "native"
        other = threading.Thread(target=lambda: seen.append(dispatch.chosen_backend()))
        other.start()
        other.join()
    assert seen == ["sdpa"], "a context is its thread's own, set_backend is everybody's"
    assert dispatch.chosen_backend() == "sdpa"


def test_describe_tells_backends_cases_and_reasons(monkeypatch):
    description = hf_kvattn.describe()
    reasons = dict(description.backends)
    assert reasons.pop("flash") == flash.unavailable()
    assert reasons.pop("triton") == triton_backend.unavailable()
    assert reasons == {"reference": None, "sdpa": None, "native": None}
    assert description.cases["decode, 1 token"] == ("native", None)
    name, reason = description.cases["decode, custom dense mask"]
    assert name == "sdpa" and "dense mask" in reason
    softcapped = hf_kvattn.describe(tiny_model("gemma2"))
    assert softcapped.cases["prefill, 512 tokens"][0] == "native"
    with hf_kvattn.backend("native"):
        assert hf_kvattn.describe().cases["decode, custom dense mask"][0] == "raises"
    monkeypatch.setattr(native, "unavailable", lambda: "no compiler was found")
    text = str(hf_kvattn.describe())
    assert "not usable: no compiler was found" in text and "decode, 1 token" in text


def test_the_command_line_prints_the_description():
    out = subprocess.run([sys.executable, "-m", "hf_kvattn"], capture_output=True, text=True, check=True).stdout
    assert "native     usable" in out and "backend asked for: auto" in out
