"""The CUDA depthwise kernels: their walk on the host, everywhere, and the kernels on a GPU.

The walk (``csrc/cuda/walk.h``) runs the kernels' own code and raises where an
element of a result is not written exactly once, or where anything outside the operands is read; its
numbers are held to the tolerance rule.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import shapes
import torch
from cases import CASES
from memory import with_layout
from numerics import Case, assert_equal, assert_kernel_close, check_operator, round_all
from shapes import Row
from torch import Tensor

from emo_kernels import _C, cuda, reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HAS_GPU = torch.cuda.is_available() and _C.build_info()["cuda"]
ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else []
on_both = pytest.mark.parametrize("device", [pytest.param("cpu", id="walk"), *ON_GPU])
ROWS = [row for row in shapes.VIEWS["depthwise_conv2d"]() if not row.slow]
# Pairs of channels and single ones, both strides, k 3, 5 and others, dilation, no pixel at all.
FEW = shapes.rows(
    "odd_c21_m31",
    "stride_2_8x15_k5",
    "stride_2_13x9",
    "dilated",
    "narrow_31x2_k5",
    "kernel_7",
    "stride_3_8x11",
    "1m_stage4_20x20",
    "batch_0_conv",
)


class _Convolve(torch.autograd.Function):
    """The kernels as a differentiable function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, options: dict[str, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        return cuda.depthwise_conv2d(x, weight, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        grads = iter(cuda.depthwise_conv2d_backward(grad, x, weight, needed=needed, **ctx.options))
        return (*(next(grads) if n else None for n in needed), None)


def convolve(x: Tensor, weight: Tensor, **options: int) -> Tensor:
    return _Convolve.apply(x, weight, options)


def case_of(row: Row) -> Case:
    return CASES["depthwise_conv2d"](row)


def inputs(row: Row, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, int]]:
    case = case_of(row)
    rounded = round_all(case.tensors, dtype)
    assert rounded["x"] is not None and rounded["weight"] is not None
    return rounded["x"], rounded["weight"], case.options


def random(shape: Any, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def moved(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(device) for t in tensors]


def close(actual: Tensor, want: Tensor, eager: Tensor, dtype: torch.dtype, name: str) -> None:
    def fallback() -> Tensor:
        return want.to(dtype)

    assert_kernel_close(actual, want, eager, dtype, name=name, gradient=True, fallback=fallback)


# ------------------------------------------------------------------------------------ the contract


# fp16 differs from bf16 in the conversions alone.
@on_both
@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row}-{dtype}")
        for row in ROWS
        for dtype in DTYPES
        if dtype != "fp16" or row in FEW
    ],
)
def test_output_and_gradients(device: str, row: Row, dtype: str) -> None:
    check_operator(
        convolve,
        reference.depthwise_conv2d,
        case_of(row),
        DTYPES[dtype],
        oracle=oracle.depthwise_conv2d,
        device=device,
        name="depthwise_conv2d",
    )


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [r for r in FEW if r.n], ids=str)
@pytest.mark.parametrize("pivot", [False, True], ids=["no_pivot", "pivot"])
def test_statistics_are_of_the_stored_output(
    device: str, row: Row, dtype: str, pivot: bool
) -> None:
    x, weight, options = inputs(row, DTYPES[dtype])
    around = random((row.m,), torch.float32, 3) if pivot else None
    arguments = moved(device, x, weight, around)
    y, sums = cuda.depthwise_conv2d_statistics(*arguments, **options)
    assert torch.equal(y, cuda.depthwise_conv2d(*arguments[:2], **options))
    want = reference.depthwise_conv2d_statistics(x, weight, around, **options)[1]
    # Of the y that is there: the reference's differs in the last bit here and there.
    mean = torch.zeros(row.m) if around is None else around
    deviation = (y.cpu().double() - mean.double().reshape(-1, 1, 1)).transpose(0, 1).flatten(1)
    exact = torch.stack([deviation.sum(1), deviation.square().sum(1)])
    # In fp32, a thread sums deviations from one value of the map, at most twice the largest.
    largest = 2 * deviation.abs().amax(1)
    scale = deviation.shape[1] * torch.stack([largest, largest.square()])
    assert sums.dtype == torch.float64 and sums.shape == want.shape
    assert ((sums.cpu() - exact).abs() <= 1e-6 * scale).all()


@on_both
def test_statistics_far_from_the_pivot_do_not_cancel(device: str) -> None:
    row = shapes.rows("5m_stage3")[0]
    weight = torch.zeros(row.m, 1, 5, 5)
    weight[:, :, 2, 2] = 1
    x = 1000 + random((2, row.m, 14, 14), torch.float32, 1)
    args = moved(device, x, weight, torch.zeros(row.m))
    _, sums = cuda.depthwise_conv2d_statistics(*args, stride=1, padding=2, dilation=1)
    mean, square = sums.cpu() / (2 * 14 * 14)
    variance = x.double().var((0, 2, 3), correction=0)
    assert ((square - mean.square() - variance).abs() <= 2e-5 * variance).all()


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [r for r in FEW if r.n], ids=str)
def test_backward_behind_a_batch_norm(device: str, row: Row, dtype: str) -> None:
    """dy = c1 grad + c2 (y - mean) + c3 is formed on the way; local_grad is added."""
    kind = DTYPES[dtype]
    x, weight, options = inputs(row, kind)
    y = reference.depthwise_conv2d(x.double(), weight.double(), **options).to(kind)
    grad, local = random(y.shape, kind, 4), random(x.shape, kind, 5)
    coefficients = random((4, row.m), torch.float32, 6)
    tensors = (grad, x, weight, y, coefficients, local)
    got = cuda.depthwise_conv2d_backward(*moved(device, *tensors), needed=(True, True), **options)
    # The yardstick rounds dy, as a map between two kernels would be.
    eager = reference.depthwise_conv2d_backward(*tensors, needed=(True, True), **options)
    exact = [t.double() for t in tensors]
    want = reference.depthwise_conv2d_backward(*exact, needed=(True, True), **options)
    for name, *values in zip(("dx", "dweight"), got, want, eager, strict=True):
        close(*values, kind, name)
    for i, needed in enumerate(((True, False), (False, True))):
        (alone,) = cuda.depthwise_conv2d_backward(
            *moved(device, *tensors), needed=needed, **options
        )
        assert torch.equal(alone, got[i]) or i == 1  # sums of taps are in another order
        close(alone, want[i], eager[i], kind, ("dx", "dweight")[i])


@on_both
@pytest.mark.parametrize("row", [r for r in FEW if r.n], ids=str)
def test_integers_are_exact(device: str, row: Row) -> None:
    """In bf16 too: no sum is rounded before it is whole."""
    generator = torch.Generator().manual_seed(2)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(torch.bfloat16)

    x, weight = integers(row.n, row.m, row.h, row.w), integers(row.m, 1, row.kernel, row.kernel)
    options = case_of(row).options
    on_device = moved(device, x, weight)
    y, sums = cuda.depthwise_conv2d_statistics(*on_device, None, **options)
    want = oracle.depthwise_conv2d(x.double(), weight.double(), **options)
    assert_equal(y, want, name="y")
    assert torch.equal(sums.cpu()[0], want.sum((0, 2, 3)))
    assert torch.equal(sums.cpu()[1], want.square().sum((0, 2, 3)))
    grad = torch.where(random(want.shape, torch.float32, 8) > 2, 1.0, 0.0).to(torch.bfloat16)
    got = cuda.depthwise_conv2d_backward(
        *moved(device, grad), *on_device, needed=(True, True), **options
    )
    exact = reference.depthwise_conv2d_backward(
        grad.double(), x.double(), weight.double(), needed=(True, True), **options
    )
    for name, a, b in zip(("dx", "dweight"), got, exact, strict=True):
        assert torch.equal(a.cpu().double(), b.to(torch.bfloat16).double()), name


# ------------------------------------------------------------------------- what tiles must not show


@on_both
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_blocks_that_walk_several_units(device: str, dtype: str) -> None:
    """So many channels that a block of threads takes one piece of the map after the other."""
    c, kind = 12800, DTYPES[dtype]
    x, weight = random((90, c, 2, 2), kind, 1), random((c, 1, 3, 3), kind, 2)
    options = {"stride": 1, "padding": 1, "dilation": 1}
    y, _ = cuda.depthwise_conv2d_statistics(*moved(device, x, weight, None), **options)
    want = oracle.depthwise_conv2d(x.double(), weight.double(), **options)
    close(y, want, reference.depthwise_conv2d(x, weight, **options), kind, "y")
    x, grad = x[:24], random((24, c, 2, 2), kind, 3)
    got = cuda.depthwise_conv2d_backward(
        *moved(device, grad, x, weight), needed=(True, True), **options
    )
    tensors = (grad, x, weight)
    eager = reference.depthwise_conv2d_backward(*tensors, needed=(True, True), **options)
    exact = reference.depthwise_conv2d_backward(
        *(t.double() for t in tensors), needed=(True, True), **options
    )
    for name, *values in zip(("dx", "dweight"), got, exact, eager, strict=True):
        close(*values, kind, name)


@on_both
@pytest.mark.parametrize("row", [r for r in FEW if r.n], ids=str)
def test_repeats_and_batches_agree_to_the_bit(device: str, row: Row) -> None:
    x, weight, options = inputs(row, torch.bfloat16)
    x = torch.cat([x, x.flip(0) * 0.5, x])
    x, weight = moved(device, x, weight)
    first, again = (cuda.depthwise_conv2d_statistics(x, weight, None, **options) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    pieces = [cuda.depthwise_conv2d(part, weight, **options) for part in (x[:1], x[1:])]
    assert torch.equal(torch.cat(pieces), first[0])
    grads = [
        cuda.depthwise_conv2d_backward(first[0], x, weight, needed=(True, True), **options)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@on_both
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "offset"])
@pytest.mark.parametrize("row", shapes.rows("dilated", "narrow_31x2_k5"), ids=str)
def test_maps_of_any_layout(device: str, row: Row, layout: str) -> None:
    """Slices begin where two channels cannot be read at once: then one is."""
    case = case_of(row)
    x, weight, options = inputs(row, torch.bfloat16)
    y = cuda.depthwise_conv2d(with_layout(x.to(device), layout), weight.to(device), **options)
    assert torch.equal(y, cuda.depthwise_conv2d(*moved(device, x, weight), **case.options))


def test_a_map_at_an_odd_address() -> None:
    x, weight, options = inputs(shapes.rows("dilated")[0], torch.bfloat16)
    n, c, h, w = x.shape
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    view = storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    view.copy_(x)
    assert view.data_ptr() % 4 == 2
    got = cuda.depthwise_conv2d(view, weight, **options)
    want = oracle.depthwise_conv2d(x.double(), weight.double(), **options)
    close(got, want, reference.depthwise_conv2d(x, weight, **options), x.dtype, "y")


def test_weights_and_norms_of_another_dtype_than_the_maps() -> None:
    """As under autocast: fp32 weights stay fp32, and so does their gradient."""
    row = shapes.rows("stride_2_13x9")[0]
    x, _, options = inputs(row, torch.bfloat16)
    weight = random((row.m, 1, 3, 3), torch.float32, 1)
    y = cuda.depthwise_conv2d(x, weight, **options)
    want = oracle.depthwise_conv2d(x.double(), weight.double(), **options)
    assert torch.equal(y, want.float().to(torch.bfloat16)) or float(
        (y.double() - want).abs().max()
    ) <= 2**-8 * float(want.abs().max())
    grad = random(y.shape, torch.bfloat16, 2)
    for kind in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        rows = torch.tensor([[0.5], [0.25], [1.0], [2.0]]).expand(4, row.m).to(kind)
        dx, dweight = cuda.depthwise_conv2d_backward(
            grad, x, weight, y, rows, needed=(True, True), **options
        )
        dy = (0.5 * grad.double() + 0.25 * (y.double() - 2.0)) + 1.0
        exact = reference.depthwise_conv2d_backward(
            dy, x.double(), weight.double(), needed=(True, True), **options
        )
        assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32
        assert float((dweight - exact[1]).norm()) <= 1e-6 * float(exact[1].norm())


def test_the_gradient_has_the_strides_of_its_weight() -> None:
    row = shapes.rows("odd_c21_m31")[0]
    x, weight, options = inputs(row, torch.float32)
    backwards = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    grad = torch.ones_like(cuda.depthwise_conv2d(x, weight, **options))
    (plain,) = cuda.depthwise_conv2d_backward(grad, x, weight, needed=(False, True), **options)
    (got,) = cuda.depthwise_conv2d_backward(grad, x, backwards, needed=(False, True), **options)
    assert got.stride() == backwards.stride() and torch.equal(got, plain)


# ------------------------------------------------------------------------------------------ limits


def test_what_the_kernels_do_not_take() -> None:
    x, weight = torch.empty(1, 4, 5, 5), torch.empty(4, 1, 3, 3)
    options = {"stride": 1, "padding": 1, "dilation": 1}
    unsupported = cuda.depthwise_conv2d_unsupported
    assert unsupported(x, weight, **options) is None
    reason = unsupported(x.double(), weight.double(), **options)
    assert reason == "the CUDA kernels take float32, float16 and bfloat16, got torch.float64"
    reason = unsupported(x, weight, **{**options, "padding": 2**24})
    assert reason == "the CUDA kernels take sizes below 2**24, got 16777216"


def test_a_launch_without_a_gpu_names_its_kernel() -> None:
    """An error of the runtime, or of a build without it; never a crash."""
    if torch.cuda.is_available():
        pytest.skip("the launch would succeed: there is a GPU")
    x = torch.zeros(1, 1, 1, 2)
    at = (x.data_ptr(), (x.data_ptr(), 0), (0, 0), x.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="depthwise_conv2d"):
        _C.cuda_depthwise_conv2d(0, at, (1, 2, 1, 1, 1, 1, 0, 1), 0, 0, 0)
