"""The last words of passages, scored by lm-evaluation-harness: by its own `hf`, and through caches by `hf-kvattn`.

Each passage is a piece of a text whose last word also occurs earlier in it: a model that has read it can know the word.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_kvattn.caches.registry import COMPLETE
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, device, positive_int
from hf_kvattn.tools.tables import markdown_table

HELP = """Score the last words of passages with lm-evaluation-harness, through its own model `hf` and through caches.

    hf-kvattn last-word --model ./my-model
    hf-kvattn last-word --model ./my-model --caches static int4 --text book.txt --task my-task

Writes a task of lm-eval (a YAML file and its documents) to the folder `--task`, and prints a table. lm-eval runs the
same task by itself:

    python -m hf_kvattn.integrations.lm_eval --model hf-kvattn --model_args pretrained=./my-model,kv_cache=int4 \\
        --include_path last_word --tasks last_word
"""

TASK = """task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


def passages(text: str, count: int, words: int) -> list[dict[str, str]]:
    """`count` passages of at least `words` words, evenly spread over the text; ValueError where it is too short.

    A passage ends with a word of five letters or more that it has more than once.
    """
    found = list(re.finditer(r"\S+", text))
    documents = []
    for i in range(count if len(found) > words else 0):
        start = (len(found) - words) * i // count
        for end in range(start + words, min(start + 2 * words, len(found))):
            word = re.fullmatch(r"[a-z]{5,}", found[end].group())
            context = text[found[start].start() : found[end - 1].end()]
            if word and re.search(rf"\b{word.group()}\b", context):
                documents.append({"context": context, "word": word.group()})
                break
    if len(documents) < count:
        raise ValueError(f"the text has {len(documents)} passages of {words} words, and {count} are needed")
    return documents


def write_task(folder: Path, documents: list[dict[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "last_word.jsonl").absolute()
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "last_word.yaml").write_text(TASK.format(documents=json.dumps(str(path))))


def scores(lm: Any, folder: Path) -> list[tuple[float, bool]]:
    """Of each passage the log-likelihood of its last word, and whether it is the greedy answer."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = simple_evaluate(lm, tasks=["last_word"], task_manager=manager, bootstrap_iters=0)
    return [sample["resps"][0][0] for sample in sorted(out["samples"]["last_word"], key=lambda each: each["doc_id"])]


def table(found: dict[str, list[tuple[float, bool]]]) -> str:
    """The `scores` of each cache, as means; those of the first are what the others' changes are counted from."""
    first, rows = next(iter(found.values())), []
    for name, answers in found.items():
        accuracy, mean = fmean(greedy for _, greedy in answers), fmean(score for score, _ in answers)
        change = fmean(abs(own - reference) for (own, _), (reference, _) in zip(answers, first, strict=True))
        rows.append([name, f"{100 * accuracy:.1f}", f"{mean:.4f}", f"{change:.4f}"])
    return markdown_table(["cache", "accuracy %", "log-likelihood", "mean size of its change"], rows)


def models(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What makes each row's model."""
    from lm_eval.models.huggingface import HFLM

    from hf_kvattn.integrations.lm_eval import KVAttnLM

    how = {"device": args.device, "dtype": args.dtype, "softmax_dtype": "float32"}
    ours = {name: functools.partial(KVAttnLM, args.model, kv_cache=name, **how) for name in args.caches}
    return {"none (`hf`)": functools.partial(HFLM, args.model, **how), **ours}


def _main(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-evaluation-harness is not installed: pip install hf_kvattn[lm-eval]")
    write_task(args.task, passages(inputs.load_text(args.text), args.passages, args.words))
    print(table({name: scores(make(), args.task) for name, make in models(args).items()}), end="")
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--caches", nargs="+", choices=COMPLETE, default=["static", "int8", "int4", "int2"])
    parser.add_argument("--text", default="pydoc", help="a file, 'wikitext', 'pydoc' (Python's topics) or 'auto'")
    parser.add_argument("--passages", type=positive_int, default=100, help="each is one last word")
    parser.add_argument("--words", type=positive_int, default=220, help="of a passage, at least")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="float32", help="of weights and cache")
    parser.add_argument("--task", type=Path, default=Path("last_word"), help="the folder to write the task to")


COMMAND = Command(HELP, _add_arguments, _main)
