"""How fast PyTorch's matrix-vector products read weights on this CPU, and the line that `enable` logs where it matters.

A decode step reads all weights once. In some dtypes some machines read them several times slower than the memory
allows: where the CPU lacks their instructions, or PyTorch's kernel does not use all threads.
"""

from __future__ import annotations

import functools
import time

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger("hf_kvattn")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SLOW_TIMES = 2.0  # `warn_of_slow_weights` speaks from here on
SAMPLE_BYTES = 32 << 20
SMALL_BYTES = 64 << 20  # weights that CPUs may keep in their caches: a sample of the memory says nothing about them
_INPUTS = 2048  # channels of the products that are timed


def weights_a_second(sample_bytes: int, runs: int) -> dict[torch.dtype, float]:
    """How many weights of each of `DTYPES` a matrix-vector product reads in a second: the best of `runs`, in turns.

    Args:
        sample_bytes: of the matrix, at least those of one row in float32.
    """
    buffer = torch.zeros(sample_bytes // (4 * _INPUTS) * 4 * _INPUTS, dtype=torch.uint8, device="cpu")
    rates = dict.fromkeys(DTYPES, 0.0)
    for _ in range(runs):
        for dtype in DTYPES:
            weight = buffer.view(dtype).view(-1, _INPUTS)
            token = torch.zeros(1, _INPUTS, dtype=dtype, device="cpu")
            start_s = time.perf_counter()
            torch.nn.functional.linear(token, weight)
            rates[dtype] = max(rates[dtype], weight.numel() / (time.perf_counter() - start_s))
    return rates


@functools.cache
def _sampled(threads: int) -> dict[torch.dtype, float]:
    """`weights_a_second` of a sample, some 50 ms; kept for as long as PyTorch's number of `threads` stays the same."""
    return weights_a_second(SAMPLE_BYTES, runs=3)


def warn_of_slow_weights(model: PreTrainedModel) -> None:
    """Logs one line where this CPU reads `model`'s 16-bit weights several times slower than those of another dtype.

    Nothing is measured for weights on other devices, quantized ones, few ones, and while something traces.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return
    weights = [module.weight for module in model.modules() if type(module) is torch.nn.Linear]
    plain = [w for w in weights if type(w) is torch.nn.Parameter and w.device.type == "cpu" and w.dtype == model.dtype]
    if model.dtype not in (torch.bfloat16, torch.float16) or sum(w.nbytes for w in plain) < SMALL_BYTES:
        return
    rates = _sampled(torch.get_num_threads())
    best, own = max(rates.values()), rates[model.dtype]
    if best >= SLOW_TIMES * own:
        faster = next(dtype for dtype, rate in rates.items() if rate == best)
        logger.warning_once(
            f"this machine reads {model.dtype} weights {best / own:.1f} times slower than {faster} ones "
            f"in decode steps ({own / 1e9:.1f} against {best / 1e9:.1f} billion a second): load it in that one, or try "
            "enable(compile=True); `hf-kvattn doctor` measures both"
        )
