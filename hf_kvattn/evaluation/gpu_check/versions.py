"""Stage `versions`: what this machine is, and what its memory and its arithmetic can do at most."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

import hf_kvattn
from hf_kvattn.evaluation.common.timing import spread
from hf_kvattn.evaluation.gpu_check.models import make_model, model_config
from hf_kvattn.evaluation.gpu_check.running import Found, Run, plain
from hf_kvattn.evaluation.gpu_check.timing import time_ms

# Import name -> what it is for; `flash_attn` and those after it are compared with.
PACKAGES = ("triton", "flash_attn", "flash_attn_interface", "flashinfer", "optimum.quanto", "hqq", "matplotlib")


def version_of(package: str) -> str:
    """The version of an importable package, or why there is none."""
    try:
        module = importlib.import_module(package)
    except Exception as error:  # a library built for another PyTorch raises whatever its loader does
        return f"absent: {type(error).__name__} {plain(error)}"
    return str(getattr(module, "__version__", "present"))


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return plain(found.stdout or found.stderr)


def l2_bytes(device: torch.device) -> int:
    """Of the GPU's own cache; 64 MiB, as much as most have, where PyTorch does not say."""
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)


def _versions(run: Run) -> Found:
    device = run.machine.device
    gpu = torch.cuda.get_device_properties(device)
    compiler = next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), "none: Triton cannot launch")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: version_of(name) for name in PACKAGES},
        "cuda": str(torch.version.cuda or torch.version.hip),
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "c_compiler": compiler,
        "gpu": gpu.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": gpu.multi_processor_count,
        "memory_bytes": gpu.total_memory,
        "l2_bytes": l2_bytes(device),
    }


def _ceilings(run: Run) -> Found:
    """Bytes a second that are read, and copied (read and written); operations a second in `dtype` products."""
    machine = run.machine
    rows, size = machine.pick((1 << 30, 8192), (1 << 12, 16))
    source = torch.ones(rows // 4, dtype=torch.float32, device=machine.device)
    target, a = torch.empty_like(source), machine.randn(size, size)
    actions: dict[str, tuple[Callable[[], Any], float]] = {
        "read_gb_s": (source.sum, source.nbytes / 1e9),
        "copy_gb_s": (lambda: target.copy_(source), 2 * source.nbytes / 1e9),
        "matmul_tflops": (lambda: a @ a, 2 * size**3 / 1e12),
    }
    found: Found = {}
    for name, (action, amount) in actions.items():
        time_ms([action], machine.pick(5, 1))
        found[name] = amount / spread(time_ms([action], machine.pick(20, 2)))["median"] * 1e3
    return found


def _describe(run: Run) -> Found:
    model = make_model(run.machine, model_config(run.machine, "1B", layers=1), run.machine.dtype)
    return {"describe": str(hf_kvattn.describe(model))}


def versions(run: Run) -> None:
    tasks = {"versions": _versions, "ceilings": _ceilings, "describe": _describe}
    run.over({name: partial(task, run) for name, task in tasks.items()})
