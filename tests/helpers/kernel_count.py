"""Which kernels a GPU would start: `with launched() as kernels:` around work on tensors that claim to be on one."""

import contextlib
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What one call of flash-attn starts where it splits the tokens: the kernel and the one that merges; FA3 plans before.
FLASH_KERNELS = {"fa2": 2, "fa3": 3}
_ALLOCATE = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")


class _Ops(TorchDispatchMode):
    def __init__(self, kernels: list[str]):
        super().__init__()
        self.kernels = kernels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if isinstance(out, torch.Tensor) and out.device.type == "cuda" and out.numel():
            if not views and func._schema.name not in _ALLOCATE:
                self.kernels.append(func._schema.name)
        return out


@contextlib.contextmanager
def launched() -> Iterator[list[str]]:
    """Names of PyTorch's operations on the GPU, but for views and allocations: each starts one kernel at least.

    What libraries start has to be counted beside.
    """
    with _Ops(kernels := []):
        yield kernels
