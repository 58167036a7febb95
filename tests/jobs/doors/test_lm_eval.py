"""The door to lm-evaluation-harness: scores are those of its own `hf`, or of a cache that is really read."""

import functools
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from models import tiny_model
from served import served
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, is_enabled
from hf_kvattn.integrations.lm_eval import KVAttnLM
from hf_kvattn.tools import commands

TASKS = {
    "last_word": "output_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: ' {{words[0]}}'\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]\n",
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: words\ndoc_to_target: 1\n"
    "metric_list: [{metric: acc}]\n",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{context}} {{words[2]}}'\n"
    "metric_list: [{metric: word_perplexity}]\n",
}


def words(count: int, seed: int) -> str:
    return " ".join(f"w{i}" for i in random.Random(seed).choices(range(3, 128), k=count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer of one word a token."""
    path = tmp_path_factory.mktemp("model")
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 128))]
    vocabulary = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(path)
    tiny_model(eos_token_id=2, head_dim=32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    """Local tasks over one file of documents; contexts of 70 to 73 words, and of a few."""
    path = tmp_path_factory.mktemp("tasks")
    documents = [
        {"context": words(length, length), "words": [words(count, 100 + length + count) for count in (1, 2, 40)]}
        for length in (*range(70, 74), 2, 3)
    ]
    (path / "documents.json").write_text("\n".join(map(json.dumps, documents)))
    for name, text in TASKS.items():
        dataset = f"task: {name}\ndataset_path: json\ntest_split: test\n"
        dataset += f"dataset_kwargs: {{data_files: {{test: {path / 'documents.json'}}}}}\n"
        (path / f"{name}.yaml").write_text(dataset + text)
    return TaskManager(include_path=str(path), include_defaults=False)


def evaluated(lm, tasks: TaskManager, name: str) -> list:
    """What the model answered to each request of a task, in order."""
    out = simple_evaluate(lm, tasks=[name], task_manager=tasks, bootstrap_iters=0)
    samples = sorted(out["samples"][name], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for answer in sample["resps"]]


def numbers(answers: list) -> torch.Tensor:
    """The log-likelihoods, and whether they are greedy, as numbers."""
    return torch.tensor([[float(each) for each in answer[0]] for answer in answers], dtype=torch.float64)


def instances(*requests: tuple) -> list[Instance]:
    return [Instance("loglikelihood", {}, request, i) for i, request in enumerate(requests)]


@pytest.fixture(scope="module")
def stock(folder, tasks):
    """The answers of lm-eval's own model to each task."""
    lm = HFLM(str(folder), device="cpu", max_length=100)
    return {name: evaluated(lm, tasks, name) for name in TASKS}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_exact_cache_scores_as_stock(folder, tasks, stock, batch_size):
    lm = KVAttnLM(str(folder), device="cpu", max_length=100, batch_size=batch_size)
    with served() as calls:
        for name in ("last_word", "choice", "whole"):
            got, expected = evaluated(lm, tasks, name), stock[name]
            if name == "whole":
                torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-4)
                continue
            torch.testing.assert_close(numbers(got), numbers(expected), rtol=1e-5, atol=1e-4)
    assert {call.q_len for call in calls} >= {1, 32, 69 if batch_size == 1 else 72} and any(
        call.from_cache for call in calls
    )


@pytest.mark.parametrize("name", ["last_word", "choice", "whole"])
def test_a_quantized_cache_is_read_and_scores_otherwise(folder, tasks, stock, name):
    lm = KVAttnLM(str(folder), device="cpu", max_length=100, kv_cache="int2")
    with served() as calls:
        got = evaluated(lm, tasks, name)
    assert sum(call.packed for call in calls) >= 3 * 4  # layers and documents that fill a block
    plain = (lambda answers: torch.tensor(answers)) if name == "whole" else (lambda answers: numbers(answers)[:, 0])
    assert (plain(got) - plain(stock[name])).abs().max() > 0.01


def test_scores_are_those_of_a_loop_over_tokens(folder):
    """One token at a time through an int4 cache, written out."""
    lm = KVAttnLM(str(folder), device="cpu", kv_cache="int4", kv_stride=1)
    context, target = words(90, 1), words(45, 2)
    [(got, greedy)] = lm.loglikelihood(instances((context, " " + target)))
    ids = torch.tensor([lm.tok_encode(context + " " + target)])
    cache, expected, predicted = QuantizedKVCache(lm.model.config, bits=4), 0.0, []
    with torch.no_grad():
        lm.model(ids[:, :89], past_key_values=cache)
        for i in range(89, 134):
            log_p = torch.log_softmax(lm.model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0], dim=-1)
            expected += log_p[ids[0, i + 1]].item()
            predicted.append(log_p.argmax())
    assert got == pytest.approx(expected, rel=1e-6)
    assert greedy == (torch.tensor(predicted) == ids[0, 90:]).all()


def test_a_greedy_continuation_is_found_greedy(folder):
    lm = KVAttnLM(str(folder), device="cpu", kv_stride=4)
    context = words(20, 3)
    [text] = lm.generate_until([Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 9}), 0)])
    wrong = " ".join([*text.split()[:-1], "w5"])
    assert text.split()[-1] != "w5" and len(text.split()) == 9
    scores = lm.loglikelihood(instances((context, f" {text}"), (context, f" {wrong}")))
    assert [greedy for _, greedy in scores] == [True, False]


def test_requests_of_one_context_share_its_prefill(folder):
    lm = KVAttnLM(str(folder), device="cpu", kv_cache="int4")
    context, other = words(70, 1), words(60, 2)
    requests = [(context, f" {each}") for each in ("w3", "w4", "w5 w6", "w5 w7", "w8 w9 w10")] + [(other, " w3")]
    apart = [lm.loglikelihood(instances(request))[0] for request in requests]
    with served() as calls:
        together = lm.loglikelihood(instances(*requests))
    assert [call.q_len for call in calls[::3]] == [69, 1, 2, 3, 59, 1]  # of the first of three layers
    assert [score for score, _ in together] == pytest.approx([score for score, _ in apart], rel=1e-6)
    lm.logits_cache = False
    with served() as calls:
        assert lm.loglikelihood(instances(*requests)) == together
    assert [call.q_len for call in calls[::3]] == [69, 1, 1, 2, 2, 3, 59, 1]


def test_answers_are_noted_for_lm_evals_own_cache(folder):
    lm, noted = KVAttnLM(str(folder), device="cpu"), []
    lm.cache_hook.add_partial = lambda *entry: noted.append(entry)
    [score] = lm.loglikelihood(instances(("w3 w4", " w5")))
    [rolling] = lm.loglikelihood_rolling(instances(("w3 w4 w5",)))
    assert noted == [
        ("loglikelihood", ("w3 w4", " w5"), score),
        ("loglikelihood_rolling", ("w3 w4 w5",), rolling),
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generate_until_is_generate(folder, batch_size):
    how = {"until": ["w7 "], "max_gen_toks": 12, "do_sample": False}
    requests = [Instance("generate_until", {}, (words(length, length), how), length) for length in (60, 70, 71, 2)]
    options = {"device": "cpu", "max_length": 100, "batch_size": batch_size}
    expected = HFLM(str(folder), **options).generate_until(requests)
    assert KVAttnLM(str(folder), **options).generate_until(requests) == expected and all(expected)
    lossy = KVAttnLM(str(folder), kv_cache="int2", **options)
    with served() as calls:
        lossy.generate_until(requests)
    assert any(call.packed and call.q_len == 1 for call in calls)


def test_a_callable_makes_the_cache(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    window = KVAttnLM(
        model, tokenizer=tokenizer, kv_cache=lambda config: SlidingWindowKVCache(config, window=8, sinks=2)
    )
    [(score, _)] = window.loglikelihood(instances((words(60, 1), " w5 w6")))
    assert is_enabled(model)
    [(whole, _)] = KVAttnLM(model, tokenizer=tokenizer).loglikelihood(instances((words(60, 1), " w5 w6")))
    assert abs(score - whole) > 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kv_cache": "int5"}, "unknown kv_cache 'int5'; known: static, int8"),
        ({"kv_cache": None}, "unknown kv_cache None; known: static"),
        ({"kv_cache": "sliding"}, "unknown kv_cache 'sliding'"),
        ({"kv_cache": lambda config: DynamicCache(config=config)}, "must make a KVCache, it made a DynamicCache"),
        ({"kv_stride": 0}, "kv_stride must be an int of at least 1, got 0"),
        ({"kv_stride": "8"}, "kv_stride must be an int of at least 1, got '8'"),
        ({"batch_size": "auto:4"}, "batch_size must be a number of at least 1, got 'auto:4'"),
        ({"batch_size": 0}, "batch_size must be a number of at least 1, got 0"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"backend": "seq2seq"}, "backend='seq2seq' is not served"),
    ],
)
def test_bad_arguments_are_refused(folder, arguments, message):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        KVAttnLM(model, tokenizer=tokenizer, **arguments)
    assert not is_enabled(model)


def test_a_continuation_longer_than_the_model_is_refused(folder):
    lm = KVAttnLM(str(folder), device="cpu", max_length=4)
    with pytest.raises(
        ValueError, match="5 of continuation; at least 1 of each is needed, and of the latter at most 4"
    ):
        lm.loglikelihood(instances(("w3", " w3 w4 w5 w6 w7")))


def test_the_command_is_lm_evals_own_with_the_model(folder, tasks, tmp_path, monkeypatch):
    [path] = {Path(entry.yaml_path).parent for entry in tasks.task_index.values()}
    command = ["lm_eval", "run", "--model", "hf-kvattn", "--device", "cpu", "--tasks", "last_word"]
    command += ["--model_args", f"pretrained={folder},kv_cache=int4,kv_stride=8"]
    command += ["--include_path", str(path), "--output_path", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.delitem(model_registry._objs, "hf-kvattn")  # as in a fresh process, which would take a minute:
    own = functools.partialmethod(TaskManager.__init__, include_defaults=False)  # lm-eval reads all its own tasks
    monkeypatch.setattr(TaskManager, "__init__", own)
    with served() as calls:
        runpy.run_module("hf_kvattn.integrations.lm_eval", run_name="__main__")
    assert any(call.packed for call in calls) and {call.q_len for call in calls} >= {1, 69}
    [written] = tmp_path.rglob("*.json")
    results = json.loads(written.read_text())
    assert results["config"]["model"] == "hf-kvattn" and "perplexity,none" in results["results"]["last_word"]


def test_last_words_are_a_task_and_a_table(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    common = " ".join(f"w{i}" for i in range(3, 40))
    text.write_text(f"{common} shared " * 20)  # no word of the tokenizer: all passages end alike
    command = ["last-word", "--model", str(folder), "--text", str(text), "--task", str(tmp_path / "task")]
    command += ["--passages", "3", "--words", "60", "--caches", "static", "int2"]
    with served() as calls:
        assert commands.main(command) == 0
    documents = [json.loads(line) for line in (tmp_path / "task/last_word.jsonl").read_text().splitlines()]
    assert len(documents) == 3 and all(len(each["context"].split()) >= 60 for each in documents)
    assert all(each["word"] == "shared" and " shared " in each["context"] for each in documents)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| none (`hf`)", "| static", "| int2"]
    assert rows[0][1:3] == rows[1][1:3] and rows[1][3] == "0.0000 |" and rows[2][2] != rows[0][2]
    assert any(call.packed for call in calls)


@pytest.mark.parametrize("words", [60, 2000])
def test_a_text_without_enough_passages_is_refused(tmp_path, words, capsys):
    (tmp_path / "text.txt").write_text("one two six " * 40)
    command = ["last-word", "--model", "m", "--text", str(tmp_path / "text.txt"), "--task", str(tmp_path / "task")]
    assert commands.main([*command, "--words", str(words), "--passages", "100"]) == 2
    assert f"passages of {words} words, and 100 are needed" in capsys.readouterr().err
    assert not (tmp_path / "task").exists()
