"""The training step of a block, composed of a backend's kernels, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import shapes
import torch
from block_kinds import DOUBLE, KINDS, randomise, relative
from cases import irmb_case
from grid import DTYPE_NAMES, device_of, implementing, slow_motion
from numerics import Case, check_operator
from shapes import Row
from torch import Tensor

from emo_kernels import backends, reference
from emo_kernels.nn import iRMB
from emo_kernels.ops.irmb_step import Plan
from emo_kernels.ops.irmb_training import irmb_training
from emo_kernels.spec import BatchNormMode, IRMBSpec, IRMBWeights, composition_limits
from emo_kernels.structure import BlockReading

STATISTICS = {"batch": (True, True), "known": (False, False), "mixed": (False, True)}
KERNELS = implementing("irmb_training")
ROWS = [
    row
    for row in shapes.SWITCHES + shapes.ODD
    if composition_limits(shapes.weights(row), row.spec()) is None and row.n > 0
]
# Between them every path of the composition; small enough for an interpreter.
FEW = shapes.rows(
    "block_windows", "both_windows", "post_expansion", "no_skip", "attention_and_excite",
    "unexpanded", "1m_stage0_small", "dilated", "batch_5", "ragged_c21", "v2_5m_stage1_small",
)  # fmt: skip


SIXTEEN_BITS = ("no_skip", "1m_stage0_small", "ragged_c21", "batch_5")


def training_case(row: Row, *, seed: int = 0) -> Case:
    """The row's block with stochastic depth where it has skips."""
    case = irmb_case(row, seed=seed)
    drop = 1.25 * (torch.arange(row.n) % 3 != 1).double() if row.skip else None
    tensors = {**case.tensors, "drop_scale": drop}
    return Case(tensors, case.options, case.dead, (*case.constant, "drop_scale"))


def kernels(backend: str, batch: tuple[bool, bool]) -> Any:
    def run(x: Tensor, *, spec: IRMBSpec, drop_scale: Tensor | None, **tensors: Tensor) -> Tensor:
        # The statistics that a step moves are not its results here.
        kept = {n: t.clone() if n.endswith(("mean", "var")) else t for n, t in tensors.items()}
        modes = [BatchNormMode(batch_statistics) for batch_statistics in batch]
        return irmb_training(x, IRMBWeights(**kept), Plan(spec, *modes, backend), drop_scale)

    return run


def plain(batch: tuple[bool, bool]) -> Any:
    def run(x: Tensor, *, spec: IRMBSpec, drop_scale: Tensor | None, **tensors: Tensor) -> Tensor:
        weights = IRMBWeights(**tensors)
        return reference.irmb(x, weights, spec, batch_statistics=batch, drop_scale=drop_scale)

    return run


def statistics_of(row: Row, which: str) -> tuple[bool, bool]:
    """A block without batch norm in front takes no statistics there."""
    batch = STATISTICS[which]
    return (batch[0] and row.norm == "batch", batch[1])


def has_one_value(row: Row) -> bool:
    return row.n * row.output_size[0] * row.output_size[1] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_in_training_is_the_modules(kind: str) -> None:
    block = randomise(iRMB(4, 4, dim_head=2, window_size=2, **KINDS[kind])).train()
    x = torch.randn(3, 4, 5, 4, **DOUBLE)
    reading = BlockReading(block)
    batch = (reading.spec.norm == "batch", True)
    got = reference.irmb(x, reading.weights(), reading.spec, batch_statistics=batch)
    assert relative(got, block(x)) < 1e-12


@pytest.mark.parametrize("which", STATISTICS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_composition_is_right(row: Row, which: str) -> None:
    """With the reference's pieces, in fp64: what is left is the composition's own."""
    batch = statistics_of(row, which)
    if any(batch) and has_one_value(row):
        pytest.skip("a batch of one value has no statistics")
    case = training_case(row)
    check_operator(kernels("reference", batch), plain(batch), case, torch.float64, name=row.name)


def refusal(backend: str, row: Row, dtype: torch.dtype) -> str | None:
    """Why the backend has no step for the row in that dtype."""
    weights = IRMBWeights._make(w if w is None else w.to(dtype) for w in shapes.weights(row))
    x = shapes.feature_map(row).to(dtype)
    device = device_of(backend)
    return backends.why_not(backend, "irmb_training", device, x, weights, row.spec())


def steps_on_kernels() -> Iterator[Any]:
    """In fp32 with the batch's statistics by default; what an interpreter has no time for, slow."""
    for backend, row, which, dtype in product(
        KERNELS, FEW, ("batch", "known"), (torch.float32, torch.bfloat16, torch.float16)
    ):
        if refusal(backend, row, dtype) is not None:
            continue
        default = which == "batch" and (dtype == torch.float32 or row.name in SIXTEEN_BITS)
        marks = [] if default or not slow_motion(backend) else [pytest.mark.slow]
        label = f"{backend}-{row.name}-{which}-{DTYPE_NAMES[dtype]}"
        yield pytest.param(backend, row, which, dtype, id=label, marks=marks)


@pytest.mark.parametrize(("backend", "row", "which", "dtype"), list(steps_on_kernels()))
def test_a_step_on_kernels(backend: str, row: Row, which: str, dtype: torch.dtype) -> None:
    batch = statistics_of(row, which)
    check_operator(
        kernels(backend, batch),
        plain(batch),
        training_case(row),
        dtype,
        name=f"irmb_training on {backend}",
        device=device_of(backend),
    )


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_running_statistics_move_as_in_pytorch(backend: str) -> None:
    row = shapes.rows("attention_and_excite")[0]
    dtype = torch.float64 if backend == "reference" else torch.float32
    torch.manual_seed(0)
    data = shapes.weights(row)
    tensors = {n: t.to(device_of(backend), dtype) for n, t in data.present()}
    weights = IRMBWeights(**{n: t.clone() for n, t in tensors.items()})
    x = shapes.feature_map(row).to(device_of(backend), dtype)
    modes = (BatchNormMode(True, 0.3), BatchNormMode(True, 0.01))
    irmb_training(x, weights, Plan(row.spec(), *modes, backend))
    mean, var = tensors["norm_mean"].clone(), tensors["norm_var"].clone()
    torch.nn.functional.batch_norm(x, mean, var, None, None, True, 0.3)
    assert torch.allclose(weights.norm_mean, mean, rtol=1e-6, atol=1e-6)
    assert torch.allclose(weights.norm_var, var, rtol=1e-6, atol=1e-6)
    assert not torch.equal(weights.bn_mean, tensors["bn_mean"])
    assert not torch.equal(weights.bn_var, tensors["bn_var"])


def test_one_value_has_no_statistics() -> None:
    row = shapes.rows("stride_2_1x1")[0]
    case = training_case(row)
    tensors = {n: t if t is None else t[:1] if n == "x" else t for n, t in case.tensors.items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernels("reference", (False, True))(**tensors, **case.options)


def test_second_derivatives_are_the_references() -> None:
    row = shapes.rows("excite_with_skip")[0]
    case = training_case(row)
    batch = (True, True)

    def second(run: Any) -> list[Tensor]:
        leaves = {
            n: t.clone().requires_grad_(n in case.differentiable()) if t is not None else None
            for n, t in case.tensors.items()
        }
        wanted = [leaves[n] for n in case.differentiable()]
        out = run(**leaves, **case.options)
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    for got, want in zip(second(kernels("reference", batch)), second(plain(batch)), strict=True):
        assert relative(got, want) < 1e-9
