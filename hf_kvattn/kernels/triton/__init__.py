"""Triton kernels for GPUs: attention over packed and exact tokens, and the quantization of blocks."""
