"""Models that transformers shares out over two processes: each process's caches hold its part of the KV heads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import processes
import torch
from models import generate, prompt, tiny_model
from processes import CACHES

import hf_kvattn

HELPER = Path(processes.__file__)


def launch(task: str, model, folder: Path, timeout_s: int = 250) -> subprocess.CompletedProcess:
    """Two processes that do `task` with the weights of `model`; a launch that waits for ever fails the test."""
    model.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HELPER)]
    paths = os.pathsep.join([str(HELPER.parent), str(HELPER.parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, task, str(folder / "model"), str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "code"),
        },
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def found_by(task: str, model, folder: Path) -> list[dict]:
    """What each process found."""
    run = launch(task, model, folder)
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / rank / "found") for rank in "01"]


def same(one, other) -> bool:
    return all(map(torch.equal, one, other)) if isinstance(one, list) else torch.equal(one, other)


def test_two_processes_answer_as_one_and_hold_half_each(tmp_path):
    found, alone = found_by("tensor_parallel", tiny_model(), tmp_path), tmp_path / "alone"
    alone.mkdir()
    expected = processes.answers(tiny_model(), alone)
    assert torch.equal(expected["static"], expected["stock"]) and torch.equal(expected["int8"], expected["stock"])
    for each in found:
        for name, tokens in expected.items():
            if not isinstance(tokens, int):
                assert same(each[name], tokens), name
        for name in CACHES:
            assert (each[f"{name}, heads"], expected[f"{name}, heads"]) == (1, 2)
            assert 0 < each[f"{name}, nbytes"] <= 0.55 * expected[f"{name}, nbytes"]
        assert "holds the KV heads of 'process" in each["file of the other"]
        assert re.search("not alike: .*Quantized.* of 0 tokens.*StaticKVCache of 0 tokens", each["unlike caches"])
        assert torch.equal(each["afterwards"], found[0]["afterwards"])


def test_compiled_steps(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    found = found_by("compiled", model, tmp_path)
    hf_kvattn.enable(model)
    for name in ("static", "int4"):
        expected, _ = generate(model, prompt(), past_key_values=CACHES[name](model.config))
        assert torch.equal(found[0][name], expected) and torch.equal(found[1][name], expected), name


def test_heads_that_cannot_be_shared_out_are_refused_in_each_process(tmp_path):
    model = tiny_model(hidden_size=96, num_attention_heads=6, num_key_value_heads=3)
    for each in found_by("uneven", model, tmp_path):
        assert not each["enabled"]
        for refusal in (each["enable"], each["cache"]):
            assert "the 3 KV heads of layer 0 cannot be shared out evenly over 2 tensor-parallel processes" in refusal


def test_a_process_that_raises_ends_the_others(tmp_path):
    run = launch("one_dies", tiny_model(num_hidden_layers=1), tmp_path, timeout_s=100)
    assert run.returncode != 0
    assert "exceed max_cache_len=20" in run.stderr
