"""Whether a change of the code leaves every result as it was, bit for bit: hashes of tokens, logits and stored tensors.

    python tests/helpers/same_results.py > before.json  in the checkout before the change
    python tests/helpers/same_results.py before.json    after it: prints what differs, and exits with 1 if any does

Tiny random models of each tested family, every cache on every backend of a CPU, with and without left padding. Only
public names are used, so that the same file runs before and after.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from models import tiny_model
from safetensors.torch import load_file

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache

CACHES = {
    "static": lambda config: StaticKVCache(config),
    "static-120": lambda config: StaticKVCache(config, max_cache_len=120),
    "sliding-12-4": lambda config: SlidingWindowKVCache(config, window=12, sinks=4),
    "sliding-7": lambda config: SlidingWindowKVCache(config, window=7),
    "int8": lambda config: QuantizedKVCache(config, bits=8, group_size=16),
    "fp8": lambda config: QuantizedKVCache(config, bits="fp8", group_size=16),
    "int4": lambda config: QuantizedKVCache(config, bits=4, group_size=16, residual_length=5),
    "int3": lambda config: QuantizedKVCache(config, bits=3, group_size=16, max_cache_len=120, sinks=0),
    "int2": lambda config: QuantizedKVCache(config, bits=2, group_size=16, skip_layers=(0, -1)),
    "k8v4": lambda config: QuantizedKVCache(config, key_bits=8, value_bits=4, group_size=16),
}
FAMILIES = (
    "llama",
    "llama-g3",
    "llama-mqa",
    "mistral",
    "qwen2-sliding",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "smollm3",
)
BACKENDS = ("reference", "sdpa", "native")
PROMPT, NEW = 41, 45  # blocks of 32 tokens are crossed in the prompt and after it


def hashed(*tensors: torch.Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def result(model, make, inputs: dict, folder: Path) -> dict[str, str]:
    """The hashes of one generation, or the reason why there is none."""
    try:
        cache = make(model.config)
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
        reports = {"return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**inputs, past_key_values=cache, **options, **reports)
    except ValueError:
        return {"refused": "ValueError"}  # its words may change
    path = folder / "cache.safetensors"
    hf_kvattn.save_cache(cache, path)
    return {
        "tokens": hashed(out.sequences),
        "logits": hashed(*out.logits),
        "stored": hashed(*(tensor for _, tensor in sorted(load_file(path).items()))),
        "nbytes": str(cache.nbytes),
    }


def results() -> dict[str, dict[str, str]]:
    torch.set_num_threads(2)
    found = {}
    ids = torch.randint(3, 128, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    prompts = {"plain": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    prompts["padded"] = {"input_ids": ids, "attention_mask": mask}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for dtype in (torch.float32, torch.bfloat16):
                model = hf_kvattn.enable(tiny_model(family).to(dtype))
                for backend in BACKENDS:
                    for cache, make in CACHES.items():
                        for prompt, inputs in prompts.items():
                            name = f"{family} {dtype} {backend} {cache} {prompt}"
                            with hf_kvattn.backend(backend), torch.no_grad():
                                found[name] = result(model, make, inputs, Path(folder))
                print(family, dtype, file=sys.stderr)
    return found


def main() -> int:
    found = results()
    if len(sys.argv) == 1:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(Path(sys.argv[1]).read_text())
    differing = [name for name in before | found if before.get(name) != found.get(name)]
    for name in differing:
        print(name, before.get(name), found.get(name))
    print(f"{len(found)} results, {len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
