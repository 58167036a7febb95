"""`describe`: the backends that this machine can run, and the backend that each case takes."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field

import torch
import transformers
from transformers import PreTrainedModel

from .caches.configs import layer_needs
from .kernels import dispatch, flash_libraries, native
from .kernels.call import AttendCall


@dataclass(frozen=True)
class Description:
    """The answer of `describe`; `str()` of it is a table.

    Attributes:
        versions: of Python, PyTorch and transformers, and what PyTorch computes with.
        chosen: the backend asked for, `auto` unless set.
        backends: for each backend, why it cannot be used here; None if it can.
        libraries: for each library that `flash` may call, in the order in which it asks them, its version, or why it
            cannot be loaded. Empty without a GPU.
        cases: for each case, its backend, and why a faster one was not taken; None if it is the fastest.
    """

    versions: dict[str, str]
    chosen: str
    backends: dict[str, str | None]
    libraries: dict[str, str]
    cases: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{name:<13} {version}" for name, version in self.versions.items()]
        lines += ["", f"backend asked for: {self.chosen}", ""]
        for name, why in self.backends.items():
            lines.append(f"  {name:<10} {'usable' if why is None else 'not usable: ' + why}")
            if name == "flash":
                lines += [f"    {library:<38} {found}" for library, found in self.libraries.items()]
        lines += ["", f"  {'case':<44} taken"]
        for case, (name, why) in self.cases.items():
            lines.append(f"  {case:<44} {name}{'' if why is None else f'  ({why})'}")
        return "\n".join(lines)


def describe(model: PreTrainedModel | None = None) -> Description:
    """Which backends are usable here, which one each case takes, and why the others are not.

    Args:
        model: the cases have its head counts, head_dim, dtype, device and softcap. Without it, they are those of a
            bfloat16 Llama-style model with 9 query and 3 KV heads of 64 on the CPU.
    """
    versions = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": transformers.__version__,
        "native": native.unavailable() or native.variant(),
    }
    reasons = {name: module.unavailable() for name, module in dispatch.BACKENDS.items()}
    cases = {name: _taken(call) for name, call in _cases(model).items()}
    return Description(versions, dispatch.chosen_backend(), reasons, flash_libraries.listing(), cases)


def _taken(call: AttendCall) -> tuple[str, str | None]:
    chosen = dispatch.chosen_backend()
    if chosen == "auto":
        return dispatch.auto_choice(call)
    reason = dispatch.BACKENDS[chosen].unsupported(call)
    return (chosen, None) if reason is None else ("raises", reason)


def _cases(model: PreTrainedModel | None) -> dict[str, AttendCall]:
    q_heads, kv_heads, dim, dtype, device, softcap = 9, 3, 64, torch.bfloat16, torch.device("cpu"), None
    if model is not None:
        config = model.config.get_text_config(decoder=True)
        q_heads = config.num_attention_heads
        widest = max((need for need in layer_needs(config) if need.keys), key=lambda need: need.dim or 0)
        kv_heads, dim = widest.heads or q_heads, sum(widest.latent or ()) or widest.dim or dim
        dtype, device = model.dtype, model.device
        softcap = getattr(config, "attn_logit_softcapping", None)

    def call(q_len: int, kv_len: int, batch: int = 1, **rules) -> AttendCall:
        q = torch.empty(batch, q_heads, q_len, dim, dtype=dtype, device=device)
        k = torch.empty(batch, kv_heads, kv_len, dim, dtype=dtype, device=device)
        return AttendCall(q, k, k, dim**-0.5, softcap=softcap, **rules)

    padded = torch.zeros(2, dtype=torch.int32, device=device)
    return {
        "prefill, 512 tokens": call(512, 512),
        "prefill continued, 512 after 512": call(512, 1024),
        "prefill, left-padded batch": call(512, 512, 2, leftpad=padded),
        "decode, 1 token": call(1, 1024),
        "decode, left-padded batch": call(1, 1024, 2, leftpad=padded),
        "decode, sliding window 256": call(1, 1024, window=256),
        "short query, 8 tokens (assisted decoding)": call(8, 1024),
        "decode, custom dense mask": call(1, 1024, mask=torch.ones(1, 1, 1, 1024, dtype=torch.bool, device=device)),
    }
