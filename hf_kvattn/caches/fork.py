"""Memory that forked caches share until one of them writes to it (copy-on-write); used by `KVCache.fork`."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref

import torch

logger = logging.getLogger("hf_kvattn")

_ALIGN = 64  # bytes


class SharedTensors:
    """A copy of some tensors that any number of caches can map, each as if it had a copy of its own.

    The copy lies in an anonymous file that every view maps copy-on-write: the system keeps one copy of each page
    (4 KiB), and whoever writes to it gets a page of its own. Views are ordinary contiguous tensors.

    Args:
        tensors: contiguous CPU tensors, each with the number of entries of its dimension 2 that are filled. The others
            take no memory and are zeros in the views.
    """

    def __init__(self, tensors: list[tuple[torch.Tensor, int]]):
        self._like = [torch.empty_like(tensor, device="meta") for tensor, _ in tensors]
        sizes = (-(-like.nbytes // _ALIGN) * _ALIGN for like in self._like)
        *self._offsets, self._nbytes = itertools.accumulate(sizes, initial=0)
        self._fd = os.memfd_create("hf_kvattn")
        weakref.finalize(self, os.close, self._fd)
        os.truncate(self._fd, self._nbytes)
        for view, (tensor, filled) in zip(self._map(shared=True), tensors, strict=True):
            view[:, :, :filled] = tensor[:, :, :filled]

    def fits(self, tensors: list[torch.Tensor]) -> bool:
        """Whether views have the shapes and dtypes of `tensors`."""
        pairs = zip(self._like, tensors, strict=True)
        return all((like.shape, like.dtype) == (tensor.shape, tensor.dtype) for like, tensor in pairs)

    def views(self) -> list[torch.Tensor]:
        """The tensors, writable; what is written to them is seen by nobody else."""
        return self._map(shared=False)

    def _map(self, shared: bool) -> list[torch.Tensor]:
        path = f"/proc/self/fd/{self._fd}"
        data = torch.from_file(path, shared=shared, size=self._nbytes, dtype=torch.uint8)
        return [
            data[start : start + like.nbytes].view(like.dtype).view(like.shape)
            for start, like in zip(self._offsets, self._like, strict=True)
        ]


def can_share(tensors: list[torch.Tensor]) -> bool:
    """Whether copy-on-write works here: on Linux, for tensors on a CPU."""
    return (
        hasattr(os, "memfd_create")
        and os.path.exists("/proc/self/fd")
        and all(tensor.device.type == "cpu" for tensor in tensors)
    )


@functools.lru_cache(maxsize=1)
def log_copy() -> None:
    logger.warning("forks are deep copies where the system does not let them open or map one more file (ulimit -n)")
