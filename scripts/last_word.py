"""Last words of passages, scored by lm-evaluation-harness: its own `hf`, and caches through `hf-kvattn`.

    python scripts/last_word.py --model ./my-model --caches static int8 int4 int2

Writes a task of lm-eval (a YAML file and its documents) to `--task`, and prints a table. Each passage is a piece of the
text whose last word also occurs earlier in it, so that a model that has read the passage can know it. The same by hand:

    python -m hf_kvattn.integrations.lm_eval --model hf-kvattn --model_args pretrained=./my-model,kv_cache=int4 \
        --include_path last_word --tasks last_word
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from statistics import fmean

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hf_kvattn.caches.registry import COMPLETE
from hf_kvattn.integrations.lm_eval import KVAttnLM
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import HelpFormatter, positive_int, reported
from hf_kvattn.tools.tables import markdown_table

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
    for i in range(count):
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


def scores(lm: HFLM, folder: Path) -> list[tuple[float, bool]]:
    """Of each passage the log-likelihood of its last word, and whether it is the greedy answer."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    out = simple_evaluate(lm, tasks=["last_word"], task_manager=manager, bootstrap_iters=0)
    return [sample["resps"][0][0] for sample in sorted(out["samples"]["last_word"], key=lambda each: each["doc_id"])]


def main(args: argparse.Namespace) -> int:
    write_task(args.task, passages(inputs.load_text(args.text), args.passages, args.words))
    how = {"device": args.device, "dtype": args.dtype, "softmax_dtype": "float32"}
    stock = scores(HFLM(args.model, **how), args.task)
    found = {"stock (`hf`)": stock}
    found |= {name: scores(KVAttnLM(args.model, kv_cache=name, **how), args.task) for name in args.caches}
    rows = []
    for name, answers in found.items():
        change = fmean(abs(own - reference) for (own, _), (reference, _) in zip(answers, stock, strict=True))
        accuracy = 100 * fmean(greedy for _, greedy in answers)
        rows.append([name, f"{accuracy:.1f}", f"{fmean(score for score, _ in answers):.4f}", f"{change:.4f}"])
    print(markdown_table(["cache", "accuracy %", "log-likelihood", "its change, mean of sizes"], rows))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="hub id or folder")
    parser.add_argument("--caches", nargs="+", choices=COMPLETE, default=["static", "int8", "int4", "int2"])
    parser.add_argument("--text", default="pydoc", help="a file, 'wikitext', 'pydoc' (Python's topics) or 'auto'")
    parser.add_argument("--passages", type=positive_int, default=100)
    parser.add_argument("--words", type=positive_int, default=280, help="of a passage, at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16")
    parser.add_argument("--task", type=Path, default=Path("last_word"), help="folder of the task")
    args = parser.parse_args()
    raise SystemExit(reported(lambda: main(args)))
