"""`gpu-check`'s stage of kernels on the real ones, in the interpreter: it finds a wrong one."""

import os
from dataclasses import replace

import pytest
import torch

from hf_kvattn.evaluation.gpu_check import kernels, rehearsal
from hf_kvattn.evaluation.gpu_check.running import Run, run_stage
from hf_kvattn.evaluation.gpu_check.stages import STAGES
from hf_kvattn.kernels.triton import attention as triton_attention

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1: without it Triton compiles"

LAUNCH = triton_attention.launch
CASES = [kernels.Case("exact", 64, 4, "padded"), kernels.Case(4, 64, 1, "window"), kernels.Case("exact", 64, 1, "ring")]
BUGS = {
    "none": lambda call: call,
    "a wider window": lambda call: replace(call, window=None if call.window is None else call.window + 1),
    "a token of padding seen": lambda call: replace(call, leftpad=None if call.leftpad is None else call.leftpad - 1),
    "another scale": lambda call: replace(call, scale=call.scale * 1.02),
}
# A ring holds no token beyond its window; the last case is that of large offsets.
WRONG = {"none": [], "a wider window": [1], "a token of padding seen": [0], "another scale": [0, 1, 2, 7]}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_kernel_is_found(bug, monkeypatch):
    launch = lambda call, *rest: LAUNCH(BUGS[bug](call), *rest)  # noqa: E731
    monkeypatch.setattr(triton_attention, "launch", launch)
    monkeypatch.setattr(kernels, "cases", lambda machine: CASES)
    assert rehearsal.not_interpreted() is None
    with rehearsal.stand_ins(), torch.no_grad():
        run = Run(rehearsal.MACHINE, {}, float("inf"))
        found = run_stage(STAGES["kernels"], run)
    assert [i for i, case in enumerate(found["cases"]) if not case["ok"]] == WRONG[bug]
    assert found["status"] == ("wrong" if WRONG[bug] else "clean")
