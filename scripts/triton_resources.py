"""Compiles the Triton kernels for NVIDIA and AMD GPUs, without one, and writes down what they take.

python scripts/triton_resources.py --output model_cards/kernels
python scripts/triton_resources.py --output resources --targets sm_90
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from hf_kvattn.evaluation import inputs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=inputs.HelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="write triton.json and TRITON.md there")
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    parser.add_argument("--targets", nargs="+", choices=targets, default=targets, help="GPUs to compile for")
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        raise ValueError("triton is not installed: pip install triton")
    folder = Path(args.output)
    paths = {name: folder / name for name in ("triton.json", "TRITON.md")}
    present = [str(path) for path in paths.values() if path.exists()]
    if present:
        raise ValueError(f"{present[0]} exists already: move it away or choose another --output")
    from hf_kvattn.evaluation import codegen  # needs triton

    found = codegen.measure(args.targets)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"triton.json": json.dumps(found, indent=1) + "\n", "TRITON.md": codegen.table(found)}
    for name, path in paths.items():
        temporary = path.with_name(f".{name}.{os.getpid()}")
        temporary.write_text(texts[name], encoding="utf-8")
        os.replace(temporary, path)
    print(f"{len(found['kernels'])} kernels: {paths['TRITON.md']}")
    return 0


if __name__ == "__main__":
    sys.exit(inputs.run(main))
