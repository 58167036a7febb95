"""`hf-kvattn doctor`: what this machine can do, and what that says about how to load and run a model on it.

A decode step reads all weights and all stored keys and values once, so bytes over bandwidth are what it takes at least.
What it takes depends on how fast the products of a dtype read their weights, uncompiled and compiled. All of this is
measured here, on matrices that are larger than a CPU's caches, and the advice is what the numbers say.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from tqdm import tqdm

from hf_kvattn.caches.registry import CACHES
from hf_kvattn.compiling.few_rows import few_rows_options
from hf_kvattn.evaluation import throughput
from hf_kvattn.evaluation.bandwidth import read_bandwidth_bytes_s
from hf_kvattn.evaluation.common import variants
from hf_kvattn.kernels import native
from hf_kvattn.planning import cache_bytes
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.conditions import cpu_name, source_name
from hf_kvattn.tools.tables import Column, digits, joined, mib, table_of, three_digits

OUTPUTS, INPUTS = 8192, 2048  # the widest matrix of Llama 3.2 1B
MATRICES = 4  # 128 MiB in 16 bits
READ_BYTES = 256 << 20
PROMPT_TOKENS = 256
SECONDS = 0.3  # for each figure
LIKE_BEST = 0.85  # a rate from this share of the best one on is as good
# Weights that stay what they are, the preferred first; float16 may overflow in models that were trained in bfloat16.
EXACT = ("bfloat16", "float16", "float32")
INT8 = "int8 (torchao)"
OURS = {False: "kvattn-static-fit", True: "kvattn-static-compiled"}


class Products(torch.nn.Module):
    """Matrix products whose weights together exceed a CPU's caches, as those of a model do."""

    def __init__(self, outputs: int, inputs: int, count: int, dtype: torch.dtype):
        super().__init__()
        layers = (torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype) for _ in range(count))
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


def cores() -> int:
    """Physical cores that this process may use: those of the machine, of its affinity, and of the group's quota."""
    found = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        found.append(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")  # two numbers of microseconds, the first may be `max`
    if quota.is_file() and (limit := quota.read_text().split())[0] != "max":
        found.append(max(1, int(limit[0]) // int(limit[1])))
    return min(found)


def compiler() -> str | None:
    """The C++ compiler of torch.compile; None where there is none."""
    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def facts() -> dict[str, Any]:
    """What this machine is, as far as it decides how a model runs here."""
    cpu = torch.cpu
    instructions = {
        "avx2": cpu._is_avx2_supported(),
        "avx512": cpu._is_avx512_supported(),
        "vnni": cpu._is_vnni_supported(),
        "avx512_bf16": cpu._is_avx512_bf16_supported(),
        "amx": cpu._is_amx_tile_supported(),
    }
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name, found in instructions.items() if found],
        "native": native.variant() if native.unavailable() is None else None,
        "native_reason": native.unavailable(),
        "compiler": compiler(),
        "torchao": importlib.metadata.version("torchao") if importlib.util.find_spec("torchao") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _best_s(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, two at least."""
    run()
    times_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while not times_s or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - start_s)
    return min(times_s)


def _read_bytes_s(n_bytes: int, seconds: float) -> float:
    """Bytes a second that the memory gives, by the native kernels where they were built, else by PyTorch's sum."""
    data = torch.ones(n_bytes // 4)
    if native.unavailable() is None:
        return read_bandwidth_bytes_s(data, seconds)
    return data.nbytes / _best_s(data.sum, seconds)


def _products(weights: str, compiled: bool, sizes: dict[str, int], seconds: float) -> dict[str, Any]:
    """What products with one token (a step) and with many (a prompt) reach with these weights."""
    dtype = inputs.DTYPES.get(weights, torch.bfloat16)
    module = Products(sizes["outputs"], sizes["inputs"], sizes["matrices"], dtype).eval()
    number_bytes = dtype.itemsize
    if weights == INT8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # an extra

        quantize_(module, Int8WeightOnlyConfig(set_inductor_config=False))
        number_bytes = 1
    token = torch.ones(1, sizes["inputs"], dtype=dtype)
    prompt = token.expand(sizes["prompt_tokens"], -1).contiguous()
    numbers = sizes["outputs"] * sizes["inputs"] * sizes["matrices"]
    run: Any = module
    start_s = time.perf_counter()
    if compiled:
        run = torch.compile(module, dynamic=False, options=few_rows_options())
        run(token)
    compile_s = time.perf_counter() - start_s if compiled else None
    step_s = _best_s(lambda: run(token), seconds)
    # Prompts run uncompiled either way.
    prompt_s = None if compiled else _best_s(lambda: module.layers[0](prompt), seconds)
    return {
        "weights": weights,
        "compiled": compiled,
        "bytes_s": numbers * number_bytes / step_s,
        "weights_s": numbers / step_s,
        "prompt_flop_s": None if prompt_s is None else 2 * numbers / sizes["matrices"] * len(prompt) / prompt_s,
        "compile_s": compile_s,
    }


@torch.no_grad()
def measure(
    compiled: bool = True,
    seconds: float = SECONDS,
    read_bytes: int = READ_BYTES,
    outputs: int = OUTPUTS,
    inputs: int = INPUTS,
    matrices: int = MATRICES,
    prompt_tokens: int = PROMPT_TOKENS,
    progress: bool = False,
) -> dict[str, Any]:
    """Facts and rates of this machine; a dict that JSON can hold. PyTorch's number of threads is as it was afterwards.

    Args:
        compiled: measure what compiled products reach too, where there is a compiler: a few seconds each.
        seconds: for each figure.
        read_bytes: of the buffer that is read to measure the memory.
        outputs, inputs, matrices: of the products.
        prompt_tokens: rows of a product that stands for a prompt.
    """
    found = facts()
    sizes = {"outputs": outputs, "inputs": inputs, "matrices": matrices, "prompt_tokens": prompt_tokens}
    counts = sorted({1, found["threads"], found["cores"]})
    kinds = [*EXACT, INT8] if found["torchao"] else [*EXACT]
    jobs = [(kind, False) for kind in kinds]
    if compiled and found["compiler"]:
        jobs += [(kind, True) for kind in kinds]
    bar = tqdm(total=len(counts) + len(jobs), desc="measuring this machine", disable=not progress)
    read_bytes_s, rows = {}, []
    with bar:
        for count in counts:
            with _threads(count):
                read_bytes_s[str(count)] = _read_bytes_s(read_bytes, seconds)
            bar.update()
        for kind, is_compiled in jobs:
            rows.append(_products(kind, is_compiled, sizes, seconds))
            bar.update()
    results = {"kind": "doctor", "machine": found, "sizes": sizes, "read_bytes_s": read_bytes_s, "products": rows}
    return results | {"choice": _choice(rows)}


def _choice(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row to load a model by: of exact weights that are read about as fast as the fastest, the preferred ones."""
    exact = [row for row in rows if row["weights"] in EXACT]
    best = max(row["weights_s"] for row in exact)
    good = [row for row in exact if row["weights_s"] >= LIKE_BEST * best]
    # Compiled, if that reads no slower: it saves what is not products too.
    return min(good, key=lambda row: (EXACT.index(row["weights"]), not row["compiled"]))


def step_weights_bytes(model: Any) -> int:
    """Bytes of weights that a decode step of a model reads: all, but for a table of embeddings that only gives rows."""
    parameters = {id(p): p.nbytes for p in model.parameters()}
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not table.weight:
        parameters.pop(id(table.weight), None)
    return sum(parameters.values())


def measure_model(
    name: str, context: int, results: dict[str, Any], new_tokens: int = 24, progress: bool = False
) -> dict[str, Any]:
    """Steps of a model that is loaded as `results` recommend, beside what bytes over bandwidth give.

    Args:
        name: as `inputs.load_model` takes it.
        context: tokens of the prompt, which are random.
        new_tokens: that are timed, in three turns.
    """
    choice = results["choice"]
    model, tokenizer = inputs.load_model(name, inputs.DTYPES[choice["weights"]])
    token_ids = torch.randint(model.config.get_text_config(decoder=True).vocab_size, (context,))
    names = [OURS[compiled] for compiled in ((False, True) if choice["compiled"] else (False,))]
    timed = throughput.measure(
        model, tokenizer, token_ids,
        variants=variants.select(names), contexts=[context], batch_sizes=[1], new_tokens=new_tokens, rounds=3,
        prompts_s=0, progress=progress,
    )  # fmt: skip
    rows = timed["cells"][0]["rows"]
    weights_bytes = step_weights_bytes(model)
    kv_bytes = cache_bytes(CACHES["static"], model.config, 1, model.dtype, context)
    read_bytes_s = results["read_bytes_s"][str(results["machine"]["threads"])]
    return {
        "name": source_name(name),
        "dtype": choice["weights"],
        "context": context,
        "weights_bytes": weights_bytes,
        "kv_bytes": kv_bytes,
        "expected_ms": 1e3 * (weights_bytes + kv_bytes) / read_bytes_s,
        "step_ms": {row["variant"]: row["step_ms"]["median"] for row in rows},
    }


def advice(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What to do here: plain words, and the number each follows from, `{"say", "value", "unit"}`."""
    return [{"say": say, "value": value, "unit": unit} for say, value, unit in _advice(results)]


def _advice(results: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    machine, rows, choice = results["machine"], results["products"], results["choice"]
    threads, cores, read = machine["threads"], machine["cores"], results["read_bytes_s"]
    if machine["gpu"]:
        yield (
            f"there is a GPU, {machine['gpu']}: `hf-kvattn gpu-check` measures it; what follows is the CPU's",
            1,
            "GPU",
        )
    worst = min((row for row in rows if row["weights"] in EXACT), key=lambda row: row["weights_s"])
    how = ", compile=True" if choice["compiled"] else ""
    yield (
        f'load with dtype="{choice["weights"]}" and enable(model, cache="static"{how}): a step reads its weights '
        f"{choice['weights_s'] / worst['weights_s']:.1f} times faster than {_described(worst)} ones",
        choice["weights_s"] / 1e9,
        "billion weights a second",
    )
    if choice["weights"] == "float16":
        yield "float16 may overflow in a model that was trained in bfloat16: compare its answers once", 65504, "at most"
    quantized = max((row for row in rows if row["weights"] == INT8), key=lambda row: row["weights_s"], default=None)
    if quantized is None:
        yield "weights of 8 bits need torchao, which is not installed: pip install hf_kvattn[weights]", 8, "bits"
    else:
        ratio = quantized["weights_s"] / choice["weights_s"]
        only = "" if ratio > 1 else "only "
        yield (
            f"{_described(quantized)} weights, which are lossy, are read {only}{ratio:.1f} times as fast",
            ratio,
            "times",
        )
    if machine["compiler"] is None:
        yield "compile=True needs a C++ compiler, and there is none: install g++ or clang", 0, "compilers"
    if machine["native"] is None:
        yield f"attention runs on `sdpa`: {machine['native_reason']}", 0, "native kernels"
    if threads != cores:
        faster = read[str(cores)] / read[str(threads)]
        yield (
            f"run with {cores} threads, the cores that this process may use, not {threads}: torch.set_num_threads("
            f"{cores}) or OMP_NUM_THREADS={cores}; memory is then read {faster:.2f} times as fast",
            faster,
            "times",
        )
    prompts = {row["weights"]: row["prompt_flop_s"] for row in rows if row["weights"] in EXACT and not row["compiled"]}
    quickest = max(prompts, key=lambda weights: prompts[weights])
    behind = prompts[quickest] / prompts[choice["weights"]]
    if behind > 1 / LIKE_BEST:
        yield (
            f"where prompts are long and answers short, {quickest} may be the better choice: its matrix products are "
            f"{behind:.1f} times faster than {choice['weights']}'s",
            behind,
            "times",
        )
    if "model" in results:
        model = results["model"]
        step_ms, expected_ms = model["step_ms"], model["expected_ms"]
        fastest = min(step_ms, key=lambda name: step_ms[name])
        yield (
            f"{model['name']} at {model['context']} tokens: a step takes {three_digits(step_ms[fastest])} ms with "
            f"{fastest}, {step_ms[variants.BASELINE] / step_ms[fastest]:.1f} times less than with "
            f"{variants.BASELINE}; reading its weights, keys and values takes {three_digits(expected_ms)}",
            step_ms[fastest] / expected_ms,
            "times what reading takes",
        )


def _described(row: dict[str, Any]) -> str:
    return f"{'compiled' if row['compiled'] else 'uncompiled'} {row['weights']}"


def _giga(value: float | None) -> str:
    return digits(".1f")(None if value is None else value / 1e9)


COLUMNS: list[Column] = [
    ("weights", "weights", str),
    ("", "compiled", lambda compiled: "compiled" if compiled else "uncompiled"),
    ("step: GB/s", "bytes_s", _giga),
    ("step: billion weights/s", "weights_s", _giga),
    ("prompt: GFLOP/s", "prompt_flop_s", _giga),
]


def report(results: dict[str, Any]) -> str:
    """All of it in Markdown."""
    machine, sizes = results["machine"], results["sizes"]
    lines = [
        f"{machine['cpu']}: {machine['threads']} threads on {machine['cores']} cores; "
        f"{', '.join(machine['instructions']) or 'no vector instructions that are looked for'}",
        f"native kernels: {machine['native'] or machine['native_reason']}",
        f"C++ compiler: {machine['compiler'] or 'none'}; torchao: {machine['torchao'] or 'not installed'}; torch "
        f"{machine['torch']}",
    ]
    memory = [{"threads": count, "read": read} for count, read in results["read_bytes_s"].items()]
    products = (
        f"Products of {sizes['matrices']} matrices of {sizes['outputs']} x {sizes['inputs']}, with one token (a step) "
        f"and one of them with {sizes['prompt_tokens']} (a prompt).\n"
    )
    parts = [
        "".join(f"- {line}\n" for line in lines),
        table_of([("threads", "threads", str), ("memory is read at GB/s", "read", _giga)], memory),
        products,
        table_of(COLUMNS, results["products"]),
    ]
    if "model" in results:
        parts.append(_model_table(results["model"]))
    said = "".join(
        f"{i}. {item['say']} ({three_digits(item['value'])} {item['unit']})\n"
        for i, item in enumerate(results["advice"], 1)
    )
    return joined(*parts, f"### Advice\n\n{said}")


def _model_table(model: dict[str, Any]) -> str:
    notes = (
        f"A step of {model['name']} in {model['dtype']} at {model['context']} tokens reads "
        f"{mib(model['weights_bytes'])} MiB of weights and {mib(model['kv_bytes'])} MiB of keys and values.\n"
    )
    rows = [{"step": "expected: bytes over bandwidth", "ms": model["expected_ms"]}]
    rows += [{"step": f"measured: {name}", "ms": ms} for name, ms in model["step_ms"].items()]
    return joined(notes, table_of([("step", "step", str), ("ms", "ms", digits(".2f"))], rows))


HELP = """Measure this machine in about half a minute, and say what to load here and how.

    hf-kvattn doctor
    hf-kvattn doctor ./my-model --context 4096
    hf-kvattn doctor --no-compile --json

With a model, its decode step is measured too, as recommended: where that is compiled, it takes a minute or more.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    help = f"a model to measure too: hub id, folder, .gguf file or {inputs.SMOLLM2}"
    parser.add_argument("model", nargs="?", help=help)
    parser.add_argument("--context", type=positive_int, default=1024, help="tokens of the model's prompt")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--no-compile", action="store_true", help="measure nothing that is compiled first")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line of stdout")


def _main(args: argparse.Namespace) -> int:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    results = measure(compiled=not args.no_compile, progress=True)
    if args.model is not None:
        results["model"] = measure_model(args.model, args.context, results, progress=True)
    results["advice"] = advice(results)
    print(report(results))
    if args.json:
        print(json.dumps(results, allow_nan=False))
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
