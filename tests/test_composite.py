"""Models that see: images, text alone, embeddings, and a padded batch of both, as stock transformers generates.

With codes, the backend that is chosen must give the tokens that `reference` gives from the same ones.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from model_sweep import CACHES, CLOSE, FAR, far, sized, varied
from served import served
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

import hf_kvattn

IMAGE, START, END = 100, 101, 102
LENGTH, PADDING, BEFORE, NEW = 52, 5, 9, 8  # a block of codes is full after the prompt, windows are crossed
TOKENS = 16  # of an image: more than a window
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN = {"image_token_id": IMAGE, "video_token_id": 103, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN_VISION = {"depth": 2, "patch_size": 4, "out_hidden_size": 64}
GRID = 8  # patches of a Qwen image in each direction; 2 x 2 are merged to a token
VISION = {"num_hidden_layers": 2, "image_size": 16, "patch_size": 4}
UNTIED = {"tie_word_embeddings": False}  # else a model says what it is told
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": QWEN
    | {
        "text_config": MROPE | {"use_sliding_window": False},
        "vision_config": QWEN_VISION | {"window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": QWEN
    | {
        "text_config": MROPE,
        "vision_config": QWEN_VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_5": QWEN
    | {
        "text_config": {"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        "vision_config": QWEN_VISION | {"num_position_embeddings": 64},
    },
    "gemma3": UNTIED
    | {"image_token_index": IMAGE, "mm_tokens_per_image": TOKENS, "text_config": UNTIED, "vision_config": VISION},
    "llava": {"image_token_index": IMAGE, "vision_feature_layer": -1, "vision_config": VISION},
    "llama4": {
        "image_token_index": IMAGE,
        "vision_config": VISION
        | {"image_size": 32, "intermediate_size": 256}
        | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 64),
    },
    "gemma4": UNTIED
    | {
        "image_token_id": IMAGE,
        "video_token_id": 103,
        "audio_token_id": 104,
        "text_config": UNTIED
        | SLIDING
        | {"use_bidirectional_attention": "vision", "global_head_dim": 32, "num_kv_shared_layers": 2},
        "vision_config": {"model_type": "gemma4_vision", "num_hidden_layers": 2, "patch_size": 4}
        | {"position_embedding_size": 64, "pooling_kernel_size": 2},
    },
}


@functools.cache
def model(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    config = sized(CONFIG_MAPPING[family], FAMILIES[family])
    return varied(AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval())


def pixels(family: str, images: int, seed: int = 2) -> dict[str, torch.Tensor]:
    """`images` random images as the family's processor hands them on."""
    random = torch.Generator().manual_seed(seed)
    if family.startswith("qwen"):  # patches of two frames, all images in a row
        values = torch.randn(images * GRID**2, 3 * 2 * 4 * 4, generator=random)
        return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, GRID, GRID]] * images)}
    if family == "gemma4":  # patches with their places
        places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).flip(1)
        values = torch.rand(images, GRID**2, 3 * 4 * 4, generator=random)
        return {"pixel_values": values, "image_position_ids": places.expand(images, -1, -1)}
    size = model(family).config.vision_config.image_size
    return {"pixel_values": torch.randn(images, 3, size, size, generator=random)}


def inputs(family: str, way: str, seed: int = 2) -> dict[str, torch.Tensor]:
    """What generate() gets in one of the `WAYS`."""
    seeing, padding = WAYS[way]
    ids = torch.randint(3, IMAGE, (len(seeing), LENGTH), generator=torch.Generator().manual_seed(7))
    mask, kinds = torch.ones_like(ids), torch.zeros_like(ids)
    for row, sees in enumerate(seeing):
        if sees:
            kinds[row, BEFORE : BEFORE + TOKENS] = 1
            ids[row, BEFORE - 1], ids[row, BEFORE + TOKENS] = START, END
    ids[kinds.bool()] = IMAGE
    ids[0, :padding] = mask[0, :padding] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if any(seeing):
        given |= pixels(family, sum(seeing), seed)
        if family not in ("llava", "llama4"):
            given["token_type_ids" if family == "gemma3" else "mm_token_type_ids"] = kinds
    if way == "embeddings":
        given["inputs_embeds"] = model(family).get_input_embeddings()(given.pop("input_ids")).detach()
    return given


WAYS = {  # which rows have an image, and the padding of the first one
    "image": ([True], 0),
    "text": ([False], 0),
    "embeddings": ([False], 0),
    "images, padded": ([True, True], PADDING),
    "text and image, padded": ([False, True], PADDING),
}


def generate(family: str, given: dict, cache=None, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens `(B, T)`, and the logits that chose them, `(B, NEW, vocab)`."""
    out = model(family).generate(
        **given,
        **how,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
def generate_by_hand(family: str, given: dict, cache=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with forwards alone, from embeddings too."""
    out = model(family)(**given, past_key_values=cache, use_cache=True)
    logits, mask = [out.logits[:, -1]], given["attention_mask"]
    for _ in range(NEW - 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        ids = logits[-1].argmax(-1, keepdim=True)
        out = model(family)(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values)
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1).argmax(-1), torch.stack(logits, 1)


def compare(family: str, run, expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """`run(cache)` on an enabled model: stock's numbers, or the reference's tokens; all attention read our cache."""
    seeing = model(family)
    for name in ("static", "int8"):
        with hf_kvattn.enabled(seeing):
            cache = CACHES[name](seeing.config)
            with served(cache) as calls:
                tokens, logits = run(cache)
            if name == "int8":
                with hf_kvattn.backend("reference"):
                    expected = run(CACHES[name](seeing.config))
        assert torch.equal(tokens, expected[0]), name
        assert name == "int8" or far(logits, expected[1]) < CLOSE
        assert cache.get_seq_length() == LENGTH + NEW - 1 and len(calls) >= NEW * len(cache.kv_layers)
        assert all(call.from_cache for call in calls) and any(call.packed for call in calls) == (name == "int8")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_sees_generates_as_stock(family, way):
    given = inputs(family, way)
    run = functools.partial(generate, family, given)
    if way == "embeddings" and family in ("gemma3", "gemma4"):
        for enabled in (contextlib.nullcontext(), hf_kvattn.enabled(model(family))):
            with enabled, pytest.raises(ValueError, match="You passed `inputs_embeds` to `.generate"):
                run()
        run = functools.partial(generate_by_hand, family, given)
    expected = run()
    assert expected[0][:, -NEW:].unique().numel() > 3, "the tokens must vary, or equality says little"
    compare(family, run, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_matters(family):
    """Or the tests above compared texts: other pixels, and what the model knows of the places of an image's tokens."""
    one, other = (inputs(family, "image", seed) for seed in (2, 3))
    expected, changed = generate(family, one), generate(family, other)
    assert far(changed[1][:, 0], expected[1][:, 0]) > FAR
    compare(family, functools.partial(generate, family, other), changed)
    kinds = one.pop("mm_token_type_ids", one.pop("token_type_ids", None))
    if kinds is not None and not family.startswith("qwen"):  # they see one another, also those after them
        causal = generate(family, one)
        assert far(causal[1][:, 0], expected[1][:, 0]) > FAR
        compare(family, functools.partial(generate, family, one), causal)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prefill_chunk_size": 20}], ids=["beams", "prompt in parts"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama4"])  # stock's raises
def test_images_by_other_ways(family, how):
    """A part ends within an image, whose tokens see one another where the model says so."""
    run = functools.partial(generate, family, inputs(family, "text and image, padded"), **how)
    expected = run()
    with hf_kvattn.enabled(model(family), cache="static"):
        tokens, logits = run()
    assert torch.equal(tokens, expected[0])
    assert "num_beams" in how or far(logits, expected[1]) < CLOSE
