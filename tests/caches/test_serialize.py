"""Caches saved, loaded, pickled, copied and moved."""

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from impostor import fake_cuda, on_gpu
from models import generate, prompt, tiny_config, tiny_model
from saved_caches import KINDS, append, assert_same, contents, every_kind
from transformers import BatchEncoding, DynamicCache

import hf_kvattn
from hf_kvattn import QuantizedKVCache, StaticKVCache, load_cache, save_cache
from hf_kvattn.caches import serialize
from hf_kvattn.kernels import dispatch


def detours(path: Path) -> dict:
    """Ways in which a cache may travel and come back."""

    def disk(cache):
        save_cache(cache, path)
        return load_cache(path, tiny_config())

    return {"disk": disk, "pickle": lambda cache: pickle.loads(pickle.dumps(cache)), "deepcopy": copy.deepcopy}


every_detour = pytest.mark.parametrize("way", ["disk", "pickle", "deepcopy"])


@every_detour
@every_kind
@pytest.mark.parametrize("left_padding", [0, 5])
def test_generation_goes_on_with_the_same_tokens(kind, way, left_padding, tmp_path):
    model, start = tiny_model(), prompt(70, left_padding=left_padding)
    cache = KINDS[kind](model.config)
    with hf_kvattn.enabled(model):
        ids, _ = generate(model, start, 20, past_key_values=cache)
        mask = torch.cat([start["attention_mask"], torch.ones(2, 20, dtype=torch.long)], 1)
        turn = {"input_ids": ids, "attention_mask": mask}
        copied = detours(tmp_path / "cache")[way](cache)
        assert_same(cache, copied)
        expected, logits = generate(model, turn, 60, past_key_values=cache)
        found, found_logits = generate(model, turn, 60, past_key_values=copied)
    assert torch.equal(found, expected) and torch.equal(found_logits, logits)
    assert_same(cache, copied)
    if kind.startswith("static"):
        assert torch.equal(found, generate(model, start, 80)[0])


@every_detour
@every_kind
@pytest.mark.parametrize("length", [1, 4, 40, 101])
def test_what_is_appended_later_is_stored_as_without_the_detour(kind, way, length, tmp_path):
    cache = append(KINDS[kind](tiny_config()), length)
    copied = detours(tmp_path / "cache")[way](cache)
    assert_same(cache, copied)
    before = {name: tensor.clone() for name, tensor in contents(copied).items()}
    append(cache, 250, seed=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in contents(copied).items())
    append(copied, 250, seed=1)
    assert_same(cache, copied)
    for made in (cache, copied):
        made.reorder_cache(torch.tensor([1, 1]))
        made.crop(-60)
        append(made, 33, seed=2)
    assert_same(cache, copied)


@every_detour
@pytest.mark.parametrize(
    "make", [StaticKVCache, partial(QuantizedKVCache, bits=4, group_size=16)], ids=["exact", "int4"]
)
def test_rings_of_layers_with_a_window_travel_too(make, way, tmp_path):
    model, start = tiny_model("mistral"), prompt(300)
    with hf_kvattn.enabled(model):
        cache = make(model.config)
        ids, _ = generate(model, start, 20, past_key_values=cache)
        if way == "disk":
            save_cache(cache, tmp_path / "cache")
            copied = load_cache(tmp_path / "cache", tiny_config("mistral"))
        else:
            copied = detours(tmp_path / "cache")[way](cache)
        assert_same(cache, copied)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected, found = (generate(model, turn, 60, past_key_values=c) for c in (cache, copied))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert_same(cache, copied)


def test_a_capacity_given_at_first_still_holds_after_loading(tmp_path):
    save_cache(append(StaticKVCache(tiny_config(), max_cache_len=12), 9), tmp_path / "cache")
    cache = load_cache(tmp_path / "cache", tiny_config())
    assert cache.layers[0].capacity == 12 and cache.get_max_length() == 12
    with pytest.raises(ValueError, match="9 stored tokens and 4 new ones exceed max_cache_len=12"):
        append(cache, 4)
    append(cache, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_kind
def test_every_dtype_and_only_the_filled_part(kind, dtype, tmp_path):
    cache = append(KINDS[kind](tiny_config()), 100, dtype=dtype)
    save_cache(cache, tmp_path / "cache")
    stored_bytes = sum(t.numel() * t.element_size() for t in contents(cache).values() if t.dim() > 1)
    assert 0 < (tmp_path / "cache").stat().st_size - stored_bytes < 12_000  # the header
    assert_same(load_cache(tmp_path / "cache", tiny_config()), cache)


def test_memory_of_the_file_is_not_the_caches(tmp_path):
    path = tmp_path / "cache"
    save_cache(append(StaticKVCache(tiny_config()), 20), path)
    cache, raw = load_cache(path, tiny_config()), path.read_bytes()
    append(cache, 1)
    cache.layers[0]._k.zero_()
    assert path.read_bytes() == raw
    path.write_bytes(b"")
    assert cache.layers[1].keys.isfinite().all()


def test_token_ids_are_compared(tmp_path):
    path, ids = tmp_path / "cache", torch.arange(18).view(2, 9)
    cache = append(StaticKVCache(tiny_config()), 9)
    save_cache(cache, path, token_ids=ids)
    for same in (ids, ids.int(), ids.tolist()):
        assert_same(load_cache(path, tiny_config(), token_ids=same), cache)
    load_cache(path, tiny_config())
    with pytest.raises(ValueError, match=r"another prefix: the sha256 .* [0-9a-f]{64}, of those given [0-9a-f]{64}"):
        load_cache(path, tiny_config(), token_ids=ids + 1)
    with pytest.raises(ValueError, match=r"token_ids are \(2, 8\), the cache holds \(2, 9\)"):
        load_cache(path, tiny_config(), token_ids=ids[:, :8])
    for wrong in (ids.flatten(), ids[:, :8], ids[:1]):
        with pytest.raises(ValueError, match=r"the cache holds \(2, 9\) tokens"):
            save_cache(cache, path, token_ids=wrong)
    for wrong in (ids.float(), ids > 3, ids + 1j, [[1 << 70] * 9] * 2, [None], "text"):
        with pytest.raises(ValueError, match="token_ids must be integers"):
            save_cache(cache, path, token_ids=wrong)
    save_cache(append(StaticKVCache(tiny_config()), 9, batch=1), path, token_ids=range(9))
    load_cache(path, tiny_config(), token_ids=[list(range(9))])
    save_cache(cache, path, token_ids=BatchEncoding({"input_ids": ids, "attention_mask": ids}))
    load_cache(path, tiny_config(), token_ids={"input_ids": ids.tolist()})
    with pytest.raises(ValueError, match="token_ids must be integers"):
        load_cache(path, tiny_config(), token_ids={"ids": ids})
    save_cache(cache, path)
    with pytest.raises(ValueError, match="saved without token_ids"):
        load_cache(path, tiny_config(), token_ids=ids)


def saved(cache, path, **token_ids):
    save_cache(cache, path, **token_ids)
    return load_cache(path, tiny_config())


@every_kind
def test_a_loaded_cache_refuses_another_prompt(kind, tmp_path):
    path, ids = tmp_path / "cache", prompt(40)["input_ids"]
    live = append(KINDS[kind](tiny_config()), 30)
    assert live.known_prefix is None and saved(live, path).known_prefix is None
    cache = saved(live, path, token_ids=ids[:, :30])
    for same in (cache, cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), saved(cache, path)):
        assert same.known_prefix == cache.known_prefix and same.known_prefix.length == 30
        for good in (ids, ids[:, :30], ids.int(), ids.clone().index_fill_(1, torch.arange(30, 40), 7)):
            same.check_prompt(good)
        for other in (ids + 1, ids.flip(0), ids[:1], ids[:, 1:], ids[:, :29], ids[:, 30:], ids[:, :0]):
            with pytest.raises(ValueError, match=r"input_ids .* do not begin with the 30 tokens .* load the cache of"):
                same.check_prompt(other)
    append(cache, 5)
    cache.reorder_cache(torch.tensor([0, 1]))
    cache.crop(-5)
    known = saved(append(cache, 2), path).known_prefix
    assert known == cache.known_prefix and known.length == 30
    load_cache(path, tiny_config(), token_ids=ids[:, :30])
    for change in (
        lambda cache: cache.crop(-3),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.reset(),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        changed.check_prompt(ids + 1)
        assert changed.known_prefix is None


def test_a_model_that_was_converted_loads_after_what_the_message_says(tmp_path):
    model = tiny_model(dtype=torch.float32).to(torch.bfloat16)
    cache = StaticKVCache(model.config)
    model(**prompt(), past_key_values=cache)
    save_cache(cache, tmp_path / "cache")
    with pytest.raises(ValueError, match="holds torch.bfloat16, and the config says torch.float32") as found:
        load_cache(tmp_path / "cache", model.config)
    config, line = model.config, str(found.value).split("set ")[1]
    assert line == "config.get_text_config().dtype = torch.bfloat16"
    exec(line)
    assert_same(load_cache(tmp_path / "cache", config), cache)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("qwen2"), "another model: model_type is 'llama', in the config 'qwen2'"),
        (tiny_config(num_hidden_layers=2), "num_hidden_layers is 3, in the config 2"),
        (tiny_config(num_key_value_heads=4), "num_key_value_heads is 2, in the config 4"),
        (tiny_config(head_dim=32), "head_dim is 16, in the config 32"),
        (tiny_config(hidden_size=96), "hidden_size is 64, in the config 96"),
        (tiny_config(vocab_size=130), "vocab_size is 128, in the config 130"),
        (tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "rope_parameters is .*500000.0"),
        (tiny_config(dtype=torch.bfloat16), "holds torch.float32, and the config says torch.bfloat16"),
        (tiny_config(dtype="float16"), "holds torch.float32, and the config says torch.float16"),
    ],
    ids=["type", "layers", "kv-heads", "head-dim", "hidden", "vocabulary", "rope", "dtype", "dtype-text"],
)
def test_another_model_or_dtype_is_refused_with_both_names(config, message, tmp_path):
    save_cache(append(StaticKVCache(tiny_config()), 9), tmp_path / "cache")
    with pytest.raises(ValueError, match=message):
        load_cache(tmp_path / "cache", config)


def test_a_windowed_model_is_another_one(tmp_path):
    save_cache(append(StaticKVCache(tiny_config("mistral")), 9), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"sliding_windows is \[8, 8, 8\], in the config \[4, 4, 4\]"):
        load_cache(tmp_path / "cache", tiny_config("mistral", sliding_window=4))
    load_cache(tmp_path / "cache", tiny_config("mistral"))


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "cache"

    class Mine(StaticKVCache):
        pass

    uneven = append(StaticKVCache(tiny_config()), 9)
    uneven.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    half = StaticKVCache(tiny_config())
    half.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16), 0)
    forgotten = append(StaticKVCache(tiny_config()), 9)
    forgotten.reset()
    for cache, message in (
        (StaticKVCache(tiny_config()), r"layers \[0, 1, 2\] of the cache hold no tokens"),
        (half, r"layers \[1, 2\] of the cache hold no tokens"),
        (forgotten, "nothing to save"),
        (uneven, r"interrupted half way: layers hold 9 to 10 tokens; crop\(-1\) goes back"),
        (append(Mine(tiny_config()), 9), r"caches that can be saved are .*QuantizedKVCache.*, got Mine"),
        (DynamicCache(config=tiny_config()), r"got DynamicCache: make one, as cache = StaticKVCache\(model.config\)"),
        ("cache", "got str"),
    ):
        with pytest.raises(ValueError, match=message):
            save_cache(cache, path)
    assert not list(tmp_path.iterdir())


def test_paths(tmp_path):
    cache, path = append(StaticKVCache(tiny_config()), 9), tmp_path / "cache"
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        save_cache(cache, tmp_path / "nowhere" / "cache")
    with pytest.raises(ValueError, match="is no file$"):
        load_cache(path, tiny_config())
    save_cache(cache, str(path))
    save_cache(append(cache, 1), path)  # a regular file is replaced
    assert load_cache(path, tiny_config()).get_seq_length() == 10
    assert path.stat().st_mode & 0o777 == 0o600 and list(tmp_path.iterdir()) == [path]

    link, folder, pipe = (tmp_path / name for name in ("link", "folder", "pipe"))
    link.symlink_to(path)
    folder.mkdir()
    os.mkfifo(pipe)
    assert_same(load_cache(link, tiny_config()), cache)
    for other in (link, folder, pipe):
        with pytest.raises(ValueError, match="a link, a folder or a device, and is not replaced"):
            save_cache(cache, other)
    for other in (folder, pipe):  # a pipe must not be opened: nobody writes to it
        with pytest.raises(ValueError, match="is no file, but a folder or a device"):
            load_cache(other, tiny_config())
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="is no file$"):
        load_cache(link, tiny_config())


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    save_cache(append(StaticKVCache(tiny_config()), 9), path)
    raw = path.read_bytes()
    code = (
        "import resource, sys, torch\n"
        "sys.path.insert(0, 'tests/helpers')\n"
        "from models import tiny_config\n"
        "from hf_kvattn import StaticKVCache, save_cache\n"
        "cache = StaticKVCache(tiny_config())\n"
        "for layer in range(3): cache.update(torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16), layer)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"  # as if the disk were full
        "try: save_cache(cache, sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert run.returncode == 0 and "cannot be written" in run.stdout, run.stderr
    assert path.read_bytes() == raw and list(tmp_path.iterdir()) == [path]

    def interrupted(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(serialize, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_cache(append(StaticKVCache(tiny_config()), 9), path)
    assert path.read_bytes() == raw and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, "tests/helpers")
from models import tiny_config
from saved_caches import append
from hf_kvattn import StaticKVCache, save_cache
from hf_kvattn.caches import serialize
from hf_kvattn.kernels import dispatch

def killed(tensors, filename, metadata):
    open(filename, "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)

serialize.save_file = killed
save_cache(append(StaticKVCache(tiny_config()), 9), sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such locks")
def test_what_a_killed_process_left_goes_with_the_next_save_and_what_is_being_written_stays(tmp_path, monkeypatch):
    cache = append(StaticKVCache(tiny_config()), 9)
    for _ in range(2):  # the second one removes what the first one left
        run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=Path(__file__).parents[2])
        assert run.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert (left / "cache").read_text() == "half"
    (tmp_path / ".kvcache-elsewhere-abcdefgh").mkdir()  # another machine's, whose locks may not be seen here
    started, may_end, save_file = threading.Event(), threading.Event(), serialize.save_file

    def slow(tensors, filename, metadata):
        monkeypatch.setattr(serialize, "save_file", save_file)
        started.set()
        assert may_end.wait(60)
        save_file(tensors, filename, metadata)

    monkeypatch.setattr(serialize, "save_file", slow)
    writer = threading.Thread(target=save_cache, args=(cache, tmp_path / "slow"))
    writer.start()
    assert started.wait(60) and not left.exists()
    mine = set(tmp_path.iterdir())
    save_cache(cache, tmp_path / "quick")
    assert set(tmp_path.iterdir()) == mine | {tmp_path / "quick"}
    may_end.set()
    writer.join(60)
    for name in ("slow", "quick"):
        assert_same(load_cache(tmp_path / name, tiny_config()), cache)
    assert {path.name for path in tmp_path.iterdir()} == {"slow", "quick", ".kvcache-elsewhere-abcdefgh"}


@every_kind
def test_moving(kind):
    cache = append(KINDS[kind](tiny_config()), 50)
    assert cache.to("cpu") is cache and cache.to(torch.float32) is cache and cache.to("cpu", torch.float32) is cache
    before = copy.deepcopy(cache)
    for wrong in ({"device": torch.bfloat16}, {"device": "meta", "dtype": torch.float16}, {"dtype": torch.float64}):
        with pytest.raises(ValueError, match="a cache of torch.float32 is not converted to torch"):
            cache.to(**wrong)
    with pytest.raises(ValueError, match="cannot move to the device 'meta', which holds no data"):
        cache.to("meta")
    assert_same(cache, before)
    for layer in cache.kv_layers:  # all the same: it is the one other device that every machine has
        layer.move(torch.device("meta"))
        layer.device = torch.device("meta")
    assert cache.layers[0].keys.device.type == "meta"
    with pytest.raises(ValueError, match="holds torch.float32 on meta, got torch.float32 on cpu"):
        append(cache, 1)
    assert cache.get_seq_length() == 50
    unused = KINDS[kind](tiny_config()).to("meta", torch.float16)
    append(unused, 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_kind
def test_moving_to_a_gpu_and_back(kind, tmp_path):
    cache = append(KINDS[kind](tiny_config()), 50)
    before = copy.deepcopy(cache)
    assert cache.to("cuda").layers[0].device.type == "cuda"
    cache.update(*(torch.randn(2, 2, 1, 16, device="cuda") for _ in "kv"), 0)
    cache.layers[0].crop(-1)
    save_cache(cache, tmp_path / "cache")
    assert_same(load_cache(tmp_path / "cache", tiny_config()), before)
    assert_same(cache.to("cpu"), before)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, "fp8"])
@pytest.mark.parametrize("window", [None, 40])
def test_a_file_written_on_a_gpu_holds_the_codes_of_a_cpu(bits, window, tmp_path, without_triton):
    """Codes lie in another order there; moved back and forth, and loaded, they mean the same."""
    config = tiny_config() if window is None else tiny_config("mistral", sliding_window=window)
    here, there = (QuantizedKVCache(config, bits=bits, group_size=16) for _ in "ab")
    generator = torch.Generator().manual_seed(5)
    with fake_cuda():
        for count in (150, 33, 70):
            for layer, tokens in enumerate(torch.randn(3, 2, 2, 2, count, 16, generator=generator)):
                for cache, (k, v) in ((here, tokens), (there, on_gpu(tokens))):
                    cache.layers[layer].append(k, v)
                    cache.layers[layer].finish_attention(dispatch.quantize_blocks)
        save_cache(there, tmp_path / "there")
        loaded = load_cache(tmp_path / "there", config)
        assert_same(loaded, here)
        moved = loaded.to("cuda").layers[0]
        assert moved.device.type == "cuda" and moved.packed_tokens
        for ours, theirs in zip(moved.dense(), there.layers[0].dense(), strict=True):
            assert torch.equal(ours.data_on_cpu, theirs.data_on_cpu)
        assert_same(loaded.to("cpu"), here)
