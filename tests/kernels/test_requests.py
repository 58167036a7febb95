"""Requests of any lengths in one call: every backend gives each of them what it gets alone."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from problems import POISON, VARIANTS
from tolerance import Expected

import hf_kvattn
from hf_kvattn.kernels import dispatch, native
from hf_kvattn.kernels.call import AttendCall, Requests

# (query tokens, keys) of each request: single tokens and prompts, tiles of 64 and 32 keys more or less, none at all
BATCHES = {
    "one-request": [(1, 1)],
    "steps": [(1, 63), (1, 1), (1, 64), (1, 130), (1, 65)],
    "prompts": [(5, 5), (67, 67), (1, 1), (64, 64)],
    "mixed": [(1, 200), (40, 173), (0, 0), (1, 3), (33, 33), (2, 129)],
    "long": [(1, 3001), (1, 7), (9, 1500)],
}
RULES = {
    "causal": {},
    "window": {"window": 33},
    "window-1": {"window": 1},
    "softcap": {"softcap": 1.5, "window": 64},
    "s-aux": {"s_aux": True},
    "not-causal": {"causal": False},
}
# How the keys of all requests lie in the rows of the buffers.
ROWS = {
    "side by side": lambda tokens: None,
    "pages of 32": lambda tokens: pages(tokens, 32),
    "pages of 7": lambda tokens: pages(tokens, 7),
    "scattered": lambda tokens: torch.randperm(tokens + 50)[:tokens],
    "shared": lambda tokens: torch.arange(tokens) % (tokens // 2 + 1),  # requests with a common prefix read it twice
}


def pages(tokens: int, size: int) -> torch.Tensor:
    """Rows of tokens in pages that lie in any order."""
    order = torch.randperm(tokens // size + 3)
    return torch.cat([page * size + torch.arange(size) for page in order])[:tokens].contiguous()


def batch(lengths, rows, rules, dtype=torch.float32, group=3, dim=64) -> tuple[AttendCall, list[AttendCall]]:
    """All requests in one call, and each of them alone; rows that no request reads are poisoned."""
    rules = dict(rules)
    if "s_aux" in rules:
        rules["s_aux"] = 2 * torch.randn(2 * group)
    queries, tokens = (sum(each) for each in zip(*lengths, strict=True))
    at = ROWS[rows](tokens)
    used = torch.arange(tokens) if at is None else at
    buffers = [torch.full((int(used.max()) + 9, 2, dim), POISON[dtype], dtype=dtype) for _ in "kv"]  # token-major
    for buffer in buffers:
        buffer[used] = torch.randn(tokens, 2, dim).to(dtype)
    k, v = (buffer.transpose(0, 1)[None] for buffer in buffers)
    q = torch.randn(1, queries, 2 * group, dim).to(dtype).transpose(1, 2)
    begins = [torch.tensor([0, *accumulate(each)], dtype=torch.int32) for each in zip(*lengths, strict=True)]
    call = AttendCall(q, k, v, dim**-0.5, requests=Requests(*begins, at), **rules)
    alone = []
    for i, (n, _) in enumerate(lengths):
        if n:
            mine = used[begins[1][i] : begins[1][i + 1]]
            own = q[:, :, begins[0][i] : begins[0][i + 1]]
            alone.append(replace(call, q=own, k=k[:, :, mine], v=v[:, :, mine], requests=None))
    return call, alone


def check(out: torch.Tensor, alone: list[AttendCall]) -> None:
    assert out.shape[1] == sum(call.q.shape[2] for call in alone)
    for call, part in zip(alone, out.split([call.q.shape[2] for call in alone], 1), strict=True):
        Expected.of(call).assert_close(part)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_each_request_gets_what_it_gets_alone(backend, name, rows, rules):
    call, alone = batch(BATCHES[name], rows, RULES[rules])
    with hf_kvattn.backend(backend):
        check(dispatch.attend(call), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group, dim", [(1, 64), (8, 128), (5, 80), (2, 7)])
@pytest.mark.parametrize("variant", VARIANTS, indirect=True)
def test_native_in_every_variant(variant, group, dim, dtype):
    for rows in ("pages of 32", "scattered"):
        call, alone = batch(BATCHES["mixed"], rows, {"window": 100}, dtype, group, dim)
        check(native.attend(call), alone)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_native_splits_the_work_over_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call, alone = batch(BATCHES["long"], "pages of 32", {"s_aux": True})
        check(native.attend(call), alone)
    finally:
        torch.set_num_threads(before)


def test_auto_serves_batches_with_native():
    call, _ = batch(BATCHES["mixed"], "pages of 32", {})
    assert dispatch.auto_choice(call) == ("native", None)
    name, reason = dispatch.auto_choice(replace(call, **{t: getattr(call, t).double() for t in "qkv"}))
    assert name == "sdpa" and "float64" in reason


WRONG = {
    "more queries than there are": ("q_begin", [0, 1, 6]),
    "fewer queries than there are": ("q_begin", [0, 1, 4]),
    "queries from the second on": ("q_begin", [1, 1, 5]),
    "falling queries": ("q_begin", [0, 6, 5]),
    "fewer keys than queries": ("kv_begin", [0, 9, 12]),
    "keys from the second on": ("kv_begin", [1, 9, 40]),
    "falling keys": ("kv_begin", [0, 50, 40]),
    "a row before the first": ("kv_rows", [-1, *range(39)]),
    "a row behind the last": ("kv_rows", [*range(39), 1000]),
    "too few rows": ("kv_rows", [*range(39)]),
}


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize("backend", ["native", "sdpa", "reference"])
def test_numbers_that_do_not_fit_are_refused(backend, change):
    field, numbers = WRONG[change]
    call, _ = batch([(1, 9), (4, 31)], "pages of 32", {})
    dtype = torch.int64 if field == "kv_rows" else torch.int32
    wrong = replace(call, requests=replace(call.requests, **{field: torch.tensor(numbers, dtype=dtype)}))
    with hf_kvattn.backend(backend), pytest.raises((ValueError, RuntimeError), match="requests|native"):
        dispatch.attend(wrong)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"leftpad": torch.zeros(1, dtype=torch.int32)}, "requests share one row without masks"),
        ({"mask": torch.ones(1, 1, 5, 49, dtype=torch.bool)}, "requests share one row without masks"),
        ({"tokens": 20}, "requests share one row without masks"),
        ({"requests": Requests(torch.zeros(3), torch.zeros(3, dtype=torch.int32))}, "q_begin is"),
        ({"requests": Requests(*(torch.zeros(n, dtype=torch.int32) for n in (3, 2)))}, "kv_begin is"),
        ({"requests": Requests(*(torch.zeros(3, dtype=torch.int32) for _ in "qk"), torch.zeros(40))}, "kv_rows is"),
    ],
)
def test_what_does_not_fit_beside_requests_is_refused(changes, words):
    call, _ = batch([(1, 9), (4, 31)], "side by side", {})
    changes = {"mask": torch.ones(1, 1, 5, call.k.shape[2], dtype=torch.bool)} if "mask" in changes else changes
    with pytest.raises(ValueError, match=words):
        dispatch.attend(replace(call, **changes))
