"""`gpu-check`: all of it rehearsed on a CPU; stages that raise, lie, die or have no time; bars; cards."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from command_lines import refused
from flash_stub import FA3
from flash_stub import flash_libraries as only_libraries
from impostor import fake_cuda

from hf_kvattn.evaluation import cards
from hf_kvattn.evaluation.common import report
from hf_kvattn.evaluation.gpu_check import bars, caches, card, command, judging, kernels, rehearsal, running
from hf_kvattn.evaluation.gpu_check.running import Machine, NotHere, Run, Stage
from hf_kvattn.evaluation.gpu_check.stages import STAGES
from hf_kvattn.kernels import dispatch, flash_libraries, reference
from hf_kvattn.kernels.call import AttendCall
from hf_kvattn.quant import blocks, layout

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stand_ins():
    with rehearsal.stand_ins(), torch.no_grad():
        yield


def arguments(folder, *stages: str, **changes) -> argparse.Namespace:
    given = {"minutes": 10.0, "stages": list(stages), "output": str(folder), "resume": False, "rehearse": True}
    return argparse.Namespace(**{**given, **changes})


def checked(folder, *stages: str, machine: Machine = rehearsal.MACHINE, **changes) -> dict:
    """What is in the folder after these stages."""
    command.check(machine, arguments(folder, *stages, **changes), progress=False)
    return written(folder)


def written(folder) -> dict:
    return json.loads((Path(folder) / "results.json").read_text())["gpu_check"]


@pytest.fixture
def plant():
    """A function: stages of these names and functions are the table, until the test ends."""
    with contextlib.ExitStack() as stack:

        def planted(**functions) -> None:
            table = {name: Stage(name, 10, function) for name, function in functions.items()}
            stack.enter_context(mock.patch.dict(STAGES, table, clear=True))  # restores the order, too

        yield planted


def right(run: Run) -> None:
    run.over({"a case": lambda: {"ok": True}})


def raises(run: Run) -> None:
    raise ZeroDivisionError("no <such> thing | in /a/b")


def test_a_stage_that_raises_is_recorded_and_the_next_runs(tmp_path, stand_ins, plant, capsys):
    def one_raises(run):
        run.over({"bad": lambda: raises(run), "absent": absent, "good": lambda: {"ok": True}})

    def absent():
        raise NotHere("nobody has it")

    plant(first=raises, second=one_raises, third=right)
    found = checked(tmp_path, "first", "second", "third")
    first, second, third = found["stages"].values()
    assert first["status"] == "failed" and "ZeroDivisionError: no  such  thing   in :a:b" == first["raised"]
    assert "test_gpu_check.py" in first["traceback"]
    assert second["status"] == "failed" and [case["case"] for case in second["cases"]] == ["bad", "absent", "good"]
    assert "raised" in second["cases"][0] and second["cases"][1]["not_here"] == "nobody has it"
    assert third["status"] == "clean" and found["running"] is None
    capsys.readouterr()
    assert command.ended(found) == 1
    assert capsys.readouterr().out.splitlines()[0] == "failed: first; second"
    assert "**failed**" in card.tables(found)


def test_a_kill_leaves_what_was_over_and_resume_goes_on(tmp_path, stand_ins, plant):
    runs = []

    def killed(run):
        runs.append("killed")
        if len(runs) == 1:
            raise KeyboardInterrupt

    plant(one=right, two=right, three=right, four=killed, five=right)
    with pytest.raises(KeyboardInterrupt):
        checked(tmp_path, *STAGES)
    found = written(tmp_path)
    assert list(found["stages"]) == ["one", "two", "three"] and found["running"] == "four"
    with pytest.raises(ValueError, match="--resume"):
        checked(tmp_path, *STAGES)
    found = checked(tmp_path, *STAGES, resume=True)
    statuses = {name: record["status"] for name, record in found["stages"].items()}
    assert statuses == dict.fromkeys(["one", "two", "three", "five"], "clean") | {"four": "failed"}
    assert runs == ["killed"] and "lost" in found["stages"]["four"]["raised"]
    with pytest.raises(ValueError, match="do not go on from each other"):
        checked(tmp_path, *STAGES, resume=True, machine=Machine(torch.device("cpu"), None))


def test_without_time_everything_is_left_out(tmp_path, stand_ins, plant, capsys):
    plant(one=right, two=right)
    found = checked(tmp_path, "one", "two", minutes=0.0)
    assert {record["status"] for record in found["stages"].values()} == {"left out"}
    capsys.readouterr()
    assert command.ended(found) == 1 and "not finished: one; two" in capsys.readouterr().out
    assert "1 left out" in card.tables(found)
    found = checked(tmp_path, "one", "two", resume=True)
    assert {record["status"] for record in found["stages"].values()} == {"clean"}


def test_lanes_are_timed_in_turns_and_one_that_raises_drops_out(stand_ins, monkeypatch):
    now, turns = [0.0], []
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    run = Run(rehearsal.MACHINE, {}, 7.5)

    def lane(name):
        now[0] += 1.0
        turns.append(name)
        if name == "b" and turns.count("b") == 2:
            raise NotHere("its memory")
        return [now[0], 1.0]

    found = {name: {"case": name} for name in "abc"}
    run.in_rounds(found, {name: lambda name=name: lane(name) for name in "abc"}, rounds=5)
    assert "".join(turns) == "abcbcaca"  # late after the third
    assert found["b"] == {"case": "b", "not_here": "its memory"}
    assert found["a"]["ms"] == [[1.0, 1.0], [6.0, 1.0], [8.0, 1.0]] and len(found["c"]["ms"]) == 3
    assert bars.median_ms(found["a"]) == 1.0


def test_cases_are_left_out_when_the_time_of_their_stage_is_over(tmp_path, stand_ins, monkeypatch, plant):
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])

    def slow(run):
        run.over({name: lambda: now.__setitem__(0, now[0] + 40.0) or {"ok": True} for name in "abc"})

    plant(one=slow, two=slow, three=right)
    found = checked(tmp_path, "one", "two", "three", minutes=2.0)  # 40 s for each
    assert [len(record["cases"]) for record in found["stages"].values()] == [1, 1, 1]
    assert found["stages"]["one"]["left_out"] == ["b", "c"] and found["stages"]["one"]["status"] == "unfinished"


def test_a_gpu_that_answers_no_more_is_left_to_a_fresh_process(tmp_path, stand_ins, monkeypatch, plant):
    answers, started = [True], []

    def breaks(run):
        run.over({"bad": lambda: answers.clear() or raises(run), "next": lambda: {"ok": True}})

    def synchronize(device=None):
        if not answers:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def execv(path, arguments):
        started.append(arguments)
        raise SystemExit(7)

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(command.os, "execv", execv)
    plant(one=right, two=breaks, three=right)
    with pytest.raises(SystemExit):
        checked(tmp_path, "one", "two", "three")
    found = written(tmp_path)
    assert list(found["stages"]) == ["one", "two"] and found["stages"]["two"]["left_out"] == ["next"]
    (typed,) = started
    assert typed[:4] == [sys.executable, "-m", "hf_kvattn", "gpu-check"] and "--resume" in typed
    assert 5 < float(typed[typed.index("--minutes") + 1]) <= 10 and typed[typed.index("--output") + 1] == str(tmp_path)


def test_a_wrong_kernel_is_wrong(tmp_path, stand_ins, monkeypatch, capsys):
    """Half of a key more or less is no matter of rounding."""

    def shifted(call):
        return (reference.attend(call) * 1.05).to(call.q.dtype)

    monkeypatch.setattr(rehearsal, "_by_formula", shifted)
    with rehearsal.stand_ins():
        found = checked(tmp_path, "flash")
    record = found["stages"]["flash"]
    assert record["status"] == "wrong" and all(case.get("ok") is not True for case in record["cases"])
    first = next(case for case in record["cases"] if "not_here" not in case)
    assert first["error"] > 2 * first["allowed"]
    capsys.readouterr()
    assert command.ended(found) == 1 and "wrong: flash" in capsys.readouterr().out


def test_the_rule_of_tolerance():
    call = AttendCall(*(torch.randn(2, 4, n, 32, dtype=torch.bfloat16) for n in (1, 60, 60)), 32**-0.5)
    truth = judging.formula(call, torch.float64)
    torch.testing.assert_close(truth.float(), reference.attend_with_lse(call)[0], rtol=0, atol=1e-6)
    assert judging.judged(reference.attend(call), call)["ok"]
    fewer = AttendCall(call.q, call.k[:, :, 1:], call.v[:, :, 1:], call.scale)
    assert not judging.judged(reference.attend(fewer), call)["ok"]
    assert not judging.judged(truth.bfloat16() * torch.nan, call)["ok"]
    assert judging.judged(truth, call)["said"].startswith("(2, 1, 4, 32) torch.float64")
    with judging.formulas(), dispatch.backend(judging.TRUTH):
        assert torch.equal(dispatch.attend(call), truth.bfloat16())
    assert judging.TRUTH not in dispatch.BACKENDS


def test_bars_are_held_missed_or_not_measured(stand_ins):
    def cell(name, ms):
        return {"case": f"B8 x 8192: {name}", "ms": [[ms], [ms]]}

    cases = [cell(bars.GRAPH, 10.0), cell("stock dynamic, flash", 14.0)]
    stages = {"steps": {"status": "done", "cases": cases, "left_out": ["B1 x 8192"]}}
    first, second, *others = bars.judge(stages, [9, 0], rehearsed=False)
    assert (first["state"], first["value"]) == ("missed", pytest.approx(1.4)) and first["limit"] == 1.5
    assert second["state"] == "not measured" and "left out" in second["why"]
    assert others[-1]["state"] == "held" and "the stage memory was not run" in {bar.get("why") for bar in others}
    cases[1] = cell("stock dynamic, flash", 16.0)
    assert bars.judge(stages, [9, 0], rehearsed=False)[0]["state"] == "held"
    assert bars.judge(stages, [8, 9], rehearsed=False)[0]["why"] == "the bar is for an H100 or later"
    assert bars.judge(stages, [9, 0], rehearsed=True)[0]["why"] == "rehearsed"
    cases[1] = {"case": cases[1]["case"], "not_here": "flash_attn: none"}
    assert "flash_attn: none" in bars.judge(stages, [9, 0], rehearsed=False)[0]["why"]
    stages["steps"]["status"] = "failed"
    assert bars.judge(stages, [9, 0], rehearsed=False)[-1]["state"] == "missed"


def test_a_card_is_made_of_a_check_and_not_of_a_rehearsal(tmp_path, stand_ins, monkeypatch):
    found = checked(tmp_path / "rehearsed", "flash")
    with pytest.raises(ValueError, match="rehearsed"):
        cards.render(tmp_path / "rehearsed")
    found |= {"rehearsed": False}
    for plotted in (True, False):
        folder = tmp_path / str(plotted)
        report.write(found | {"plotted": plotted}, folder)
        text = cards.render(folder)
        assert ("gpu_check.png" in text) == plotted == (folder / "gpu_check.png").exists()
        assert "not measured" in text and "rehearsed)" not in text


def test_bad_arguments_and_machines_without_a_gpu(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "results"
    said = refused(capsys, tmp_path, set(), "gpu_check", "--output", folder)
    assert "sees no GPU" in said and "--rehearse" in said
    for wrong in (
        ["--minutes", "-1"],
        ["--minutes", "nan"],
        ["--stages", "flash,nothing"],
        ["--stages", "flash,flash"],
    ):
        with pytest.raises(SystemExit) as end:
            command_line(wrong)
        assert end.value.code == 2 and wrong[1].split(",")[-1] in capsys.readouterr().err


def command_line(wrong: list[str]) -> None:
    parser = argparse.ArgumentParser()
    command.COMMAND.add_arguments(parser)
    parser.parse_args(wrong)


@pytest.mark.parametrize("stage", ["versions", "kernels", "flash", "sdpa", "caches", "attention"])
def test_stages_keep_to_the_gpu(stage, without_triton, monkeypatch):
    """On tensors that claim a GPU, where one of the CPU among them raises, as a rehearsal does not see."""
    real = dict(dispatch.BACKENDS)
    stand_ins = {} if stage in ("kernels", "attention") else real  # those are about Triton's kernels
    monkeypatch.setattr(caches, "PROGRAMS", dict.fromkeys(caches.PROGRAMS, (40, 1, 0, 1, -1, 2)))
    machine = Machine(torch.device("cuda", 0), torch.device("cuda", 1), rehearsed=True)
    in_words = layout.in_words
    with only_libraries(FA3), fake_cuda((9, 0), devices=2), contextlib.ExitStack() as stack:
        fakes = {name: getattr(torch.cuda, name) for name in ("Event", "Stream", "current_stream", "stream")}
        load = flash_libraries.load
        stack.enter_context(rehearsal.stand_ins())
        stack.enter_context(mock.patch.dict(dispatch.BACKENDS, stand_ins))
        stack.enter_context(mock.patch.object(flash_libraries, "load", load))
        stack.enter_context(mock.patch.object(layout, "in_words", in_words))
        for name, fake in fakes.items():
            timed = rehearsal._Event if name == "Event" else None
            answer = (lambda fake=fake, timed=timed, **kwargs: timed() if kwargs else fake()) if timed else fake
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(torch.no_grad())
        run = Run(machine, {}, time.monotonic() + 1000)
        found = running.run_stage(STAGES[stage], run)
    assert found["status"] in ("clean", "done"), [case for case in run.cases if not case.get("ok")]
    served = [case for case in run.cases if "not_here" not in case]
    assert len(served) > len(run.cases) / 2


def test_a_wrong_quantizer_is_found(monkeypatch):
    assert kernels._quantizes(rehearsal.MACHINE, 4, 64)["ok"]
    wrong = lambda jobs: blocks.quantize_blocks([job._replace(v=1.01 * job.v) for job in jobs])  # noqa: E731
    monkeypatch.setattr(dispatch, "quantizer", lambda *given: wrong)
    assert not kernels._quantizes(rehearsal.MACHINE, 4, 64)["ok"]


def test_the_rings_of_the_kernels_wrap():
    """In a rehearsal and on a GPU: else the case would be one of plain tokens."""
    for machine in (rehearsal.MACHINE, Machine(torch.device("cpu"), None, torch.float16)):
        call = kernels.make_call(kernels.Case("exact", 64, 1, "ring"), machine)
        assert call.tokens is not None and call.slot + call.tokens > call.k.shape[2]
        assert call.window is not None and call.kv_len > call.window - 1
    names = {str(case) for case in kernels.cases(Machine(torch.device("cpu"), None))}
    for part in (*map(str, kernels.BITS), *kernels.RULES, *(f"D{dim}" for dim in kernels.DIMS)):
        assert any(part in name for name in names)


@pytest.mark.timeout(900)
def test_every_stage_runs_in_a_rehearsal(tmp_path):
    """In processes of its own, as a user starts it: Triton's kernels in the interpreter where there is triton."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    typed = [sys.executable, "-m", "hf_kvattn", "gpu-check", "--rehearse", "--output", str(tmp_path / "found")]
    ended = subprocess.run(typed, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = written(tmp_path / "found")
    assert found["rehearsed"] and list(found["stages"]) == list(STAGES)
    assert {record["status"] for record in found["stages"].values()} == {"clean", "done"}
    for name, record in found["stages"].items():
        cases = record["cases"]
        assert cases or name == "memcheck"
        assert not record["left_out"] and not [case for case in cases if "raised" in case or case.get("ok") is False]
        absent = {case["not_here"].split()[0].rstrip(":") for case in cases if "not_here" in case}
        assert absent <= {"flashinfer", "the", "this"}, absent  # libraries; no lengths in PyTorch
        assert sum("not_here" not in case for case in cases) >= len(cases) / 2
    assert "no number here means anything" in ended.stdout and "### Bars" in ended.stdout
    # Nothing that any stage notes is refused by a card.
    report.write(found | {"rehearsed": False, "plotted": True}, tmp_path / "card")
    assert "whole steps" in cards.render(tmp_path / "card")
