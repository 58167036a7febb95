"""Continuous batching (`generate_batch`) of an enabled model: stock's tokens, each request over its own rows alone."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model
from served import served
from transformers import CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as paged_cache

import hf_kvattn
from hf_kvattn import paged
from hf_kvattn.evaluation import batching, cards
from hf_kvattn.evaluation.common import report
from hf_kvattn.kernels import dispatch
from hf_kvattn.paged import PagedBatch
from hf_kvattn.tools import conditions as recording

pytestmark = pytest.mark.skipif(
    not hasattr(paged_cache, "ATTN_TYPE_TO_ALLOCATOR"), reason="an older transformers has another paged cache"
)
LENGTHS = (5, 40, 131, 17, 63, 64, 65, 200)  # pages of 32, and prompts that are taken in several parts
NEW = 16


def config(**changes) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(**{"page_size": 32, "num_blocks": 64, "max_batch_tokens": 100, **changes})


def generation(**changes) -> GenerationConfig:
    return GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **changes}
    )


def prompts(seed: int = 0) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=chance).tolist() for n in LENGTHS]


def batched(model, inputs, **changes) -> list[list[int]]:
    results = model.generate_batch(inputs, generation_config=generation(), continuous_batching_config=config(**changes))
    assert len(results) == len(inputs)
    assert [result.error for result in results.values()] == [None] * len(inputs)
    return [result.generated_tokens for result in results.values()]


def one_by_one(model, inputs) -> list[list[int]]:
    rows = [model.generate(torch.tensor([ids]), generation_config=generation())[0].tolist() for ids in inputs]
    return [row[len(ids) :] for ids, row in zip(inputs, rows, strict=True)]


FAMILIES = ("llama", "llama-mqa", "llama-g8", "qwen3", "mistral", "qwen2-sliding", "gemma2", "gemma3", "gpt-oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family, monkeypatch):
    """Windows of 6 and 8 wrap in their rings; learned sinks and softcaps are the families' own."""
    model = tiny_model(family)
    expected = one_by_one(model, prompts())
    assert len({tuple(tokens) for tokens in expected}) == len(LENGTHS)
    hf_kvattn.enable(model)
    calls = []
    stock = dispatch.attend
    monkeypatch.setattr(dispatch, "attend", lambda call: calls.append(call) or stock(call))
    assert batched(model, prompts()) == expected
    sizes = {(call.q.shape[2], len(call.requests.q_begin) - 1) for call in calls}
    assert any(n == queries > 1 for queries, n in sizes) and any(
        1 < n < queries for queries, n in sizes
    )  # steps, mixed
    assert model.config._attn_implementation == "kvattn"
    assert one_by_one(model, prompts()) == expected  # it is as it was


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_every_backend_serves_batches(backend):
    model = tiny_model("mistral")
    expected = one_by_one(model, prompts())
    with hf_kvattn.enabled(model):
        hf_kvattn.set_backend(backend)  # the batch runs in a thread of its own
        try:
            with served() as calls:
                assert batched(model, prompts()) == expected
        finally:
            hf_kvattn.set_backend("auto")
    assert {call.backend for call in calls} == {backend}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_logits_of_half_precision_are_as_near_as_stocks(dtype):
    """The log-probability of each first token, against the same model in float32: at most twice stock's error."""
    model = tiny_model("llama").to(dtype)
    exact = copy.deepcopy(model).float()
    expected = [torch.log_softmax(exact(torch.tensor([ids])).logits[0, -1], 0) for ids in prompts()]

    def error() -> float:
        results = model.generate_batch(
            prompts(),
            generation_config=generation(max_new_tokens=1),
            continuous_batching_config=config(return_logprobs=True),
        )
        found = [(result.generated_tokens[0], result.logprobs[0]) for result in results.values()]
        assert len(found) == len(expected)
        return max(abs(float(row[token]) - score) for row, (token, score) in zip(expected, found, strict=True))

    stock = error()
    hf_kvattn.enable(model)
    assert 0 < error() <= 2 * stock


def test_requests_share_the_pages_of_a_common_prefix():
    model = tiny_model("llama")
    prefix = prompts()[-1]
    inputs = [prefix + ids for ids in prompts(seed=1)[:4]]
    expected = one_by_one(model, inputs)
    hf_kvattn.enable(model)
    # Two at a time: the third finds the pages of the first.
    assert batched(model, inputs, max_requests_per_batch=2, allow_block_sharing=True) == expected


def test_several_answers_to_one_prompt():
    model = tiny_model("llama")
    expected = one_by_one(model, prompts()[:2])
    hf_kvattn.enable(model)
    sampling = generation(num_return_sequences=3, do_sample=True, top_k=1)
    results = model.generate_batch(prompts()[:2], generation_config=sampling, continuous_batching_config=config())
    tokens = [result.generated_tokens for result in results.values()]
    assert tokens == [expected[0]] * 3 + [expected[1]] * 3


def test_a_manager_that_is_kept_and_a_request_that_is_cancelled():
    model = tiny_model("llama")
    expected = one_by_one(model, prompts())
    hf_kvattn.enable(model)
    first = model.generate_batch(
        prompts(), generation_config=generation(), continuous_batching_config=config(), persistent_manager=True
    )
    assert [result.generated_tokens for result in first.values()] == expected
    assert model.config._attn_implementation == "kvattn"
    with model.continuous_batching_context_manager(generation_config=generation()) as manager:
        gone = manager.add_request(prompts()[7], max_new_tokens=200)
        kept = manager.add_request(prompts()[1], max_new_tokens=NEW)
        manager.cancel_request(gone)
        result = None
        while result is None or result.request_id != kept or not result.is_finished():
            result = manager.get_result(timeout=30)
            assert result is not None
    assert result.generated_tokens == expected[1]
    model.destroy_cached_continuous_batching_manager()
    hf_kvattn.disable(model)
    assert "init_continuous_batching" not in model.__dict__ and batched(model, prompts()) == expected


@pytest.mark.parametrize("asked", [{"cache": "int4"}, {"compile": True}])
def test_what_batches_do_without_is_named_once(asked, caplog):
    model = hf_kvattn.enable(tiny_model("llama"), **asked)
    exact = one_by_one(tiny_model("llama"), prompts()[:1])
    logging.getLogger("hf_kvattn").addHandler(caplog.handler)
    paged.logger.warning_once.cache_clear()
    try:
        assert [batched(model, prompts()[:1]) for _ in range(2)] == [exact, exact]
    finally:
        logging.getLogger("hf_kvattn").removeHandler(caplog.handler)
    lines = {record.getMessage() for record in caplog.records if record.name == "hf_kvattn"}
    assert len([line for line in lines if "is for generate()" in line]) == 1


def test_what_is_refused(monkeypatch):
    model = hf_kvattn.enable(tiny_model("llama"))
    with pytest.raises(ValueError, match="is not compiled: leave its compile configs out"):
        batched(model, prompts(), varlen_compile_config=CompileConfig())
    assert model.config._attn_implementation == "kvattn"
    monkeypatch.delattr(paged_cache, "ATTN_TYPE_TO_ALLOCATOR")
    with pytest.raises(ValueError, match="needs transformers >= 5.20"):
        batched(model, prompts())


def test_on_other_devices_transformers_own_attention_serves(monkeypatch):
    model = tiny_model("llama")
    hf_kvattn.enable(model)
    seen = []

    class Manager:
        _original_attn_impl = None

    def stock(model, *args, **kwargs):
        seen.append(model.config._attn_implementation)
        return Manager()

    monkeypatch.setattr(type(model), "init_continuous_batching", stock)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert model.init_continuous_batching()._original_attn_impl == "kvattn"  # which transformers sets when it stops
    assert seen == ["sdpa"]


def test_another_implementation_that_was_set_since_is_left_alone():
    model = hf_kvattn.enable(tiny_model("llama"))
    expected = one_by_one(model, prompts())
    model.set_attn_implementation("sdpa")
    assert batched(model, prompts()) == expected
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shape", [(1, 2, 3, 8), (1, 3, 3, 16)])
def test_tokens_of_another_shape_are_refused_before_they_are_stored(shape):
    allocator = type("Allocator", (), {"num_key_value_heads": 2, "head_dim": 16, "index": 0})()
    cache = type("Cache", (), {"layer_to_allocator": {0: allocator}})()
    batch = PagedBatch(cache, [torch.arange(9)], [torch.arange(3)], torch.tensor([0, 3]), {})
    with pytest.raises(ValueError, match="holds 2 KV heads of 16, got keys"):
        batch.store(0, torch.zeros(shape), torch.zeros(1, 2, 3, 16))


def test_the_measurement(tmp_path):
    model, ids = tiny_model("llama"), torch.randint(3, 128, (400,))
    sizes = {"requests": 4, "shortest": 9, "longest": 120, "new_tokens": 8, "batch_tokens": 64, "rounds": 2}
    found = batching.measure(model, ids, **sizes)
    assert not hf_kvattn.is_enabled(model) and batching.lengths_of(4, 9, 120) == [9, 21, 51, 120]
    assert [(row["variant"], row["same_tokens"]) for row in found["rows"]] == [("stock", 1), ("kvattn", 1)]
    assert all(0 < row["step_ms"]["median"] < row["whole_ms"]["median"] for row in found["rows"])
    conditions = recording.conditions(model, SimpleNamespace(model="tiny", text="x", backend="auto"))
    report.write({"kind": "batching", "conditions": conditions} | found, tmp_path)
    assert "| kvattn | " in (tmp_path / "report.md").read_text() and (tmp_path / "batching.png").is_file()
    assert "new tokens a second, steps: kvattn" in cards.render(tmp_path)
    for wrong, said in (
        ({"new_tokens": 3}, "new_tokens=3"),
        ({"shortest": 121}, "shortest=121"),
        ({"longest": 999}, "has 400"),
    ):
        with pytest.raises(ValueError, match=said):
            batching.measure(model, ids, **sizes | wrong)
