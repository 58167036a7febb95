"""The command `hub-kernel`: this package and its C++ library, laid out as the `kernels` package loads them."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path

import hf_kvattn
from hf_kvattn.kernels import native
from hf_kvattn.tools.command_line import Command, positive_int
from hf_kvattn.tools.files import new_folder

HELP = """Write hf_kvattn, with the C++ library of this machine, as a kernel that the package `kernels` loads.

    hf-kvattn hub-kernel --output hf-kvattn
    kernels.get_local_kernel(Path("hf-kvattn"), backend="cpu").enable(model, cache="int4")

The library has a plain C ABI: one build serves every PyTorch from 2.7 on, on this kind of CPU and system. It needs
transformers where it is loaded. Upload the folder to a kernel repository of the hub to load it by that name.
"""

OLDEST_TORCH = "27"  # as the names of builds say 2.7; see pyproject.toml


def variant() -> str:
    """The name of a build for this kind of machine, as the `kernels` package reads it."""
    system = platform.system().lower()
    machine = platform.machine().lower()
    if (system, machine) == ("darwin", "arm64"):
        machine = "aarch64"
    return f"torch-stable-abi{OLDEST_TORCH}-cpu-{'x86_64' if machine == 'amd64' else machine}-{system}"


def build(output: Path, version: int) -> None:
    """Writes the kernel to the new folder `output`; `version` is its major version on the hub.

    Raises:
        ValueError: the folder exists, or the C++ library was not built.
    """
    library = native.library_path()
    if library is None:
        raise ValueError("the C++ kernels were not built: install a C++ compiler, then reinstall hf_kvattn")
    package = Path(hf_kvattn.__file__).parent
    with new_folder(output) as folder:
        place = folder / "build" / variant()
        skip = shutil.ignore_patterns("__pycache__", "csrc", library.name)
        shutil.copytree(package, place / package.name, ignore=skip)
        shutil.copy(library, place / package.name / "kernels")
        shutil.copy(Path(__file__).with_name("kernel.py"), place / "__init__.py")
        metadata = {
            "id": f"_hf_kvattn_{hf_kvattn.__version__.replace('.', '_')}",
            "name": "hf-kvattn",
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": "cpu"},
        }
        (place / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the folder to write; must not exist")
    parser.add_argument("--version", type=positive_int, default=1, help="the kernel's major version on the hub")


def _main(args: argparse.Namespace) -> int:
    build(args.output, args.version)
    print(f"wrote {args.output}/build/{variant()}")
    return 0


COMMAND = Command(HELP, _add_arguments, _main)
