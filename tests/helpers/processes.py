"""What each process of a tensor-parallel model does in `tests/jobs/doors/test_tensor_parallel.py`, one model a launch.

    python -m torch.distributed.run --standalone --nproc-per-node 2 processes.py TASK MODEL FOLDER

Each process saves what the task returns to `FOLDER/RANK`.
"""

import copy
import os
import sys
from pathlib import Path

import torch
from models import generate, prompt
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_kvattn
from hf_kvattn import QuantizedKVCache, SlidingWindowKVCache, StaticKVCache, load_cache, save_cache

CACHES = {
    "static": StaticKVCache,
    "sliding": lambda config: SlidingWindowKVCache(config, window=16, sinks=2),
    "int8": lambda config: QuantizedKVCache(config, bits=8),
    "int4": lambda config: QuantizedKVCache(config, bits=4),
}


def refusal(run) -> str | None:
    try:
        run()
    except ValueError as error:
        return str(error)
    return None


def answers(model, folder: Path) -> dict:
    """Tokens of `model` in every way that a cache is used, and the bytes of each cache."""
    inputs, found = prompt(50, left_padding=4), {}
    found["stock"] = generate(model, inputs)[0]
    for name in ("static", "int8", "int4"):  # a forced window needs enable()
        found[f"{name}, not enabled"] = generate(model, inputs, past_key_values=CACHES[name](model.config))[0]
    hf_kvattn.enable(model, cache="int4")
    found["int4 by name"] = generate(model, inputs)[0]
    for name, make in CACHES.items():
        cache = make(model.config)
        found[name] = generate(model, inputs, past_key_values=cache)[0]
        found[f"{name}, nbytes"], found[f"{name}, heads"] = cache.nbytes, cache.kv_layers[0].kv_heads
        found[f"{name}, beams"] = generate(model, inputs, num_beams=3, past_key_values=make(model.config))[0]
        found[f"{name}, goes on"] = goes_on(model, cache, found[name], folder / name)
    return found


def goes_on(model, cache, tokens, path) -> list[torch.Tensor]:
    """What follows `tokens` through a fork of `cache`, through a file of it, and through itself."""
    save_cache(cache, path)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["attention_mask"][0, :4] = 0
    caches = [cache.fork(), load_cache(path, model.config), copy.deepcopy(cache), cache]
    return [generate(model, inputs, 8, past_key_values=each)[0] for each in caches]


def tensor_parallel(model, folder: Path) -> dict:
    """`answers`, and what the processes of a group refuse."""
    rank = torch.distributed.get_rank()
    found, inputs = answers(model, folder), prompt()
    torch.distributed.barrier()
    other = folder.parent / str(1 - rank) / "static"
    found["file of the other"] = refusal(lambda: load_cache(other, model.config))
    unlike = CACHES["static" if rank else "int4"](model.config)
    found["unlike caches"] = refusal(lambda: generate(model, inputs, past_key_values=unlike))
    found["afterwards"] = generate(model, inputs)[0]
    found["before"] = generate(hf_kvattn.disable(model), inputs, past_key_values=CACHES["int4"](model.config))[0]
    return found


def compiled(model, folder: Path) -> dict:
    hf_kvattn.enable(model, compile=True)
    caches = {name: CACHES[name](model.config) for name in ("static", "int4")}
    return {name: generate(model, prompt(), past_key_values=cache)[0] for name, cache in caches.items()}


def uneven(model, folder: Path) -> dict:
    return {
        "enable": refusal(lambda: hf_kvattn.enable(model)),
        "cache": refusal(lambda: QuantizedKVCache(model.config)),
        "enabled": hf_kvattn.is_enabled(model),
    }


def one_dies(model, folder: Path) -> dict:
    """Without `enable` nobody compares caches beforehand."""
    room = 20 if torch.distributed.get_rank() else 200
    return {"tokens": generate(model, prompt(), past_key_values=StaticKVCache(model.config, room))[0]}


TASKS = {each.__name__: each for each in (tensor_parallel, compiled, uneven, one_dies)}


def main(task: str, path: str, folder: str) -> None:
    torch.set_num_threads(1)
    config = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config)
    own = Path(folder, str(torch.distributed.get_rank()))
    own.mkdir()
    torch.save(TASKS[task](model, own), own / "found")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
