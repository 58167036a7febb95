"""Drafts of every kind that transformers verifies: stock's tokens, or a `ValueError` before any token.

Random models agree with no draft. So every draft is told part of what stock generates: some tokens of it are taken, the
others are rolled back. With codes, the backend that is chosen must give the tokens that `reference` gives.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from model_sweep import CACHES, EXTRA, model_of
from transformers import PreTrainedModel
from transformers.generation import candidate_generator

import hf_kvattn
from hf_kvattn import SlidingWindowKVCache, StaticKVCache

LENGTH, NEW, LAYERS = 44, 12, 4  # a block of codes is full after the prompt, native windows are crossed
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
SPECIAL = {  # beside what the sweep of models builds
    "gemma3_text": {"tie_word_embeddings": False},
    "gemma4_text": {"global_head_dim": 16, "tie_word_embeddings": False},
    "glm4_moe": {"num_nextn_predict_layers": 3},
    "mellum": {"num_nextn_predict_layers": 1},
}
WAYS = {
    "lookup": lambda family: {"prompt_lookup_num_tokens": 3},
    "draft": lambda family: {"assistant_model": draft(family)},
    "early exit": lambda family: {"assistant_early_exit": 2},
    "mtp": lambda family: {"use_mtp": True},
    "dflash": lambda family: {"assistant_model": dflash(), "speculation_type": "dflash"},
}
CASES = {
    "llama": ("lookup", "draft", "early exit", "dflash"),
    "gemma3_text": ("lookup", "draft", "early exit", "dflash"),  # sliding windows
    "gemma4_text": ("lookup", "draft", "dflash"),  # layers that attend to others' keys; stock has no early exit there
    "lfm2": ("lookup", "draft", "early exit", "dflash"),  # convolutions
    "llama4_text": ("lookup", "draft"),  # chunks; nor there
    "deepseek_v3": ("draft", "mtp"),  # latents
    "glm4_moe": ("early exit", "mtp"),
    "mellum": ("mtp",),
}


@functools.cache
def model(family: str) -> PreTrainedModel:
    with mock.patch.dict(EXTRA, {family: EXTRA.get(family, {}) | SPECIAL.get(family, {})}):
        made = model_of(family)
    config = made.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = 4, "constant"
    config.assistant_confidence_threshold = 0.0
    return made


@functools.cache
def draft(family: str) -> PreTrainedModel:
    return copy.deepcopy(model(family))


@functools.cache
def dflash() -> PreTrainedModel:
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "sliding_window": 16}
    reads = {"block_size": 5, "mask_token_id": 2, "target_layer_ids": [0, 2]}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**sizes, **reads, **tokens)).eval()


def random_heads(main_model: PreTrainedModel, **kwargs) -> torch.nn.Module:
    """In the place of those of a checkpoint."""
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(1)
    return MtpModel(main_model, main_model.config.num_mtp_layers).eval()


@contextlib.contextmanager
def told(known: torch.Tensor) -> Iterator[list[tuple[int, int]]]:
    """Drafts begin with so many tokens of `known` `(1, T)` as a round's number says; yields (drafted, told) of each."""
    rounds: list[tuple[int, int]] = []

    def telling(own):
        def get_candidates(self, input_ids, *args, **kwargs):
            ids, logits = own(self, input_ids, *args, **kwargs)
            begin, drafted = input_ids.shape[1], ids.shape[1] - input_ids.shape[1]
            if drafted:
                number = min((len(rounds) + 1) % (drafted + 1), known.shape[1] - begin)
                rounds.append((drafted, number))
                ids = torch.cat([input_ids, known[:, begin : begin + number], ids[:, begin + number :]], 1)
            return ids, logits

        return get_candidates

    with contextlib.ExitStack() as stack:
        for kind in vars(candidate_generator).values():
            if isinstance(kind, type) and "get_candidates" in vars(kind) and "EarlyExit" not in kind.__name__:
                stack.enter_context(mock.patch.object(kind, "get_candidates", telling(kind.get_candidates)))
        if hasattr(candidate_generator, "MTPCandidateGenerator"):
            stack.enter_context(mock.patch("transformers.modeling_layers.MtpModel.from_pretrained", random_heads))
        yield rounds


def prompt() -> torch.Tensor:
    """With every token twice, for prompt lookup."""
    ids = torch.randint(3, 128, (1, LENGTH // 2), generator=torch.Generator().manual_seed(7))
    return ids.repeat(1, 2)


@functools.cache
def plain(family: str) -> torch.Tensor:
    """Stock's tokens without drafts."""
    return model(family).generate(prompt(), **GREEDY)


def generate(family: str, cache=None, known: torch.Tensor | None = None, **how) -> torch.Tensor:
    with told(plain(family) if known is None else known) as rounds:
        tokens = model(family).generate(prompt(), past_key_values=cache, **GREEDY, **how)
    assert any(number for _, number in rounds) and any(drafted > number for drafted, number in rounds), rounds
    if cache is not None:
        assert cache.get_seq_length() == LENGTH + NEW - 1
    return tokens


@pytest.mark.parametrize(("family", "way"), [(family, way) for family, ways in CASES.items() for way in ways])
def test_drafts_are_verified_as_by_stock(family, way):
    verifying, how = model(family), WAYS[way](family)
    expected = plain(family)
    assert expected[0, LENGTH:].unique().numel() > 4, "the tokens must vary, or equality says little"
    with hf_kvattn.enabled(verifying):
        for name in ("static", "sliding"):
            assert torch.equal(generate(family, CACHES[name](verifying.config), **how), expected), name
        got = generate(family, CACHES["int8"](verifying.config), **how)
        with hf_kvattn.backend("reference"):
            assert torch.equal(got, generate(family, CACHES["int8"](verifying.config), **how))
    with hf_kvattn.enabled(verifying, cache="static"), hf_kvattn.enabled(draft(family), cache="static"):
        assert torch.equal(generate(family, **how), expected)
    # the cache alone, on a model that is not enabled
    assert torch.equal(generate(family, CACHES["static"](verifying.config), **how), expected)


@pytest.mark.parametrize("way", ["lookup", "draft", "early exit", "dflash"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_window_that_has_wrapped_rolls_drafts_back(family, way):
    """As without drafts: positions of a stream and the sinks before the window go back too."""
    make = functools.partial(SlidingWindowKVCache, model(family).config, window=24, sinks=4)
    with hf_kvattn.enabled(model(family)):
        expected = model(family).generate(prompt(), past_key_values=make(), **GREEDY)
        assert not torch.equal(expected, plain(family))
        assert torch.equal(generate(family, make(), expected, **WAYS[way](family)), expected)


@functools.cache
def gemma4_assistant() -> PreTrainedModel:
    """All its layers attend to the target's keys and values; transformers 5.23 does not build it without help."""
    from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

    target, reuse = model("gemma4_text").config, property(lambda config: ["reuse"] * config.num_hidden_layers)
    none = dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0)
    text = target.to_dict() | none | {"num_kv_shared_layers": LAYERS, "global_head_dim": 16}
    del text["per_layer_config"]
    torch.manual_seed(1)
    with mock.patch.object(Gemma4TextConfig, "kv_sharing_modes", reuse):
        made = Gemma4AssistantForCausalLM(Gemma4AssistantConfig(text_config=text, backbone_hidden_size=64)).eval()
    made.generation_config.num_assistant_tokens = 4
    return made


def test_a_draft_that_reads_the_targets_keys_is_refused_before_any_token():
    """Of our caches on an enabled model; it is served by others, and by ours on a model that is not enabled."""
    target, expected = model("gemma4_text"), plain("gemma4_text")
    how = {"assistant_model": gemma4_assistant()}
    assert torch.equal(generate("gemma4_text", **how), expected)
    assert torch.equal(generate("gemma4_text", StaticKVCache(target.config), **how), expected)
    with hf_kvattn.enabled(target):
        assert torch.equal(generate("gemma4_text", **how), expected)
        for make in CACHES.values():
            cache = make(target.config)
            with pytest.raises(ValueError, match="^return_shared_kv_states: keys and values of all tokens are not at"):
                generate("gemma4_text", cache, **how)
            assert not cache.get_seq_length()
            assert torch.equal(target.generate(prompt(), past_key_values=cache, **GREEDY)[:, :LENGTH], prompt())
    with hf_kvattn.enabled(target, cache="static"), pytest.raises(ValueError, match="^return_shared_kv_states"):
        generate("gemma4_text", **how)


@pytest.mark.parametrize("family", ["qwen3_5_text", "nemotron_h"])
def test_recurrent_states_are_refused_before_any_token(family):
    """By transformers itself: they cannot go back."""
    cache = StaticKVCache(model(family).config)
    for way in ("lookup", "draft", "early exit", "dflash"):
        with hf_kvattn.enabled(model(family)), pytest.raises(ValueError, match="not supported with stateful models"):
            generate(family, cache, **WAYS[way](family))
    assert not cache.get_seq_length()


@pytest.mark.parametrize(
    ("family", "exit", "make", "message"),
    [
        ("llama", 2, functools.partial(StaticKVCache, max_cache_len=LENGTH // 2), "exceed max_cache_len=22"),
        ("lfm2", 1, StaticKVCache, r"its layers, of type \['conv'\], store no keys and values"),
    ],
)
def test_an_early_exit_that_is_refused_leaves_the_model_whole(family, exit, make, message):
    """transformers cuts the model short for its draft, and leaves it so where the draft raises."""
    cache = StaticKVCache(model(family).config)
    with hf_kvattn.enabled(model(family), cache=make), pytest.raises(ValueError, match=message):
        generate(family, cache, assistant_early_exit=exit)
    assert not cache.get_seq_length() and torch.equal(model(family).generate(prompt(), **GREEDY), plain(family))
