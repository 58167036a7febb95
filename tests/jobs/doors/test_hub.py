"""Doors by way of the hub, from local folders: `custom_generate`, and a kernel of the `kernels` package."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from models import generate, prompt, tiny_model
from served import served
from transformers import DynamicCache
from transformers.integrations import hub_kernels

import hf_kvattn
from hf_kvattn.integrations import hub
from hf_kvattn.kernels import native
from hf_kvattn.tools import commands

ROOT = Path(__file__).parents[3]
CUSTOM = {"custom_generate": hub.FOLDER, "trust_remote_code": True}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    """The folder that the command writes."""
    path = tmp_path_factory.mktemp("kernel") / "hf-kvattn"
    assert commands.main(["hub-kernel", "--output", str(path), "--version", "3"]) == 0
    return path


@pytest.mark.parametrize("padding", [0, 4])
def test_custom_generate_serves_one_call(padding):
    model, inputs = tiny_model(head_dim=32), prompt(70, left_padding=padding)
    expected, before = generate(model, inputs), dict(model.__dict__)
    with served() as calls:
        tokens, logits = generate(model, inputs, **CUSTOM)
    assert torch.equal(tokens, expected[0]) and len(calls) == 24 * 3
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)
    with served() as calls:
        generate(model, inputs, kv_cache="int4", **CUSTOM)
    assert sum(call.packed for call in calls) == 23 * 3
    assert not hf_kvattn.is_enabled(model) and model.config._attn_implementation == "sdpa"
    assert set(model.__dict__) == set(before) and not any(m._forward_pre_hooks for m in model.modules())


def test_custom_generate_beams_and_samples_as_generate_does():
    model, inputs = tiny_model(), prompt()
    for how in ({"num_beams": 3}, {"do_sample": True}):
        torch.manual_seed(0)
        expected = model.generate(**inputs, max_new_tokens=9, **how)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, max_new_tokens=9, **how, **CUSTOM), expected)


def test_custom_generate_goes_on_with_a_cache_that_is_given():
    model, inputs = tiny_model(), prompt()
    expected, _ = generate(model, inputs)
    cache = hf_kvattn.StaticKVCache(model.config)
    assert torch.equal(generate(model, inputs, past_key_values=cache, kv_cache=None, **CUSTOM)[0], expected)
    assert cache.get_seq_length() == 13 + 23


def test_custom_generate_leaves_an_enabled_model_enabled():
    model, inputs = hf_kvattn.enable(tiny_model(head_dim=32)), prompt(70)
    with served() as calls:
        generate(model, inputs, kv_cache="int8", **CUSTOM)
    assert any(call.packed for call in calls) and hf_kvattn.is_enabled(model)
    with served() as calls:
        generate(model, inputs)
    assert not any(call.packed for call in calls)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kv_cache": "int5"}, "unknown cache 'int5'; known: static"),
        ({"compile": 1}, "compile must be True or False, got 1"),
        ({"kv_cache": "int4", "past_key_values": DynamicCache()}, "kv_cache='int4' makes a fresh cache, and past"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_custom_generate_refuses(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        generate(model, prompt(), **arguments, **CUSTOM)
    assert not hf_kvattn.is_enabled(model) and "generate" not in model.__dict__


def test_a_kernel_is_loaded_and_enables_a_model(kernel):
    loaded = kernels.get_local_kernel(kernel, backend="cpu")
    [about] = [each.metadata for each in kernels.get_loaded_kernels() if each.module is loaded]
    assert (about.name.python_name, about.version, about.license) == ("hf_kvattn", 3, "Apache-2.0")
    model, inputs = tiny_model(), prompt(left_padding=3)
    expected, _ = generate(model, inputs)
    loaded.enable(model, cache="static")
    with served() as calls:
        assert torch.equal(generate(model, inputs)[0], expected)
    assert all(call.from_cache for call in calls[3:])


def test_a_kernel_needs_no_other_hf_kvattn(kernel, tmp_path):
    """In a process that finds none, the copy in the kernel's folder serves, with its C++ library."""
    shutil.copy(ROOT / "tests/helpers/models.py", tmp_path)
    code = (
        "import importlib.metadata, importlib.util, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if isinstance(f, type)]\n"  # no finder of an editable install
        "from importlib.machinery import PathFinder\n"
        "installed = [p for p in sys.path if p and PathFinder.find_spec('hf_kvattn', [p])]\n"
        "class Hidden(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        if name == 'hf_kvattn': path = [p for p in sys.path if p not in installed]\n"
        "        return PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Hidden if f is PathFinder else f for f in sys.meta_path]\n"
        "import kernels, torch\n"
        "from pathlib import Path\n"
        "from models import generate, prompt, tiny_model\n"
        "model, inputs = tiny_model(), prompt(40)\n"
        "expected, _ = generate(model, inputs)\n"
        "assert importlib.util.find_spec('hf_kvattn') is None\n"
        f"loaded = kernels.get_local_kernel(Path({str(kernel)!r}), backend='cpu')\n"
        "loaded.enable(model, cache='static')\n"
        "assert torch.equal(generate(model, inputs)[0], expected)\n"
        "from hf_kvattn.kernels import native\n"
        "print(native.__file__, native.library_path(), native.unavailable())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    package, library, reason = run.stdout.splitlines()[-1].split()
    assert package.startswith(str(kernel)) and library.startswith(str(kernel)) and reason == "None"


@pytest.mark.parametrize("name", ["someone/hf-kvattn", "someone/hf-kvattn:kvattn_attention"])
def test_transformers_takes_the_attention_function_by_the_kernels_name(kernel, monkeypatch, name):
    """As from the hub; `LOCAL_KERNELS` says where the repository lies."""
    monkeypatch.setenv("LOCAL_KERNELS", f"someone/hf-kvattn={kernel}")
    # Each version of transformers takes a few versions of `kernels` only, and not always one that can be installed.
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    monkeypatch.setattr(
        hub_kernels, "get_kernel_hub", functools.partial(kernels.get_kernel, backend="cpu"), raising=False
    )
    model, inputs = tiny_model(), prompt(left_padding=4)
    expected = [generate(model, inputs, **how)[0] for how in ({}, {"cache_implementation": "static"})]
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    with served() as calls:
        got = [generate(model, inputs, **how)[0] for how in ({}, {"cache_implementation": "static"})]
    assert all(map(torch.equal, got, expected)) and len(calls) == 2 * 24 * 3
    cache = hf_kvattn.QuantizedKVCache(model.config, bits=8)  # right without `enable`, on dense tensors
    with served(cache) as calls:
        generate(model, inputs, past_key_values=cache)
    assert calls and not any(call.packed for call in calls)


def test_a_kernel_is_written_whole_or_not_at_all(kernel, tmp_path, monkeypatch, capsys):
    assert commands.main(["hub-kernel", "--output", str(kernel)]) == 2
    assert f"{kernel} exists already" in capsys.readouterr().err
    monkeypatch.setattr(native, "library_path", lambda: None)
    assert commands.main(["hub-kernel", "--output", str(tmp_path / "new")]) == 2
    assert "the C++ kernels were not built" in capsys.readouterr().err and not list(tmp_path.iterdir())
