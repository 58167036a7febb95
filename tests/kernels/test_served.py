"""The helper that counts which backend served: it must not miss a call, nor invent one."""

import functools

import pytest
import torch
from models import generate, prompt, tiny_model
from packed_problems import packed_problem
from problems import problem
from served import Served, served

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache
from hf_kvattn.kernels import dispatch


def test_each_call_is_recorded_once_and_the_table_is_restored():
    before = dict(dispatch.BACKENDS)
    with served() as calls:
        dispatch.attend(problem("long-split"))
        dispatch.attend(packed_problem("g3-65", 8, 4))
        dispatch.attend(problem("s-aux"))  # the kernel is called by the backend itself
        with hf_kvattn.backend("sdpa"):
            dispatch.attend(problem("window-long-prefill"))  # in blocks
        with hf_kvattn.backend("native"), pytest.raises(ValueError, match="no dropout"):
            refused = problem("long-split")
            refused.dropout = 0.5
            dispatch.attend(refused)
    assert calls == [
        Served("native", False, 1, 3001, False),
        Served("native", True, 1, 65, False),
        Served("native", False, 1, 90, False),
        Served("sdpa", False, 530, 600, False),
    ]
    assert dispatch.BACKENDS == before


CACHES = {
    "static": StaticKVCache,
    "packed": functools.partial(QuantizedKVCache, bits=8, group_size=16),
    "ring": functools.partial(SlidingWindowKVCache, window=16),
}


@pytest.mark.parametrize("cache", CACHES)
def test_calls_that_read_a_cache_say_so(cache):
    model, inputs, count = tiny_model(), prompt(90), 8
    with hf_kvattn.enabled(model, cache=CACHES[cache]), served() as calls, torch.no_grad():
        generate(model, inputs, count)
    layers = model.config.num_hidden_layers
    assert len(calls) == layers * count and all(call.from_cache for call in calls)
    assert [call.q_len for call in calls] == [90] * layers + [1] * (layers * (count - 1))
    assert [call.packed for call in calls] == [cache == "packed" and call.q_len == 1 for call in calls]
    with hf_kvattn.enabled(model), served() as calls, torch.no_grad():
        model(**inputs, use_cache=False)
    assert len(calls) == layers and not any(call.from_cache for call in calls)
