"""The rule itself: honest rounding passes, planted errors do not, and memory tools bite."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import memory
import pytest
import torch
import torch.nn.functional as F
from numerics import (
    UNIT_ROUNDOFF,
    Case,
    Layouts,
    MeaninglessToleranceError,
    assert_equal,
    assert_kernel_close,
    assert_structural_zero,
    check_operator,
)
from torch import Tensor

LOW = [torch.float32, torch.bfloat16, torch.float16]
ALL = [*LOW, torch.float64]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# A stand-in for an operator: layer norm, 1x1 convolution, GELU.
def plain(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    pixels = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=eps)
    return F.gelu(F.conv2d(pixels.permute(0, 3, 1, 2), weight, bias))


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An honest kernel: another order of operations, at least fp32 inside, one rounding."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    h, w = x.to(wide), weight.to(wide).flatten(1)
    h = h - h.mean(1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6)
    u = torch.einsum("mc,nchw->nmhw", w, h) + bias.to(wide).reshape(-1, 1, 1)
    return (u * 0.5 * (1 + torch.erf(u * 0.5**0.5))).to(x.dtype)


def case() -> Case:
    x = normal(2, 21, 5, 4)
    return Case({"x": x, "weight": normal(34, 21, 1, 1, seed=1) / 4, "bias": normal(34, seed=2)})


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_an_honest_kernel_passes(dtype: torch.dtype) -> None:
    comparisons = check_operator(fused, plain, case(), dtype)
    assert [c.name for c in comparisons] == [
        f"operator: {n}" for n in ("out", "x", "weight", "bias")
    ]
    if dtype != torch.float64:
        assert all(c.l2 > 0 for c in comparisons)


def wrong_eps(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain(x, weight, bias, eps=1e-5)


def tanh_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=1e-6).permute(0, 3, 1, 2)
    return F.gelu(F.conv2d(h, weight, bias), approximate="tanh")


def unbiased_variance(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.var(1, keepdim=True) + 1e-6)
    return F.gelu(F.conv2d(h, weight, bias))


def lost_tail(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mask = torch.ones_like(weight)
    mask[:, -1] = 0  # the last of 21 channels
    return plain(x, weight * mask, bias)


def bf16_inside(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=1e-6).permute(0, 3, 1, 2)
    return plain(h.bfloat16().to(x.dtype), weight, bias)


def no_bias_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return plain(x, weight, bias.detach() + 0 * bias)


def one_element(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = plain(x, weight, bias)
    bump = torch.zeros_like(out)
    bump[1, 33, 4, 3] = 64 * max(UNIT_ROUNDOFF[x.dtype], 1e-12) * float(out.detach().abs().max())
    return out + bump


PLANTED = [tanh_gelu, unbiased_variance, lost_tail, no_bias_gradient, wrong_eps, bf16_inside]


@pytest.mark.parametrize("planted", [*PLANTED, one_element])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_planted_error_fails(planted: Callable[..., Tensor], dtype: torch.dtype) -> None:
    wrong = case()
    if planted is wrong_eps:  # only visible where the variance is small, as after a weak input
        wrong.tensors["x"] = normal(2, 21, 5, 4) * 1e-2
    with pytest.raises(AssertionError, match="relative L2 error"):
        check_operator(planted, plain, wrong, dtype)


@pytest.mark.parametrize("planted", [unbiased_variance, lost_tail, no_bias_gradient, one_element])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_catch_coarse_errors(
    planted: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    with pytest.raises(AssertionError, match="relative L2 error"):
        check_operator(planted, plain, case(), dtype)


def test_the_message_names_tensor_error_and_place() -> None:
    reference = normal(2, 3)
    wrong = reference.float()
    wrong[1, 2] += 1
    with pytest.raises(AssertionError, match=r"y \(torch.float32\): .* at \(1, 2\) of \(2, 3\)"):
        assert_kernel_close(wrong, reference, reference.float(), torch.float32, name="y")


def test_shape_and_dtype_are_part_of_the_rule() -> None:
    r = normal(2, 3)
    with pytest.raises(AssertionError, match="shape must be"):
        assert_kernel_close(r.float().T, r, r.float(), torch.float32, name="y")
    with pytest.raises(AssertionError, match="dtype must be"):
        assert_kernel_close(r.float(), r, r.bfloat16(), torch.bfloat16, name="y")


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_special_values_stand_where_the_oracle_has_them(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    r = torch.tensor([1.0, nan, inf, -inf, 2.0], dtype=torch.float64)
    y = r.to(dtype)
    assert_kernel_close(y, r, y, dtype, name="y")
    for index, value in [(0, nan), (0, inf), (1, 0.0), (2, nan), (2, -inf), (3, 1.0)]:
        wrong = y.clone()
        wrong[index] = value
        with pytest.raises(AssertionError, match="NaN|infinity"):
            assert_kernel_close(wrong, r, y, dtype, name="y")


def test_overflow_of_the_dtype_counts_as_infinity_of_the_oracle() -> None:
    r = torch.tensor([1.0, 1e6, 65519.0], dtype=torch.float64)  # fp16 ends at 65504
    y = torch.tensor([1.0, float("inf"), 65504.0], dtype=torch.float16)
    assert_kernel_close(y, r, r.half(), torch.float16, name="y")
    edge = torch.tensor([1.0, float("inf"), float("inf")], dtype=torch.float16)
    assert_kernel_close(edge, r, r.half(), torch.float16, name="y")


def test_a_broken_eager_gives_way_to_fp32_with_one_rounding() -> None:
    r = normal(64)
    garbage = torch.full((64,), float("nan"), dtype=torch.bfloat16)
    poor = (r * 1.5).bfloat16()
    for eager in (garbage, poor):
        assert_kernel_close(
            r.bfloat16(), r, eager, torch.bfloat16, name="y", fallback=lambda: r.float()
        )
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_kernel_close(
                (r * 1.02).bfloat16(),
                r,
                eager,
                torch.bfloat16,
                name="y",
                fallback=lambda: r.float(),
            )


def test_a_tolerance_that_accepts_anything_is_refused() -> None:
    r = normal(64)
    for eager in (r.float() * 1.2, r.float() * float("nan")):
        with pytest.raises(MeaninglessToleranceError):
            assert_kernel_close(r.float(), r, eager, torch.float32, name="y")


def test_zero_and_empty_references() -> None:
    zero = torch.zeros(5, dtype=torch.float64)
    assert_kernel_close(zero.float(), zero, zero.float(), torch.float32, name="y")
    with pytest.raises(AssertionError):
        assert_kernel_close(zero.float() + 1e-30, zero, zero.float(), torch.float32, name="y")
    empty = torch.empty(0, 3, dtype=torch.float64)
    assert_kernel_close(empty.float(), empty, empty.float(), torch.float32, name="y")


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_integers_must_be_equal(dtype: torch.dtype) -> None:
    r = torch.arange(-8.0, 8.0, dtype=torch.float64)
    assert_equal(r.to(dtype), r, name="y")
    wrong = r.to(dtype).clone()
    wrong[3] += 1
    with pytest.raises(AssertionError, match="1 of 16 elements differ"):
        assert_equal(wrong, r, name="y")


def test_integers_beyond_the_dtype_are_an_error_of_the_test() -> None:
    r = torch.tensor([257.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="cannot represent"):
        assert_equal(r.bfloat16(), r, name="y")


def test_structural_zeros_are_measured_against_their_neighbours() -> None:
    live = normal(100)
    assert_structural_zero(live * 1e-7, live, torch.float32, name="k half")
    assert_structural_zero(live * 4e-3, live, torch.bfloat16, name="k half")
    with pytest.raises(AssertionError, match="zero by structure"):
        assert_structural_zero(live * 1e-5, live, torch.float32, name="k half")


# ------------------------------------------------------------------------------------- memory


class _Planted(torch.autograd.Function):
    """y = 2x whose backward takes the gradient's memory for dense."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        dense = torch.as_strided(grad, (grad.shape[0],), (1,), grad.storage_offset())
        return (dense * 2).expand_as(grad) if grad.dim() == 1 else grad * 2


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_gradient_layouts_catch_a_dense_assumption(layout: str) -> None:
    x = Case({"x": normal(9)})
    check_operator(_Planted.apply_on, lambda x: x * 2, x, torch.float32)
    with pytest.raises((AssertionError, RuntimeError)):
        check_operator(
            _Planted.apply_on,
            lambda x: x * 2,
            x,
            torch.float32,
            layouts=Layouts(grad=layout),
        )


_Planted.apply_on = staticmethod(lambda x: _Planted.apply(x))


@pytest.mark.parametrize("layout", memory.VALUE_LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (0, 3, 2, 2), (6,), (4, 1, 3, 3)])
def test_layouts_keep_the_values(layout: str, shape: tuple[int, ...]) -> None:
    t = normal(*shape).bfloat16()
    assert torch.equal(memory.with_layout(t, layout), t)


def test_sliced_and_strided_inputs_lie_in_nan() -> None:
    t = normal(2, 3, 4, 5)
    for layout in ("sliced", "sliced_channels_last", "strided", "offset", "cat"):
        view = memory.with_layout(t, layout)
        storage = torch.as_strided(view, (view.untyped_storage().nbytes() // 8,), (1,), 0)
        assert storage.isnan().sum() == storage.numel() - t.numel(), layout
    assert memory.with_layout(t, "sliced").storage_offset() > 0
    assert memory.with_layout(t, "expanded").stride() == (0, 0, 0, 0)
    assert memory.with_layout(t, "channels_last").is_contiguous(memory_format=torch.channels_last)


def _unwritten_row(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:-1] = x[:-1]
    return y


@pytest.mark.parametrize("poison", memory.POISONS)
def test_poison_shows_an_unwritten_row(poison: str) -> None:
    if poison == "huge" and not sys.platform.startswith("linux"):
        pytest.skip("malloc's perturbation is glibc's")
    x = Case({"x": normal(64, 64)})
    with pytest.raises(AssertionError):
        check_operator(
            _unwritten_row, lambda x: x * 1, x, torch.float32, gradients=False, poison=poison
        )
    torch.empty(3)  # the allocator is itself again
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc's perturbation is glibc's")
def test_poison_reaches_memory_taken_without_torch() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    with memory.poisoned_memory("huge"):
        for size in (4096, 1 << 22):
            block = libc.malloc(size)
            assert ctypes.string_at(block, size) == b"\xfe" * size
            libc.free(block)


def test_borders_show_a_stray_write() -> None:
    inside = memory.Bordered((3, 4), torch.float32)
    inside.view.zero_()
    inside.assert_border_intact("y")
    inside.assert_fully_written("y")
    torch.as_strided(inside.buffer, (1,), (1,), inside.inside.stop).zero_()
    with pytest.raises(AssertionError, match=r"wrote outside its tensor at elements \[12\]"):
        inside.assert_border_intact("y")


GUARDED = """
import sys; sys.path.insert(0, {tests!r})
import ctypes, memory, torch
t = memory.guarded(torch.arange(1000.0), {side!r})
assert t.sum() == 499500
at = t.data_ptr() + ({index} * 4)
print("read", ctypes.c_float.from_address(at).value, flush=True)
"""


@pytest.mark.parametrize(
    ("side", "index", "dies"),
    [("right", 999, False), ("right", 1000, True), ("left", 0, False), ("left", -1, True)],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages use Linux's mmap")
def test_guard_pages_kill_the_first_byte_outside(side: str, index: int, dies: bool) -> None:
    code = GUARDED.format(tests=str(Path(__file__).parent), side=side, index=index)
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    if dies:
        assert child.returncode == -11 and "read" not in child.stdout
    else:
        assert child.returncode == 0 and "read" in child.stdout, child.stderr


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages use Linux's mmap")
def test_guarded_copies_keep_values_and_strides(layout: str, side: str) -> None:
    t = memory.with_layout(normal(2, 3, 5, 7).half(), layout)
    copy = memory.guarded(t, side)
    assert torch.equal(copy, t) and copy.stride() == t.stride()
