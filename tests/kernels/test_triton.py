"""The Triton backend: when it serves, what it refuses and why.

Its numbers and what it compiles to are jobs of their own: `jobs/triton_interpreter` and `jobs/triton_codegen`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import command_lines
import pytest
import torch
from packed_problems import packed_problem
from problems import problem

from hf_kvattn.kernels import dispatch
from hf_kvattn.kernels.call import SinkKV
from hf_kvattn.kernels.triton import backend as triton_backend
from hf_kvattn.quant.codecs import CODECS, Codec

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (PyTorch's CPU builds do not bring it)"
)


def test_the_package_works_without_triton_and_imports_its_kernels_with_the_first_call():
    code = (
        "import sys, hf_kvattn; hf_kvattn.describe(); assert 'hf_kvattn.kernels.triton.attention' not in sys.modules\n"
        "from hf_kvattn.kernels.triton import backend; backend._installed.cache_clear()\n"
        "sys.modules['triton'] = None; print(hf_kvattn.describe().backends['triton'])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith("triton is not installed")


@pytest.fixture
def search():
    """Forgets whether triton was found, before and after."""
    triton_backend._installed.cache_clear()
    yield
    triton_backend._installed.cache_clear()


def test_what_is_missing_is_named(search, monkeypatch):
    searched = []
    monkeypatch.setattr(importlib.util, "find_spec", searched.append)
    assert "pip install triton" in triton_backend.unavailable()
    assert triton_backend.unavailable() and searched == ["triton"], "found out once"
    triton_backend._installed.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"no GPU that this PyTorch ({torch.__version__})" in triton_backend.unavailable()


@pytest.mark.parametrize(
    ("major", "minor", "hip", "reason"),
    [(7, 5, None, "cuda:0 has compute capability 7.5, the triton kernels need 8.0"), (8, 0, None, None),
     (9, 0, None, None), (7, 5, "6.4", None)],
)  # fmt: skip
def test_gpus_that_are_too_old(major, minor, hip, reason, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    found = triton_backend._too_old(torch.device("cuda", 0))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("bits", "capability", "hip", "reason"),
    [(("fp8", 4), (8, 6), None, "compute capability 8.6, fp8 needs 8.9"), ((8, "fp8"), (8, 0), None, "needs 8.9"),
     (("fp8", "fp8"), (8, 9), None, None), (("fp8", "fp8"), (9, 4), "6.4", "on NVIDIA's GPUs only"),
     ((8, 4), (8, 0), None, None), ((8, 4), (9, 4), "6.4", None)],
)  # fmt: skip
def test_gpus_without_fp8(bits, capability, hip, reason, monkeypatch):
    call = packed_problem("g4-d128", *bits, torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = unsupported_on_gpu(call)
    assert found is None if reason is None else reason in found


def unsupported_on_gpu(call):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    call.q = call.q.as_subclass(OnGpu)
    return triton_backend.unsupported(call)


def long(call, softcap: float | None = None) -> None:
    call.q, call.softcap = call.q.repeat(1, 1, 129, 1), softcap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: None, None),
        (long, None),
        (lambda c: setattr(c, "q", c.q.float()), "float16 and bfloat16, not torch.float32"),
        (lambda c: setattr(c, "q", c.q[..., :40]), "16 to 256 in steps of 16, not 40"),
        (lambda c: long(c, 2.0), "beyond 128 query tokens blocks are dequantized for flash-attn or SDPA; "),
        (lambda c: setattr(c.packed, "v_codec", CODECS["int3"]), None),
        (lambda c: setattr(c.packed, "v_codec", Codec("int6", 6)), "read int8, fp8, int4, int3, int2, not int6"),
        (lambda c: setattr(c, "mask", torch.ones(1)), "dense mask"),
        (lambda c: setattr(c, "sinks", SinkKV(c.k, c.v, c.q, 0)), None),
        (lambda c: setattr(c, "dropout", 0.5), "no dropout"),
    ],
)
def test_what_it_refuses(change, message, monkeypatch):
    call = packed_problem("g4-d128", 4, 4, torch.bfloat16)
    assert "run on a GPU, the tensors are on cpu" in triton_backend.unsupported(call)
    change(call)
    monkeypatch.setattr(triton_backend, "_too_old", lambda device: None)
    found = unsupported_on_gpu(call)
    assert found is None if message is None else message in found


def test_choices_on_a_cpu_are_as_without_it():
    for call in (problem("long-split"), packed_problem("long-split", 4, 4)):
        assert dispatch.auto_choice(call)[0] == "native"


def test_the_script_refuses_an_output_that_exists(tmp_path, monkeypatch, capsys):
    (tmp_path / "triton.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert command_lines.run("triton_resources", "--output", tmp_path) == 2
    assert "triton.json exists already" in capsys.readouterr().err


@needs_triton
def test_the_page_is_made_from_the_json():
    from hf_kvattn.evaluation import codegen

    found = json.loads((ROOT / "model_cards/kernels/triton.json").read_text())
    assert codegen.table(found) == (ROOT / "model_cards/kernels/TRITON.md").read_text()
