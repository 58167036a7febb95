"""Measurements in two processes: windows are shared out, times are taken by one process alone.

`torchrun` starts them: on CPUs `accelerate launch` starts a single one, whatever `--num_processes` says, without MPI.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import command_lines
import launched
import pytest
from models import tiny_model

HELPER = Path(launched.__file__)
ROOT = HELPER.parents[2]
SMALL = ["--window", "80", "--prefill", "40", "--stride", "6", "--windows", "5", "--variants", "none", "kvattn-int8"]


@pytest.fixture(scope="module")
def common(tmp_path_factory) -> list[str]:
    """The arguments for a tiny model with a tokenizer, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tiny_model().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and sleeps. " * 8)
    return ["--model", str(folder), "--dtype", "float32", "--text", str(folder / "text.txt"), "--threads", "1"]


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(*arguments: str, launcher=TORCHRUN, **environment: str) -> subprocess.CompletedProcess:
    """What a launch printed; one that waits for ever fails the test."""
    paths = os.pathsep.join([str(HELPER.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *launcher, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=90,
    )


def same_rows(one: list[dict], other: list[dict]) -> bool:
    numbers = ("perplexity", "perplexity_change_pct", "kld_mean", "kld_p99", "same_top1_pct", "bits_per_element")
    assert [row["variant"] for row in one] == [row["variant"] for row in other]
    return all(
        row[name] == again[name] if row[name] is None else again[name] == pytest.approx(row[name], abs=1e-6)
        for row, again in zip(one, other, strict=True)
        for name in numbers
    )


def test_windows_are_shared_out_and_a_killed_run_goes_on(common, tmp_path):
    assert command_lines.run("perplexity", *common, *SMALL, "--out", str(tmp_path / "one")) == 0
    expected = json.loads((tmp_path / "one" / "results.json").read_text())["perplexity"]
    out, log = tmp_path / "two", tmp_path / "log"
    run = launch(str(HELPER), *common, *SMALL, "--out", str(out), KILLED="1", LOG=str(log))
    assert run.returncode != 0 and not (out / "results.json").exists()
    first = log.read_text().split()
    assert {"0:0", "1:3", "1:4"} <= set(first)  # process and window; the second dies in its last
    done = {path.stem for path in (out / "perplexity-windows").glob("*.safetensors")}
    assert "3" in done and "4" not in done
    log.unlink()
    resumed = [str(HELPER), *common, *SMALL, "--out", str(out), "--resume", "--json"]
    run = launch(*resumed, "--stride", "7", launcher=ACCELERATE, LOG=str(log))
    assert run.returncode != 0 and "perplexity-windows was begun with stride=6, and this run has 7" in run.stderr
    assert not log.exists()
    run = launch(*resumed, LOG=str(log))
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("{")]
    assert {each.split(":")[1] for each in log.read_text().split()} == {*"01234"} - done
    found = json.loads((out / "results.json").read_text())["perplexity"]
    assert found == json.loads(line) and found["settings"] == expected["settings"]
    assert same_rows(found["rows"], expected["rows"])
    assert not (out / "perplexity-windows").exists()


def test_times_are_taken_by_one_process_alone(common, tmp_path):
    sizes = ["--contexts", "12", "--batch-sizes", "1", "--new-tokens", "8", "--rounds", "2"]
    script, log = str(ROOT / "scripts/throughput.py"), tmp_path / "log"
    arguments = [*common, *sizes, "--variants", "kvattn-static", "--out", str(tmp_path / "out"), "--json"]
    run = launch(script, *arguments, LOG=str(log))
    assert run.returncode == 0, run.stderr[-3000:]
    assert len([line for line in run.stdout.splitlines() if line.startswith("{")]) == 1
    assert run.stdout.count("written: ") == 1
    assert json.loads((tmp_path / "out" / "results.json").read_text())["throughput"]["cells"]
