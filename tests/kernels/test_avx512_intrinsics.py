"""The emulated AVX-512 intrinsics against their definitions and, where the CPU has them, against the instructions."""

import ctypes
import mmap
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import emulated_avx512
import numpy as np
import pytest

FOLDER = Path(emulated_avx512.__file__).parent / "avx512"
CPU_FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
REAL = [*emulated_avx512.AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16", "vnni"))]
COUNT = 500  # registers of random bits, and as many of ordinary numbers

pytestmark = pytest.mark.skipif(not (shutil.which("g++") and " avx2 " in CPU_FLAGS), reason="needs g++ and AVX2")

F32, F64, U8, I8, U16, I16, I32, I64 = map(np.dtype, ("f4", "f8", "u1", "i1", "u2", "i2", "i4", "i8"))
LIMITS = np.float32([0, 1, 1.5, 2.5, 2.0**-126, 2.0**-149, 2.0**-130, 2.0**-24, 127, 2.0**31, 3e38, np.inf, np.nan])


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    library = folder / "intrinsics.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *flags, str(FOLDER / "intrinsics.cpp"), "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    return compiled(tmp_path_factory.mktemp("emulated"), *emulated_avx512.flags(REAL))


@pytest.fixture(scope="module")
def registers() -> np.ndarray:
    """(n, 3, 64) bytes: any bits, ordinary numbers, and all that is special beside all that is."""
    chance = np.random.default_rng(0)
    any_bits = chance.integers(0, 256, (COUNT, 3, 64), U8)
    ordinary = (chance.standard_normal((COUNT, 3, 16)) * 2.0 ** chance.integers(-12, 12, (COUNT, 3, 16))).astype(F32)
    special = chance.choice(np.concatenate([LIMITS, -LIMITS]), (4 * COUNT, 3, 16))
    made = np.concatenate([any_bits, ordinary.view(U8), special.view(U8)])
    made[:COUNT:4, :, ::2] = chance.choice([0, 1, 127, 128, 255], made[:COUNT:4, :, ::2].shape)  # ends of ranges
    return np.ascontiguousarray(made)


def results(library: ctypes.CDLL, name: str, registers: np.ndarray, size_bytes: int = 64) -> np.ndarray:
    out = np.full((len(registers), 64), 0xAA, U8)
    status = library.run(name.encode(), len(registers), registers.ctypes.data_as(ctypes.c_char_p), out.ctypes.data_as(
        ctypes.c_char_p))  # fmt: skip
    assert status == 0, name
    return out[:, :size_bytes]


def halves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of each 128 bits, those of x and then those of y: (n, m) twice -> (n, 2 m)."""
    both = [t.reshape(len(t), 4, -1) for t in (x, y)]
    return np.concatenate(both, 2).reshape(len(x), -1)


def pairs(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Products of signed words, summed in pairs in 64 bits."""
    return (x.view(I16).astype(I64) * y.view(I16)).reshape(len(x), 16, 2).sum(2)


def bytes_dot(x: np.ndarray, y: np.ndarray, total: np.ndarray) -> np.ndarray:
    products = x.astype(I64) * y.view(I8)
    return (products.reshape(len(x), 16, 4).sum(2) + total.view(I32)).astype(I32)


def towards_minus_infinity(exact: np.ndarray) -> np.ndarray:
    nearest = exact.astype(F32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def fraction(x: np.ndarray) -> np.ndarray:
    wide = x.view(F32).astype(F64)
    exact = wide - np.floor(wide)  # exact but for tiny negative numbers
    result = towards_minus_infinity(exact)
    result = np.where((wide < 0) & (wide > -(2.0**-24)), np.float32(1 - 2.0**-24), result)
    result = np.where(exact == 0, np.float32(-0.0), result)
    return np.where(np.isinf(wide), np.float32(0), result)


def scaled(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    a, b = x.view(F32).astype(F64), y.view(F32).astype(F64)
    power = np.where(np.isnan(b), b, np.exp2(np.clip(np.floor(b), -600, 600)))
    return (a * np.where(np.isinf(b), np.where(b > 0, np.inf, 0), power)).astype(F32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(F32)


def bf16_dot(x: np.ndarray, y: np.ndarray, total: np.ndarray) -> np.ndarray:
    a, b = ((t.view(U16).astype("u4") << 16).view(F32).reshape(len(t), 16, 2) for t in (x, y))
    sums = flushed(total.view(F32))
    for i in (1, 0):  # the upper of each pair first; products are exact in fp64
        sums = flushed((flushed(a[..., i]).astype(F64) * flushed(b[..., i]) + sums).astype(F32))
    return sums


def rounded_to_bf16(x: np.ndarray) -> np.ndarray:
    """The upper halves of the nearest floats whose lower halves are zeros; NaN stays, denormals become zeros."""
    bits = flushed(x.view(F32)).view("u4")
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x.view(F32)), bits >> 16 | 0x40, nearest).astype(U16)


def to_int32(x: np.ndarray) -> np.ndarray:
    rounded = np.rint(x.view(F32).astype(F64))
    fits = (rounded >= -(2.0**31)) & (rounded < 2.0**31)
    return np.where(fits, np.where(fits, rounded, 0), -(2.0**31)).astype(I32)


def folded(x: np.ndarray, f: Callable) -> np.ndarray:
    x = x.view(F32)
    while x.shape[1] > 1:
        x = f(*np.split(x, 2, 1))
    return x


def greater(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(x > y, x, y)  # y where either is NaN


def shuffled(x: np.ndarray, order: np.ndarray) -> np.ndarray:
    lanes, at = x.reshape(-1, 4, 16), order.reshape(-1, 4, 16)
    return np.where(at < 128, np.take_along_axis(lanes, (at & 15).astype(I64), 2), 0).astype(U8).reshape(-1, 64)


def saturated(x: np.ndarray, low: int, high: int, dtype) -> np.ndarray:
    return np.clip(x, low, high).astype(dtype)


def repeated(x: np.ndarray, size_bytes: int) -> np.ndarray:
    return np.tile(x[:, :size_bytes], (1, 64 // size_bytes))


# What each intrinsic makes of its registers a, b and c, of 64 bytes each.
DEFINED: dict[str, Callable] = {
    "add_ps": lambda a, b, c: a.view(F32) + b.view(F32),
    "mul_ps": lambda a, b, c: a.view(F32) * b.view(F32),
    "div_ps": lambda a, b, c: a.view(F32) / b.view(F32),
    "max_ps": lambda a, b, c: greater(a.view(F32), b.view(F32)),
    "abs_ps": lambda a, b, c: a.view("u4") & np.uint32(0x7FFFFFFF),
    "fmadd_ps": lambda a, b, c: (a.view(F32).astype(F64) * b.view(F32) + c.view(F32)).astype(F32),
    "reduce_ps": lambda a, b, c: fraction(a),
    "scalef_ps": lambda a, b, c: scaled(a, b),
    "cmp_ps_mask": lambda a, b, c: np.packbits(~(a.view(F32) <= b.view(F32)), 1, "little"),
    "reduce_add_ps": lambda a, b, c: folded(a, np.add),
    "reduce_max_ps": lambda a, b, c: folded(a, greater),
    "cvtps_epi32": lambda a, b, c: to_int32(a),
    "cvtepi32_ps": lambda a, b, c: a.view(I32).astype(F32),
    "cvtph_ps": lambda a, b, c: np.ascontiguousarray(a[:, :32]).view("f2").astype(F32),
    "cvtepu16_epi32": lambda a, b, c: np.ascontiguousarray(a[:, :32]).view(U16).astype(I32),
    "cvtepu8_epi32": lambda a, b, c: np.ascontiguousarray(a[:, :16]).astype(I32),
    "cvtepu8_epi64": lambda a, b, c: np.ascontiguousarray(a[:, :8]).astype(I64),
    "cvtepi8_epi32": lambda a, b, c: np.ascontiguousarray(a[:, :16]).view("i1").astype(I32),
    "add_epi16": lambda a, b, c: a.view(U16) + b.view(U16),
    "add_epi32": lambda a, b, c: a.view("u4") + b.view("u4"),
    "madd_epi16": lambda a, b, c: pairs(a, b).astype(I32),
    "packs_epi32": lambda a, b, c: saturated(halves(a.view(I32), b.view(I32)), -(2**15), 2**15 - 1, I16),
    "packus_epi32": lambda a, b, c: saturated(halves(a.view(I32), b.view(I32)), 0, 2**16 - 1, U16),
    "packus_epi16": lambda a, b, c: saturated(halves(a.view(I16), b.view(I16)), 0, 255, U8),
    "shuffle_epi8": lambda a, b, c: shuffled(a, b),
    "unpacklo_epi64": lambda a, b, c: np.stack([a.view(I64)[:, ::2], b.view(I64)[:, ::2]], 2).reshape(len(a), -1),
    "permutevar_ps": lambda a, b, c: np.take_along_axis(a.view(I32), (b.view(I32) & 3) + np.arange(16) // 4 * 4, 1),
    "permutexvar_epi64": lambda a, b, c: np.take_along_axis(b.view(I64), a.view(I64) & 7, 1),
    "permutexvar_epi16": lambda a, b, c: np.take_along_axis(b.view(U16), (a.view(U16) & 31).astype(I64), 1),
    "permutex2var_ps": lambda a, b, c: np.take_along_axis(np.hstack([a, c]).view(I32), b.view(I32) & 31, 1),
    "and_si512": lambda a, b, c: a & b,
    "or_si512": lambda a, b, c: a | b,
    "xor_si512": lambda a, b, c: a ^ b,
    "srli_epi16": lambda a, b, c: a.view(U16) >> 5,
    "slli_epi16": lambda a, b, c: a.view(U16) << 5,
    "slli_epi32": lambda a, b, c: a.view("u4") << 16,
    "slli_epi64": lambda a, b, c: a.view("u8") << np.uint64(28),
    "srlv_epi32": lambda a, b, c: np.where(b.view("u4") < 32, a.view("u4") >> (b.view("u4") & 31), 0).astype("u4"),
    "dpbusd_epi32": bytes_dot,
    "dpwssd_epi32": lambda a, b, c: (pairs(a, b) + c.view(I32)).astype(I32),
    "dpbf16_ps": bf16_dot,
    "cvtneps_pbh": lambda a, b, c: rounded_to_bf16(a),
    "cvtne2ps_pbh": lambda a, b, c: np.hstack([rounded_to_bf16(b), rounded_to_bf16(a)]),
    "set1_ps": lambda a, b, c: repeated(a, 4),
    "set1_epi8": lambda a, b, c: repeated(a, 1),
    "set1_epi16": lambda a, b, c: repeated(a, 2),
    "set1_epi32": lambda a, b, c: repeated(a, 4),
    "setzero_ps": lambda a, b, c: np.zeros_like(a),
    "setzero_si512": lambda a, b, c: np.zeros_like(a),
    "setr_epi64": lambda a, b, c: a,
    "setr_epi32": lambda a, b, c: a,
    "broadcast_f32x4": lambda a, b, c: repeated(a, 16),
    "broadcast_i32x4": lambda a, b, c: repeated(a, 16),
    "castsi512_ps": lambda a, b, c: a,
    "castps_si512": lambda a, b, c: a,
    "castps512_ps256": lambda a, b, c: a[:, :32],
    "extractf32x8_ps": lambda a, b, c: a[:, 32:],
    "loadu_ps": lambda a, b, c: a,
    "loadu_si512": lambda a, b, c: a,
    "storeu_ps": lambda a, b, c: a,
    "storeu_si512": lambda a, b, c: a,
}  # fmt: skip
FLOATS = {"add_ps", "mul_ps", "div_ps", "max_ps", "fmadd_ps", "reduce_ps", "scalef_ps", "cvtph_ps", "dpbf16_ps"}
MASKED = {"maskz_loadu_ps", "maskz_loadu_epi16"}


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, but for which NaN it is."""
    if expected.dtype == F32:
        found, expected = np.ascontiguousarray(found).view(F32), np.ascontiguousarray(expected)
        nan = np.isnan(expected)
        assert np.array_equal(np.isnan(found), nan)
        found, expected = np.where(nan, 0, found), np.where(nan, 0, expected)
    found, expected = (np.ascontiguousarray(t).view(U8) for t in (found, expected))
    np.testing.assert_array_equal(found, expected)


def registers_of(registers: np.ndarray, name: str) -> np.ndarray:
    if name != "fmadd_ps":
        return registers
    return registers[COUNT:]  # the definition in fp64 rounds twice where magnitudes are very different


@pytest.mark.parametrize("name", DEFINED)
def test_emulated_intrinsics_are_as_defined(name, emulated, registers):
    registers = registers_of(registers, name)
    with np.errstate(all="ignore"):
        expected = DEFINED[name](*(np.ascontiguousarray(registers[:, i]) for i in range(3)))
    size_bytes = expected.dtype.itemsize * expected.shape[1]
    same(results(emulated, name, registers, size_bytes), expected)


def test_every_emulated_intrinsic_has_a_definition():
    header = (FOLDER / "immintrin.h").read_text()
    emulated = set(re.findall(r"^EMULATED \w+ _mm\d+_(\w+)\(", header, re.M))
    emulated |= set(re.findall(r"^KVATTN_\w+\((\w+), ", header, re.M)) | set(
        re.findall(r"^KVATTN_SHIFT\((\w+)\)", header, re.M)
    )
    assert emulated == DEFINED.keys() | MASKED


@pytest.mark.parametrize("lane_bytes", [4, 2, None], ids=["floats", "words", "half the words"])
def test_masked_loads_do_not_touch_what_is_masked_out(lane_bytes, emulated):
    size = mmap.PAGESIZE
    pages = mmap.mmap(-1, 2 * size)
    pages[:size] = bytes(range(1, 256)) * (size // 255) + bytes(size % 255)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), size, 0) == 0  # the second page: no access
    for lanes in range(17 if lane_bytes in (4, None) else 33):
        used = lanes * (lane_bytes or 2)
        out = ctypes.create_string_buffer(b"\xaa" * 64, 64)
        at = ctypes.c_void_p(start + size - used)
        if lane_bytes:
            emulated.run_load_first(lane_bytes, lanes, at, out)
        else:
            emulated.run_load_first_half(lanes, at, out)
        assert out.raw[: 64 if lane_bytes else 32] == pages[size - used : size] + bytes(
            (64 if lane_bytes else 32) - used
        )


@pytest.mark.skipif("avx512_bf16" not in CPU_FLAGS, reason="the CPU has no AVX-512 with bf16")
def test_emulated_intrinsics_are_the_instructions(emulated, registers, tmp_path):
    real = compiled(tmp_path, *REAL)
    for name in DEFINED:
        expected = results(real, name, registers)
        same(results(emulated, name, registers), expected.view(F32) if name in FLOATS else expected)
