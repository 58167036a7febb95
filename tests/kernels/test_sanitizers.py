"""The native kernels, built with AddressSanitizer and UndefinedBehaviorSanitizer, on random calls and the kernel tests.

    pytest -m slow tests/kernels/test_sanitizers.py

It needs GCC and CMake, and builds for some minutes. With `HF_KVATTN_SANITIZE_JOBS=1` the variants for other CPUs run
under sanitizers too, for an hour or so; for Arm that needs what `tests/jobs/arm` needs.
`HF_KVATTN_RANDOM_CALLS=20000` makes more random calls.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import arm_library
import pytest
from built_once import built_once

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "hf_kvattn"
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="GCC on Linux alone"),
    pytest.mark.skipif(not shutil.which("cmake"), reason="there is no cmake"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder with a copy of the package and the library in it."""
    return built_once(tmp_path_factory, "sanitized", build)


def build(folder: Path) -> Path:
    built, copy = folder / "build", folder / "hf_kvattn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    configure = ["cmake", "-S", copy / "kernels" / "csrc", "-B", built, f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    configure += ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_COMPILER=g++"]
    for command in (configure, ["cmake", "--build", built, "--parallel", "2"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.copy(built / "libkvattn.so", copy / "kernels")
    return folder


def preloaded() -> str:
    """AddressSanitizer's library, which must be loaded before all others, and C++'s, whose `throw` it looks up."""
    names = ("libasan.so", "libstdc++.so")
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True) for name in names]
    return ":".join(path.strip() for path in paths)


def run(package: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Python with these arguments, in which the sanitizer watches all memory of the heap."""
    watched = {"LD_PRELOAD": preloaded(), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(package)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | watched, cwd=package, capture_output=True, text=True)


READ_BEYOND = """
import torch
from hf_kvattn.kernels import native
from hf_kvattn.kernels.call import AttendCall
class Lie(AttendCall):
    kv_len = 100 + {tokens}
native.attend(Lie(torch.randn(1, 2, 1, 64), *torch.randn(2, 100, 64).view(2, 1, 1, 100, 64).unbind(0), 0.1))
print("done")
"""


def test_a_read_beyond_a_tensor_is_reported(package):
    sound = run(package, "-c", READ_BEYOND.format(tokens=0))
    assert sound.stdout == "done\n", sound.stderr[-3000:]
    report = run(package, "-c", READ_BEYOND.format(tokens=200))
    assert report.returncode != 0 and "heap-buffer-overflow" in report.stderr and "kvattn" in report.stderr


@pytest.mark.parametrize("name", ["random_calls", "call_check", "c_abi", "kernels", "packed", "requests"])
def test_nothing_is_reported(name, package):
    test = Path(__file__).parent / f"test_{name}.py"
    # `-s`: a report ends the process at once, and what pytest has captured until then is lost.
    options = ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-x", "-s", "--timeout=0"]
    done = run(package, "-m", "pytest", *options, test)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif("HF_KVATTN_SANITIZE_JOBS" not in os.environ, reason="asked for by HF_KVATTN_SANITIZE_JOBS=1")
@pytest.mark.parametrize("job", ["arm", "emulated_avx512"])
def test_nothing_is_reported_of_variants_for_other_cpus(job):
    if job == "arm" and (missing := arm_library.missing()):
        pytest.skip(missing)
    environment = {"HF_KVATTN_JOB_FLAGS": FLAGS, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
    if job == "emulated_avx512":
        environment["LD_PRELOAD"] = preloaded()
    command = [sys.executable, "-m", "pytest", "-x", "--timeout=0", "-p", "no:cacheprovider", ROOT / "tests/jobs" / job]
    done = subprocess.run(command, env=os.environ | environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
