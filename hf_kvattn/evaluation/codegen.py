"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, tensor-core instructions.

`compile_only` stands in for the GPU's driver: the package's own host code runs on fake CUDA tensors (shapes and strides
without memory), each launch is compiled to machine code by the assembler in triton's wheel, and recorded instead of
launched. Reading a tensor's numbers from the host, which would wait for the GPU, raises there.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory: what a block may ask for, and what a multiprocessor has.
_SHARED = {"sm_80": (166912, 167936), "sm_90": (232448, 233472), "sm_100": (232448, 233472), "gfx942": (65536, 65536)}
_RESERVED = 1024  # shared bytes that CUDA takes for itself in each block
_REGISTERS = 65536  # of a multiprocessor


@dataclass
class CompileOnly(DriverBase):
    """A Triton driver that compiles for a target and records launches: (kernel's name, grid)."""

    name: str
    launches: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return False  # never chosen by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> str:
        return self.name  # a kernel keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_benchmarker(self):
        raise NotImplementedError("nothing is timed where nothing runs")

    def get_device_properties(self, device: str) -> dict[str, int]:
        return {"max_shared_mem": _SHARED[self.name][0], "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: str) -> tuple:
        return None, None, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, *arguments):
            self.launches.append((metadata.name, (x, y, z)))

        return launch


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[CompileOnly]:
    """Compiles for `target` instead of launching, on CUDA tensors that are fake."""
    before, recorder = driver._active, CompileOnly(target)
    driver.set_active(recorder)
    try:
        with FakeTensorMode():
            yield recorder
    finally:
        driver._active = before  # reset_active() raises where there is no GPU


def resources(kernel: Any, target: str) -> list[dict[str, int]]:
    """What each variant of `kernel` that was compiled for `target` takes, in the order of their compilation."""
    compiled = kernel.device_caches[target][0].values()
    return [(_of_amd if target.startswith("gfx") else _of_nvidia)(each, target) for each in compiled]


def _of_nvidia(compiled: Any, target: str) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "nvdisasm", "-c", file.name)
    registers, stack, local = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK", "LOCAL"))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return {
        "warps": warps,
        "registers": registers,
        "spilled_bytes": stack + local,
        "spill_instructions": _count(r"(?:STL|LDL)", sass),
        "shared_bytes": shared,
        "tensor_core_instructions": _count(r"(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)", sass),
        "asynchronous_copies": _count(r"(?:LDGSTS|UTMALDG)", sass),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]+\*/", sass, re.M)),
        "blocks_per_multiprocessor": min(by_registers, _SHARED[target][1] // (shared + _RESERVED)),
    }


def _of_amd(compiled: Any, target: str) -> dict[str, int]:
    code = compiled.asm["amdgcn"]
    vector = _number(r"\.vgpr_count:\s+(\d+)", code)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    by_registers = 512 // (-(-vector // 8) * 8) * 4 // warps  # 512 for each of the four SIMDs' waves
    return {
        "warps": warps,
        "registers": vector,
        "spilled_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", code),
        "spill_instructions": _number(r"\.vgpr_spill_count:\s+(\d+)", code),
        "shared_bytes": shared,
        "tensor_core_instructions": _count(r"v_mfma_\w+", code),
        "asynchronous_copies": 0,
        "instructions": len(re.findall(r"^\s+[a-z]+_\w+", code, re.M)),
        "blocks_per_multiprocessor": min(by_registers, _SHARED[target][1] // max(shared, 1)),
    }


def _output(*command: Path | str) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in what the tool printed"
    return int(found[1])


def _count(pattern: str, text: str) -> int:
    return len(re.findall(rf"\b{pattern}\b", text))
