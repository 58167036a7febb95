"""The native kernels on an emulated Arm CPU, in place of the library that `native` loads.

`arm_runner.cpp` runs in qemu's user mode. Python gives it each call's struct with the memory behind its pointers, and
writes back what it returns.
"""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from test_c_abi import POINTER, Attend, Linear, Quantize

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "hf_kvattn" / "kernels" / "csrc"
TARGET = "aarch64-linux-gnu"
BLOCK = 32
ATTEND, QUANTIZE, SELECT, VARIANT, LINEAR = range(5)
# What of qemu's CPUs has which features: the variants that each should choose from, the best one first.
CPUS = {
    "max": ["neon_bf16", "neon_dot", "neon", "portable"],
    "neoverse-n1": ["neon_dot", "neon", "portable"],
    "cortex-a57": ["neon", "portable"],
}


def missing() -> str | None:
    """What of the tools is not installed, or None."""
    absent = [tool for tool in (f"{TARGET}-g++", "qemu-aarch64", "cmake") if not shutil.which(tool)]
    return f"there is no {', no '.join(absent)}" if absent else None


def build(folder: Path, flags: str) -> Path:
    """Builds the library for Arm with the package's own CMakeLists, and a runner that is linked to it; its path."""
    configure = ["cmake", "-S", CSRC, "-B", folder, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    configure += [f"-DCMAKE_CXX_COMPILER={TARGET}-g++", "-DCMAKE_BUILD_TYPE=Debug", f"-DCMAKE_CXX_FLAGS_DEBUG={flags}"]
    runner, library = folder / "runner", folder / "libkvattn.so"
    link = [f"{TARGET}-g++", "-std=c++17", *flags.split(), f"-I{CSRC}", FOLDER / "arm_runner.cpp", library]
    link += [f"-Wl,-rpath,{folder}", "-o", runner]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"], link):
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return runner


def reach(stride, sizes, dim: int) -> int:
    """How many numbers there are from the first to the last, with rows of `dim`."""
    return sum(step * (size - 1) for step, size in zip(stride, sizes, strict=True)) + dim if min(sizes) > 0 else 0


def block_bytes(a, lead: int) -> dict[str, int]:
    """Bytes of the arrays that hold quantized blocks."""
    blocks, groups = lead * a.packed_blocks, a.head_dim // a.v_group
    codes = {f"{x}_codes": blocks * 4 * getattr(a, f"{x}_bits") * a.head_dim for x in "kv"}
    k_scale = blocks * (2 * a.head_dim if a.k_bits == 8 else 3 * a.head_dim // 4)
    scales = {"k_scale": k_scale, "v_scale": blocks * groups * BLOCK * (2 if a.v_bits == 8 else 1)}
    table = {"k_mean": 4 * lead * a.head_dim, "k_widths": lead * a.head_dim // 16}
    return codes | scales | table | dict.fromkeys(("k_step", "k_unit", "k_order"), 2 * lead * a.head_dim)


def attend_bytes(a: Attend) -> dict[str, int]:
    """Bytes behind each pointer of the struct."""
    batch = 1 if a.q_begin else a.batch  # of the tensors
    number, tokens = 4 if a.dtype == 0 else 2, a.ring_slots or a.kv_len - a.packed_len
    queries, keys, sinks = (batch, a.q_heads, a.q_len), (batch, a.kv_heads, tokens), (batch, a.kv_heads, a.sinks)
    found = {"q": number * reach(a.q_stride, queries, a.head_dim), "leftpad": 4 * batch, "sink_leftpad": 4 * batch}
    found |= {x: number * reach(getattr(a, f"{x}_stride"), keys, a.head_dim) for x in "kv"}
    found |= {"out": number * batch * a.q_len * a.q_heads * a.head_dim, "lse": 4 * batch * a.q_heads * a.q_len}
    found["sink_q"] = number * reach(a.sink_q_stride, queries, a.head_dim)
    found |= dict.fromkeys(("sink_k", "sink_v"), number * reach(a.sink_kv_stride, sinks, a.head_dim))
    if a.q_begin:
        stored = ctypes.cast(a.kv_begin, ctypes.POINTER(ctypes.c_int32))[a.batch]
        found |= dict.fromkeys(("q_begin", "kv_begin"), 4 * (a.batch + 1)) | {"kv_rows": 8 * max(0, stored)}
    if a.packed_len:
        found |= block_bytes(a, batch * a.kv_heads)
    return found


def quantize_bytes(a: Quantize) -> dict[str, int]:
    rows, number = (a.batch, a.kv_heads, a.blocks * BLOCK), 4 if a.dtype == 0 else 2
    given = {x: number * reach(getattr(a, f"{x}_stride"), rows, a.head_dim) for x in "kv"}
    return given | block_bytes(a, a.batch * a.kv_heads)


def linear_bytes(a: Linear) -> dict[str, int]:
    number, w_number, width = 4 if a.dtype == 0 else 2, {0: 4, 3: 1}.get(a.w_dtype, 2), getattr(a, "in")
    weights = [(getattr(a, f"out{i}"), getattr(a, f"stride{i}")) for i in range(a.weights)]
    found = {f"w{i}": w_number * reach((stride,), (out,), width) for i, (out, stride) in enumerate(weights)}
    return found | {
        "x": number * reach((a.x_stride,), (a.rows,), width), "out": number * a.rows * sum(out for out, _ in weights)
    }  # fmt: skip


class ArmLibrary:
    """The functions of `kvattn.h` that `native` calls, on an Arm CPU that qemu knows by the name `cpu`."""

    def __init__(self, runner: Path, cpu: str, environment: dict[str, str] | None = None):
        command = ["qemu-aarch64", "-L", f"/usr/{TARGET}", "-cpu", cpu, str(runner)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)

    def close(self) -> int:
        """Ends the runner; its exit status."""
        self.process.stdin.close()
        return self.process.wait(timeout=30)

    def read(self, size_bytes: int) -> bytes:
        found = self.process.stdout.read(size_bytes)
        if len(found) < size_bytes:
            raise RuntimeError(f"the Arm runner ended with status {self.process.wait()}")
        return found

    def call(self, function: int, arguments: bytes, memory: list[tuple[int, int, int, bool]] = ()) -> int:
        """Calls a function; `memory` has, for each pointer, its place, address, bytes, and whether they come back."""
        message = [struct.pack("=3i", function, len(arguments), len(memory)), arguments]
        for place, address, size_bytes, comes_back in memory:
            message += [struct.pack("=2qi", place, size_bytes, comes_back), ctypes.string_at(address, size_bytes)]
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        (status,) = struct.unpack("=i", self.read(4))
        for _, address, size_bytes, comes_back in memory:
            if comes_back:
                ctypes.memmove(address, self.read(size_bytes), size_bytes)
        return status

    @staticmethod
    def memory(arguments: ctypes.Structure, sizes: dict[str, int], returned: tuple) -> Iterator[tuple]:
        for field, kind in arguments._fields_:
            if kind is POINTER and (address := getattr(arguments, field)) is not None:
                yield getattr(type(arguments), field).offset, address, sizes.get(field, 0), field in returned

    def kvattn_attend(self, arguments: bytes) -> int:
        a = Attend.from_buffer_copy(arguments)
        return self.call(ATTEND, arguments, [*self.memory(a, attend_bytes(a), ("out", "lse"))])

    def kvattn_quantize(self, arguments: bytes) -> int:
        a = Quantize.from_buffer_copy(arguments)
        written = [f"{x}_{name}" for x in "kv" for name in ("codes", "scale")]
        return self.call(QUANTIZE, arguments, [*self.memory(a, quantize_bytes(a), written)])

    def kvattn_linear(self, arguments: bytes) -> int:
        a = Linear.from_buffer_copy(arguments)
        return self.call(LINEAR, arguments, [*self.memory(a, linear_bytes(a), ("out",))])

    def kvattn_select(self, name: bytes) -> int:
        return self.call(SELECT, name + b"\0")

    def kvattn_variant(self) -> bytes:
        length = self.call(VARIANT, bytes(64))
        return self.read(64)[:length]

    def kvattn_has_openmp(self) -> int:
        return 1
