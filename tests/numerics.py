"""Hold an operator against its oracle: the driver that applies the tolerance rule to a call.

Everything a test of a kernel needs is importable from here; the rule itself is ``tolerance.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from memory import poisoned_memory, with_layout
from tolerance import (
    UNIT_ROUNDOFF,
    Comparison,
    MeaninglessToleranceError,
    Tensors,
    assert_bitwise_equal,
    assert_equal,
    assert_kernel_close,
    assert_structural_zero,
    round_all,
    round_to,
)
from torch import Tensor

__all__ = [
    "DENSE",
    "UNIT_ROUNDOFF",
    "Case",
    "Comparison",
    "Layouts",
    "MeaninglessToleranceError",
    "assert_bitwise_equal",
    "assert_equal",
    "assert_kernel_close",
    "assert_structural_zero",
    "check_draws",
    "check_operator",
    "grad_output_like",
    "round_all",
    "round_to",
    "run",
]

Function = Callable[..., Tensor]


@dataclass
class Case:
    """One call of an operator: fp64 values of its tensors, its options, what is zero by structure.

    Attributes:
        tensors: keyword arguments that are tensors, in fp64, unrounded; ``None`` where absent.
        options: the other keyword arguments.
        dead: names of tensors whose gradient vanishes by structure (attention over one token).
        constant: names of tensors that are no leaves (statistics): no gradient is asked for.
        sharpness: how many times larger than usual q and k are, and with them the rounding of
            the gradient that their biases' K half should not have.
    """

    tensors: dict[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)
    dead: tuple[str, ...] = ()
    constant: tuple[str, ...] = ()
    sharpness: float = 1.0

    def differentiable(self) -> list[str]:
        """Names of the tensors whose gradients are compared."""
        return [n for n, t in self.tensors.items() if t is not None and n not in self.constant]


def grad_output_like(out: Tensor, *, seed: int = 7) -> Tensor:
    """A fixed, non-trivial fp64 gradient of an output: no symmetry, no zero mean."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return noise + 0.25 * torch.rand(out.shape, generator=generator, dtype=torch.float64)


def run(
    function: Function,
    tensors: Tensors,
    options: Mapping[str, Any],
    wanted: Iterable[str] = (),
    grad_output: Tensor | None = None,
) -> dict[str, Tensor]:
    """Call an operator; return its output as ``out`` beside the gradients named in ``wanted``."""
    wanted = list(wanted)
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted) if tensor is not None else None
        for name, tensor in tensors.items()
    }
    out = function(**leaves, **options)
    if not wanted:
        return {"out": out.detach()}
    assert grad_output is not None
    grads = torch.autograd.grad(
        out, [leaves[name] for name in wanted], grad_output, allow_unused=True
    )
    missing = [name for name, grad in zip(wanted, grads, strict=True) if grad is None]
    assert not missing, f"no gradient reached {missing}"
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


class Layouts(NamedTuple):
    """Strides and storage of the kernel's inputs, as names of ``memory.LAYOUTS``."""

    maps: str = "contiguous"  # x, y, local, residual
    weights: str = "contiguous"
    grad: str = "contiguous"  # of the incoming gradient


MAPS = ("x", "y", "local", "residual")
DENSE = Layouts()


def check_operator(
    function: Function,
    reference: Function,
    case: Case | Tensors,
    dtype: torch.dtype,
    *,
    oracle: Function | None = None,
    gradients: bool = True,
    device: str = "cpu",
    layouts: Layouts = DENSE,
    exact: bool = False,
    poison: str | None = "nan",
    name: str = "operator",
) -> list[Comparison]:
    """Hold one call of ``function`` against the oracle, forward and (if asked) backward.

    Args:
        function: the operator under test, called with the case's tensors and options by keyword.
        reference: the plain composition: the yardstick, and the oracle if none is given.
        case: the fp64 values; they are rounded to ``dtype`` before anything is computed.
        dtype: of all tensors in the kernel's and the eager call.
        oracle: an independent fp64 statement of the operator.
        gradients: also compare the gradient of every differentiable tensor.
        device: where the kernel runs.
        layouts: strides and storage of what the kernel is given.
        exact: integer-valued data: equality instead of the rule.
        poison: what uninitialised memory holds during the kernel's call.
        name: begins every message.
    """
    case = case if isinstance(case, Case) else Case(dict(case))
    how = {"gradients": gradients, "device": device, "layouts": layouts, "poison": poison}
    got, truth = _run_and_truth(
        function, reference, case, dtype, oracle or reference, exact=exact, name=name, **how
    )
    if exact:
        for key, actual in got.items():
            assert_equal(actual, truth.want[key], name=f"{name}: {key}")
        return []
    return [_compare(key, actual, truth, f"{name}: {key}") for key, actual in got.items()]


def _run_and_truth(
    function: Function,
    reference: Function,
    case: Case,
    dtype: torch.dtype,
    oracle: Function,
    *,
    gradients: bool,
    device: str,
    layouts: Layouts,
    poison: str | None,
    name: str,
    exact: bool = False,
) -> tuple[dict[str, Tensor], _Truth]:
    """What the kernel makes of a case, its inputs untouched, and what that is measured with."""
    wanted = case.differentiable() if gradients else []
    rounded = round_all(case.tensors, dtype)
    grad_output = _rounded_grad_output(oracle, rounded, case, dtype, exact)
    grad_output = with_layout(grad_output.to(device), layouts.grad)
    plain_grad = grad_output.detach().cpu().contiguous()

    truth = _Truth(oracle, reference, rounded, plain_grad, case, wanted, dtype)
    inputs = _laid_out(rounded, layouts, device)
    before = {n: t.clone() for n, t in inputs.items() if t is not None}
    with poisoned_memory(poison):
        got = run(function, inputs, case.options, wanted, grad_output)
    _assert_inputs_untouched(inputs, before, got["out"], name)
    return got, truth


def check_draws(
    function: Function,
    reference: Function,
    cases: Sequence[Case],
    dtype: torch.dtype,
    *,
    oracle: Function,
    gradients: bool = True,
    device: str = "cpu",
    layouts: Layouts = DENSE,
    poison: str | None = "nan",
    replace_broken: bool = True,
    name: str,
) -> list[Comparison]:
    """The rule over several draws of one call, as if they were one larger call.

    A result of one number gives one error, and the yardstick's single error is as likely tiny as
    not: which of two honest kernels is nearer is then a matter of luck. Over some draws it is not.

    Args:
        replace_broken: False says of data on which eager is broken that they are no test
            (``MeaninglessToleranceError``): on random blocks it is, as a rule, their gradients that
            are the rounding of 16-bit maps and nothing else, in any implementation.
    """
    pooled: dict[str, list[tuple[Tensor, _Truth]]] = {}
    how = {"gradients": gradients, "device": device, "layouts": layouts, "poison": poison}
    for case in cases:
        got, truth = _run_and_truth(function, reference, case, dtype, oracle, name=name, **how)
        for key, actual in got.items():
            if key in case.dead:
                _compare(key, actual, truth, f"{name}: {key}")
                continue
            if key == "qk_bias":
                _assert_dead_half(actual, truth, f"{name}: {key}")
            pooled.setdefault(key, []).append((actual, truth))
    return [
        _compare_pool(key, draws, dtype, replace_broken, f"{name}: {key}")
        for key, draws in pooled.items()
    ]


def _compare_pool(
    key: str,
    draws: Sequence[tuple[Tensor, _Truth]],
    dtype: torch.dtype,
    replace_broken: bool,
    label: str,
) -> Comparison:
    """The rule for one tensor of :func:`check_draws`."""

    def pool(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([_live(key, t).detach().cpu().flatten() for t in tensors])

    return assert_kernel_close(
        pool(actual for actual, _ in draws),
        pool(truth.want[key] for _, truth in draws),
        pool(truth.eager[key] for _, truth in draws) if dtype != torch.float64 else None,
        dtype,
        name=label,
        gradient=key != "out",
        fallback=(lambda: pool(truth.fp32[key] for _, truth in draws)) if replace_broken else None,
    )


@dataclass
class _Truth:
    """What a call is measured with; each part is computed when first asked for."""

    oracle: Function
    reference: Function
    rounded: Tensors
    grad: Tensor
    case: Case
    wanted: list[str]
    dtype: torch.dtype

    def _run(self, which: Function, tensors: Tensors, grad: Tensor) -> dict[str, Tensor]:
        return run(which, tensors, self.case.options, self.wanted, grad)

    def _plain(self, which: Function, compute: torch.dtype) -> dict[str, Tensor]:
        return self._run(which, round_all(self.rounded, compute), self.grad.to(compute))

    @cached_property
    def want(self) -> dict[str, Tensor]:
        """The oracle in fp64, on the rounded values."""
        return self._plain(self.oracle, torch.float64)

    @cached_property
    def eager(self) -> dict[str, Tensor]:
        """The plain composition in the dtype; nothing in fp64, which is judged absolutely."""
        return {} if self.dtype == torch.float64 else self._plain(self.reference, self.dtype)

    @cached_property
    def fp32(self) -> dict[str, Tensor]:
        """The plain composition in fp32, where eager is broken."""
        return self._plain(self.reference, torch.float32)


def _compare(key: str, actual: Tensor, truth: _Truth, label: str) -> Comparison:
    """The rule for one tensor of :func:`check_operator`, minding what is zero by structure."""
    dtype = truth.dtype
    if key in truth.case.dead:
        scale = max(float(t.norm()) for t in truth.want.values())
        assert_structural_zero(actual, scale, dtype, name=label)
        return Comparison(label, 0.0, 0.0, 0.0, 0.0)

    if key == "qk_bias":
        _assert_dead_half(actual, truth, label)
    return assert_kernel_close(
        _live(key, actual),
        _live(key, truth.want[key]),
        _live(key, truth.eager[key]) if truth.eager else None,
        dtype,
        name=label,
        gradient=key != "out",
        fallback=lambda: _live(key, truth.fp32[key]),
    )


def _live(key: str, gradient: Tensor) -> Tensor:
    """Without the K half of the qk bias, which shifts every logit of a row alike: no gradient."""
    return gradient.chunk(2)[0] if key == "qk_bias" else gradient


def _assert_dead_half(actual: Tensor, truth: _Truth, label: str) -> None:
    live, zero = actual.chunk(2)
    # On a map of few pixels the Q half may cancel as well; then the weight's gradient counts.
    scale = truth.case.sharpness * max(
        float(live.norm()), 0.1 * float(truth.want.get("qk_weight", live).norm())
    )
    assert_structural_zero(zero, scale, truth.dtype, name=f"{label} (K half)")


def _rounded_grad_output(
    truth: Function, rounded: Tensors, case: Case, dtype: torch.dtype, exact: bool
) -> Tensor:
    with torch.no_grad():
        out = truth(**round_all(rounded, torch.float64), **case.options)
    grad = grad_output_like(out)
    return (grad.round().clamp(-2, 2) if exact else grad).to(dtype)


def _laid_out(rounded: Tensors, layouts: Layouts, device: str) -> dict[str, Tensor | None]:
    return {
        name: None
        if tensor is None
        else with_layout(tensor.to(device), layouts.maps if name in MAPS else layouts.weights)
        for name, tensor in rounded.items()
    }


def _assert_inputs_untouched(
    inputs: Tensors, before: Mapping[str, Tensor], out: Tensor, name: str
) -> None:
    for key, tensor in inputs.items():
        if tensor is None:
            continue
        assert_bitwise_equal(tensor, before[key], name=f"{name}: input {key} was changed")
        same = out.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        assert not same or out.numel() == 0, f"{name}: the output shares memory with {key}"
