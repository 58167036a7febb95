"""The libraries that have `flash_attn_with_kvcache`, one row each, and the choice of one for a call.

A library that cannot be loaded, lacks an argument, or fails a tiny launch on the GPU is passed over with its reason.
Kernels of the hub are those that transformers takes for its own flash attention. They are loaded from the local cache
only: nothing here downloads.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from transformers import modeling_flash_attention_utils

from .call import PIECES, RULES, Feature

ARGUMENTS = frozenset(
    ("k", "v", "cache_seqlens", "cache_leftpad", "softmax_scale", "causal", "window_size", "softcap",
     "return_softmax_lse")
)  # fmt: skip
_NEEDS = "a GPU of compute capability 8.0 or later"
# Builds may lack the kernels for these.
_PROBED = int(Feature.WINDOW | Feature.SOFTCAP | Feature.LEFT_PADDING)
_probes: dict[tuple, str | None] = {}  # why a launch failed, for each that was tried


class Library(NamedTuple):
    """One row of `LIBRARIES`.

    Attributes:
        name: of the module that is imported, or of the hub's repository.
        least: the first version that has all `ARGUMENTS`.
        capability: the least and the largest compute capability that it is taken for.
        amd: whether it is for AMD's GPUs, not NVIDIA's.
        serves: features of a call (bits of `Feature`) that it computes as this package means them.
    """

    name: str
    least: str
    capability: tuple[tuple[int, int], tuple[int, int]]
    amd: bool = False
    serves: int = RULES | PIECES

    def is_for(self, device: torch.device) -> bool:
        least, largest = self.capability
        amd = torch.version.hip is not None
        return self.amd is amd and least <= torch.cuda.get_device_capability(device) <= largest


_AMPERE, _HOPPER, _LATEST = (8, 0), (9, 0), (99, 9)
# In the order in which they are asked: what is installed goes before kernels of the hub.
LIBRARIES = (
    Library("flash_attn_interface", "a build of 2025", (_HOPPER, _HOPPER)),  # FA3
    Library("flash_attn", "2.6.1", (_AMPERE, _LATEST)),  # FA2
    Library("kernels-community/vllm-flash-attn3", "version 1", (_HOPPER, _HOPPER)),
    Library("kernels-community/flash-attn2", "version 3", (_AMPERE, _LATEST)),
    # It takes `cache_leftpad` and ignores it, and refuses a softcap. Its log-sum-exps are not joined.
    Library(
        "kernels-community/aiter-flash-attn", "version 2", ((9, 0), _LATEST), amd=True,
        serves=int(Feature.BIDIRECTIONAL_ATTENTION | Feature.WINDOW),
    ),
)  # fmt: skip


@functools.lru_cache
def load(name: str) -> tuple[Callable | None, str]:
    """The function of the library of that name, and its version; or None and why there is none."""
    try:
        module, version = _from_hub(name) if "/" in name else _imported(name)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return None, f"{name}: {_first_line(error)}"
    function = getattr(module, "flash_attn_with_kvcache", None)
    if function is None:  # a folder without __init__.py is a module too: FlashAttention 4 alone leaves such a one
        return None, f"{name}: it has no flash_attn_with_kvcache (FlashAttention 4 has none)"
    if missing := ARGUMENTS - inspect.signature(function).parameters.keys():
        (least,) = [library.least for library in LIBRARIES if library.name == name]
        return None, f"{name}: {version} lacks {', '.join(sorted(missing))}; {least} or later is needed"
    return (function if torch.version.hip is None else _on_its_gpu(function)), version


def _on_its_gpu(function: Callable) -> Callable:
    """AITER's function is Triton's, which launches on the current GPU wherever the tensors are."""

    def launch(q: torch.Tensor, *args, **kwargs):
        with torch.cuda.device(q.device):
            return function(q, *args, **kwargs)

    return launch


def _imported(name: str) -> tuple[ModuleType, str]:
    module = importlib.import_module(name)
    return module, getattr(module, "__version__", "of unknown version")


def _from_hub(repository: str) -> tuple[ModuleType, str]:
    """A kernel of the hub in the local cache, in the version that transformers would load.

    Raises:
        ImportError, OSError, ValueError, RuntimeError: it is not there, or not for this system.
    """
    import kernels  # an optional dependency

    version = getattr(modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_VERSIONS", {}).get(repository)
    if version is None:
        raise ImportError(f"transformers {transformers.__version__} names no version of it")
    # The local cache does not tell whether the hub trusts its publisher: transformers names the repository.
    asked = {"version": version, "local_files_only": True, "trust_remote_code": [repository]}
    if missing := asked.keys() - inspect.signature(kernels.install_kernel).parameters.keys():
        raise ImportError(f"kernels {kernels.__version__} is too old, its install_kernel lacks {min(missing)}")
    path = kernels.install_kernel(repository, **asked)
    return kernels.get_local_kernel(path, trust_remote_code=[repository]), f"version {version}"


@functools.lru_cache
def candidates(device: torch.device | None) -> tuple[Library, ...]:
    """The libraries for a GPU, or for any GPU of this machine, in the order in which they are asked."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if device is None else [device]
    return tuple(library for library in LIBRARIES if any(map(library.is_for, devices)))


def listing() -> dict[str, str]:
    """Of each library for this machine's GPUs, its version, or why it cannot be loaded. Empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {library.name: load(library.name)[1].removeprefix(f"{library.name}: ") for library in candidates(None)}


def unavailable() -> str | None:
    """Why no library can be used on this machine, or None."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    reasons = []
    for library in candidates(None):
        function, reason = load(library.name)
        if function is not None:
            return None
        reasons.append(reason)
    return f"flash-attn cannot be loaded ({'; '.join(reasons)})" if reasons else f"flash-attn needs {_NEEDS}"


def serving(q: torch.Tensor, features: int) -> tuple[Callable | None, str | None]:
    """The function that serves queries such as `q`, `(B, Hq, Tq, D)`, in calls with these features, or why none does.

    The first call of each kind makes a tiny launch. While a CUDA graph is recorded none is made: a library that was
    not tried yet is taken to serve.
    """
    device, reasons = q.device, []
    for library in candidates(device):
        function, text = load(library.name)
        if function is None:
            reasons.append(text)
        elif reason := _refused(library, features) or _failure(library.name, function, q, features & _PROBED):
            reasons.append(reason)
        else:
            return function, None
    version = "{}.{}".format(*torch.cuda.get_device_capability(device))
    if not reasons:
        return None, f"flash-attn needs {_NEEDS}, {device} has {version}"
    return None, f"no flash-attn for compute capability {version} ({'; '.join(reasons)})"


def _refused(library: Library, features: int) -> str | None:
    if not (refused := features & ~library.serves):
        return None
    names = [str(feature.name).lower().replace("_", " ") for feature in Feature if feature & refused]
    return f"{library.name}: not used with {', '.join(names)}"


def _failure(name: str, function: Callable, q: torch.Tensor, features: int) -> str | None:
    """Why a launch of `function` failed, or None: one launch for each library, GPU, dtype, head_dim and features."""
    key = (name, q.device, q.dtype, q.shape[-1], features)
    if key not in _probes:
        if torch.cuda.is_current_stream_capturing():
            return None
        with torch.cuda.device(q.device):
            reason = probe(function, q.device, q.dtype, q.shape[-1], features)
        _probes[key] = reason and f"{name}: {reason}"
    return _probes[key]


def probe(function: Callable, device: torch.device, dtype: torch.dtype, dim: int, features: int) -> str | None:
    """Launches `function` on 2 queries and 8 keys of zeros: its error, or None. Nothing waits for the GPU."""
    q, k = (torch.zeros(1, tokens, 1, dim, dtype=dtype, device=device) for tokens in (2, 8))
    options: dict = {"window_size": (1, 0) if features & Feature.WINDOW else (-1, -1), "causal": True}
    if features & Feature.LEFT_PADDING:
        options |= {"cache_leftpad": torch.zeros(1, dtype=torch.int32, device=device), "cache_seqlens": 8}
    softcap = 1.0 if features & Feature.SOFTCAP else 0.0
    try:
        result = function(q, k, k, softmax_scale=1.0, softcap=softcap, return_softmax_lse=True, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return _first_line(error)
    return None if isinstance(result, tuple) else "it returns no log-sum-exps"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
