"""What a file holds is all that the next token depends on, whatever was done to the cache before."""

import copy
import functools

import pytest
import torch
from cache_table import ALL
from models import tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache, load_cache, save_cache

SHORT = {"max_position_embeddings": 64}  # stored keys are rotated back from token 158 on, and later again
KINDS = {name: ("llama", {}, make) for name, make in ALL.items()} | {
    "sliding": ("llama", SHORT, functools.partial(SlidingWindowKVCache, window=15)),
    "sinks": ("llama", SHORT, functools.partial(SlidingWindowKVCache, window=12, sinks=3)),
    "sinks-without-rope": ("smollm3", SHORT, functools.partial(SlidingWindowKVCache, window=12, sinks=3)),
    "sinks-over-windows": ("gemma3", {}, functools.partial(SlidingWindowKVCache, window=12, sinks=3)),
    "rings": ("mistral", {}, StaticKVCache),
    "rings-of-blocks": ("mistral", {}, functools.partial(QuantizedKVCache, bits=8, group_size=16, skip_layers=(0,))),
    "residual": ("llama", {}, functools.partial(QuantizedKVCache, bits=2, group_size=16, residual_length=5, sinks=0)),
}


class Chat:
    """A cache, what it was filled with, and a model that goes on from it."""

    def __init__(self, model, cache, padding: list[int]):
        self.model, self.cache, self.mask = model, cache, torch.zeros(len(padding), 0, dtype=torch.long)
        self.padding, self.random = padding, torch.Generator().manual_seed(1)

    @torch.no_grad()
    def tokens(self, count: int) -> None:
        limit = self.cache.get_max_length()
        if 0 < limit < self.mask.shape[1] + count + 31:
            return  # no room
        new = torch.ones(len(self.mask), count, dtype=torch.long)
        for row, padding in enumerate(self.padding if not self.mask.shape[1] else ()):
            new[row, :padding] = 0
        self.mask = torch.cat([self.mask, new], 1)
        ids = torch.randint(3, 128, new.shape, generator=self.random)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -count:]
        past = {"attention_mask": self.mask, "position_ids": positions, "past_key_values": self.cache}
        self.logits = self.model(ids, **past).logits[self.mask[:, -count:] == 1]

    def rows(self, rows: list[int]) -> None:
        self.cache.batch_select_indices(torch.tensor(rows))
        self.mask = self.mask[rows]

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.mask = self.mask[:, : self.mask.shape[1] - count]

    def fork(self, _) -> None:
        self.parent, self.cache = self.cache, self.cache.fork()


# Lengths cross windows of 8 to 15 tokens, blocks of 32, the slack of a ring (64), and the limit of positions (158).
LIFE = [("tokens", 5), ("tokens", 1), ("rows", [0, 0, 2]), ("crop", 2), ("tokens", 9), ("tokens", 1), ("repeat", 2),
        ("rows", [1, 4, 0, 3, 5, 2]), ("tokens", 1), ("fork", None), ("tokens", 30), ("crop", 3), ("rows", [0]),
        ("tokens", 1), ("tokens", 70), ("crop", 5), ("tokens", 50), ("tokens", 1), ("repeat", 2), ("tokens", 40),
        ("crop", 1), ("tokens", 1)]  # fmt: skip


BEGINS_LATE = [(kind, [2, 4, 6]) for kind in KINDS if "sink" in kind or "sliding" in kind]  # a row, after the prompt


@pytest.mark.parametrize(("kind", "padding"), [*((kind, [3, 0, 1]) for kind in KINDS), *BEGINS_LATE], ids=str)
def test_a_loaded_cache_goes_on_like_the_live_one(kind, padding, tmp_path):
    family, changes, make = KINDS[kind]
    model = hf_kvattn.enable(tiny_model(family, **changes))
    chat = Chat(model, make(model.config), padding)
    for name, argument in LIFE:
        getattr(chat, name)(argument)
        save_cache(chat.cache, tmp_path / "cache")
        live, loaded = copy.deepcopy(chat), copy.deepcopy(chat)
        loaded.cache = load_cache(tmp_path / "cache", model.config)
        for step in (1, 29):
            live.tokens(step), loaded.tokens(step)
            assert torch.equal(live.logits, loaded.logits), (name, argument, step)
    seen = chat.cache.layers[0].seen
    rebased = getattr(chat.cache.layers[0], "rebased", 0)
    assert seen > 190 if chat.cache.get_max_length() < 0 else seen > 100
    assert rebased > 0 if changes else rebased == 0


def test_a_loaded_stream_refuses_what_the_live_one_refuses(tmp_path):
    model = hf_kvattn.enable(tiny_model())
    chat = Chat(model, SlidingWindowKVCache(model.config, window=12), [0, 2])
    chat.tokens(20)
    save_cache(chat.cache, tmp_path / "cache")
    for cache in (chat.cache, load_cache(tmp_path / "cache", tiny_config())):
        for position, message in ((19, "run backwards"), (21, "a jump ahead")):
            with pytest.raises(ValueError, match=message):
                model(
                    torch.ones(2, 1, dtype=torch.long), position_ids=torch.tensor([[position]]), past_key_values=cache
                )


def test_what_was_interrupted_is_not_saved(tmp_path):
    """All layers hold as many tokens, but the last one has not looked for sinks among the newest."""
    model = hf_kvattn.enable(tiny_model())
    cache = SlidingWindowKVCache(model.config, window=12, sinks=6)
    model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    cache.layers[2].sink_inputs = lambda q, leftpad: [][0]
    with pytest.raises(IndexError):
        model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert [layer.seen for layer in cache.layers] == [4, 4, 4]
    with pytest.raises(ValueError, match=r"interrupted half way: layers hold 3 to 4 tokens; crop\(-1\)"):
        save_cache(cache, tmp_path / "cache")
    cache.layers[1].inconsistent = "crop"
    with pytest.raises(ValueError, match="layer 1: crop was interrupted half way; only reset"):
        save_cache(cache, tmp_path / "cache")
    assert not list(tmp_path.iterdir())
