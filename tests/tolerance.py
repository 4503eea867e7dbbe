"""The tolerance rule of every backend and dtype.

The rule compares three results computed from the *same rounded* numbers: ``reference`` in fp64,
``eager`` (the plain composition in the dtype under test, contiguous) and ``actual`` (the kernel).
A kernel may be as wrong as eager, times a small factor, plus one rounding of the result:

====== ==================================== ===============================================
dtype  L2 norm of the error                 largest error
====== ==================================== ===============================================
fp32   <= 2 * eager + u * |reference|       <= 4 * eager + 2u * max|reference|
16 bit <= 1.25 * eager + u * |reference|    <= 2 * eager + 2u * max|reference|
fp64   <= 1e-12 * |reference|, gradients 1e-10
====== ==================================== ===============================================

NaN and infinity must stand exactly where the reference has them. Where eager is non-finite or
worse than 50u, fp32 arithmetic with one rounding takes its place. A tolerance that would accept a
tenth of the reference is an error of the test, not of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
FP64_OUTPUT, FP64_GRADIENT = 1e-12, 1e-10
STRUCTURAL_ZERO = {
    torch.bfloat16: 1e-2,
    torch.float16: 1e-2,
    torch.float32: 1e-6,
    torch.float64: 1e-10,
}


Tensors = Mapping[str, "Tensor | None"]


class MeaninglessToleranceError(AssertionError):
    """The yardstick is so bad that the test would accept nearly anything: choose other data."""


@dataclass(frozen=True)
class Comparison:
    """How far one tensor was from the oracle, as fractions of what the rule allows."""

    name: str
    l2: float
    l2_allowed: float
    largest: float
    largest_allowed: float

    @property
    def used(self) -> float:
        """Share of the tolerance that was used: above 1 is a failure."""
        return max(_ratio(self.l2, self.l2_allowed), _ratio(self.largest, self.largest_allowed))


def _ratio(error: float, allowed: float) -> float:
    return 0.0 if error == 0.0 else error / allowed if allowed else float("inf")


def round_to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The value in the dtype, fresh and contiguous, as every input of a test is first rounded."""
    return None if value is None else value.detach().to(dtype).clone().contiguous()


def round_all(values: Tensors, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """:func:`round_to` on every tensor of a mapping."""
    return {name: round_to(value, dtype) for name, value in values.items()}


def assert_kernel_close(
    actual: Tensor,
    reference_fp64: Tensor,
    eager: Tensor | None,
    dtype: torch.dtype,
    *,
    name: str,
    gradient: bool = False,
    fallback: Callable[[], Tensor] | None = None,
) -> Comparison:
    """Assert the tolerance rule for one tensor; see the module's docstring.

    Args:
        actual: what the kernel returned, in ``dtype``.
        reference_fp64: the oracle, computed in fp64 from inputs rounded to ``dtype``.
        eager: the plain composition in ``dtype``; not used in fp64.
        dtype: the dtype under test.
        name: of the tensor, for the message.
        gradient: whether this is a gradient (fp64 allows 1e-10 instead of 1e-12).
        fallback: computes the fp32-arithmetic result that replaces a broken ``eager``.
    """
    assert actual.dtype == dtype, f"{name}: dtype must be {dtype}, got {actual.dtype}"
    assert actual.shape == reference_fp64.shape, (
        f"{name}: shape must be {tuple(reference_fp64.shape)}, got {tuple(actual.shape)}"
    )
    assert reference_fp64.dtype == torch.float64, f"{name}: the oracle must be fp64"
    if actual.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0)
    got, want = actual.detach().cpu().double(), reference_fp64.detach().cpu()
    _assert_special_values(got, want, dtype, name)
    finite = torch.isfinite(want.to(dtype).double()) & torch.isfinite(got)
    error = torch.where(finite, got - want, 0.0)
    want = torch.where(finite, want, 0.0)
    norm, peak = float(want.norm()), float(want.abs().max())
    l2_allowed, largest_allowed = _allowed(
        want, norm, peak, finite, eager, dtype, name, gradient, fallback
    )
    comparison = Comparison(
        name, float(error.norm()), l2_allowed, float(error.abs().max()), largest_allowed
    )
    if comparison.used > 1.0:
        raise AssertionError(_message(comparison, error, norm, dtype))
    return comparison


def _allowed(
    want: Tensor,
    norm: float,
    peak: float,
    finite: Tensor,
    eager: Tensor | None,
    dtype: torch.dtype,
    name: str,
    gradient: bool,
    fallback: Callable[[], Tensor] | None,
) -> tuple[float, float]:
    """The allowed L2 norm and the allowed largest element of the error."""
    if dtype == torch.float64:
        bound = FP64_GRADIENT if gradient else FP64_OUTPUT
        return bound * norm, float("inf")
    u = UNIT_ROUNDOFF[dtype]
    assert eager is not None, f"{name}: {dtype} needs an eager result as its yardstick"
    eager_error = _eager_error(want, finite, eager)
    broken = not torch.isfinite(eager_error).all() or float(eager_error.norm()) > 50 * u * norm
    if broken and fallback is not None and dtype != torch.float32:
        eager_error = _eager_error(want, finite, fallback().to(dtype))
    if not torch.isfinite(eager_error).all():
        raise MeaninglessToleranceError(f"{name}: eager is non-finite where the oracle is finite")
    factors = (2.0, 4.0) if dtype == torch.float32 else (1.25, 2.0)
    l2 = factors[0] * float(eager_error.norm()) + u * norm
    largest = factors[1] * float(eager_error.abs().max()) + 2 * u * peak
    if norm > 0.0 and l2 >= 0.1 * norm:
        raise MeaninglessToleranceError(
            f"{name}: the rule would allow {l2 / norm:.2g} of the reference in {dtype}"
        )
    return l2, largest


def _eager_error(want: Tensor, finite: Tensor, eager: Tensor) -> Tensor:
    return torch.where(finite, eager.detach().cpu().double() - want, 0.0)


def _assert_special_values(got: Tensor, want: Tensor, dtype: torch.dtype, name: str) -> None:
    """NaN and infinities exactly where the oracle, rounded to the dtype, has them."""
    rounded = want.to(dtype).double()
    nan_differs = got.isnan() != rounded.isnan()
    assert not nan_differs.any(), (
        f"{name}: NaN differs from the oracle at {int(nan_differs.sum())} of {got.numel()} "
        f"elements, first {_first(nan_differs)} (kernel has {int(got.isnan().sum())}, "
        f"oracle {int(rounded.isnan().sum())})"
    )
    # A finite oracle value within a few roundings of the largest number may go either way.
    edge = want.abs() * (1 + 8 * UNIT_ROUNDOFF[dtype]) >= torch.finfo(dtype).max
    edge &= want.isfinite()
    infinities = torch.where(got.isinf(), got.sign(), 0.0)
    wanted = torch.where(rounded.isinf(), rounded.sign(), 0.0)
    inf_differs = (infinities != wanted) & ~edge
    assert not inf_differs.any(), (
        f"{name}: infinity differs from the oracle at {int(inf_differs.sum())} elements, "
        f"first {_first(inf_differs)}"
    )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def _message(comparison: Comparison, error: Tensor, norm: float, dtype: torch.dtype) -> str:
    worst = error.abs() == error.abs().max()
    scale = norm or 1.0
    return (
        f"{comparison.name} ({dtype}): relative L2 error {comparison.l2 / scale:.3g}, allowed "
        f"{comparison.l2_allowed / scale:.3g}; largest error {comparison.largest:.3g} at "
        f"{_first(worst)} of {tuple(error.shape)}, allowed {comparison.largest_allowed:.3g}"
    )


def assert_equal(actual: Tensor, reference_fp64: Tensor, *, name: str) -> None:
    """Equality for integer-valued data, which every dtype represents: no rounding is excused."""
    want = reference_fp64.detach().cpu().double()
    assert torch.equal(want.to(actual.dtype).double(), want), (
        f"{name}: {actual.dtype} cannot represent the expected values: choose smaller integers"
    )
    got = actual.detach().cpu().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} != {tuple(want.shape)}"
    differs = ~((got == want) | (got.isnan() & want.isnan()))
    if differs.any():
        where = _first(differs)
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {got.numel()} elements differ, first at {where}: "
            f"got {float(got[where])}, expected {float(want[where])}"
        )


def assert_bitwise_equal(first: Tensor, second: Tensor, *, name: str) -> None:
    """Two runs gave the same bits (NaN equals NaN)."""
    assert first.dtype == second.dtype and first.shape == second.shape, name
    differs = ~((first == second) | (first.isnan() & second.isnan()))
    assert not differs.any(), (
        f"{name}: {int(differs.sum())} of {first.numel()} elements differ between two runs, "
        f"first {_first(differs)}"
    )


def assert_structural_zero(
    zero: Tensor, scale: Tensor | float, dtype: torch.dtype, *, name: str
) -> None:
    """A gradient that mathematics makes zero is small against the one beside it."""
    bound = STRUCTURAL_ZERO[dtype]
    size = float(zero.detach().double().norm())
    against = float(scale.detach().double().norm()) if isinstance(scale, Tensor) else scale
    assert size <= bound * against, (
        f"{name} ({dtype}): zero by structure, got norm {size:.3g}, allowed {bound} * {against:.3g}"
    )
