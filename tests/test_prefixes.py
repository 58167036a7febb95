"""`PrefixStore`: what it finds, keeps and removes, and that an answer is what it would be without it."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from cache_table import ALL, contents, forward, same, tokens
from model_sweep import model_of
from models import generate, prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.integrations.prefixes import PrefixStore, fresh_cache

IDS = prompt(300, 1)["input_ids"]
KINDS = {
    "static": StaticKVCache,
    "int4": functools.partial(QuantizedKVCache, bits=4, group_size=16),
    "sliding": functools.partial(SlidingWindowKVCache, window=24, sinks=4),
}


def enabled(kind="static", model=None):
    cache = KINDS.get(kind, kind) if isinstance(kind, str) else kind
    return hf_kvattn.enable(tiny_model() if model is None else model, cache=cache)


@pytest.fixture
def model():
    return enabled()


@torch.no_grad()
def fill(model, count: int, ids: torch.Tensor = IDS, chunk: int | None = None):
    """A cache of the first `count` tokens."""
    cache = fresh_cache(model)
    for part in ids[:, :count].split(chunk or count, 1):
        model(part, past_key_values=cache)
    return cache


def put(store, model, count: int, ids: torch.Tensor = IDS) -> None:
    store.put(model, fill(model, count, ids), ids[:, :count])


def found(store, model, ids: torch.Tensor = IDS) -> int:
    cache = store.longest(model, fresh_cache(model), ids)
    return 0 if cache is None else cache.get_seq_length()


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def branch(at: int, count: int = 250) -> torch.Tensor:
    """`count` tokens, the first `at` of them those of `IDS`, and the next another one."""
    return torch.cat([IDS[:, :at], 3 + (IDS[:, at:count] - 2) % 125], 1)


# What a cut leaves is what was stored, unchanged, and of exact tokens what a shorter prompt leaves.


@pytest.mark.parametrize("stored", [40, 67, 110])
@pytest.mark.parametrize("kind", [*ALL, "sliding-layers", "blocks-in-rings"])
def test_a_cut_that_is_called_exact_changes_nothing_it_keeps(kind, stored):
    family = "mistral" if kind in ("sliding-layers", "blocks-in-rings") else "llama"
    changes = {"sliding_window": 30} if family == "mistral" else {}
    make = {"sliding-layers": StaticKVCache, "blocks-in-rings": ALL["int8"]}.get(kind) or ALL[kind]
    config, new, exact = tiny_config(family, **changes), tokens(stored), set()
    long = make(config)
    forward(long, new)
    for wanted in range(1, stored + 1):
        count = make(config).exact_prefix(stored, wanted)
        assert 0 <= count <= wanted
        if not count or count in exact or (count % 5 and (count - 4) % 32 and count != stored):
            exact.add(count)
            continue
        exact.add(count)
        cut = long.fork()
        cut.crop(count - stored)
        assert cut.get_seq_length() == count
        if kind != "sliding-layers":
            assert all(torch.equal(t, before[:, :, : t.shape[2]])
                       for t, before in zip(contents(cut), contents(long), strict=True))  # fmt: skip
        if kind in ("static", "static-sized", "sliding-late", "sliding-layers"):
            short = make(config)
            forward(short, [(k[:, :, :count], v[:, :, :count]) for k, v in new])
            for cache in (cut, short):
                forward(cache, tokens(9, seed=1))
            assert same(contents(cut), contents(short))
    whole = {0, stored}
    blocks = {*range(1, 5), *range(4, stored, 32), stored}
    every = set(range(1, stored + 1))
    expected = {"static": every, "static-sized": every, "quantized-late": {*range(5), stored}, "sliding-late": whole}
    expected |= {"sliding-layers": every if stored <= 30 + 64 else whole, "blocks-in-rings": whole}
    assert exact == expected.get(kind, blocks)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2", "falcon_h1"])
def test_recurrent_states_are_taken_whole_or_not_at_all(family):
    cache = StaticKVCache(model_of(family).config)
    assert cache.exact_prefix(50, 50) == 50 and not any(cache.exact_prefix(50, wanted) for wanted in range(50))


# Finding.


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_longest_prefix_is_found(model, tmp_path, in_memory):
    store = PrefixStore(None if in_memory else tmp_path)
    for count in (120, 40, 200):
        put(store, model, count)
    put(store, model, 200, branch(60))
    for each in (store,) if in_memory else (store, PrefixStore(tmp_path)):
        assert found(each, model) == 200
        assert found(each, model, IDS[:, :200]) == 199  # at least one token is computed
        assert found(each, model, IDS[:, :90]) == 89
        assert found(each, model, branch(150)) == 150
        assert found(each, model, branch(60)) == 200
        assert found(each, model, branch(31)) == 0 and found(each, model, branch(32)) == 32
        assert found(each, model, IDS[0].tolist()) == found(each, model, {"input_ids": IDS}) == 200
    assert found(store, model, IDS.flip(1)) == 0


def test_a_file_is_read_once_and_forked(model, tmp_path, monkeypatch):
    put(PrefixStore(tmp_path), model, 200)
    from hf_kvattn.integrations import prefixes

    loads, load = [], prefixes.load_cache
    monkeypatch.setattr(prefixes, "load_cache", lambda path, *args: loads.append(path) or load(path, *args))
    store = PrefixStore(tmp_path)
    forks = [store.longest(model, fresh_cache(model), IDS) for _ in range(3)]
    assert loads == caches(tmp_path)
    before = contents(forks[0])
    generate(model, {"input_ids": IDS[:, :210]}, 5, past_key_values=forks[1])
    assert same(contents(forks[0]), before) and same(contents(store.longest(model, fresh_cache(model), IDS)), before)


def test_blocks_are_cut_between_and_states_and_windows_are_not(tmp_path):
    for kind, expected in (("int4", 4 + 4 * 32), ("sliding", 0)):
        model, store = enabled(kind), PrefixStore(tmp_path)
        put(store, model, 200)
        assert found(store, model) == 200 and found(store, model, branch(150)) == expected
    hybrid = hf_kvattn.enable(model_of("lfm2"), cache="static")
    ids = IDS[:, :100] % hybrid.config.vocab_size
    put(store, hybrid, 80, ids)
    assert found(store, hybrid, ids) == 80 and found(store, hybrid, ids[:, :60]) == 0


def test_models_kinds_weights_and_dtypes_are_never_mixed_up(tmp_path):
    store = PrefixStore(tmp_path)
    put(store, enabled(), 100)
    others = [enabled("int4"), enabled("int8"), enabled(model=tiny_model(rope_parameters={"rope_theta": 9e3}))]
    changed = enabled()
    with torch.no_grad():
        changed.lm_head.weight[5, 7] += 1e-3  # one number
    others += [changed, enabled().to(torch.bfloat16), enabled(model=tiny_model("qwen2"))]
    for count, other in enumerate(others, 1):
        assert found(PrefixStore(tmp_path), other) == 0
        put(store, other, 90)
        assert found(PrefixStore(tmp_path), other) == 90 and len(caches(tmp_path)) == count + 1
    assert found(PrefixStore(tmp_path), enabled()) == 100
    memory = PrefixStore(None)
    put(memory, others[-3], 90)
    assert found(memory, others[-3]) == 90 and not any(found(memory, each) for each in (*others[:3], *others[4:]))


# The answer is the same.


@pytest.mark.parametrize("kind", [*KINDS, "hybrid"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_two_turns_give_the_tokens_of_one_cache_that_goes_on(kind, in_memory, tmp_path):
    model = hf_kvattn.enable(model_of("falcon_h1"), cache="static") if kind == "hybrid" else enabled(kind)
    ids = IDS % model.config.vocab_size
    first, cache, folder = {"input_ids": ids[:, :100]}, fresh_cache(model), None if in_memory else tmp_path
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = [model.generate(**first, **options, past_key_values=cache)]
    second = {"input_ids": torch.cat([expected[0], ids[:, 200:230]], 1)}
    expected.append(model.generate(**second, **options, past_key_values=cache))
    lengths: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds" if kwargs.get("input_ids") is None
                                                           else "input_ids"].shape[1]), with_kwargs=True
    )  # fmt: skip
    store = PrefixStore(folder)
    answers = [store.generate(model, **first, **options)]
    store = store if in_memory else PrefixStore(folder)
    answers.append(store.generate(model, **second, **options, attention_mask=torch.ones_like(second["input_ids"])))
    assert all(map(torch.equal, answers, expected))
    assert [n for n in lengths if n > 1] == [100, 31]  # the last token of an answer is not in the cache
    if kind == "static":
        assert torch.equal(answers[1], model.generate(**second, **options))
        other = {"input_ids": torch.cat([ids[:, :70], ids[:, 230:250]], 1)}
        assert torch.equal(store.generate(model, **other, **options), model.generate(**other, **options))
        assert lengths[-24:].count(20) == 1  # 70 of them were known


def test_quantized_tokens_are_cut_between_blocks(tmp_path):
    model, store = enabled("int4"), PrefixStore(tmp_path)
    put(store, model, 200)
    other = branch(150, 170)
    cache = fill(model, 200)
    cache.crop(4 + 4 * 32 - 200)
    expected = generate(model, {"input_ids": other}, past_key_values=cache)[0]
    assert torch.equal(store.generate(model, input_ids=other, max_new_tokens=24, do_sample=False), expected)


def test_what_is_no_single_row_runs_without_the_store(model, tmp_path):
    store, inputs = PrefixStore(tmp_path), prompt(60, 2, left_padding=5)
    put(store, model, 50, inputs["input_ids"][1:])
    one = {name: t[1:] for name, t in inputs.items()}
    calls = [inputs, {name: t[:1] for name, t in inputs.items()}, one | {"num_beams": 2}, one | {"use_cache": False}]
    calls += [one | {"cache_implementation": "dynamic"}, {"inputs": one["input_ids"]}]
    calls += [one | {"num_return_sequences": 2, "do_sample": True, "top_k": 1}]
    for kwargs in calls:
        mine = store.generate(model, **kwargs, max_new_tokens=4)
        assert torch.equal(mine, model.generate(**kwargs, max_new_tokens=4))
    own = StaticKVCache(model.config)
    store.generate(model, **one, past_key_values=own, max_new_tokens=4)
    assert own.get_seq_length() == 63 and len(caches(tmp_path)) == 1
    got = store.generate(model, **one, max_new_tokens=4, return_dict_in_generate=True)
    assert got.past_key_values.get_seq_length() == 63 and len(caches(tmp_path)) == 2


# Room.


def test_what_was_used_longest_ago_goes_first(model, tmp_path):
    put(PrefixStore(tmp_path), model, 100)
    size = caches(tmp_path)[0].stat().st_size
    (tmp_path / "mine.safetensors").write_bytes(b"x" * 10 * size)  # nobody else's files are touched or counted
    store = PrefixStore(tmp_path, limit_bytes=4 * size)
    prompts = [IDS.roll(50 * i, 1) for i in range(5)]
    for ids in prompts[1:4]:
        put(store, model, 100, ids)
    assert len(caches(tmp_path)) == 5 and found(PrefixStore(tmp_path), model, IDS) == 100  # now used last
    put(store, model, 100, prompts[4])
    there = [found(PrefixStore(tmp_path), model, ids) for ids in [IDS, *prompts[1:]]]
    assert there == [100, 0, 100, 100, 100]
    assert len(list(tmp_path.iterdir())) == 1 + 2 * 4
    put(PrefixStore(tmp_path, limit_bytes=size // 2), model, 100, prompts[1])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_memory_has_the_same_limit(model):
    one = fill(model, 100).nbytes
    store = PrefixStore(None, limit_bytes=2 * one)
    prompts = [IDS.roll(50 * i, 1) for i in range(3)]
    for ids in prompts[:2]:
        put(store, model, 100, ids)
    assert found(store, model, prompts[0]) == 100
    put(store, model, 100, prompts[2])
    assert [found(store, model, ids) for ids in prompts] == [100, 0, 100]
    small = PrefixStore(None, limit_bytes=one - 1)
    put(small, model, 100)
    assert found(small, model) == 0


# Files.


@pytest.mark.parametrize("spoil", ["flipped", "cut", "empty", "other", "ids", "odd-ids"])
def test_a_poisoned_file_is_removed_and_named_and_the_answer_comes(model, tmp_path, caplog, spoil):
    store, inputs = PrefixStore(tmp_path), {"input_ids": IDS[:, :120]}
    put(store, model, 50)
    put(store, model, 100)
    small, large = caches(tmp_path)
    raw = large.read_bytes()
    if spoil.endswith("ids"):
        ids = large.with_suffix(".ids")
        ids.write_bytes(b"odd" if spoil == "odd-ids" else ids.read_bytes()[:-8])
    else:
        large.write_bytes({"flipped": raw[:-1] + bytes([raw[-1] ^ 1]), "cut": raw[:-100], "empty": b"",
                           "other": small.read_bytes()}[spoil])  # fmt: skip
    caplog.set_level(logging.WARNING, "hf_kvattn")
    store = PrefixStore(tmp_path)
    logging.getLogger("hf_kvattn").addHandler(caplog.handler)
    try:
        assert found(store, model, IDS[:, :120]) == 50
        answer = store.generate(model, **inputs, max_new_tokens=5, do_sample=False)
    finally:
        logging.getLogger("hf_kvattn").removeHandler(caplog.handler)
    assert torch.equal(answer, generate(model, inputs, 5)[0])
    lines = {record.getMessage() for record in caplog.records}
    assert len(lines) == 1 and str(large) in lines.pop() and not large.exists()
    assert found(PrefixStore(tmp_path), model) == 120


def test_a_file_that_went_is_a_miss_without_a_word(model, tmp_path, caplog):
    store = PrefixStore(tmp_path)
    put(PrefixStore(tmp_path), model, 100)
    assert store._known(store._kind(model, fresh_cache(model), model.dtype))
    caches(tmp_path)[0].unlink()
    assert found(store, model) == 0 and not list(tmp_path.iterdir()) and not caplog.records


def test_a_full_disk_does_not_take_the_answer_away(model, tmp_path, monkeypatch):
    from hf_kvattn.integrations import prefixes

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prefixes, "save_cache", full)
    inputs = {"input_ids": IDS[:, :100]}
    answer = PrefixStore(tmp_path).generate(model, **inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(answer, generate(model, inputs, 5)[0]) and not list(tmp_path.iterdir())


def test_what_is_written_is_its_owners(model, tmp_path):
    store = PrefixStore(tmp_path / "new")
    put(store, model, 100)
    rights = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert rights == {0o600} and stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def hammer(folder: str, seed: int, limit_bytes: int, answers) -> None:
    """Stores and finds prefixes, poisons some files, and compares every answer with one without a store."""
    torch.set_num_threads(1)
    logging.getLogger("hf_kvattn").setLevel(logging.ERROR)
    model = enabled()
    generator, counts = torch.Generator().manual_seed(seed), {"reused": 0, "poisoned": 0}
    for turn in range(18):
        store = PrefixStore(folder, limit_bytes)
        at, kind = (int(torch.randint(n, (), generator=generator)) for n in (150, 4))
        ids = IDS.roll(50 * kind, 1)[:, : 60 + at]  # the same few conversations in both processes
        counts["reused"] += found(store, model, ids) > 0
        answer = store.generate(model, input_ids=ids, max_new_tokens=3, do_sample=False)
        if not torch.equal(answer, model.generate(ids, max_new_tokens=3, do_sample=False)):
            raise AssertionError(f"turn {turn} of process {seed}")
        if turn % 6 == 5:
            for path in caches_of(folder)[:1]:
                try:
                    os.truncate(path, 1000)
                    counts["poisoned"] += 1
                except FileNotFoundError:
                    pass
    answers.put(counts)


def caches_of(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def test_two_processes_share_a_folder(model, tmp_path):
    put(PrefixStore(tmp_path), model, 200)
    limit_bytes = 4 * caches(tmp_path)[0].stat().st_size
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    processes = [spawn.Process(target=hammer, args=(str(tmp_path), seed, limit_bytes, answers)) for seed in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    for counts in (answers.get(timeout=10) for _ in processes):
        assert counts["reused"] > 5 and counts["poisoned"] > 1
    assert sum(path.stat().st_size for path in caches(tmp_path)) <= limit_bytes
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".ids"}


# What is refused.


def test_impossible_arguments_are_named(model, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "no" / "folder"):
        with pytest.raises(ValueError, match=f"{folder} is no folder"):
            PrefixStore(folder)
    for limit in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"limit_bytes must be .*, got {limit}"):
            PrefixStore(None, limit)
    store, cache = PrefixStore(tmp_path), fill(model, 50)
    for ids, match in ((IDS[:, :49], r"\(49,\)"), (IDS.expand(2, -1), r"one row of them, got int64 \(2, 300\)"),
                       (IDS[:, :50].float(), "float32"), ("words", "<U5")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            store.put(model, cache, ids)
    with pytest.raises(ValueError, match="an empty cache is not stored"):
        store.put(model, fresh_cache(model), IDS)
    offloaded = StaticKVCache(model.config, max_cache_len=60, offload=True)
    model(IDS[:, :50], past_key_values=offloaded)
    with pytest.raises(ValueError, match="offload=True is not stored"):
        store.put(model, offloaded, IDS[:, :50])
    offloading = enabled(functools.partial(StaticKVCache, max_cache_len=60, offload=True))
    with pytest.raises(ValueError, match="offload=True is not stored"):  # before anything is computed
        store.generate(offloading, input_ids=IDS[:, :50])
    own = enabled(type("Own", (StaticKVCache,), {}))
    with pytest.raises(ValueError, match=r"caches that a folder can hold are \['StaticKVCache', .*, got Own"):
        store.generate(own, input_ids=IDS[:, :50])
    assert PrefixStore(None).generate(own, input_ids=IDS[:, :50], max_new_tokens=3).shape == (1, 53)
    for other in (tiny_model(), hf_kvattn.enable(tiny_model())):
        with pytest.raises(ValueError, match=r"enable\(model, cache='static'\)"):
            store.generate(other, input_ids=IDS)
    assert not list(tmp_path.glob("*-*"))
    with torch.device("meta"):
        elsewhere = type(model)(model.config)
    with pytest.raises(ValueError, match="on the device meta"):
        store.put(elsewhere, cache, IDS[:, :50])
