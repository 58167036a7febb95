"""`STAGES`: what is checked and measured, in this order, one row a stage. A new stage is a function and a row."""

from __future__ import annotations

from hf_kvattn.evaluation.gpu_check import kernels, libraries, versions
from hf_kvattn.evaluation.gpu_check.running import Stage

STAGES: dict[str, Stage] = {
    "versions": Stage("versions and ceilings", 15, versions.versions, checks=False),
    "kernels": Stage("Triton kernels against float64", 90, kernels.kernels),
    "flash": Stage("flash-attn against float64", 40, libraries.flash),
    "sdpa": Stage("PyTorch's SDPA, and the kernels it takes", 15, libraries.sdpa),
    "memcheck": Stage("memory accesses of the Triton kernels", 40, kernels.memcheck),
}
