"""GGUF to a safetensors folder that transformers loads by itself, with the same logits.

A model loaded from a GGUF file cannot be saved in stock transformers when its weights stay packed. Here they are
unpacked (`GgufConfig(dequantize=True)`), written with config, tokenizer, chat template, generation config and a card,
loaded back, and compared before the folder gets its name.

The header is checked first. A GGUF header is a list of counts and lengths, and readers believe them: a file of 60 bytes
that promises 2**60 array items keeps the `gguf` package's reader busy until memory is full.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import StrictDataclassError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_kvattn.convert.output import CHECKED_TOKENS, save
from hf_kvattn.tools import inputs
from hf_kvattn.tools.command_line import Command
from hf_kvattn.tools.files import new_folder
from hf_kvattn.tools.tables import markdown_table

# GGUF's metadata types: numbers by their struct format, then the two of variable size.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
MAX_ITEMS = 1 << 22  # of an array, of metadata, of tensors: the `gguf` package's reader loops over each
# What is read below, and by transformers, without another look at its type.
KINDS: dict[str, type] = {
    "general.architecture": str,
    "general.name": str,
    "general.license": str,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.merges": list,
}

# What transformers raises when a well-formed file describes no model that it can build.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Numbers:
    """An array of numbers. Only its length is kept."""

    length: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: metadata (arrays of strings are lists), elements and type of tensors."""

    metadata: dict[str, Any]
    elements: dict[str, int]
    types: Counter[str]


class _Reader:
    """Reads forward through an open file, and never past its end."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self.file = file
        self.left_bytes = size_bytes

    def take(self, count: int) -> bytes:
        if count > self.left_bytes:
            raise ValueError("the file ends inside its header")
        self.left_bytes -= count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self) -> int:
        count = self.number("Q")
        if count > MAX_ITEMS:
            raise ValueError(f"the header promises {count} items, and {MAX_ITEMS} are allowed")
        return count

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"the header holds a value of unknown type {kind}")
        kind, count = self.number("I"), self.count()
        if kind in NUMBERS:
            self.take(count * struct.calcsize("<" + NUMBERS[kind]))
            return Numbers(count)
        if kind == STRING:
            return [self.string() for _ in range(count)]
        raise ValueError(f"the header holds an array of unknown type {kind}")


def read_header(path: Path) -> Header:
    """The header of a GGUF file, after checking that everything it promises lies inside the file.

    Raises ValueError that names the file for anything else than a whole little-endian GGUF file of version 2 or 3.
    """
    try:
        with open(path, "rb") as file:
            return _read_header(_Reader(file, path.stat().st_size))
    except ValueError as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from error


def _read_header(reader: _Reader) -> Header:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if reader.take(4) != b"GGUF":
        raise ValueError("it does not start with GGUF")
    size_bytes = reader.left_bytes + 4
    version = reader.number("I")
    if version not in (2, 3):
        raise ValueError(f"version {version} (little-endian 2 and 3 are supported)")
    tensor_count, metadata_count = reader.count(), reader.count()
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"the key {key!r} is there twice")
        metadata[key] = reader.value()
    elements: dict[str, int] = {}
    types: Counter[str] = Counter()
    end_bytes = 0
    for _ in range(tensor_count):
        name, dimensions = reader.string(), reader.number("I")
        if name in elements or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} is there twice or has {dimensions} dimensions")
        shape = [reader.number("Q") for _ in range(dimensions)]
        kind = GGMLQuantizationType(reader.number("I"))
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[0] % block_elements:
            raise ValueError(f"tensor {name!r} has rows of {shape[0]}, no multiple of {kind.name}'s {block_elements}")
        elements[name] = math.prod(shape)
        types[kind.name] += elements[name]
        end_bytes = max(end_bytes, reader.number("Q") + elements[name] // block_elements * block_bytes)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment is {alignment!r}")
    header_bytes = size_bytes - reader.left_bytes
    end_bytes += -header_bytes % alignment + header_bytes
    if end_bytes > size_bytes:
        raise ValueError(f"its tensors end at byte {end_bytes}, the file at {size_bytes}")
    return Header(metadata, elements, types)


def _check_counts(header: Header) -> None:
    """Raise where metadata have other types than they are read as, or counts that the tensors cannot have.

    transformers takes an array of one number for that number, and calls some architectures by another's name.
    """
    metadata, tensors = header.metadata, len(header.elements)
    for key, kind in KINDS.items():
        if not isinstance(metadata.get(key, kind()), kind):
            raise ValueError(f"{key} is {metadata[key]!r:.99}, which is no {kind.__name__}")
    architecture = metadata.get("general.architecture")
    blocks = {key: value for key, value in metadata.items() if key.endswith(".block_count")}
    for key, value in {f"{architecture}.block_count": None, **blocks}.items():
        if type(value) is not int or not 1 <= value <= tensors:
            raise ValueError(f"{tensors} tensors cannot be {value!r:.99} blocks ({key}) of {architecture!r}")
    for key, value in metadata.items():
        if f"{key.partition('.')[0]}.block_count" in blocks and _is_no_size(value):
            raise ValueError(f"{key} is {value!r:.99}, where a size is used")


def _is_no_size(value: Any) -> bool:
    length = value.length if isinstance(value, Numbers) else len(value) if isinstance(value, list) else 2
    return length < 2 or (type(value) is int and value < 0)


def _check_model(path: Path, header: Header) -> None:
    """Raise unless the file holds as many numbers as the model that its metadata describes, before any is allocated."""
    _check_counts(header)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(header.elements.values())
    if needed > held:
        raise ValueError(f"its metadata describes a model of {needed} numbers, its tensors hold {held}")


def _check_vocabulary(header: Header) -> None:
    """Raise where the vocabulary lacks tokens that it needs: the tokenizers library has no error class of its own."""
    tokens = set(header.metadata["tokenizer.ggml.tokens"])
    if header.metadata["tokenizer.ggml.model"] == "gpt2":  # other tokens are spelled in bytes before they are used
        alphabet = set(ByteLevel.alphabet())
        tokens = {token for token in tokens if alphabet.issuperset(token)}
    elif "<unk>" not in tokens:
        raise ValueError("its vocabulary lacks <unk>")
    for merge in header.metadata.get("tokenizer.ggml.merges", []):
        first, _, second = merge.partition(" ")
        if not {first, second, first + second} <= tokens:
            raise ValueError(f"its vocabulary lacks tokens of the merge {merge!r}")


def _load(path: Path, header: Header, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        _check_model(path, header)
        _check_vocabulary(header)
        return inputs.load_model(str(path), dtype)
    except UNREADABLE as error:
        raise ValueError(f"transformers cannot read {path}: {error or type(error).__name__}") from error


def _card(path: Path, header: Header, dtype: torch.dtype, has_template: bool) -> str:
    total = sum(header.types.values())
    types = ", ".join(f"{name} {count / total:.1%}" for name, count in header.types.most_common())
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = hashlib.sha256(data).hexdigest()
    name = " ".join(str(header.metadata.get("general.name", path.stem)).split())
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("transformers", "gguf"))
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["converted-from-gguf"],
        license=header.metadata.get("general.license"),
    )
    return f"""---
{metadata.to_yaml()}
---

# {name}, converted from GGUF

| | |
| :-- | :-- |
| source | `{path.name}`, {path.stat().st_size} bytes |
| sha256 of the source | `{digest}` |
| weights in the source | {types} of {total} numbers |
| weights here | {str(dtype).removeprefix("torch.")}, unpacked; what quantization lost before stays lost |
| chat template | {"kept" if has_template else "the source has none"} |
| converted with | hf_kvattn, {versions} |

Loaded back after writing, the logits of {CHECKED_TOKENS} tokens were equal to those of the GGUF-loaded model in the
same dtype, bit by bit, and the tokenizer gave the same ids.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
"""


def convert(source: str, output: str | Path, dtype: torch.dtype, max_shard_size: str = "5GB") -> dict[str, Any]:
    """Write a GGUF model as a safetensors folder, and give a dict that JSON can hold.

    Raises ValueError, and leaves nothing at `output`, when the file is broken, the model cannot be read, the output
    exists, or what was written does not give equal logits when loaded back.

    Args:
        source: a path that ends in .gguf, or `smollm2-135m`.
        output: the folder to write; it must not exist.
        dtype: of the written weights, and of the comparison.
        max_shard_size: of one safetensors file, as `save_pretrained` takes it.
    """
    path = inputs.gguf_path(source)
    if path is None:
        raise ValueError(f"not a .gguf file: {source!r}")
    with new_folder(output) as folder:
        header = read_header(path)
        model, tokenizer = _load(path, header, dtype)
        save(model, tokenizer, folder, max_shard_size)
        card = _card(path, header, dtype, tokenizer.chat_template is not None)
        (folder / "README.md").write_text(card, encoding="utf-8")
        written = sorted(folder.iterdir())
        return {
            "source": path.name,
            "output": str(output),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": model.num_parameters(),
            "weight_types": dict(header.types),
            "logits_equal_tokens": CHECKED_TOKENS,
            "chat_template": tokenizer.chat_template is not None,
            "files_bytes": {file.name: file.stat().st_size for file in written},
        }


HELP = """Turn a GGUF file into a safetensors folder that transformers loads by itself.

    hf-kvattn convert-gguf model.Q4_K_M.gguf --output model
    hf-kvattn convert-gguf model.f16.gguf --output model --dtype float16 --max-shard-size 2GB
    hf-kvattn convert-gguf smollm2-135m --output smollm2 --json

The folder holds weights, config, tokenizer with its chat template, generation config and a card. It is loaded back, and
gets its name only when its logits are equal to those of the GGUF-loaded model, bit by bit.
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help=f"a .gguf file, or {inputs.SMOLLM2}")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--dtype", choices=inputs.DTYPES, default="bfloat16", help="of the written weights")
    parser.add_argument("--max-shard-size", default="5GB", help="of one safetensors file")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON in the last line of stdout")


def _main(args: argparse.Namespace) -> int:
    found = convert(args.source, args.output, inputs.DTYPES[args.dtype], args.max_shard_size)
    print(markdown_table(["file", "bytes"], [[name, str(size)] for name, size in found["files_bytes"].items()]))
    print(f"written: {args.output}, logits of {found['logits_equal_tokens']} tokens equal, bit by bit")
    if args.json:
        print(json.dumps(found))
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
