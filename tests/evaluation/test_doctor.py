"""What `doctor` measures of a machine, what it concludes, and the line that `enable` logs of the same facts."""

from __future__ import annotations

import functools
import json
import logging

import pytest
import torch
from models import tiny_model

import hf_kvattn
from hf_kvattn import machine
from hf_kvattn.evaluation import doctor
from hf_kvattn.kernels import native
from hf_kvattn.tools import commands, inputs

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"seconds": 0.01, "read_bytes": 1 << 16, "outputs": 64, "inputs": 32, "matrices": 2, "prompt_tokens": 4}


def product(weights: str, weights_s: float, compiled: bool = False, prompt: float = 1e11) -> dict:
    found = {"weights": weights, "compiled": compiled, "weights_s": weights_s, "bytes_s": 2 * weights_s}
    return found | {"prompt_flop_s": None if compiled else prompt, "compile_s": 1.0 if compiled else None}


def judged(*rows: dict, **facts) -> dict:
    """Made-up results, and the advice on them."""
    known = {"cpu": "a CPU", "cores": 2, "threads": 2, "instructions": [], "native": "avx2", "native_reason": None}
    known |= {"compiler": "g++", "torchao": None, "gpu": None, "torch": "2.13"} | facts
    results = {"machine": known, "sizes": SMALL, "products": list(rows), "read_bytes_s": {"2": 3e10, "4": 2e10}}
    results["choice"] = doctor._choice(results["products"])
    return results | {"advice": doctor.advice(results)}


def said(results: dict) -> str:
    return "\n".join(item["say"] for item in results["advice"])


def test_a_machine_is_measured_as_it_is():
    results = doctor.measure(compiled=False, **SMALL)
    facts, names = results["machine"], [row["weights"] for row in results["products"]]
    assert names[:3] == ["bfloat16", "float16", "float32"] and (len(names) == 4) == bool(facts["torchao"])
    assert set(results["read_bytes_s"]) == {"1", str(facts["cores"])} and min(results["read_bytes_s"].values()) > 0
    for row in results["products"][:3]:
        assert row["bytes_s"] == pytest.approx(row["weights_s"] * (4 if row["weights"] == "float32" else 2))
        assert row["prompt_flop_s"] > 0 and not row["compiled"]
    assert torch.get_num_threads() == facts["threads"] == 1 and facts["cores"] >= 1
    results["advice"] = doctor.advice(results)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    report = doctor.report(results)
    assert facts["cpu"] in report and all(item["say"] in report for item in results["advice"])


def test_every_dtype_is_measured_compiled_too(monkeypatch):
    asked = []
    monkeypatch.setattr(doctor, "compiler", lambda: "g++")
    monkeypatch.setattr(
        doctor, "_products", lambda kind, compiled, *_: asked.append((kind, compiled)) or product(kind, 1e9, compiled)
    )
    results = doctor.measure(**SMALL)
    kinds = ["bfloat16", "float16", "float32", "int8 (torchao)"][: 4 if results["machine"]["torchao"] else 3]
    assert asked == [(kind, compiled) for compiled in (False, True) for kind in kinds]


def test_without_native_kernels_memory_is_measured_all_the_same(monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "not built")
    results = doctor.measure(compiled=False, **SMALL)
    assert results["machine"]["native"] is None and results["read_bytes_s"]["1"] > 0
    assert "attention runs on `sdpa`: not built" in said(results | {"advice": doctor.advice(results)})


@pytest.mark.parametrize(
    ("rows", "dtype", "compiled"),
    [
        ([("bfloat16", 1.0, False), ("float16", 3.0, False), ("float32", 2.0, False)], "float16", False),
        ([("bfloat16", 1.0, False), ("float32", 2.0, False), ("bfloat16", 4.0, True)], "bfloat16", True),
        ([("bfloat16", 2.8, False), ("float16", 3.0, False), ("bfloat16", 2.9, True)], "bfloat16", True),
        ([("bfloat16", 2.8, False), ("float16", 3.0, False), ("bfloat16", 2.5, True)], "bfloat16", False),
        ([("float32", 9.0, False), ("bfloat16", 1.0, False), ("int8 (torchao)", 99.0, True)], "float32", False),
    ],
)
def test_the_choice_is_the_fastest_and_of_equals_the_preferred(rows, dtype, compiled):
    choice = doctor._choice([product(*row) for row in rows])
    assert (choice["weights"], choice["compiled"]) == (dtype, compiled)


def test_advice_follows_from_its_numbers():
    rows = [product("bfloat16", 5e9), product("float16", 13e9, prompt=1e10), product("float32", 9e9)]
    results = judged(*rows)
    first = results["advice"][0]
    assert 'dtype="float16" and enable(model, cache="static"): ' in first["say"] and first["value"] == 13.0
    assert "2.6 times faster than uncompiled bfloat16" in first["say"] and "overflow" in said(results)
    assert "10.0 times faster than float16's" in said(results) and "hf_kvattn[weights]" in said(results)
    assert "threads" not in said(results) and "gpu-check" not in said(results)

    compiled = judged(*rows, product("bfloat16", 16e9, True), product("int8 (torchao)", 30e9, True), torchao="0.18")
    assert 'dtype="bfloat16" and enable(model, cache="static", compile=True)' in compiled["advice"][0]["say"]
    assert "compiled int8 (torchao) weights, which are lossy, are read 1.9 times" in said(compiled)
    assert "overflow" not in said(compiled) and "hf_kvattn[weights]" not in said(compiled)

    bare = judged(product("bfloat16", 1e9), threads=4, compiler=None, native=None, native_reason="why", gpu="a GPU")
    for line in ("2 threads, the cores", "not 4", "1.50 times as fast", "install g++", "`sdpa`: why", "gpu-check"):
        assert line in said(bare)


def test_the_command_measures_a_model_beside_what_bytes_give(tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "measure", functools.partial(doctor.measure, **SMALL))
    monkeypatch.setattr(doctor, "_choice", lambda rows: rows[2])
    assert commands.main(["doctor", str(tiny_folder), "--context", "24", "--no-compile", "--json"]) == 0
    out = capsys.readouterr().out
    model = json.loads(out.splitlines()[-1])["model"]
    config = inputs.load_config(str(tiny_folder))
    rows = config.vocab_size * config.hidden_size  # the table of embeddings gives rows, the head is read whole
    layer = config.hidden_size * (2 * config.hidden_size + 2 * 2 * 16 + 3 * config.intermediate_size + 2)
    assert model["weights_bytes"] == 4 * (2 * layer + rows + config.hidden_size)
    assert model["kv_bytes"] == 4 * 2 * 2 * 2 * 16 * 24 and model["dtype"] == "float32"
    assert set(model["step_ms"]) == {"stock-dynamic", "kvattn-static-fit"} and model["expected_ms"] > 0
    assert "| expected: bytes over bandwidth |" in out and "1. load with" in out and "tiny at 24 tokens: a step" in out


def slow_model(dtype: torch.dtype = torch.bfloat16):
    return tiny_model().to(dtype)


@pytest.fixture
def sampled(monkeypatch):
    """A machine where float32 weights are read four times as fast; the numbers of threads it was asked with."""
    asked = []

    def rates(threads: int) -> dict[torch.dtype, float]:
        asked.append(threads)
        return {torch.bfloat16: 1e9, torch.float16: 2.1e9, torch.float32: 4e9}

    monkeypatch.setattr(machine, "_sampled", rates)
    monkeypatch.setattr(machine, "SMALL_BYTES", 1)
    machine.logger.warning_once.cache_clear()
    return asked


def test_enable_says_once_that_a_dtype_is_slow_here(sampled, caplog):
    with caplog.at_level(logging.WARNING, "hf_kvattn"):
        for _ in range(2):
            hf_kvattn.enable(slow_model())
    [line] = [record.message for record in caplog.records]
    assert "bfloat16 weights 4.0 times slower than torch.float32" in line and "(1.0 against 4.0" in line
    assert "compile=True" in line and sampled == [1, 1]


def test_enable_says_nothing_where_there_is_nothing_to_say(sampled, caplog):
    plain, quantized = slow_model(), slow_model()
    for layer in (module for module in quantized.modules() if isinstance(module, torch.nn.Linear)):
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with caplog.at_level(logging.WARNING, "hf_kvattn"):
        hf_kvattn.enable(slow_model(), compile=True)
        hf_kvattn.enable(slow_model(torch.float32))
        hf_kvattn.enable(slow_model().to("meta"))
        hf_kvattn.enable(quantized)
        with torch._subclasses.FakeTensorMode():
            machine.warn_of_slow_weights(plain)
        torch.compile(lambda: machine.warn_of_slow_weights(plain) or torch.ones(1), backend="eager")()
    assert not caplog.records and not sampled
    machine.warn_of_slow_weights(slow_model(torch.float16))
    assert not caplog.records and sampled == [1]  # 1.9 times is not several


def test_a_small_model_is_not_worth_a_sample(sampled, monkeypatch):
    monkeypatch.undo()
    before = machine._sampled.cache_info().currsize
    hf_kvattn.enable(slow_model())
    assert machine._sampled.cache_info().currsize == before


def test_the_sample_is_short_and_tells_weights_a_second():
    rates = machine.weights_a_second(1 << 20, runs=2)
    assert set(rates) == set(machine.DTYPES) and all(1e6 < rate < 1e13 for rate in rates.values())
