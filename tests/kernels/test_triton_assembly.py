"""The PTX that Triton's kernels unpack codes with, run by an emulator of the few instructions in it.

Triton's interpreter takes another way, and what is compiled runs nowhere without a GPU: before that, nothing else holds
this text against the formula. An instruction runs on all cases at once; an fma is exact, and rounded once.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re

import pytest
import torch

pytest.importorskip("triton")

from hf_kvattn.kernels.triton import attention, attention_kernels
from hf_kvattn.quant import few_bits

DTYPES = (torch.float16, torch.bfloat16)
SCALES, ZEROS = (1.0, 0.0173, 0.3125, 37.25, -0.6), (0.0, -1.71875, 0.0371, 240.0)
MASK = 0xFFFFFFFF


def fma(a, b, c, dtype: torch.dtype) -> torch.Tensor:
    """float64 `a * b + c` of numbers of `dtype`, rounded to it once, half to even. torch rounds to float32 before."""
    product = a * b  # exact: 22 bits
    total = product + c
    high = total - product
    assert not ((product - (total - high)) + (c - high)).any(), "float64 does not hold this sum"
    info = torch.finfo(dtype)
    exponent = torch.frexp(total).exponent - 1
    least = math.frexp(info.smallest_normal)[1] - 1
    unit = torch.ldexp(torch.full_like(total, info.eps), exponent.clamp(min=least))
    return torch.round(total / unit) * unit


def number(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 numbers, of the low 16 bits of each."""
    return (bits & 0xFFFF).to(torch.uint16).view(dtype).double()


def bits_of(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return numbers.to(dtype).view(torch.int16).long() & 0xFFFF


def fma_x2(dtype: torch.dtype):
    def run(*given: torch.Tensor) -> torch.Tensor:
        low, high = (bits_of(fma(*(number(x >> shift, dtype) for x in given), dtype), dtype) for shift in (0, 16))
        return high << 16 | low

    return run


def lop3(a, b, c, table) -> torch.Tensor:
    out = a * 0
    for i, (x, y, z) in enumerate(itertools.product((~a, a), (~b, b), (~c, c))):
        out = out | (x & y & z & MASK) * (table >> i & 1)
    return out


def prmt(a, b, pick) -> torch.Tensor:
    """Four of the eight bytes of `a` and `b`, each named by four bits of `pick`."""
    out = a * 0
    for i in range(4):
        which = pick >> 4 * i & 0xF
        assert not (which > 7).any(), "this would repeat a sign"
        out = out | (torch.where(which < 4, a, b) >> 8 * (which & 3) & 0xFF) << 8 * i
    return out


def funnel(low, high, n) -> torch.Tensor:
    """The high half of `n` bits more, of 64 bits: in two parts, since int64 has a sign."""
    return (high << n | low >> 32 - n) & MASK


INSTRUCTIONS = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & MASK,
    "shf.l.wrap.b32": lambda low, high, n: funnel(low, high, n & 31),
    "shf.r.wrap.b32": lambda low, high, n: (high << 32 | low) >> (n & 31) & MASK,
    "and.b32": lambda a, b: a & b,
    "sub.u32": lambda a, b: a - b & MASK,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "fma.rn.f16x2": fma_x2(torch.float16),
    "fma.rn.bf16x2": fma_x2(torch.bfloat16),
    "setp.ne.u32": lambda a, b: (a != b).long(),
    "selp.b32": lambda a, b, chosen: torch.where(chosen != 0, a, b),
}


def run(text: str, operands: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the registers hold after `text`; an instruction or a register that is not known raises."""
    assert text[0] == "{" and text[-2:] == ";}"
    values, declared = dict(operands), set()

    def get(name: str) -> torch.Tensor:
        return values[name] if name in values else torch.tensor(int(name, 0) & MASK)

    def put(name: str, value: torch.Tensor) -> None:
        assert name in declared or name in ("$0", "$1") and name not in operands, f"{name} is no register to write"
        values[name] = value

    for statement in text[1:-2].split(";"):
        name, rest = statement.split(None, 1)
        if name == ".reg":
            declared |= set(rest.split(None, 1)[1].replace(" ", "").split(","))
        elif name == "mov.b64":  # two registers of 32 bits from one of 64
            low, high, whole = re.findall(r"[\w$]+", rest)
            put(low, get(whole) & MASK)
            put(high, get(whole) >> 32 & MASK)
        else:
            to, *given = (each.strip() for each in rest.split(","))
            put(to, INSTRUCTIONS[name](*map(get, given)))
    return values


def pair(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return high << 16 | low


def wrong(text: str, bits: int, dtype: torch.dtype) -> list[tuple]:
    """Where a text gives another number than `(code - middle) * scale`, rounded once: token, code, its number, right.

    Each code stands in each lane, with each scale, among other codes of other tokens.
    """
    lanes = 4 if bits in (2, 3) else 2
    own, s = torch.cartesian_prod(torch.arange(2**bits), torch.arange(len(SCALES))).T[:, :, None]
    code = (own + 3 * torch.arange(lanes)) % 2**bits  # (cases, lanes)
    scale = bits_of(torch.tensor(SCALES)[(s + torch.arange(lanes)) % len(SCALES)], dtype)
    middle = 128 if bits == 8 else (2**bits - 1) / 2
    expected = fma(code - middle, number(scale, dtype), torch.zeros(code.shape, dtype=torch.double), dtype)
    found = []
    for token in range(4):
        words = torch.randint(0, 2**bits, (*code.shape, 4), generator=torch.Generator().manual_seed(token))
        words[..., token] = code
        # As `dequantize` gives them: as many elements of an argument in a register as fit.
        if bits == 8:
            given = [*in_registers(words, 8, 1), *pairs_of(scale), *[0x4400 + 0x1111 * token] * 2]
        elif bits == 3:
            given = [*in_registers(words & 3, 2, 4), halves(words >> 2), *pairs_of(scale), *[token] * 4]
        else:
            given = [*in_registers(words, bits, 8 // bits * 2 if bits == 2 else 2), *pairs_of(scale), *[token] * lanes]
        found += differences(text, lanes, given, expected, code, token, dtype)
    return found


def wrong_key(text: str, width: int, dtype: torch.dtype) -> list[tuple]:
    """As `wrong`, of keys by channel: `(code - half the number of codes) * scale + zero`, rounded once."""
    grid = torch.cartesian_prod(torch.arange(2**width), torch.arange(len(SCALES)), torch.arange(len(ZEROS)))
    own, s, z = grid.T[:, :, None]
    code = (own + 3 * torch.arange(4)) % 2**width
    scale = bits_of(torch.tensor(SCALES)[(s + torch.arange(4)) % len(SCALES)], dtype)
    zero = bits_of(torch.tensor(ZEROS)[(z + torch.arange(4)) % len(ZEROS)], dtype)
    expected = fma((code - (1 << width >> 1)).double(), number(scale, dtype), number(zero, dtype), dtype)
    found = []
    for token in range(4):
        words = torch.randint(0, 2**width, (*code.shape, 4), generator=torch.Generator().manual_seed(token))
        words[..., token] = code
        planes = [words & 15 if width & 4 else words * 0, words >> (width & 4) & 3 if width & 2 else words * 0,
                  words >> (width & 6) & 1 if width & 1 else words * 0]  # fmt: skip
        given = [*in_registers(planes[0], 4, 2), *in_registers(planes[1], 2, 4), halves(planes[2])]
        given += [width * 0x01010101, *pairs_of(scale), *pairs_of(zero), *[token] * 4]
        found += differences(text, 4, given, expected, code, token, dtype)
    return found


def in_registers(words: torch.Tensor, bits: int, each: int) -> list[torch.Tensor]:
    """Words of four codes `(cases, lanes, 4)` of `bits`, `each` of them in a register."""
    packed = (words << bits * torch.arange(4)).sum(-1)
    return [sum(word << 4 * bits * i for i, word in enumerate(part.T)) for part in packed.split(each, 1)]


def halves(words: torch.Tensor) -> torch.Tensor:
    """Words of four codes of one bit, of four lanes: two share a byte, and that stands there twice."""
    first, second = in_registers(words, 1, 2)
    return first * 0x101 | second * 0x1010000


def differences(text, lanes, given, expected, code, token, dtype) -> list[tuple]:
    values = run(text, {f"${i}": torch.as_tensor(each) for i, each in enumerate(given, lanes // 2)})
    made = torch.stack([number(values[f"${i // 2}"] >> 16 * (i % 2), dtype) for i in range(lanes)], 1)
    return [
        (token, code[case, lane].item(), made[case, lane].item(), expected[case, lane].item())
        for case, lane in (made != expected).nonzero().tolist()
    ]


def pairs_of(numbers: torch.Tensor) -> list[torch.Tensor]:
    """The registers that hold numbers `(cases, lanes)`, two each."""
    return [pair(*numbers[:, i : i + 2].T) for i in range(0, numbers.shape[1], 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_are_dequantized_with_one_rounding(bits, dtype):
    assert not wrong(attention.ASSEMBLY[bits, dtype], bits, dtype)[:5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", range(8))
def test_keys_of_every_width_are_dequantized_with_one_rounding(width, dtype):
    assert not wrong_key(attention.ASSEMBLY[attention.BY_CHANNEL, dtype], width, dtype)[:5]


# A part of a text, and what it is by mistake.
BUGS: dict[int, list[tuple[str, str]]] = {
    8: [("prmt.b32 a, $1, $2", "prmt.b32 a, $2, $1"), ("$1, $2, $4", "$1, $2, 21760"), ("a, $3, none", "a, $3, a")],
    4: [("shl.b32 s, $3, 2", "shl.b32 s, $3, 1"), (f"{0x001E001E}", f"{0x000E001E}"), ("a, $2, none", "a, $2, a")],
    3: [("s, 1, s", "s, 2, s"), ("0x06060606", "0x02060606"), ("s, 3, $6", "s, 2, $6"), ("0x0f000f00", "0x0f0f0f00")],
    2: [("s, 1, s", "s, 1, 1"), (f"{0x00060006}", f"{0x00020006}"), (f"{0x3322}", f"{0x2233}")],
    attention.BY_CHANNEL: [
        ("shf.l.wrap.b32 m, m, m, s;", ""), ("shf.l.wrap.b32 n, n, n, s;", ""), ("shf.l.wrap.b32 a, a, a, s;", ""),
        ("and.b32 s, $6, 6", "and.b32 s, $6, 2"), ("shl.b32 s, $11, 1", "shl.b32 s, $11, 0"), ("0x6420", "0x4620"),
        ("shr.u32 a, a, 1;", ""), ("a, $7, $9", "a, $7, none"), ("a, $8, $10", "a, $8, $9"), ("n, $11;", "n, 1;"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "right", "mistake"), [(bits, *bug) for bits in BUGS for bug in BUGS[bits]])
def test_a_mistake_in_the_text_is_found(bits, right, mistake, dtype):
    text = attention.ASSEMBLY[bits, dtype]
    assert right in text
    text = text.replace(right, mistake, 1)
    assert wrong(text, bits, dtype) if bits else any(wrong_key(text, width, dtype) for width in range(8))


def test_scales_of_a_token_are_taken_out_of_a_word_of_four():
    """The text in `_spread`: of two words of 64 bits, one of the four numbers of 16 bits in each."""
    source = inspect.getsource(attention_kernels._spread.fn)
    text, of_bytes = re.findall(r'"(\{.reg[^"]*(?:"\n *"[^"]*)*\})"', source)
    text, of_bytes = (re.sub(r'"\n *"', "", each) for each in (text, of_bytes))
    numbers = torch.tensor([[0x1111, 0x2222, 0x3333, 0x7444], [0x1AAA, 0x2BBB, 0xCCCC, 0x6DDD]])
    words = (numbers << 16 * torch.arange(4)).sum(-1)
    for token in range(4):
        given = [*words, *[token // 2] * 2, *[0x5410 + token % 2 * 0x2222] * 2]
        values = run(text, {f"${i}": torch.as_tensor(each) for i, each in enumerate(given, 1)})
        assert values["$0"] == pair(*numbers[:, token])
    codes = torch.tensor([[8, 0x55, 0x9C, 255], [0, 0x7F, 0xE1, 0x10]])
    words = (codes << 8 * torch.arange(4)).sum(-1)
    for token in range(4):
        given = [*words, *[0x4400 + 0x1111 * token] * 2]
        values = run(of_bytes, {f"${i}": torch.as_tensor(each) for i, each in enumerate(given, 1)})
        right = bits_of(few_bits.scales_of(codes[:, token].to(torch.uint8)), torch.bfloat16)
        assert values["$0"] == pair(*right)
