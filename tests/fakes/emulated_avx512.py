"""The native kernels' library with its AVX-512 variants compiled for CPUs that have AVX2 alone, by the package's own
CMakeLists: `avx512/immintrin.h` takes the place of the compiler's header. For tests of what they compute, not of speed.

This file is the compiler's launcher too: `python emulated_avx512.py g++ ...`.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parents[2] / "hf_kvattn" / "kernels" / "csrc"
AVX2 = ("-mavx2", "-mfma", "-mf16c")
VARIANTS = ("avx512_bf16", "avx512")


def flags(command: Sequence[str]) -> list[str]:
    """The command without flags that the CPU does not bear out, and with what emulates them."""
    asked = {flag for flag in command if flag.startswith("-mavx512")}
    given = [flag for flag in command if flag not in asked]
    if asked:
        given += [f"-I{Path(__file__).parent / 'avx512'}", "-Wno-psabi"]
    if "-mavx512bf16" in asked:
        given.append("-DKVATTN_EMULATED_BF16")
    return [*given, "-D__builtin_cpu_supports(feature)=true"]  # the choice at load takes them for usable


def build(folder: Path, compiler_flags: str) -> Path:
    """Builds the library in `folder` with GCC; returns its path."""
    launcher = f"-DCMAKE_CXX_COMPILER_LAUNCHER={sys.executable};{Path(__file__).resolve()}"
    configure = ["cmake", "-S", str(CSRC), "-B", str(folder), "-DCMAKE_CXX_COMPILER=g++", launcher]
    configure += ["-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS_DEBUG={compiler_flags}"]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", "2"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "libkvattn.so"


if __name__ == "__main__":
    command = flags(sys.argv[1:])
    os.execvp(command[0], command)
