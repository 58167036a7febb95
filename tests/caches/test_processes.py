"""Caches that are handed to other processes: as arguments and through queues."""

import copy
import functools
import multiprocessing

import torch
from cache_table import ALL, forward, tokens
from models import prompt, tiny_config, tiny_model

import hf_kvattn
from hf_kvattn import SlidingWindowKVCache, StaticKVCache

KINDS = ALL | {
    "sinks": functools.partial(SlidingWindowKVCache, window=24, sinks=4),
    "offloaded": functools.partial(StaticKVCache, max_cache_len=160, offload=True),
}
PAST, STEP = 50, 3


@torch.no_grad()
def logits(cache) -> torch.Tensor:
    ids = prompt(PAST + STEP)["input_ids"][:, PAST:]
    return hf_kvattn.enable(tiny_model())(ids, past_key_values=cache).logits


def child(caches: dict, queue, answers) -> None:
    torch.set_num_threads(1)
    for each in (caches, queue.get()):
        answers.put({kind: logits(cache).numpy() for kind, cache in each.items()})


def test_a_spawned_process_goes_on_with_its_own_copies():
    caches = {}
    for kind, make in KINDS.items():
        caches[kind] = make(tiny_config())
        with torch.no_grad():
            hf_kvattn.enable(tiny_model())(prompt(PAST)["input_ids"], past_key_values=caches[kind])
    given = caches | {f"{kind}-fork": cache.fork() for kind, cache in caches.items()}
    spawn = multiprocessing.get_context("spawn")
    queue, answers = spawn.Queue(), spawn.Queue()
    process = spawn.Process(target=child, args=(given, queue, answers))
    process.start()
    queue.put(copy.deepcopy(given))  # a queue pickles later, on a thread of its own
    expected = {kind: logits(cache) for kind, cache in given.items()}  # while the child does the same
    for cache in given.values():
        assert cache.get_seq_length() == PAST + STEP
        forward(cache, tokens(60))  # what the child reads is not overwritten
    for _ in range(2):
        found = answers.get(timeout=120)
        assert all(torch.equal(torch.from_numpy(found[kind]), expected[kind]) for kind in given)
    process.join(60)
    assert process.exitcode == 0
