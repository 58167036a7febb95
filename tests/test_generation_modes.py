"""Every way in which `generate()` makes tokens: stock's own, for each cache and backend, padded at the left or not."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from cache_table import ALL, EXACT, ROUNDED
from models import prompt, tiny_model
from talking import talking_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import hf_kvattn
from hf_kvattn.caches.base import KVCache
from hf_kvattn.evaluation import beams, cards
from hf_kvattn.evaluation.common import report, variants
from hf_kvattn.tools import conditions as recording

BACKENDS = ["native", "sdpa", "reference"]
NEW_TOKENS = 14
SCORES = {"rtol": 1e-3, "atol": 1e-3}  # fp32 sums in another order, through three layers and the warpers

# generate()'s arguments, and copies of a row that it makes (None: batches are refused by generate() itself).
MODES: dict[str, tuple[dict, int | None]] = {
    "greedy": ({}, 1),
    "sampling": ({"do_sample": True, "top_k": 0}, 1),
    "top-k-p": ({"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8}, 1),
    "min-p": ({"do_sample": True, "min_p": 0.05}, 1),
    "returned": ({"do_sample": True, "num_return_sequences": 3}, 3),
    "beams": ({"num_beams": 4, "num_return_sequences": 2}, 4),
    "beams-with-end": ({"num_beams": 3, "eos_token_id": [20, 30, 40, 50], "early_stopping": True}, 3),
    "beam-sampling": ({"num_beams": 3, "do_sample": True, "num_return_sequences": 3}, 3),
    "ragged-ends": ({"eos_token_id": list(range(20, 40))}, 1),
    "penalties": ({"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9}, 1),
    "constrained": ({"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + int(ids[-1]) % 7, 120))}, 1),
    "constrained-beams": ({"num_beams": 3, "prefix_allowed_tokens_fn": lambda row, ids: [3, 5, 8, 13, 21, 34]}, 3),
    "chunked-prefill": ({"prefill_chunk_size": 4}, 1),
    "prompt-lookup": ({"prompt_lookup_num_tokens": 3}, None),
    "draft": ({"assistant": 1}, None),
    # The draft's generate() takes a token 0 for padding, wherever it is.
    "draft-sampling": ({"assistant": 1, "do_sample": True, "suppress_tokens": [0]}, None),
    "perfect-draft": ({"assistant": 3}, None),
    "early-exit": ({"assistant_early_exit": 2}, None),
}
# One that grows differs from one that is sized in where its buffer lies only.
KINDS = {kind: make for kind, make in EXACT.items() if kind != "static"}


@functools.cache
def target():
    return tiny_model()


@functools.cache
def draft(layers: int):
    """A smaller model, or with 3 layers the same one."""
    model = tiny_model(num_hidden_layers=layers)
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def inputs_for(mode: str, padding: int, length: int = 13) -> dict[str, torch.Tensor]:
    batch = 1 if MODES[mode][1] is None else 3
    return prompt(length, batch, left_padding=padding)


def run(model, mode: str, inputs: dict, **kwargs):
    """The outcome of one mode from a fixed seed, with the scores of every step."""
    arguments = dict(MODES[mode][0])
    if "assistant" in arguments:
        arguments["assistant_model"] = draft(arguments.pop("assistant"))
    torch.manual_seed(5)
    return model.generate(
        **inputs,
        **{"do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments, **kwargs},
        return_dict_in_generate=True,
        output_scores=True,
    )


@functools.cache
def stock(mode: str, padding: int):
    return run(target(), mode, inputs_for(mode, padding))


def assert_same(ours, expected, what: str) -> None:
    assert torch.equal(ours.sequences, expected.sequences), what
    for one, other in zip(ours.scores, expected.scores, strict=True):
        torch.testing.assert_close(one, other, **SCORES, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("padding", [0, 5], ids=["full", "left-padded"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_scores_are_stocks(mode, kind, padding):
    """Also the draft's cache is one of ours."""
    model, expected = target(), stock(mode, padding)
    assert len(expected.sequences[:, 13:].unique()) > 4, "the stock tokens must vary, or equality says little"
    for backend in BACKENDS:
        with hf_kvattn.enabled(model, cache=KINDS[kind]), hf_kvattn.enabled(draft(1), cache=KINDS[kind]):
            with hf_kvattn.enabled(draft(3), cache=KINDS[kind]), hf_kvattn.backend(backend):
                ours = run(model, mode, inputs_for(mode, padding))
        assert_same(ours, expected, backend)
        assert isinstance(ours.past_key_values, KVCache)
        ours.past_key_values.check_consistent_layers()
        stored = expected.past_key_values.get_seq_length()
        assert ours.past_key_values.get_seq_length() == stored
    not_enabled = KINDS[kind](model.config)
    assert_same(run(model, mode, inputs_for(mode, padding), past_key_values=not_enabled), expected, "not enabled")


@functools.cache
def prefilled(kind: str, padding: int) -> KVCache:
    """70 tokens of a prompt of 71: of the quantized ones 64 are codes, and `NEW_TOKENS` complete no other block."""
    model, inputs = target(), prompt(71, 3, left_padding=padding)
    with torch.no_grad(), hf_kvattn.enabled(model), hf_kvattn.backend("reference"):
        cache = ROUNDED[kind](model.config)
        model(inputs["input_ids"][:, :70], attention_mask=inputs["attention_mask"][:, :70], past_key_values=cache)
    return cache


@pytest.mark.parametrize("padding", [0, 5], ids=["full", "left-padded"])
@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("mode", [mode for mode in MODES if MODES[mode][1]])
def test_backends_agree_from_the_same_codes(mode, kind, padding):
    """Codes made anew may round to the other side, which a random model amplifies: so all start from the same ones."""
    model, inputs = target(), prompt(71, 3, left_padding=padding)
    expected = None
    for backend in ["reference", "native", "sdpa", None]:
        cache = prefilled(kind, padding).fork()
        cache.batch_repeat_interleave(MODES[mode][1])  # generate() repeats the prompt, not what a cache holds
        if backend is None:
            ours = run(model, mode, inputs, past_key_values=cache)
        else:
            with hf_kvattn.enabled(model), hf_kvattn.backend(backend):
                ours = run(model, mode, inputs, past_key_values=cache)
        expected = ours if expected is None else expected
        assert torch.equal(ours.sequences, expected.sequences), backend
        assert cache.get_seq_length() == ours.sequences.shape[1] - 1


@pytest.mark.parametrize("padding", [0, 5], ids=["full", "left-padded"])
@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("mode", [mode for mode in MODES if not MODES[mode][1]])
def test_assisted_decoding_rolls_codes_back(mode, kind, padding):
    """Every round appends a draft and takes part of it back, here over the ends of blocks. The tokens of the reference.

    A cache that is filled already is not what transformers' assisted decoding starts from: it would store the prompt
    twice (in transformers' own caches too).
    """
    model, inputs, sequences = target(), prompt(60, 1, left_padding=padding), []
    for backend in ["reference", *BACKENDS[:2]]:
        make = ROUNDED[kind]
        with hf_kvattn.enabled(model, cache=make), hf_kvattn.enabled(draft(1), cache=make):
            with hf_kvattn.enabled(draft(3), cache=make), hf_kvattn.backend(backend):
                ours = run(model, mode, inputs, max_new_tokens=20)
        sequences.append(ours.sequences)
        assert isinstance(ours.past_key_values, KVCache)
        assert torch.equal(sequences[-1], sequences[0]), backend


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_logits_are_stocks(kind):
    model, inputs = target(), inputs_for("greedy", 4)
    arguments = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    arguments |= {"output_hidden_states": True, "output_logits": True, "output_scores": True}
    expected = model.generate(**inputs, **arguments)
    with hf_kvattn.enabled(model, cache=KINDS[kind]):
        ours = model.generate(**inputs, **arguments)
    seen = inputs["attention_mask"].bool()
    for step, (one, other) in enumerate(zip(ours.hidden_states, expected.hidden_states, strict=True)):
        for a, b in zip(one, other, strict=True):
            a, b = (t[seen] if step == 0 else t for t in (a, b))  # what padding sees is nobody's business
            torch.testing.assert_close(a, b, **SCORES)
    for one, other in zip(ours.logits + ours.scores, expected.logits + expected.scores, strict=True):
        torch.testing.assert_close(one, other, **SCORES)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_weights_are_refused_with_the_reason(kind):
    with hf_kvattn.enabled(target(), cache=KINDS[kind]):
        with pytest.raises(ValueError, match="output_attentions"):
            target().generate(**prompt(), max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("mode", ["greedy", "sampling", "prompt-lookup"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamers_and_stopping_criteria(kind, mode):
    """Stopped at the first token of a kind: what was streamed is what is returned, and the cache as long as stock's."""
    model, inputs = target(), prompt(batch=1)
    stops = StoppingCriteriaList([lambda ids, scores: (ids[:, -1] % 5 == 2) & (ids.shape[1] > 17)])
    expected = run(model, mode, inputs, stopping_criteria=stops)
    streamer = Collected()
    with hf_kvattn.enabled(model, cache=KINDS[kind]):
        ours = run(model, mode, inputs, stopping_criteria=stops, streamer=streamer)
    assert_same(ours, expected, mode)
    assert streamer.ended and streamer.tokens == ours.sequences[0].tolist()
    assert ours.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


def test_a_generation_loop_of_the_users_own():
    """`custom_generate` with a function."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        cache = kwargs["past_key_values"]
        while not stopping_criteria(input_ids, None).all():
            logits = model(input_ids[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
            input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], 1)
        return input_ids

    for make in KINDS.values():
        with hf_kvattn.enabled(target(), cache=make):
            inputs = inputs_for("greedy", 0)
            ours = target().generate(**inputs, custom_generate=loop, max_new_tokens=NEW_TOKENS, do_sample=False)
        assert torch.equal(ours, stock("greedy", 0).sequences)


def diverse_beams(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """Diverse beam search (arXiv:1610.02424) of one prompt: groups of beams, one after the other, each discouraged
    from the tokens that earlier ones took in this step. transformers 5 keeps its own in a repository that it downloads
    (`transformers-community/group-beam-search`)."""
    cache, beams, groups, penalty = kwargs["past_key_values"], 6, 3, 1.5
    width, scores = beams // groups, torch.zeros(groups, beams // groups)
    scores[:, 1:] = -1e9  # at first all beams are the same
    input_ids = input_ids.repeat_interleave(beams, 0)
    while not stopping_criteria(input_ids, None).all():
        logits = model(input_ids[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1].log_softmax(-1)
        taken, rows, tokens = torch.zeros(logits.shape[-1]), [], []
        for group in range(groups):
            total = scores[group, :, None] + logits[group * width : (group + 1) * width] - penalty * taken
            scores[group], best = total.flatten().topk(width)
            rows.append(group * width + best // logits.shape[-1])
            tokens.append(best % logits.shape[-1])
            taken += torch.bincount(tokens[-1], minlength=logits.shape[-1])
        cache.reorder_cache(torch.cat(rows))
        input_ids = torch.cat([input_ids[torch.cat(rows)], torch.cat(tokens)[:, None]], 1)
    return input_ids


def test_diverse_beams():
    arguments = {**prompt(batch=1), "max_new_tokens": 16, "custom_generate": diverse_beams}
    expected = target().generate(**arguments)
    assert len({tuple(row) for row in expected[:, 13:].tolist()}) == 6
    for make in KINDS.values():
        for backend in BACKENDS:
            with hf_kvattn.enabled(target(), cache=make), hf_kvattn.backend(backend):
                assert torch.equal(target().generate(**arguments), expected)


def test_beam_search_moves_few_bytes(tmp_path):
    """Rows that stay are not moved, nor the tokens that beams have in common; stock moves all of them every step."""
    ids = prompt(90, 2)["input_ids"].flatten()
    names = ["stock-dynamic", "stock-static", "kvattn-static", "kvattn-static-fit", "kvattn-int8"]
    chosen = variants.select(names)
    sizes = {"context": 90, "batch_size": 2, "beams": 4, "new_tokens": 40, "rounds": 1}
    found = beams.measure(tiny_model(head_dim=32), ids, variants=chosen, **sizes)
    rows = {row["variant"]: row for row in found["rows"]}
    # Stock: keys and values, 3 layers, 8 rows, 2 heads, of 90 to 128 tokens, 32 numbers, 4 bytes; and nothing else.
    tokens_moved = sum(range(90, 129)) / 39
    assert rows["stock-dynamic"]["written_bytes"] == pytest.approx(2 * 3 * 8 * 2 * 32 * 4 * tokens_moved, rel=0.03)
    assert rows["stock-dynamic"]["fewer_bytes"] == 1 < 1.1 < 1 / rows["stock-static"]["fewer_bytes"]
    for name in names[2:]:
        assert rows[name]["fewer_bytes"] > 5 and rows[name]["same_tokens"] in (True, None), rows[name]
    conditions = recording.conditions(tiny_model(), SimpleNamespace(model="tiny", text="x", backend="auto"))
    report.write({"kind": "beams", "conditions": conditions} | found, tmp_path)
    assert "| kvattn-int8 | " in (tmp_path / "report.md").read_text() and (tmp_path / "beams.png").is_file()
    assert "bytes moved at a step of beam search: kvattn-static" in cards.render(tmp_path)
    for wrong, message in (
        ({"variants": chosen[1:]}, "stock-dynamic must be among the variants, got"),
        ({"variants": [*variants.select(["none"]), *chosen[:1]]}, "none is no cache"),
        ({"beams": 1}, "beams=1"),
        ({"context": 91}, "180 tokens, context=91"),
    ):
        with pytest.raises(ValueError, match=message):
            beams.measure(target(), ids, **{"variants": chosen} | sizes | wrong)


def in_threads(*functions) -> list:
    """The results of the functions, each in a thread of its own, all at the same time."""
    barrier = threading.Barrier(len(functions))

    def together(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(together, f) for f in functions]]


def test_threads_with_caches_of_their_own_do_not_disturb_each_other():
    """On one enabled model: two caches, two backends, several rounds."""
    model, prompts = target(), [prompt(13, 2, left_padding=3), prompt(29, 3)]
    makers = [EXACT["static"], ROUNDED["int8"]]
    backends = ["native", "reference"]

    def generate(i: int) -> torch.Tensor:
        with hf_kvattn.backend(backends[i]):
            return model.generate(
                **prompts[i], max_new_tokens=18, do_sample=False, past_key_values=makers[i](model.config)
            )

    with hf_kvattn.enabled(model):
        alone = [generate(i) for i in range(2)]
        for _ in range(3):
            for ours, expected in zip(
                in_threads(*[functools.partial(generate, i) for i in range(2)]), alone, strict=True
            ):
                assert torch.equal(ours, expected)


def test_stop_strings_bring_a_tokenizer():
    words, inputs = talking_tokenizer(), {"input_ids": torch.tensor([[5, 17, 60]])}
    model = functools.partial(tiny_model, vocab_size=len(words))
    arguments = {"max_new_tokens": 20, "do_sample": False, "tokenizer": words}
    whole = model().generate(**inputs, **arguments)
    arguments["stop_strings"] = [words.decode(whole[0, 7:9])]
    expected = model().generate(**inputs, **arguments)
    assert expected.shape[1] <= 9
    for kind, make in KINDS.items():
        assert torch.equal(hf_kvattn.enable(model(), cache=make).generate(**inputs, **arguments), expected), kind


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", padding_side="left")


def test_a_pipeline_works_unchanged():
    texts = ["w5 w17 w99", "w20 w30 w40 w50 w60 w70"]
    arguments = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2, "pad_token_id": 0}
    for kind, make in KINDS.items():
        model = tiny_model()
        expected = pipeline("text-generation", model=model, tokenizer=tokenizer())(texts, **arguments)
        hf_kvattn.enable(model, cache=make)
        assert pipeline("text-generation", model=model, tokenizer=tokenizer())(texts, **arguments) == expected, kind


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_streamed_from_a_thread(kind):
    model, inputs = target(), prompt(batch=1)
    expected = tokenizer().decode(stock_tokens(inputs)[0, 13:])
    with hf_kvattn.enabled(model, cache=KINDS[kind]):
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
        arguments = {**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs=arguments)
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == expected


def stock_tokens(inputs: dict) -> torch.Tensor:
    return target().generate(**inputs, max_new_tokens=8, do_sample=False)


class Harness:
    """As evaluation harnesses are: made with the model before anybody enables it, with their own config and calls."""

    def __init__(self, model):
        self.model, self.config = model, GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)

    @torch.inference_mode()
    def answer(self, inputs: dict) -> torch.Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        return self.model.generate(ids, self.config, attention_mask=mask, use_cache=True)[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", ALL)
def test_a_harness_that_knows_nothing_of_it_works_unchanged(kind):
    model, batches = tiny_model(), [prompt(13, 3, left_padding=5), prompt(21, 1), prompt(9, 2)]
    harness = Harness(model)
    expected = [harness.answer(inputs) for inputs in batches]
    hf_kvattn.enable(model, cache=ALL[kind])
    answers = [harness.answer(inputs) for inputs in batches]
    assert all(torch.equal(one, other) for one, other in zip(answers, expected, strict=True))  # too short for codes
