"""Window attention that keeps q and k, and its gradient, which reads them: a training step's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import shapes
import torch
from cases import attention_case, positional
from grid import DTYPES, implementing
from memory import poisoned_memory
from numerics import assert_kernel_close, check_operator
from shapes import Row
from torch import Tensor

from emo_kernels import backends, reference
from emo_kernels._C import available_isas
from emo_kernels.ops.irmb_step import spread

BACKENDS = [n for n in implementing("window_attention_with_maps") if n != "reference"]
# The cpu kernels have no grouped expansion.
ROWS = [row for row in shapes.attention_rows() if row.qk_proj and not row.grouped_v]
FEW = shapes.rows("ragged_c21", "below_window", "both_windows", "5m_stage3")
TENSORS = ("x", "qk_weight", "qk_bias", "v_weight", "v_bias", "norm_weight", "norm_bias")


class _Kept(torch.autograd.Function):
    """Forward and backward pass of one backend with q and k between them."""

    @staticmethod
    def forward(ctx: Any, backend: str, options: dict[str, Any], *tensors: Tensor | None) -> Tensor:
        z, qk = backends.function(backend, "window_attention_with_maps")(*tensors, **options)
        ctx.backend, ctx.options = backend, options
        ctx.save_for_backward(*tensors, qk)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, qk = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        run = backends.function(ctx.backend, "window_attention_backward")
        found = run(grad, *tensors, None, None, qk, needed=needed, **ctx.options)
        return None, None, *spread(found, needed)


def kept(backend: str) -> Callable[..., Tensor]:
    """The operator by keyword."""

    def call(**given: Any) -> Tensor:
        tensors = [given.pop(name, None) for name in TENSORS]
        return _Kept.apply(backend, given, *tensors)

    return call


def hold(backend: str, row: Row, dtype: str) -> None:
    check_operator(
        kept(backend),
        reference.window_attention,
        attention_case(row),
        DTYPES[dtype],
        name=f"{backend} with q and k kept",
    )


@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, marks=[] if dtype == "fp32" or row in FEW else [pytest.mark.slow])
        for row in ROWS
        for dtype in ("fp32", "bf16", "fp64")
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_result_and_gradients(backend: str, row: Row, dtype: str) -> None:
    hold(backend, row, dtype)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("row", shapes.rows("ragged_c21", "below_window"), ids=str)
def test_every_instruction_set(row: Row, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    hold("cpu", row, "fp32")


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_maps(backend: str, row: Row) -> None:
    """The result has the bits of the pass that keeps nothing; q and k are those of the pixels."""
    exact, options = positional("window_attention", attention_case(row))
    tensors = [None if t is None else t.float() for t in exact]
    forward = backends.function(backend, "window_attention")
    with poisoned_memory("nan"):
        function = backends.function(backend, "window_attention_with_maps")
        z, qk = function(*tensors, **options)
    assert torch.equal(z, forward(*tensors, **options))
    rounded = [None if t is None else t.double() for t in tensors]
    want = reference.window_attention_with_maps(*rounded, **options)[1]
    eager = reference.window_attention_with_maps(*tensors, **options)[1]
    assert_kernel_close(qk, want, eager, torch.float32, name="qk")


@pytest.mark.parametrize("row", shapes.rows("ragged_c21", "both_windows"), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_torch_ops(backend: str, row: Row) -> None:
    """Schemas and fakes."""
    exact, options = positional("window_attention", attention_case(row))
    tensors = [None if t is None else t.float() for t in exact]
    given = (*tensors, *options.values(), backend)
    library, checks = torch.ops.emo_kernels, ("test_schema", "test_faketensor")
    forward = library.window_attention_with_maps.default
    torch.library.opcheck(forward, given, test_utils=checks)
    z, qk = forward(*given)
    needed = [t is not None for t in tensors]
    given = (torch.ones_like(z), *tensors, None, None, qk, needed, *options.values(), backend)
    torch.library.opcheck(library.window_attention_backward.default, given, test_utils=checks)
