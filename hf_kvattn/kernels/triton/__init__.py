"""Triton kernels for GPUs: attention over packed and exact tokens, and the quantization of blocks."""

READ_CODECS = ("int8", "fp8", "int4", "int3", "int2")
WRITTEN_CODECS = ("int8", "int4")
