"""Random rows, layouts and dtypes for every operator: the fourth part of the contract.

Derandomised: the default run draws the same few dozen examples everywhere, the slow one hundreds.
A failing example prints its row, which can be pasted into ``shapes.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import memory
import pytest
import torch
from contract import FEW_NUMBERS, OperatorContract
from grid import DTYPES, refusal, slow_motion
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numerics import Case, Layouts, MeaninglessToleranceError
from shapes import Row

ENOUGH_PIXELS = 32
SIDES = st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, 17))


@st.composite
def random_rows(draw: Any, operator: str) -> Row:
    """A small block with any combination of switches that fit together."""
    attends = operator == "window_attention" or draw(st.booleans())
    head_dim = draw(st.integers(1, 9)) if attends else 0
    c = head_dim * draw(st.integers(1, 4)) if attends else draw(st.integers(1, 24))
    if operator == "norm_pool_linear":
        c += 3  # two channels normalise to 1 and -1, whose mean over pixels may vanish
    heads = c // head_dim if attends else 1
    kernel, stride = draw(st.sampled_from([(3, 1), (5, 1), (3, 2), (5, 2), (7, 1), (1, 1), (2, 1)]))
    if operator == "irmb" and draw(st.integers(0, 7)) == 0:
        kernel, stride = 0, 1
    grouped = attends and draw(st.booleans())
    expands = operator == "expand" or draw(st.integers(0, 4)) > 0
    m = heads * draw(st.integers(1, max(1, 40 // heads))) if expands else c
    norm = draw(st.sampled_from(["none", "batch", "layer"]))
    if c <= 2 and norm == "layer":
        norm = "batch"  # one channel normalises to 0, two to 1 and -1: no gradient but rounding
    swapped = attends and kernel not in (0, 2) and stride == 1 and draw(st.integers(0, 5)) == 0
    skip = stride == 1 and kernel != 2 and draw(st.booleans())  # k = 2 grows the map
    return Row(
        "random",
        c=c,
        m=m,
        # Eager is exact by luck where all of a result is one or two numbers.
        o=c if skip else draw(st.integers(8 if operator == "norm_pool_linear" else 1, 24)),
        h=draw(SIDES),
        w=draw(SIDES),
        n=draw(st.sampled_from([1, 1, 2, 3, 0])),
        kernel=kernel,
        stride=stride,
        norm=norm,
        act=draw(st.sampled_from(["none", "relu", "gelu", "silu"])),
        head_dim=head_dim,
        window=draw(st.sampled_from([2, 3, 4, 5, 7, 8, 0])),
        window_mode=draw(st.sampled_from(["grid", "block", "both"])),
        attn_pre=draw(st.booleans()) or not expands,
        grouped_v=grouped and expands,
        qk_proj=draw(st.integers(0, 4)) > 0,
        bias=draw(st.booleans()),
        expands=expands,
        se=draw(st.integers(1, 4)) if kernel and draw(st.integers(0, 3)) == 0 else 0,
        skip=skip,
        gamma=draw(st.integers(0, 3)) == 0,
        op_order="conv_attn" if swapped else "attn_conv",
    )


def random_layouts() -> st.SearchStrategy[Layouts]:
    """Strides of maps, weights and incoming gradient."""
    return st.builds(
        Layouts,
        maps=st.sampled_from(memory.VALUE_LAYOUTS),
        weights=st.sampled_from(["contiguous", "sliced", "offset", "strided"]),
        grad=st.sampled_from(list(memory.LAYOUTS)),
    )


def draws_of(row: Row) -> int:
    """Draws that make a fair comparison: the errors of a pixel's numbers are not independent."""
    pixels = row.n * row.h * row.w
    return -(-ENOUGH_PIXELS // pixels) if pixels else 1


def fewest_numbers(case: Case) -> int:
    """Of the case's gradients, those that are not zero by structure."""
    sizes = {name: case.tensors[name].numel() for name in case.differentiable()}
    return min(size // 2 if name == "qk_bias" else size for name, size in sizes.items())


def has_fair_gradients(row: Row, case: Case, dtype: torch.dtype) -> bool:
    """Whether gradients are a fair comparison over the draws of a row; all are in fp64.

    Those of a few numbers need more draws, and those of relu in 16 bits have an element wrong or
    right as rounding puts its argument on a side of 0: the named rows have both.
    """
    if dtype == torch.float64:
        return True
    return fewest_numbers(case) >= FEW_NUMBERS and (row.act != "relu" or dtype == torch.float32)


@contextmanager
def or_other_data() -> Iterator[None]:
    """Other data where the yardstick is too bad to judge by, whatever the kernel did."""
    try:
        yield
    except MeaninglessToleranceError:
        assume(False)


class FuzzContract(OperatorContract):
    """Random blocks through every backend that takes them; the reference in fp64 always."""

    def fuzz(self, backend: str, examples: int) -> None:
        @settings(max_examples=examples)
        @given(st.data())
        def one(data: Any) -> None:
            row = data.draw(random_rows(self.operator), label="row")
            layouts = data.draw(random_layouts(), label="layouts")
            seed = data.draw(st.integers(0, 3), label="seed")
            case = self.case(row, seed=seed)
            name = "fp64" if backend == "reference" else data.draw(st.sampled_from(list(DTYPES)))
            if refusal(self.operator, backend, case, DTYPES[name]) is None:
                gradients = has_fair_gradients(row, case, DTYPES[name])
                gradients &= self.owns_gradient(backend, DTYPES[name])
                draws = 1 if DTYPES[name] == torch.float64 else draws_of(row)
                cases = [self.case(row, seed=seed + more) for more in range(draws)]
                how = {"layouts": layouts, "gradients": gradients}
                with or_other_data():
                    self.check_several(backend, cases, DTYPES[name], **how)

        one()

    def test_fuzz(self, backend: str) -> None:
        self.fuzz(backend, examples=20 if slow_motion(backend) else 60)

    @pytest.mark.slow
    def test_fuzz_at_length(self, backend: str) -> None:
        self.fuzz(backend, examples=1500)
