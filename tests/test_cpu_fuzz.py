"""Random blocks wide enough for several panels of channels, on every instruction set.

``fuzz.py`` draws small blocks for every backend; a panel of the cpu kernels has up to 48 channels,
so that those never meet a second one. Here also dilation, threads, and whole training steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from cases import CASES, function
from contract import FEW_NUMBERS
from fuzz import (
    draws_of,
    fewest_numbers,
    has_fair_gradients,
    or_other_data,
    random_layouts,
    random_rows,
)
from grid import DTYPES, refusal
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import Case, check_draws
from shapes import Row
from test_irmb_training import kernels, plain, statistics_of, training_case
from test_irmb_training import refusal as refusal_of_step

from emo_kernels import _C, ops, reference

ISAS = _C.available_isas()
ENOUGH_NUMBERS = 64  # of each gradient, over the draws that are judged as one
WIDTHS = st.one_of(st.sampled_from([15, 16, 17, 31, 33, 47, 48, 49, 96, 97]), st.integers(4, 110))


@st.composite
def wide_rows(draw: Any, operator: str) -> Row:
    """A row of ``fuzz.py`` with more channels, and dilated where its map leaves room."""
    row = draw(random_rows(operator))
    head_dim = draw(st.sampled_from([5, 8, 16, 20, 21, 24, 32])) if row.head_dim else 0
    heads = row.heads or 1
    c = head_dim * heads if head_dim else draw(WIDTHS)
    m = heads * draw(st.integers(1, max(1, 150 // heads))) if row.expands else c
    # A few squeezed channels are a few numbers, and whatever follows from them hangs together.
    se = draw(st.integers(8, 24)) if row.se else 0
    row = replace(row, c=c, m=m, o=c if row.skip else draw(WIDTHS), head_dim=head_dim, se=se)
    reach = 2 * (row.kernel - 1) + 1 - 2 * row.padding
    if not row.skip and row.op_order == "attn_conv" and min(row.h, row.w) >= reach > 0:
        row = replace(row, dilation=draw(st.sampled_from([1, 2])))
    return row


@contextmanager
def running_with(isa: str, threads: int) -> Iterator[None]:
    before = os.environ.get("EMO_KERNELS_ISA")
    os.environ["EMO_KERNELS_ISA"] = isa
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(1)
        os.environ.pop("EMO_KERNELS_ISA")
        if before is not None:
            os.environ["EMO_KERNELS_ISA"] = before


def pixels(row: Row) -> int:
    """Of the output."""
    return row.n * row.output_size[0] * row.output_size[1]


def repeat(examples: int, one: Callable[[Any], None]) -> None:
    settings(max_examples=examples)(given(st.data())(one))()


def draw_how(data: Any) -> tuple[str, torch.dtype, int]:
    """(instruction set, dtype, threads)."""
    isa = data.draw(st.sampled_from(ISAS), label="isa")
    dtype = data.draw(st.sampled_from(["fp32", "fp32", "fp64", "bf16"]), label="dtype")
    return isa, DTYPES[dtype], data.draw(st.integers(1, 3), label="threads")


def one_operator(operator: str) -> Callable[[Any], None]:
    def one(data: Any) -> None:
        row = data.draw(wide_rows(operator), label="row")
        layouts = data.draw(random_layouts(), label="layouts")
        isa, dtype, threads = draw_how(data)
        case = CASES[operator](row)
        assume(refusal(operator, "cpu", case, dtype) is None)
        # Results of few numbers are judged over several draws, by the named rows of each operator.
        exact = dtype == torch.float64
        assume(exact or pixels(row) * min(row.c, row.m, row.o) >= 64)
        gradients = operator != "irmb" and has_fair_gradients(row, case, dtype)
        draws = 1 if exact else draws_of(row)
        if gradients and not exact:
            draws = max(draws, -(-ENOUGH_NUMBERS // fewest_numbers(case)))
        cases = [CASES[operator](row, seed=seed) for seed in range(draws)]
        kernel = function(operator, getattr(ops, operator), backend="cpu")
        yardstick = function(operator, getattr(reference, operator))
        with running_with(isa, threads), or_other_data():
            check_draws(
                kernel,
                yardstick,
                cases,
                dtype,
                oracle=getattr(oracle, operator),
                layouts=layouts,
                gradients=gradients,
                name=f"{operator} {isa}",
            )

    return one


def one_step(data: Any) -> None:
    row = data.draw(wide_rows("irmb"), label="row")
    which = data.draw(st.sampled_from(["batch", "known"]), label="statistics")
    isa, dtype, threads = draw_how(data)
    # Statistics and gradients of a handful of values are cancellation, in any implementation.
    assume(pixels(row) >= 16 and min(row.c, row.m, row.o) >= FEW_NUMBERS)
    assume(row.kernel > 0 and refusal_of_step("cpu", row, dtype) is None)
    batch = statistics_of(row, which)

    def make(seed: int) -> Case:
        case = training_case(row, seed=seed)
        if batch[1] and row.kernel == 1:  # the batch norm takes out a channel's factor: no gradient
            case = replace(case, constant=(*case.constant, "dw_weight"))
        return case

    gradients = has_fair_gradients(row, make(0), dtype)
    more = gradients and dtype != torch.float64
    draws = -(-ENOUGH_NUMBERS // fewest_numbers(make(0))) if more else 1
    cases = [make(seed) for seed in range(draws)]
    with running_with(isa, threads), or_other_data():
        check_draws(
            kernels("cpu", batch),
            plain(batch),
            cases,
            dtype,
            oracle=plain(batch),
            gradients=gradients,
            replace_broken=False,
            name=f"step {isa}",
        )


PARTS: dict[str, Callable[[Any], None]] = {
    **{operator: one_operator(operator) for operator in CASES},
    "step": one_step,
}


@pytest.mark.parametrize("part", PARTS)
def test_wide_blocks(part: str) -> None:
    repeat(15, PARTS[part])


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_wide_blocks_at_length(part: str) -> None:
    repeat(600, PARTS[part])
