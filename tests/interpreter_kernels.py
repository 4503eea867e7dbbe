"""A child process that does bf16 arithmetic in Triton's interpreter: ``python ... shim|plain``.

Prints one line for each operation: its name and ``same`` or how it differs from torch's result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import interpreter

interpreter.switch_on()
if sys.argv[1:] == ["shim"]:
    interpreter.install()

import torch  # noqa: E402  (may import triton)
import triton  # noqa: E402  (only now does it define interpreted functions)
import triton.language as tl  # noqa: E402  (as triton)
from torch import Tensor  # noqa: E402  (as torch)

SIZE = 4096


@triton.jit
def _square(x):
    return x * x


@triton.jit
def _kernel(x_ptr, y_ptr, z_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    z = tl.load(z_ptr + offs)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "chain":
        out = _square(x + y) * y + 1.5
    elif OP == "negate":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "less":
        out = tl.where(x < y, x, y)
    elif OP == "loop":
        out = x
        for _ in range(0, 3):
            out += y
    elif OP == "fma":
        out = tl.fma(x, y, z)
    elif OP == "integer":
        out = offs.to(tl.bfloat16)
    else:
        out = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, out)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, OP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * COLS + tl.arange(0, COLS)[None, :])
    out = tl.sum(x, axis=1) if OP == "sum" else tl.max(x, axis=1)
    tl.store(out_ptr + rows, out)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    square = i[:, None] * SIZE + i[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    acc = tl.dot(tl.load(x_ptr + square), tl.load(y_ptr + square), acc)
    tl.store(out_ptr + square, acc)


def difference(got: Tensor, want: Tensor) -> str:
    """``same`` if the bits agree, where any NaN is like any other."""
    assert got.dtype == want.dtype
    integer = torch.int16 if got.element_size() == 2 else torch.int32
    wrong = (got.view(integer) != want.view(integer)) & ~(got.isnan() & want.isnan())
    if not wrong.any():
        return "same"
    first = int(wrong.flatten().nonzero()[0])
    pair = f"{float(got.flatten()[first])}, torch has {float(want.flatten()[first])}"
    return f"differs at {int(wrong.sum())} of {got.numel()}: first {pair}"


def report(name: str, got: Tensor, want: Tensor) -> None:
    print(f"{name}: {difference(got, want)}")


def patterns(bits: int, seed: int) -> Tensor:
    """Numbers of every kind: random bits, with zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    low, high, kind = {
        16: (-(2**15), 2**15, torch.int16),
        32: (-(2**31), 2**31, torch.int32),
    }[bits]
    drawn = torch.randint(low, high, (SIZE,), generator=generator, dtype=torch.int64)
    return drawn.to(kind).view(torch.bfloat16 if bits == 16 else torch.float32)


def elementwise() -> None:
    x, y = (torch.randn(SIZE).bfloat16() * 100 for _ in range(2))
    z = torch.randn(SIZE).bfloat16()
    wild, other = patterns(16, 1), patterns(16, 2)
    expected: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "chain": lambda a, b: (a + b) * (a + b) * b + 1.5,
        "negate": lambda a, b: 0 - a,
        "abs": lambda a, b: a.abs(),
        "less": lambda a, b: torch.where(a < b, a, b),
        "loop": lambda a, b: a + b + b + b,
        "fma": lambda a, b: (a.double() * b.double() + z.double()).float().bfloat16(),
        "integer": lambda a, b: torch.arange(SIZE).bfloat16(),
    }
    for name, function in expected.items():
        for label, a, b in (("", x, y), (" of any bits", wild, other)):
            if label and name in ("fma", "integer"):
                continue
            out = torch.empty_like(a)
            _kernel[(4,)](a, b, z, out, name, SIZE // 4)
            report(name + label, out, function(a, b))


def casts() -> None:
    wide, narrow = patterns(32, 3), patterns(16, 4)
    ties = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, -3.4e38, 1e-40, -0.0]).repeat(SIZE)
    for name, x, dtype in (
        ("fp32 to bf16", wide, torch.bfloat16),
        ("ties to even", ties[:SIZE], torch.bfloat16),
        ("fp16 to bf16", torch.randn(SIZE).half(), torch.bfloat16),
        ("bf16 to fp32", narrow, torch.float32),
        ("bf16 to fp16", torch.randn(SIZE).bfloat16(), torch.float16),
    ):
        out = torch.empty(SIZE, dtype=dtype)
        _kernel[(4,)](x, x, x, out, "cast", SIZE // 4)
        report(name, out, x.to(dtype))


def reductions() -> None:
    x = torch.randint(-9, 9, (64, 64)).bfloat16()
    for name, want in (("sum", x.float().sum(1).bfloat16()), ("max", x.amax(1))):
        out = torch.empty(64, dtype=torch.bfloat16)
        _reduce_kernel[(1,)](x, out, name, 64, 64)
        report(name, out, want)


def dots() -> None:
    out = torch.empty(32, 32)
    x, y = (torch.randint(-9, 9, (32, 32)).bfloat16() for _ in range(2))
    _dot_kernel[(1,)](x, y, out, 32)
    report("dot", out, x.float() @ y.float())


if __name__ == "__main__":
    torch.manual_seed(0)
    print("triton", triton.__version__)
    for part in (elementwise, casts, reductions, dots):
        try:
            part()
        except Exception as error:  # without the shim some operations do not even run
            print(f"{part.__name__}: raised {type(error).__name__}")
