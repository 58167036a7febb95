"""Which library serves a call of flash: what is found, what is tried once, and why others are passed over."""

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from flash_stub import AITER, FA2, FA3, HUB_FA2, HUB_FA3, Kernels, flash_libraries, probes
from impostor import fake_cuda, on_gpu
from models import generate, prompt, tiny_model
from problems import problem
from tolerance import assert_close_to_reference

import hf_kvattn
from hf_kvattn import StaticKVCache
from hf_kvattn.kernels import dispatch, flash
from hf_kvattn.kernels import flash_libraries as libraries
from hf_kvattn.kernels.call import AttendCall, Feature

pytestmark = pytest.mark.usefixtures("fresh_choice", "without_triton")


def moved(name="padded", dtype=torch.bfloat16, call=None):
    """The problem of that name, or `call`, on the GPU."""
    call = call or problem(name, dtype)
    values = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    return dataclasses.replace(call, **{name: on_gpu(value) for name, value in values.items()})


def check_result(name="padded"):
    """The problem of that name, computed by whatever serves it."""
    call = problem(name, torch.bfloat16)
    assert_close_to_reference(dispatch.attend(moved(call=call)).data_on_cpu, call)


def library(function=None, version="2.8.3"):
    made = ModuleType("flash_attn")
    made.__version__ = version
    if function is not None:
        made.flash_attn_with_kvcache = function
    return made


def no_leftpad(q, k_cache, v_cache, k, v, cache_seqlens, softmax_scale, causal, window_size, softcap,
               return_softmax_lse): ...  # fmt: skip


def no_softcap(q, k_cache, v_cache, k, v, cache_seqlens, softmax_scale, causal, window_size, return_softmax_lse): ...


UNFIT = {
    "namespace": (library(), "it has no flash_attn_with_kvcache"),
    "2.6.0": (library(no_leftpad, "2.6.0"), "2.6.0 lacks cache_leftpad; 2.6.1 or later is needed"),
    "2.5.9": (library(no_softcap, "2.5.9"), "2.5.9 lacks cache_leftpad, softcap; 2.6.1 or later is needed"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_library_that_lacks_something_is_passed_over_with_the_reason(name, caplog):
    module, reason = UNFIT[name]
    with flash_libraries(flash_attn=module) as calls, fake_cuda(), caplog.at_level(logging.INFO, "hf_kvattn"):
        check_result()
        assert not calls and [reason in record.message for record in caplog.records] == [True]
        with pytest.raises(ValueError, match=f"'flash' in set_backend cannot be used here: .*{reason}"):
            hf_kvattn.set_backend("flash")
    with flash_libraries(FA3, flash_attn=module) as calls, fake_cuda((9, 0)):
        dispatch.attend(moved())
        assert [launch["library"] for launch in calls] == ["fa3"], "and the next one serves"


def test_an_empty_folder_is_no_library(tmp_path, monkeypatch):
    """As FlashAttention 4 alone leaves it: `flash_attn/cute`, and no `__init__.py`."""
    (tmp_path / FA2 / "cute").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with flash_libraries():
        del sys.modules[FA2]
        function, reason = libraries.load(FA2)
        assert function is None and "has no flash_attn_with_kvcache (FlashAttention 4 has none)" in reason
    sys.modules.pop(FA2, None)


def failing(when, error="CUDA error: no kernel image is available for execution on the device\nand more"):
    """FA2 in a build that lacks something: its launches raise as PyTorch does."""
    with flash_libraries(FA2):
        real = libraries.load(FA2)[0]
    tried = []

    def function(
        q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, cache_leftpad=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, return_softmax_lse=False,
    ):  # fmt: skip
        tried.append(tuple(q.shape))
        if when(q, softcap, window_size, cache_leftpad):
            raise RuntimeError(error)
        return real(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad, causal=causal,
            softmax_scale=softmax_scale, window_size=window_size, softcap=softcap, return_softmax_lse=True,
        )  # fmt: skip

    function.tried = tried
    return function


BUILDS = {
    "architecture": (lambda q, *rest: True, "padded"),
    "head_dim": (lambda q, *rest: q.shape[-1] == 64, "padded"),
    "softcap": (lambda q, softcap, *rest: softcap > 0, "softcap"),
    "window": (lambda q, softcap, window, pad: window != (-1, -1), "window-many-queries"),
    "left padding": (lambda q, softcap, window, pad: pad is not None, "padded"),
}


@pytest.mark.parametrize("lacks", BUILDS)
def test_a_build_that_cannot_launch_is_found_out_once(lacks, caplog):
    when, name = BUILDS[lacks]
    function = failing(when)
    with flash_libraries(flash_attn=library(function)) as calls, fake_cuda():
        call = moved(name)
        with caplog.at_level(logging.INFO, "hf_kvattn"):
            for _ in range(3):
                check_result(name)
        assert not calls and function.tried == [(1, 2, 1, call.q.shape[-1])]
        (record,) = caplog.records
        error = "(flash_attn: CUDA error: no kernel image is available for execution on the device; kernels-community"
        assert error in record.message, "its first line"
        with hf_kvattn.backend("flash"), pytest.raises(ValueError, match="'flash' cannot serve .*no kernel image"):
            dispatch.attend(call)
        with pytest.raises(ValueError, match="no kernel image"):
            flash.attend(call)
        other = moved(call=smaller_heads(problem("g3-65", torch.bfloat16)))
        assert (dispatch.auto_choice(other)[0] == "flash") == (lacks != "architecture"), "other calls are served"


def smaller_heads(call):
    return dataclasses.replace(call, q=call.q[..., :32], k=call.k[..., :32], v=call.v[..., :32])


def test_each_kind_of_call_is_tried_once():
    """A launch for each library, GPU, dtype, head_dim, and window, softcap and left padding or not."""
    names, dtypes = ("g3-65", "short-query", "padded", "softcap"), (torch.float16, torch.bfloat16)
    with flash_libraries(FA2) as calls, fake_cuda(devices=2):
        for name in names * 2:
            for dtype in dtypes:
                flash.attend(moved(name, dtype))
        kinds = {(p.q.shape[-1], p.features() & libraries._PROBED) for p in map(problem, names)}
        assert len(calls) == 16 and len(probes) == len(dtypes) * len(kinds) < 8
        q, k, v = (on_gpu(torch.zeros(1, 1, 2, 64).half(), "cuda:1") for _ in "qkv")
        flash.attend(AttendCall(q, k, v, 1.0))
        assert len(probes) == len(dtypes) * len(kinds) + 1 and probes[-1]["q"].device.index == 1


def test_a_generation_tries_each_kind_once():
    model, inputs = tiny_model().half(), prompt(left_padding=4)
    with flash_libraries(FA2) as calls, fake_cuda():
        with hf_kvattn.enabled(on_gpu(model)):
            generate(model, on_gpu(inputs), past_key_values=StaticKVCache(model.config))
        assert len(probes) == 1 < len(calls)


def test_no_memory_says_nothing_of_a_library():
    def function(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with fake_cuda(), pytest.raises(torch.OutOfMemoryError):
        libraries.probe(function, torch.device("cuda", 0), torch.float16, 64, 0)


def test_nothing_is_tried_while_a_graph_is_recorded(monkeypatch):
    """What is known already counts then; what is not is not remembered."""
    function = failing(lambda q, softcap, *rest: softcap > 0)
    with flash_libraries(flash_attn=library(function)), fake_cuda():
        assert "no kernel image" in flash.unsupported(moved("softcap"))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert "no kernel image" in flash.unsupported(moved("softcap"))
        function.tried.clear()
        assert flash.unsupported(moved("g3-65")) is None and not function.tried
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert flash.unsupported(moved("g3-65")) is None and len(function.tried) == 1


@pytest.mark.parametrize(
    ("capability", "there", "serves", "libraries_asked"),
    [
        ((8, 0), (HUB_FA2,), "fa2", [(HUB_FA2, 4)]),
        ((9, 0), (HUB_FA2, HUB_FA3), "fa3", [(HUB_FA3, 1)]),
        ((9, 0), (HUB_FA2,), "fa2", [(HUB_FA3, 1), (HUB_FA2, 4)]),
        ((9, 0), (FA2, HUB_FA3), "fa2", []),
        ((10, 0), (HUB_FA3, HUB_FA2), "fa2", [(HUB_FA2, 4)]),
    ],
)
def test_kernels_of_the_hub_come_from_the_local_cache_after_what_is_installed(
    capability, there, serves, libraries_asked, monkeypatch
):
    versions = {HUB_FA2: 4, HUB_FA3: 1}
    monkeypatch.setattr(libraries.modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_VERSIONS", versions, raising=False)
    with flash_libraries(*there) as calls, fake_cuda(capability):
        check_result()
        assert [launch["library"] for launch in calls] == [serves]
        assert sys.modules["kernels"].asked == libraries_asked


def test_why_a_kernel_of_the_hub_is_not_there(monkeypatch):
    versions = {HUB_FA2: 4}
    monkeypatch.setattr(libraries.modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_VERSIONS", versions, raising=False)
    with flash_libraries(HUB_FA3), fake_cuda((9, 0)):
        assert libraries.listing() == {
            FA3: "import of flash_attn_interface halted; None in sys.modules",
            FA2: "import of flash_attn halted; None in sys.modules",
            HUB_FA3: f"transformers {libraries.transformers.__version__} names no version of it",
            HUB_FA2: f"Version 4 of '{HUB_FA2}' is not available in the local cache",
        }
        libraries.load.cache_clear()
        monkeypatch.setattr(Kernels, "install_kernel", lambda self, repo_id, version=None: None)
        assert libraries.load(HUB_FA2)[1] == (
            f"{HUB_FA2}: kernels 0.18.2 is too old, its install_kernel lacks local_files_only"
        )
    with flash_libraries(), fake_cuda():
        assert "import of kernels halted" in libraries.load(HUB_FA2)[1]


CACHED = """
import json, socket, sys
from pathlib import Path
from hf_kvattn.kernels import flash_libraries

def refused(*args, **kwargs):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refused
found = {name: flash_libraries.load(name) for name in sys.argv[1:]}
print(json.dumps({name: [function is not None, text] for name, (function, text) in found.items()}))
"""
FUNCTION = f"def flash_attn_with_kvcache(q, k_cache, v_cache, {', '.join(sorted(libraries.ARGUMENTS))}): ...\n"


def test_the_package_kernels_finds_it_in_its_cache_without_a_network(tmp_path):
    """The real package: a kernel for this system lies where a download would have put it."""
    pytest.importorskip("kernels")
    versions = getattr(libraries.modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_VERSIONS", {})
    if HUB_FA2 not in versions:
        pytest.skip("this transformers names no versions")
    version, commit = versions[HUB_FA2], "a" * 40
    repository = tmp_path / f"kernels--{HUB_FA2.replace('/', '--')}"
    build = repository / "snapshots" / commit / "build" / "torch-cpu"
    build.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / f"v{version}").write_text(commit)
    metadata = {"name": "flash-attn2", "id": "_flash_attn2_cpu", "version": version, "license": "BSD-3-Clause"}
    (build / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}, "python-depends": []}))
    (build / "__init__.py").write_text(FUNCTION)
    command = [sys.executable, "-c", CACHED, HUB_FA2, HUB_FA3]
    environment = {"HF_HUB_CACHE": str(tmp_path), "KERNELS_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found[HUB_FA2] == [True, f"version {version}"]
    assert not found[HUB_FA3][0] and "not available in the local cache" in found[HUB_FA3][1]


def test_on_amd_only_calls_that_its_library_computes(monkeypatch):
    """AITER's function takes `cache_leftpad` and ignores it."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        libraries.modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_VERSIONS", {AITER: 2}, raising=False
    )
    with flash_libraries(AITER, FA2) as calls, fake_cuda((9, 4)):
        assert list(libraries.listing().items()) == [(AITER, "version 2")]
        for name in ("g3-65", "short-query", "window-many-queries", "not-causal"):
            assert dispatch.auto_choice(moved(name)) == ("flash", None)
            check_result(name)
        assert len(calls) == 4
        for name, feature in (("padded", "left padding"), ("softcap", "softcap")):
            chosen, reason = dispatch.auto_choice(moved(name))
            assert chosen == "sdpa" and f"{AITER}: not used with {feature}" in reason
        call = moved("g3-65")
        assert "not used with left padding" in flash.cannot_append(call), "it says where rows begin"
        assert {Feature.RING_BUFFERS, Feature.WINDOW_SINKS, Feature.LEARNED_SINKS} <= {
            f for f in Feature if "not used with" in (libraries.serving(call.q, int(f))[1] or "")
        }
    entered = []
    with flash_libraries(AITER), fake_cuda((9, 4), devices=2), monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())
        q, k, v = (on_gpu(torch.zeros(1, 1, 2, 64).half(), "cuda:1") for _ in "qkv")
        dispatch.attend(AttendCall(q, k, v, 1.0))
        assert entered[-1] == torch.device("cuda", 1) and len(entered) == 3, "around the probe, in it, and for the call"
    with flash_libraries(FA2), fake_cuda((9, 4)):
        assert "flash-attn cannot be loaded (kernels-community/aiter" in flash.unavailable(), "FA2 is for NVIDIA"


def test_describe_lists_the_libraries_in_their_order(monkeypatch):
    with flash_libraries(FA2, HUB_FA2), fake_cuda((9, 0)):
        description = hf_kvattn.describe(on_gpu(tiny_model(num_hidden_layers=1).half()))
        assert list(description.libraries) == [FA3, FA2, HUB_FA3, HUB_FA2]
        version = description.libraries[FA2]
        assert version == sys.modules[FA2].__version__
        assert f"    {FA2:<38} {version}\n" in str(description)
    assert hf_kvattn.describe().libraries == {}, "without a GPU none is loaded"
