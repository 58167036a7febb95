"""The C ABI of the native kernels, called with wrong arguments: it refuses them and neither crashes nor writes.

Each list of calls runs in a process of its own, so that a crash is a failure: `python test_c_abi.py LIBRARY SEED`. This
file needs no more of the package than the library. Whether the memory behind a pointer is as large as the sizes say, it
cannot know: the calls here have more than enough.
"""

import ctypes
import math
import mmap
import random
import subprocess
import sys
from collections.abc import Iterator

import torch  # whose OpenMP runtime the library shares

U8, I16, I32, I64 = ctypes.c_uint8, ctypes.c_int16, ctypes.c_int32, ctypes.c_int64
F32, POINTER = ctypes.c_float, ctypes.c_void_p
THREE = I64 * 3


NEW = ("k_new", "v_new", "k_slot", "v_slot")
TABLE = ("k_step", "k_unit", "k_order", "k_widths")
ARRAYS = ("k_codes", "k_scale", "k_mean", *TABLE, "v_codes", "v_scale")


class Attend(ctypes.Structure):
    """`kvattn_attend_args`."""

    _fields_ = (
        [(name, I32) for name in ("dtype", "causal", "threads", "reserved")]
        + [(name, I64) for name in ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "window")]
        + [("scale", F32), ("softcap", F32)]
        + [(name, POINTER) for name in ("q", "k", "v", "out", *NEW, "leftpad", "lse")]
        + [(name, THREE) for name in ("q_stride", "k_stride", "v_stride")]
        + [(name, I64) for name in ("ring_slots", "ring_slot", "sinks", "sink_evicted")]
        + [(name, POINTER) for name in ("sink_q", "sink_k", "sink_v", "sink_leftpad")]
        + [(name, THREE) for name in ("sink_q_stride", "sink_kv_stride")]
        + [(name, POINTER) for name in ("q_begin", "kv_begin", "kv_rows")]
        + [(name, I64) for name in ("packed_start", "packed_len", "packed_blocks", "packed_slot")]
        + [("v_group", I64), ("v_rotation", I64), ("k_bits", I32), ("v_bits", I32)]
        + [(name, POINTER) for name in ARRAYS]
    )


class Quantize(ctypes.Structure):
    """`kvattn_quantize_args`."""

    _fields_ = (
        [(name, I32) for name in ("dtype", "threads", "k_bits", "v_bits")]
        + [(name, I64) for name in ("batch", "kv_heads", "blocks", "head_dim", "v_group", "v_rotation")]
        + [("packed_blocks", I64), ("slot", I64), ("k", POINTER), ("v", POINTER)]
        + [("k_stride", THREE), ("v_stride", THREE)]
        + [(name, POINTER) for name in ARRAYS]
    )


class Linear(ctypes.Structure):
    """`kvattn_linear_args`, the weights one after the other."""

    _fields_ = (
        [(name, I32) for name in ("dtype", "w_dtype", "threads", "weights")]
        + [(name, I64) for name in ("rows", "in", "x_stride")]
        + [("x", POINTER), ("out", POINTER)]
        + [(f"{name}{i}", kind) for i in range(4) for name, kind in (("w", POINTER), ("out", I64), ("stride", I64))]
    )


B, HQ, H, TQ, TK, D, S = 2, 6, 2, 3, 100, 64, 4
STRIDES = {"q_stride": (HQ * TQ * D, TQ * D, D)} | dict.fromkeys(("k_stride", "v_stride"), (H * 200 * D, 200 * D, D))
EXACT = dict(dtype=0, causal=1, threads=2, batch=B, q_heads=HQ, kv_heads=H, q_len=TQ, kv_len=TK, head_dim=D, scale=0.1)
EXACT |= STRIDES
SINKS = {"sinks": S, "sink_evicted": 9, "sink_q_stride": STRIDES["q_stride"], "sink_kv_stride": (H * S * D, S * D, D)}
BLOCKS = {"packed_blocks": 6, "v_group": 32, "v_rotation": 64, "k_bits": 4, "v_bits": 8}
# What the pointers of a table lead to, for as many heads as any call has: widths of 4 bits on average, falling.
FEW_BITS = {"k_order": (I16, [*range(D - 1, -1, -1)]), "k_widths": (U8, [7, 5, 4, 0])}
# What the pointers of requests lead to. Other calls have none.
REQUESTS = {"q_begin": (I32, [0, 1, TQ]), "kv_begin": (I32, [0, 40, TK]), "kv_rows": (I64, [*range(99, -1, -1)])}
# Calls that are right: the struct, its numbers, and the pointers that are null beside those of no sinks.
RIGHT = {
    "exact": (Attend, EXACT | {"window": 70, "softcap": 5.0}, ARRAYS),
    "new": (Attend, EXACT, ARRAYS),
    "ring": (Attend, EXACT | SINKS | {"ring_slots": 120, "ring_slot": 90}, ARRAYS),
    "packed": (Attend, EXACT | BLOCKS | {"packed_start": 4, "packed_len": 64, "packed_slot": 2}, ()),
    "requests": (Attend, EXACT | {"window": 70}, [*ARRAYS, "leftpad"]),
    "quantize": (Quantize, BLOCKS | {k: EXACT[k] for k in ("dtype", "threads", "batch", "kv_heads", "head_dim")}
                 | {k: STRIDES[k] for k in ("k_stride", "v_stride")} | {"blocks": 2, "slot": 3}, ()),
    "linear": (Linear, {"dtype": 0, "w_dtype": 0, "threads": 2, "weights": 2, "rows": 3, "in": D, "x_stride": D,
                        "out0": 5, "stride0": D, "out1": 7, "stride1": D}, ["w2", "w3"]),
}  # fmt: skip
# What may take these values, since they have a meaning, or are not read in this call. All other changes are refused.
HUGE, HUGEST = 2**62, 2**63 - 1
ANY = (-1, 0, HUGE, HUGEST, -HUGEST - 1)
NOT_PACKED = {name: ANY for name in ("packed_start", "v_group", "v_rotation")}
NOT_PACKED |= {name: (-1, 0, 2**31 - 1, -(2**31)) for name in ("k_bits", "v_bits")}
NO_SINKS = {"sink_evicted": ANY, "sink_q_stride": ANY, "sink_kv_stride": ANY}
OFF = {"window": (0, HUGE, HUGEST), "scale": (0.0, -1.0)} | dict.fromkeys(("causal", "softcap", "leftpad", "lse"), (0,))
OFF |= dict.fromkeys(("q_stride", "k_stride", "v_stride"), (0,))  # the same numbers for all
HARMLESS = {
    "exact": OFF | NOT_PACKED | NO_SINKS,
    "new": OFF | NOT_PACKED | NO_SINKS,
    "ring": OFF | NOT_PACKED | {"causal": (), "sinks": (0,), "sink_evicted": (0, -1), "sink_leftpad": (0,),
                                "sink_q_stride": (0,), "sink_kv_stride": (0,), "ring_slot": (0,)},
    "requests": OFF | NOT_PACKED | NO_SINKS | {"kv_rows": (0,)},
    "packed": OFF | NO_SINKS | {"packed_start": (0,), "packed_len": (0,), "packed_slot": (0,)},
    "quantize": {"k_stride": (0,), "v_stride": (0,), "slot": (0,)},
    "linear": dict.fromkeys(("x_stride", "stride0", "stride1"), (0,))
              | dict.fromkeys(("out2", "stride2", "out3", "stride3"), ANY),
}  # fmt: skip


def memory(size_bytes: int) -> int:
    """The address of as many zeros; pages that nobody writes to take no memory."""
    zeros = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    KEPT.append(zeros)
    return ctypes.addressof(ctypes.c_char.from_buffer(zeros))


KEPT: list[mmap.mmap] = []
HEADS = 1 << 12
ROOM_BYTES = 1 << 28  # behind each pointer


class Problem:
    """One of `RIGHT`, with memory behind its pointers."""

    def __init__(self, name: str):
        self.name, (self.struct, self.numbers, nulls) = name, RIGHT[name]
        pointers = [field for field, kind in self.struct._fields_ if kind is POINTER and field not in nulls]
        if not self.numbers.get("sinks"):
            pointers = [field for field in pointers if not field.startswith("sink_")]
        if name != "new":
            pointers = [field for field in pointers if field not in NEW]
        if name != "requests":
            pointers = [field for field in pointers if field not in REQUESTS]
        self.places = {field: memory(ROOM_BYTES) for field in pointers}
        for field in REQUESTS.keys() & self.places:
            kind, numbers = REQUESTS[field]
            (kind * len(numbers)).from_address(self.places[field])[:] = numbers
        for field in FEW_BITS.keys() & self.places:
            kind, numbers = FEW_BITS[field]
            (kind * (HEADS * len(numbers))).from_address(self.places[field])[:] = numbers * HEADS

    def arguments(self) -> ctypes.Structure:
        made = self.struct()
        for field, value in (self.numbers | self.places).items():
            setattr(made, field, THREE(*value) if isinstance(value, tuple) else value)
        return made

    def fields(self) -> Iterator[tuple[str, int | None, type]]:
        """Field, place in it if it is an array, type."""
        for field, kind in self.struct._fields_:
            for place in range(3) if kind is THREE else (None,):
                yield field, place, I64 if kind is THREE else kind

    def change(self, arguments: ctypes.Structure, field: str, place: int | None, value: int | float) -> None:
        if place is None:
            setattr(arguments, field, value)
        else:
            getattr(arguments, field)[place] = value

    def value(self, field: str, place: int | None) -> int | float:
        found = (self.numbers | self.places).get(field, 0)
        return found if place is None else (found or (0, 0, 0))[place]

    def hostile(self, kind: type, right: int | float) -> list[int | float]:
        if kind is POINTER:
            return [0, right + 1] if right else []
        if kind is F32:
            return [math.nan, math.inf, -math.inf, -1.0, 0.0]
        return [-1, 0, 2**31 - 1, -(2**31)] if kind is I32 else list(ANY)

    def harmless(self, field: str, value: int | float) -> bool:
        if field in ("k_codes", "k_scale", "v_codes") and value == self.value(field, None) + 1:
            return True  # bytes lie anywhere
        return value in HARMLESS[self.name].get(field, ())


def call(library: ctypes.CDLL, arguments: ctypes.Structure) -> int:
    return getattr(library, f"kvattn_{type(arguments).__name__.lower()}")(ctypes.byref(arguments))


def written(problem: Problem) -> bool:
    """Whether a call has written; cleans up."""
    found = False
    for name in ("k_scale", "v_scale", "v_codes") if problem.struct is Quantize else ("out", "lse", "k_slot", "v_slot"):
        if name in problem.places:
            head = (ctypes.c_char * (1 << 16)).from_address(problem.places[name])
            nothing = bytes(len(head))
            found, head[:] = found or head.raw != nothing, nothing
    return found


def table(library: ctypes.CDLL) -> None:
    """Every field of every right call, with every hostile value."""
    for problem in map(Problem, RIGHT):
        for name in ("q", "k", "v", "k_new", "v_new", "x", "w0", "w1"):
            if name in problem.places:
                numbers = (ctypes.c_float * (1 << 16)).from_address(problem.places[name])
                numbers[:] = [1 + i % 7 for i in range(len(numbers))]
        assert call(library, problem.arguments()) == 0 and written(problem), problem.name
        for field, place, kind in problem.fields():
            for value in problem.hostile(kind, problem.value(field, place)):
                if value == problem.value(field, place):
                    continue
                arguments = problem.arguments()
                problem.change(arguments, field, place, value)
                what = (problem.name, field, place, value)
                print(what, flush=True)  # the last one is the one that crashed
                status, harmless = call(library, arguments), problem.harmless(field, value)
                assert status == (0 if harmless else 1), (*what, status)
                assert written(problem) == harmless, what
        assert call(library, problem.arguments()) == 0 and written(problem), problem.name
    for function in (library.kvattn_attend, library.kvattn_quantize, library.kvattn_linear, library.kvattn_select):
        assert function(None) == 1
    here = memory(4096)
    wrong = [(None, 8, 1), (here + 1, 8, 1), (here, -1, 1), (here, -(2**63), 1), (here, 2**62, 1), (here, 8, 0)]
    for data, size, threads in wrong:
        assert library.kvattn_read_bytes(POINTER(data), I64(size), I32(threads)) == 0


def mutations(library: ctypes.CDLL, seed: int, count: int = 20_000) -> None:
    """Up to four fields at once, hostile or small: whatever comes of it, the process lives."""
    chance, statuses = random.Random(seed), {0: 0, 1: 0}
    problems = [Problem(name) for name in RIGHT]
    for _ in range(count):
        problem = chance.choice(problems)
        arguments = problem.arguments()
        changed = []
        for field, place, kind in chance.sample(list(problem.fields()), chance.randint(1, 4)):
            small = [] if kind in (POINTER, F32) else [1, 2, 3, 5, 8]
            if kind is I64 and place is None and field != "head_dim":
                small += [32, 64]
            values = problem.hostile(kind, problem.value(field, place)) + small
            if values:
                changed.append((field, place, chance.choice(values)))
                problem.change(arguments, *changed[-1])
        print((problem.name, changed), flush=True)
        statuses[call(library, arguments)] += 1  # KeyError for another
    assert all(call(library, problem.arguments()) == 0 for problem in problems)
    assert min(statuses.values()) > count / 50, statuses


def run(*arguments: str) -> None:
    from hf_kvattn.kernels import native

    library = next(path for path in native._candidates() if path.exists())
    done = subprocess.run([sys.executable, __file__, str(library), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout[-300:], done.stderr[-3000:])


def test_a_change_of_one_field_is_refused_or_harmless():
    run()


def test_changes_of_several_fields_do_not_crash():
    run("1")


def test_the_structs_here_are_those_of_the_library():
    from hf_kvattn.kernels import native

    library = native._library()
    assert ctypes.sizeof(Attend) == library.kvattn_sizeof_attend_args() == native._ARGS.size + native._PACKED_ARGS.size
    assert ctypes.sizeof(Quantize) == library.kvattn_sizeof_quantize_args() == native._QUANTIZE_ARGS.size
    assert ctypes.sizeof(Linear) == library.kvattn_sizeof_linear_args() == native._LINEAR_ARGS.size


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = ctypes.CDLL(sys.argv[1])
    loaded.kvattn_read_bytes.restype = ctypes.c_uint64
    loaded.kvattn_select.argtypes = [ctypes.c_char_p]
    mutations(loaded, int(sys.argv[2])) if len(sys.argv) > 2 else table(loaded)
