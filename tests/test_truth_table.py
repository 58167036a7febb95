"""The truth table: every cache, by every way in which people run a model.

Each cell asserts that attention read our cache in each layer of each forward, from its buffers and packed where there
are codes, and that the logits which chose the tokens are those of

- stock transformers over the same tokens, for a cache that keeps everything exactly;
- attention spelled out a query at a time, for a window with sinks;
- stock transformers over the keys and values that the codes stand for, for a quantized cache.

The last two are far from the exact answer, so that a cache that is not used shows.
"""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from models import prompt, tiny_config, tiny_model
from served import Served, served
from spelled_out import expected_logits
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tolerance import FACTOR
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import (
    CLIPVisionConfig,
    CompileConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_kvattn
from hf_kvattn import SlidingWindowKVCache, StaticKVCache
from hf_kvattn.caches.base import KVCache
from hf_kvattn.caches.layer import KVLayer
from hf_kvattn.caches.registry import CACHES, COMPLETE
from hf_kvattn.modules import CachedSelfAttention

WINDOW, SINKS = 24, 4
EXACT = {
    "static": CACHES["static"],
    "static-sized": functools.partial(StaticKVCache, max_cache_len=112),
    "sliding-wide": functools.partial(SlidingWindowKVCache, window=200),
}
CROSSED = {"sliding-sinks": functools.partial(SlidingWindowKVCache, window=WINDOW, sinks=SINKS)}
ROUNDED = {name: CACHES[name] for name in ("int8", "int4", "int2", "k8v4", "fp8")}
KINDS = EXACT | CROSSED | ROUNDED

PROMPT, NEW = 76, 6  # a block is quantized after the prompt's attention, and no other one until the end
CHUNKS = (34, 34, 8)  # it is after the second of them
QUANTIZED_FROM = 4 + 64  # tokens that a quantized cache holds when it makes its first block
SMALL = {"num_hidden_layers": 2, "head_dim": 32}
# Of the largest logit. Exact: fp32 sums in another order, through two layers. Codes: the native kernels' queries are
# rounded to 16 bits. An answer that is not exact must differ from the exact one by FAR; 8 bits do so by 15e-3. A beam's
# score is a mean, in which they do so by 1.5e-3.
CLOSE, CLOSE_FROM_CODES, FAR, FAR_IN_A_MEAN = 2e-5, 4e-4, 2e-3, 1e-3


@functools.cache
def stock():
    return tiny_model(**SMALL)


def fresh():
    return copy.deepcopy(stock())


@dataclass
class Answer:
    """What came of one run.

    Attributes:
        tokens: `(B, T)`, the prompt and what was generated.
        logits: `(B, n, vocab)`, those that chose the last n tokens; None after a beam search.
        cache: the cache, as it is at the end.
        chunks: tokens of each forward; None where drafts decide that.
        padding: left padding of row 0.
        quantized_at: tokens that the cache held when it made its first block: until then attention is exact.
        inputs: what the prompt's forward takes besides tokens.
        model: the stock model that computes the same, in fp32.
        plain: that model as it ran, where it did not run in fp32: its errors are allowed.
        scores: `(B,)` of a beam search: the mean log-probability of the new tokens.
        greedy: whether each token is the likeliest.
    """

    tokens: torch.Tensor
    logits: torch.Tensor | None
    cache: KVCache
    chunks: list[int] | None
    padding: int = 0
    quantized_at: int = PROMPT
    inputs: dict | None = None
    model: torch.nn.Module | None = None
    plain: Callable[[], torch.nn.Module] | None = None
    scores: torch.Tensor | None = None
    greedy: bool = True


@dataclass
class Run:
    """One cell: what a way of entering is given. `folder` is empty."""

    kind: str
    folder: Path

    def make(self, config) -> KVCache:
        return KINDS[self.kind](config)

    @property
    def cache(self) -> str | Callable:
        """For `enable(cache=...)`: a name where the cache has one."""
        return self.kind if self.kind in COMPLETE else KINDS[self.kind]


def chunks_of(*begin: int) -> list[int]:
    return [*begin, *[1] * (NEW - 1)]


def generated(model, text: dict | None = None, **kwargs) -> Answer:
    """`generate()`: greedy unless `kwargs` say otherwise."""
    text = prompt(PROMPT) if text is None else text
    arguments = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**text, **arguments | kwargs)
    padding = int((text["attention_mask"][0] == 0).sum())
    return Answer(out.sequences, torch.stack(out.logits, 1), out.past_key_values, chunks_of(PROMPT), padding)


def by_hand(forward, cache: KVCache, chunks=(PROMPT,), ids: torch.Tensor | None = None) -> Answer:
    """The prompt in `chunks`, after what `cache` holds, and greedy steps."""
    tokens, begin = prompt(PROMPT)["input_ids"] if ids is None else ids, cache.get_seq_length()
    logits, ran = [], chunks_of(*chunks)
    with torch.no_grad():
        for i, new in enumerate(ran):
            out = forward(tokens[:, begin : begin + new], past_key_values=cache).logits[:, -1]
            begin += new
            if i >= len(chunks) - 1:
                logits.append(out)
                tokens = torch.cat([tokens, out.argmax(-1, keepdim=True)], 1)
    return Answer(tokens, torch.stack(logits, 1), cache, ran, quantized_at=quantized_at(chunks))


def quantized_at(chunks) -> int:
    held = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    return next(tokens for tokens in held if tokens >= QUANTIZED_FROM)


# Ways of entering.


def greedy(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    return generated(model, past_key_values=run.make(model.config))


def left_padded(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    return generated(model, prompt(PROMPT, left_padding=5), past_key_values=run.make(model.config))


def beams(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    arguments = {"max_new_tokens": NEW, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    cache = run.make(model.config)
    out = model.generate(**prompt(PROMPT), **arguments, past_key_values=cache)
    expected = stock().generate(**prompt(PROMPT), **arguments)
    if run.kind in EXACT:
        assert torch.equal(out.sequences, expected.sequences)
    scores = out.sequences_scores
    return Answer(out.sequences, None, out.past_key_values, chunks_of(PROMPT), scores=scores, greedy=False)


def sampling(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    sampled = {"do_sample": True, "top_k": 0}
    torch.manual_seed(3)
    answer = generated(model, past_key_values=run.make(model.config), **sampled)
    torch.manual_seed(3)
    if run.kind in EXACT:
        assert torch.equal(answer.tokens, generated(stock(), **sampled).tokens)
    return replace(answer, greedy=False)


def text_pipeline(run: Run) -> Answer:
    """Of texts of two lengths, so that the first is padded; the pipeline keeps its cache and logits to itself."""
    model, made, logits = fresh(), [], []
    hf_kvattn.enable(model, cache=lambda config: made.append(run.make(config)) or made[-1])
    model.register_forward_hook(lambda module, args, out: logits.append(out.logits[:, -1]))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    rows = prompt(PROMPT, left_padding=5)["input_ids"].tolist()
    texts = [" ".join(f"w{i}" for i in row if i) for row in rows]
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generate(texts, max_new_tokens=NEW, do_sample=False, batch_size=2, return_tensors=True)
    tokens = torch.tensor([row + each[0]["generated_token_ids"][-NEW:] for row, each in zip(rows, found, strict=True)])
    return Answer(tokens, torch.stack(logits, 1), made[0], chunks_of(PROMPT), padding=5)


def forward_by_hand(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    return by_hand(model, run.make(model.config))


def chunked_by_hand(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    return by_hand(model, run.make(model.config), CHUNKS)


def prefill_chunk_size(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    answer = generated(model, prefill_chunk_size=CHUNKS[0])
    return replace(answer, chunks=chunks_of(*CHUNKS), quantized_at=quantized_at(CHUNKS))


def inputs_embeds(run: Run) -> Answer:
    model, text = hf_kvattn.enable(fresh(), cache=run.cache), prompt(PROMPT)
    ids = text.pop("input_ids")
    answer = generated(model, {"inputs_embeds": model.get_input_embeddings()(ids).detach(), **text})
    return replace(answer, tokens=torch.cat([ids, answer.tokens], 1))


@torch.no_grad()
def autocast(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    with torch.autocast("cpu", torch.bfloat16):
        answer = generated(model)
    return replace(answer, plain=autocast_stock)


def autocast_stock() -> torch.nn.Module:
    model = fresh()
    forward = model.forward

    def under_autocast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = under_autocast
    return model


def dispatched(run: Run, **skip) -> Answer:
    model = dispatch_model(fresh(), {"": "cpu"}, force_hooks=True, **skip)
    return generated(hf_kvattn.enable(model, cache=run.cache))


def dispatched_with_skip_keys(run: Run) -> Answer:
    return dispatched(run, skip_keys="past_key_values")


def offloaded(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return generated(model)


def lora(run: Run) -> Answer:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(fresh(), config).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    answer = generated(hf_kvattn.enable(model, cache=run.cache))
    assert hf_kvattn.is_enabled(model)
    return replace(answer, model=merged)


def pickled(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    return generated(pickle.loads(pickle.dumps(model)))


def torch_saved(run: Run) -> Answer:
    file = io.BytesIO()
    torch.save(hf_kvattn.enable(fresh(), cache=run.cache), file)
    file.seek(0)
    return generated(torch.load(file, weights_only=False))


def deepcopied(run: Run) -> Answer:
    return generated(copy.deepcopy(hf_kvattn.enable(fresh(), cache=run.cache)))


def bfloat16(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache).bfloat16()
    return replace(generated(model), model=fresh().bfloat16().float(), plain=lambda: fresh().bfloat16())


def half(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache).half()
    return replace(generated(model), model=fresh().half().float(), plain=lambda: fresh().half())


def compiled_by_hand(run: Run) -> Answer:
    torch._dynamo.reset()
    model = hf_kvattn.enable(fresh())
    answer = by_hand(torch.compile(model, backend="eager", fullgraph=True), run.make(model.config))
    torch._dynamo.reset()
    return answer


def compiled_by_enable(run: Run) -> Answer:
    torch._dynamo.reset()
    model = hf_kvattn.enable(fresh(), cache=run.cache, compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    answer = generated(model, compile_config=CompileConfig(fullgraph=True, mode=None, backend="eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    torch._dynamo.reset()
    return answer


def assistant(run: Run) -> Answer:
    """The assistant keeps a stock cache."""
    model, draft = hf_kvattn.enable(fresh(), cache=run.cache), tiny_model(**SMALL | {"num_hidden_layers": 1})
    draft.generation_config.num_assistant_tokens, draft.generation_config.assistant_confidence_threshold = 3, 0.0
    return replace(generated(model, prompt(PROMPT, 1), assistant_model=draft), chunks=None)


def prompt_lookup(run: Run) -> Answer:
    text = prompt(PROMPT, 1)
    text["input_ids"] = text["input_ids"][:, :19].repeat(1, 4)  # so that there is something to look up
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    return replace(generated(model, text, prompt_lookup_num_tokens=3), chunks=None)


def custom_generate(run: Run) -> Answer:
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return by_hand(model, kwargs["past_key_values"], ids=input_ids)

    return hf_kvattn.enable(fresh(), cache=run.cache).generate(**prompt(PROMPT), custom_generate=loop)


def second_turn(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    first = generated(model, past_key_values=run.make(model.config), max_new_tokens=3)
    text = torch.cat([first.tokens, prompt(4)["input_ids"]], 1)
    text = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    answer = generated(model, text, past_key_values=first.cache)
    return replace(answer, chunks=[PROMPT, 1, 1, *chunks_of(1 + 4)])


def prefix_of(run: Run, model) -> KVCache:
    """72 tokens of the prompt."""
    cache = run.make(model.config)
    with torch.no_grad():
        model(prompt(PROMPT)["input_ids"][:, :72], past_key_values=cache)
    return cache


def after_prefix(model, cache: KVCache) -> Answer:
    return replace(generated(model, past_key_values=cache), chunks=[72, *chunks_of(PROMPT - 72)], quantized_at=72)


def forked_prefix(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    return after_prefix(model, prefix_of(run, model).fork())


def loaded_prefix(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh())
    hf_kvattn.save_cache(prefix_of(run, model), run.folder / "cache")
    return after_prefix(model, hf_kvattn.load_cache(run.folder / "cache", model.config))


def named_cache(run: Run) -> Answer:
    return generated(hf_kvattn.enable(fresh(), cache=run.cache))


def callable_cache(run: Run) -> Answer:
    return generated(hf_kvattn.enable(fresh(), cache=lambda config: run.make(config)))


def hybrid_in_the_checkpoint(run: Run) -> Answer:
    model = fresh()
    model.generation_config.cache_implementation = "hybrid"  # transformers takes it for nothing
    return generated(hf_kvattn.enable(model, cache=run.cache))


def made_by_name(run: Run) -> Answer:
    """As `from_pretrained(..., attn_implementation="kvattn")` makes it."""
    model = type(stock())._from_config(copy.deepcopy(stock().config), attn_implementation="kvattn").eval()
    model.load_state_dict(stock().state_dict())
    return generated(hf_kvattn.enable(model, cache=run.cache))


def enabled_context(run: Run) -> Answer:
    with hf_kvattn.enabled(fresh(), cache=run.cache) as model:
        return generated(model)


def enabled_again(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    return generated(hf_kvattn.enable(hf_kvattn.disable(model), cache=run.cache))


@functools.cache
def seeing() -> LlavaForConditionalGeneration:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    parts = {"vision_config": vision, "text_config": tiny_config(**SMALL)}
    config = LlavaConfig(**parts, image_token_index=2, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration._from_config(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def vision_language(run: Run) -> Answer:
    text = prompt(PROMPT)
    text["input_ids"][:, 3:7] = 2  # an image of 2 x 2 patches
    pixels = {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    model = hf_kvattn.enable(copy.deepcopy(seeing()), cache=run.cache)
    answer = generated(model, text | pixels)
    return replace(answer, inputs=pixels, model=copy.deepcopy(seeing()))


def training_mode(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh()).train()
    return by_hand(model, run.make(model.config))


def inference_mode(run: Run) -> Answer:
    model = hf_kvattn.enable(fresh(), cache=run.cache)
    with torch.inference_mode():
        return generated(model)


def threads(run: Run) -> list[Answer]:
    model, barrier = hf_kvattn.enable(fresh(), cache=run.cache), threading.Barrier(3)

    def answer(padding: int) -> Answer:
        barrier.wait()
        return generated(model, prompt(PROMPT, left_padding=padding))

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(answer, (0, 3, 5)))


WAYS = [greedy, left_padded, beams, sampling, text_pipeline, forward_by_hand, chunked_by_hand, prefill_chunk_size,
        inputs_embeds, autocast, dispatched, dispatched_with_skip_keys, offloaded, lora, pickled, torch_saved,
        deepcopied, bfloat16, half, compiled_by_hand, compiled_by_enable, assistant, prompt_lookup, custom_generate,
        second_turn, forked_prefix, loaded_prefix, named_cache, callable_cache, hybrid_in_the_checkpoint,
        made_by_name, enabled_context, enabled_again, vision_language, training_mode, inference_mode, threads,
]  # fmt: skip
COMPILED = [compiled_by_hand, compiled_by_enable]  # each takes seconds
CELLS = [
    pytest.param(way, kind, id=f"{way.__name__}-{kind}", marks=[pytest.mark.slow] * slow)
    for way in WAYS
    for kind in KINDS
    for slow in [way in COMPILED and kind not in ("static", "int4")]
]


def calls_of(chunks: list[int], kind: str, quantized_at: int) -> list[tuple]:
    """Queries, keys, whether they are packed and whether they are our cache's: of each layer of each forward."""
    calls, past = [], 0
    for new in chunks:
        seen = min(past, WINDOW - 1) if kind in CROSSED else past
        packed = kind in ROUNDED and past >= quantized_at
        calls += [(new, seen + new, packed, True)] * SMALL["num_hidden_layers"]
        past += new
    return calls


def assert_the_cache_was_read(calls: list[Served], answers: list[Answer], kind: str) -> None:
    reader = "sdpa" if kind == "fp8" else "native"
    steps = {call.backend for call in calls if call.q_len == 1}
    assert steps <= {reader}, f"steps are read by {steps}"
    made = [(call.q_len, call.kv_len, call.packed, call.from_cache) for call in calls]
    if answers[0].chunks is None:  # the first draft comes with the prompt; how many of its tokens stay, the second says
        drafted = made[0][0] - PROMPT
        assert 0 < drafted <= 3 and made[:2] == calls_of([PROMPT + drafted], kind, PROMPT)
        assert made[::2] == made[1::2] and 2 < len(made[::2]) <= NEW
        assert {call[2:] for call in made[2:]} == {(kind in ROUNDED, True)}
        answers[0].quantized_at = made[2][1] - made[2][0]
    else:
        expected = [call for answer in answers for call in calls_of(answer.chunks, kind, answer.quantized_at)]
        assert sorted(made) == sorted(expected) if len(answers) > 1 else made == expected


def exact_logits(model, answer: Answer) -> torch.Tensor:
    """Of each token of the answer, by stock transformers at once."""
    ids, mask, positions = context(answer)
    inputs = {"attention_mask": mask, "position_ids": positions, **(answer.inputs or {})}
    with torch.no_grad():
        return model(ids, **inputs, use_cache=False).logits.float()


def context(answer: Answer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask and positions of everything that the model saw, each `(B, T - 1)`."""
    ids = answer.tokens[:, :-1]
    first = torch.zeros(len(ids), 1, dtype=torch.long)
    first[0] = answer.padding
    positions = torch.arange(ids.shape[1]) - first
    return ids, (positions >= 0).long(), positions.clamp(min=0)


def logits_from_codes(model, answer: Answer) -> torch.Tensor:
    """By stock transformers, from the keys and values that the codes of the cache stand for."""
    (ids, mask, positions), kept = context(answer), answer.quantized_at
    cache = copy.deepcopy(answer.cache)
    cache.crop(kept - cache.get_seq_length())
    if answer.logits is None:
        cache.batch_select_indices(torch.arange(0, cache.layers[0].batch_size, cache.layers[0].batch_size // len(ids)))
    dense = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        dense.update(*(tensor.to(model.dtype) for tensor in layer.dense()), i)
    with torch.no_grad():
        given = {"attention_mask": mask, "position_ids": positions[:, kept:], "past_key_values": dense}
        return model(ids[:, kept:], **given).logits.float()


def expected_of(kind: str, answer: Answer, model) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that chose the new tokens: what they must be, and what they would be if nothing were left out."""
    exact = exact_logits(model, answer)
    expected = exact
    if kind in ROUNDED:
        expected = torch.cat([exact[:, : answer.quantized_at], logits_from_codes(model, answer)], 1)
    elif kind in CROSSED:
        ids, _, positions = context(answer)
        first = ids.shape[1] - 1 - positions[:, -1]
        expected = expected_logits(model, ids, WINDOW, SINKS, first, **(answer.inputs or {})).float()
    return expected[:, -NEW:], exact[:, -NEW:]


def assert_right(answer: Answer, kind: str) -> None:
    expected, exact = expected_of(kind, answer, answer.model or fresh())
    new = answer.tokens[:, -NEW:]
    ours, far = answer.logits, FAR
    if ours is None:  # a beam search says what its sequences are worth
        ours, far = answer.scores, FAR_IN_A_MEAN
        expected, exact = (t.log_softmax(-1).gather(-1, new[..., None]).mean((1, 2)) for t in (expected, exact))
    scale = float(expected.abs().max())
    error = float((ours - expected).abs().max())
    allowed = scale * (CLOSE_FROM_CODES if kind in ROUNDED else CLOSE)
    if answer.plain is not None:
        plain, _ = expected_of(kind, answer, answer.plain())
        allowed += FACTOR * float((plain - expected).abs().max())
    assert error <= allowed, f"logits are off by {error:.2e}, {allowed:.2e} allowed"
    if answer.plain is None and kind not in EXACT:
        assert float((ours - exact).abs().max()) > far * scale, "as exact as if the cache had not been used"
    if answer.plain is None and answer.greedy:
        assert torch.equal(new, expected.argmax(-1))


@pytest.fixture(autouse=True)
def no_gathering(monkeypatch):
    """Attention reads the layers themselves: none is asked for all its keys and values."""

    def refuse(*args, **kwargs):
        raise AssertionError("update() was called on the layer")

    monkeypatch.setattr(KVLayer, "update", refuse)


@pytest.mark.parametrize(("way", "kind"), CELLS)
def test_every_way_reads_every_cache(way, kind, tmp_path):
    with served() as calls:
        answers = way(Run(kind, tmp_path))
    answers = answers if isinstance(answers, list) else [answers]
    assert_the_cache_was_read(calls, answers, kind)
    for answer in answers:
        asked = KINDS[kind](stock().config)
        assert type(answer.cache) is type(asked) and answer.cache.settings == asked.settings
        assert_right(answer, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_self_attention_without_a_model_reads_every_cache(kind):
    """It adds no positions, so that its window has no sinks."""
    torch.manual_seed(0)
    attention = CachedSelfAttention(64, num_heads=4, num_kv_heads=2, head_dim=32)
    cache = SlidingWindowKVCache(attention.config, WINDOW) if kind in CROSSED else KINDS[kind](attention.config)
    x, chunks = 4 * torch.randn(2, PROMPT + NEW, 64), [PROMPT] + [1] * NEW
    with served() as calls, torch.no_grad():
        out = [attention.prefill(x[:, :PROMPT], cache)]
        out += [attention.step(x[:, i : i + 1], cache) for i in range(PROMPT, PROMPT + NEW)]
    made = [(call.q_len, call.kv_len, call.packed, call.from_cache) for call in calls]
    assert made == calls_of(chunks, kind, PROMPT)[::2]  # it is one layer
    assert {call.backend for call in calls[1:]} == {"sdpa" if kind == "fp8" else "native"}

    with torch.no_grad():
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
        q, k, v = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in parts)
        position = torch.arange(PROMPT + NEW)
        causal = position <= position[:, None]
        window = causal & (position > position[:, None] - WINDOW)

        def spelled_out(k, v, mask):
            return attention.o_proj(sdpa(q, k, v, mask, enable_gqa=True).transpose(1, 2).flatten(2))[:, -NEW:]

        exact = expected = spelled_out(k, v, causal)
        if kind in CROSSED:
            expected = spelled_out(k, v, window)
        elif kind in ROUNDED:
            cache.crop(-NEW)
            dense = (
                torch.cat([of, own[:, :, PROMPT:]], 2) for of, own in zip(cache.layers[0].dense(), (k, v), strict=True)
            )
            expected = spelled_out(*dense, causal)
    ours, scale = torch.cat(out, 1)[:, -NEW:], float(expected.abs().max())
    assert float((ours - expected).abs().max()) <= scale * (CLOSE_FROM_CODES if kind in ROUNDED else CLOSE)
    if kind not in EXACT:
        assert float((ours - exact).abs().max()) > FAR * scale
