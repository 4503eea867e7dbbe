"""The training step of the stem, composed of a backend's kernels, against plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import shapes
import torch
from block_kinds import relative
from cases import conv_norm_act_case
from fuzz import random_layouts, random_rows
from grid import DTYPES, device_of, implementing
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import Case, check_operator, grad_output_like, round_all, run
from shapes import Row
from torch import Tensor

from emo_kernels import _C, backends, reference
from emo_kernels.ops.conv_norm_act_training import StemPlan, conv_norm_act_training
from emo_kernels.spec import BatchNormMode

NORM = ("norm_weight", "norm_bias", "norm_mean", "norm_var")
KERNELS = implementing("conv_norm_act_training")
STATISTICS = {"batch": True, "known": False}
ROWS = [  # one pixel of three images is no batch to speak of: its variance may be next to nothing
    r for r in shapes.STEMS if r.norm == "batch" and r.n * r.output_size[0] * r.output_size[1] > 3
]
FEW = shapes.rows("stem_small", "stem_v2_small", "stem_grey_k5_dilated", "stem_patches_4x4")
# A gradient of equal numbers has none behind the batch's mean.
LAYOUTS = random_layouts().filter(lambda layouts: layouts.grad != "expanded")
TINY = (
    Row("tiny_stem", c=2, m=3, o=3, h=4, w=5, n=2, stride=2, act="silu"),
    Row("tiny_grey_stem", c=1, m=2, o=2, h=3, w=3, n=2, act="gelu", bias=False),
)


def training_case(row: Row, *, batch: bool, seed: int = 0) -> Case:
    """The stem; a bias in front of the batch's own mean has no gradient to speak of."""
    case = conv_norm_act_case(row, seed=seed)
    constant = (*case.constant, "bias") if batch else case.constant
    return Case(case.tensors, case.options, case.dead, constant)


def kernels(backend: str, batch: bool) -> Any:
    """A step on one backend, which leaves the statistics it is given as they are."""

    def step(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: str, **rest: Any
    ) -> Tensor:
        norm = [rest.pop(name) for name in NORM]
        vectors = (bias, *norm[:2], *(t.clone() for t in norm[2:]))
        mode = BatchNormMode(batch)
        plan = StemPlan(**rest, eps=1e-6, act=act, norm=mode, backend=backend)
        return conv_norm_act_training(x, weight, *vectors, plan=plan)

    return step


def plain(batch: bool) -> Any:
    def step(**arguments: Any) -> Tensor:
        return reference.conv_norm_act(**arguments, batch_statistics=batch)

    return step


def refusal(backend: str, row: Row, dtype: torch.dtype) -> str | None:
    x, weight = torch.empty(row.input_shape, dtype=dtype), torch.empty(row.o, row.c, row.kernel, 1)
    return backends.why_not(
        backend, "conv_norm_act_training", device_of(backend), x, weight.to(dtype)
    )


def check(backend: str, row: Row, batch: bool, dtype: torch.dtype, **how: Any) -> None:
    seed = how.pop("seed", 0)
    check_operator(
        kernels(backend, batch),
        plain(batch),
        training_case(row, batch=batch, seed=seed),
        dtype,
        name=f"conv_norm_act_training on {backend}",
        device=device_of(backend),
        **how,
    )


@pytest.mark.parametrize("which", STATISTICS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_composition_is_right(row: Row, which: str) -> None:
    """With the reference's pieces, in fp64: what is left is the composition's own."""
    check("reference", row, STATISTICS[which], torch.float64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("which", STATISTICS)
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_step_on_kernels(backend: str, row: Row, which: str, dtype: str) -> None:
    reason = refusal(backend, row, DTYPES[dtype])
    if reason is not None:
        assert row.c > 16 and "input channels" in reason
        return
    check(backend, row, STATISTICS[which], DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("row", FEW, ids=str)
def test_every_instruction_set(
    row: Row, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    check("cpu", row, True, DTYPES[dtype])


@pytest.mark.parametrize("backend", KERNELS)
def test_random_stems(backend: str) -> None:
    @settings(max_examples=60)
    @given(st.data())
    def one(data: Any) -> None:
        row = data.draw(random_rows("conv_norm_act"), label="row")
        row = replace(row, norm="batch", c=min(row.c, 16))
        batch, layouts = data.draw(st.booleans()), data.draw(LAYOUTS)
        if row.n * row.output_size[0] * row.output_size[1] > 3:  # else xhat is one sign or another
            check(backend, row, batch, torch.float64, layouts=layouts)

    one()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("row", FEW, ids=str)
def test_a_thread_count_gives_the_same_bits_every_time(row: Row, threads: int, dtype: str) -> None:
    case = training_case(row, batch=True)
    inputs = round_all(case.tensors, DTYPES[dtype])
    kernel = kernels("cpu", True)

    def gradients() -> dict[str, Tensor]:
        out = run(kernel, inputs, case.options)["out"]
        grad = grad_output_like(out).to(out.dtype)
        return run(kernel, inputs, case.options, case.differentiable(), grad)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("which", STATISTICS)
@pytest.mark.parametrize("row", TINY, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_numerical_differentiation(backend: str, row: Row, which: str) -> None:
    batch = STATISTICS[which]
    case = training_case(row, batch=batch)
    names = case.differentiable()
    values = [case.tensors[n].clone().requires_grad_() for n in names]

    def step(*given: Tensor) -> Tensor:
        tensors = {**case.tensors, **dict(zip(names, given, strict=True))}
        return kernels(backend, batch)(**tensors, **case.options)

    assert torch.autograd.gradcheck(step, values)


@pytest.mark.parametrize("which", STATISTICS)
@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_are_the_references(backend: str, which: str) -> None:
    batch = STATISTICS[which]
    case = training_case(shapes.rows("stem_v2_small")[0], batch=batch)

    def second(step: Any) -> list[Tensor]:
        leaves = {n: t if t is None else t.clone() for n, t in case.tensors.items()}
        wanted = [leaves[n].requires_grad_() for n in case.differentiable()]
        out = step(**leaves, **case.options)
        first = torch.autograd.grad(out.square().sum(), wanted, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wanted))

    for got, want in zip(second(kernels(backend, batch)), second(plain(batch)), strict=True):
        assert relative(got, want) < 1e-9


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_running_statistics_move_as_in_pytorch(backend: str) -> None:
    case = conv_norm_act_case(shapes.rows("stem_small")[0])
    x, weight, bias, *norm = (t.double() for t in case.tensors.values())
    mean, var = (t.clone() for t in norm[2:])
    y = torch.nn.functional.conv2d(x, weight, bias, 2, 1)
    torch.nn.functional.batch_norm(y, mean, var, None, None, True, 0.3)
    plan = StemPlan(2, 1, 1, 1e-6, "none", BatchNormMode(True, 0.3), backend)
    versions = [t._version for t in norm[2:]]
    conv_norm_act_training(x, weight, bias, *norm, plan=plan)
    assert relative(norm[2], mean) < 1e-12 and relative(norm[3], var) < 1e-12
    assert all(t._version > v for t, v in zip(norm[2:], versions, strict=True))


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_the_batch_s_mean_takes_the_bias_away(backend: str) -> None:
    """Its gradient is zero, where a sum of rounded numbers gives noise."""
    case = conv_norm_act_case(shapes.rows("stem_small")[0])
    tensors = round_all(case.tensors, torch.float64)
    bias = tensors["bias"]
    assert bias is not None
    bias.requires_grad_()
    kernels(backend, True)(**tensors, **case.options).square().sum().backward()
    assert bias.grad is not None and not bias.grad.any()


@pytest.mark.parametrize("backend", KERNELS)
def test_one_value_has_no_statistics(backend: str) -> None:
    row = shapes.rows("stem_one_pixel")[0]
    case = training_case(row, batch=True)
    tensors = {n: t if t is None or n != "x" else t[:1] for n, t in case.tensors.items()}
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        kernels(backend, True)(**tensors, **case.options)


def test_a_call_that_c_refuses_says_what_is_wrong() -> None:
    sizes = (1, 3, 8, 8, 4, 3, 2, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="conv_norm_act_backward: a null pointer"):
        _C.conv_norm_act_backward(0, sizes)((0,) * 8, 1)
    with pytest.raises(ValueError, match="conv_norm_act_backward: sizes"):
        _C.conv_norm_act_backward(0, (1, 3, 8, 8, 0, *sizes[5:]))((0,) * 8, 1)
    kernel = _C.prepare_conv_norm_act(0, 0, (64,) * 6, (64, 64), (*sizes[:10], 3, 0), 1e-6)
    with pytest.raises(ValueError, match="sums behind an activation"):
        kernel(64, 64, 1)
