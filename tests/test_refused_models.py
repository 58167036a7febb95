"""What can be known of a model is known when a cache is made or `enable` is called, not in the first step."""

import pytest
import torch
from models import SMALL, generate, prompt, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, MllamaForCausalLM, StaticCache
from transformers.distributed import DistributedConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

import hf_kvattn
from hf_kvattn import QuantizedKVCache, StaticKVCache, load_cache, save_cache

MIMO = {"n_routed_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "num_experts_per_tok": 2, "v_head_dim": 16}
MIMO |= {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}


def test_a_config_that_lies_about_its_layers_is_refused_by_enable():
    config = AutoConfig.for_model("mimo_v2_flash", **{**SMALL, **MIMO})
    model = AutoModelForCausalLM.from_config(config)
    config.head_dim = 32
    with pytest.raises(ValueError, match="layer 0 has heads of 16, its config says 32"):
        hf_kvattn.enable(model)
    assert not hf_kvattn.is_enabled(model)
    config.head_dim, config.num_key_value_heads = 16, 1
    hf_kvattn.enable(model)
    cache = StaticKVCache(config)
    with pytest.raises(ValueError, match="layer 0: the cache was made for 1 KV heads of 16, got 2 of 16"):
        generate(model, prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_a_layer_that_reuses_what_no_layer_stores_is_refused():
    types = ["full_attention"] * 3
    config = AutoConfig.for_model("gemma3n_text", **SMALL, layer_types=types, num_kv_shared_layers=1)
    assert StaticKVCache(config).lender_of == {2: 1}
    config = tiny_config()
    config.kv_sharing_modes = [None, None, "reuse"]
    with pytest.raises(ValueError, match="no layer stores the keys and values that layer 2 reuses"):
        StaticKVCache(config)


def test_cross_attention_to_images_is_refused_by_enable():
    model = MllamaForCausalLM(MllamaTextConfig(**{**SMALL, "cross_attention_layers": [1]}))
    with pytest.raises(ValueError, match="cross_attention_states.* not known here"):
        hf_kvattn.enable(model)


@pytest.mark.parametrize(
    ("model_type", "extra", "message"),
    [
        # It reads its mask: a compact one crashes it, and without any it sees the future.
        ("doge", {"keep_window_size": 12}, r"its attention needs dense masks, .*_supports_flash_attn=False"),
        ("zamba", {}, r"one attention module serves several layers \(ZambaAttention\)"),
        ("bart", {"decoder_layers": 3, "encoder_layers": 3, "d_model": 64}, "6 modules take a cache, .* 3.*BartAtt"),
    ],
)
def test_modules_that_are_not_known_to_be_served_are_refused_by_enable(model_type, extra, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **extra}))
    with pytest.raises(ValueError, match=message):
        hf_kvattn.enable(model)
    assert not hf_kvattn.is_enabled(model)


def test_a_config_of_several_transformers_is_a_valueerror():
    for make in (StaticKVCache, QuantizedKVCache):
        with pytest.raises(ValueError, match="blt: models that are not one stack of layers"):
            make(AutoConfig.for_model("blt"))


@pytest.mark.parametrize(("head_dim", "group_size"), [(16, 16), (32, 32), (64, 32), (80, 16), (96, 32)])
def test_a_group_size_is_chosen_for_the_head(head_dim, group_size):
    model, inputs = hf_kvattn.enable(tiny_model(head_dim=head_dim), cache="int8"), prompt(50)
    cache = QuantizedKVCache(model.config, bits=8)
    assert cache.settings["group_size"] == group_size
    tokens, _ = generate(model, inputs, past_key_values=cache)
    assert cache.layers[0].packed_tokens and torch.equal(generate(model, inputs)[0], tokens)


def test_a_group_size_that_does_not_fit_is_refused_when_the_cache_is_made():
    with pytest.raises(ValueError, match="group_size=32 does not divide head_dim=80"):
        QuantizedKVCache(tiny_config(head_dim=80), group_size=32)
    with pytest.raises(ValueError, match="group_size=16 does not divide head_dim=8"):
        QuantizedKVCache(tiny_config("llama-g8"))
    with pytest.raises(ValueError, match="group_size=16 does not divide head_dim=8"):
        hf_kvattn.enable(tiny_model("llama-g8"), cache="int4")


def tensor_parallel(monkeypatch, config, rank=0, processes=2, plan="auto"):
    """`config` as transformers leaves it in process `rank` of a tensor-parallel model."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    config.distributed_config = DistributedConfig(tp_size=processes, tp_plan=plan)
    return config


def test_a_tensor_parallel_process_stores_its_share_of_the_heads(monkeypatch):
    one, both = torch.randn(2, 1, 5, 16), torch.randn(2, 2, 5, 16)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="made for 2 KV heads of 16, got 1 of 16: .* model.config"):
        StaticKVCache(tiny_config()).update(one, one, 0)
    cache = StaticKVCache(tensor_parallel(monkeypatch, tiny_config()))
    with pytest.raises(ValueError, match="made for 1 KV heads of 16, got 2 of 16"):
        cache.update(both, both, 0)
    assert torch.equal(cache.update(one, one, 0)[0], one)


@pytest.mark.parametrize(
    ("family", "plan"),
    [("phi3", "auto"), ("llama", {"layers.*.self_attn.k_proj": "colwise_gather_output"}), ("llama", {})],
)
def test_where_the_plan_gives_every_process_all_heads_it_stores_them(monkeypatch, family, plan):
    both = torch.randn(2, 2, 5, 16)
    cache = StaticKVCache(tensor_parallel(monkeypatch, tiny_config(family), plan=plan))
    assert torch.equal(cache.update(both, both, 0)[0], both)


def test_heads_that_cannot_be_shared_out_are_refused(monkeypatch):
    reason = "llama: the 2 KV heads of layer 0 cannot be shared out evenly over 4 tensor-parallel processes"
    with pytest.raises(ValueError, match=reason):
        StaticKVCache(tensor_parallel(monkeypatch, tiny_config(), processes=4))
    model = tiny_model()
    tensor_parallel(monkeypatch, model.config, processes=4)
    with pytest.raises(ValueError, match=reason):
        hf_kvattn.enable(model)
    assert not hf_kvattn.is_enabled(model)


def test_a_saved_share_is_loaded_by_its_own_process_alone(monkeypatch, tmp_path):
    one, path = torch.randn(2, 1, 5, 16), tmp_path / "cache"
    cache = StaticKVCache(tensor_parallel(monkeypatch, tiny_config(), rank=3))
    for layer in range(3):
        cache.update(one, one, layer)
    save_cache(cache, path)
    loaded = load_cache(path, tensor_parallel(monkeypatch, tiny_config(), rank=1))
    assert torch.equal(loaded.layers[2].keys, one)
    for config, own in (
        (tensor_parallel(monkeypatch, tiny_config(), rank=2), "process 0 of 2"),
        (tiny_config(), "a whole model"),
    ):
        with pytest.raises(ValueError, match=f"the KV heads of 'process 1 of 2', and the config is that of {own}"):
            load_cache(path, config)


def test_other_libraries_read_the_capacity_as_of_transformers_caches():
    config = tiny_config()
    assert StaticKVCache(config, max_cache_len=40).max_cache_len == StaticCache(config, 40).get_max_length() == 40
    assert StaticKVCache(config).max_cache_len == -1
    assert QuantizedKVCache(config, max_cache_len=40).max_cache_len == 40
