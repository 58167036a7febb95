"""`STAGES`: what is checked and measured, in this order, one row a stage. A new stage is a function and a row."""

from __future__ import annotations

from hf_kvattn.evaluation.gpu_check import attention, caches, graphs, kernels, libraries, memory, steps, versions
from hf_kvattn.evaluation.gpu_check.running import Stage

STAGES: dict[str, Stage] = {
    "versions": Stage("versions and ceilings", 15, versions.versions, checks=False),
    "kernels": Stage("Triton kernels against float64", 90, kernels.kernels),
    "flash": Stage("flash-attn against float64", 35, libraries.flash),
    "sdpa": Stage("PyTorch's SDPA, and the kernels it takes", 20, libraries.sdpa),
    "caches": Stage("caches in a model, against float64", 80, caches.caches),
    "graphs": Stage("steps in CUDA graphs", 90, graphs.graphs),
    "sync": Stage("steps that wait for nothing", 10, caches.sync),
    "memory": Stage("peaks of memory", 30, memory.memory),
    "attention": Stage("decode attention of one layer", 50, attention.attention, checks=False),
    "steps": Stage("whole steps", 120, steps.steps, checks=False),
    "memcheck": Stage("memory accesses of the Triton kernels", 40, kernels.memcheck),
    "two_gpus": Stage("two GPUs", 20, caches.two_gpus),
}
