"""accelerate's hooks send a module's arguments to a device, by `.to` of whatever has one: caches stay what they are."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from cache_table import ALL, contents, same
from models import generate, prompt, tiny_model

import hf_kvattn
from hf_kvattn import StaticKVCache

LAYERS = {f"model.layers.{i}": "cpu" for i in range(3)}
PLACES = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu", **LAYERS}
WAYS = {
    "one device": lambda model, folder: dispatch_model(model, {"": "cpu"}, force_hooks=True),
    "layers": lambda model, folder: dispatch_model(model, PLACES, main_device="cpu", force_hooks=True),
    "cpu and disk": lambda model, folder: dispatch_model(
        model, {**PLACES, "model.layers.1": "disk"}, main_device="cpu", offload_dir=folder
    ),
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
}


@pytest.mark.parametrize("kind", [*ALL, "offloaded"])
@pytest.mark.parametrize("way", WAYS)
def test_a_dispatched_model_is_bit_equal(way, kind, tmp_path):
    make = ALL.get(kind, lambda config: StaticKVCache(config, max_cache_len=160, offload=True))
    model, inputs = tiny_model(), prompt(70, left_padding=3)
    dispatched = copy.deepcopy(model)
    cache, other = make(model.config), make(model.config)
    expected, logits = generate(hf_kvattn.enable(model), inputs, 12, past_key_values=cache)
    hf_kvattn.enable(dispatched)
    WAYS[way](dispatched, str(tmp_path))
    hooks = [m._hf_hook for m in dispatched.modules() if isinstance(getattr(m, "_hf_hook", None), AlignDevicesHook)]
    assert not any("past_key_values" in (hook.skip_keys or ()) for hook in hooks)
    tokens, ours = generate(dispatched, inputs, 12, past_key_values=other)
    assert torch.equal(tokens, expected) and torch.equal(ours, logits)
    assert same(contents(other), contents(cache))
