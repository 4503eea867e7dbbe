"""Shrink: the contract, and what only the block's second half can be asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import integers
from fuzz import FuzzContract
from grid import over
from numerics import Case, run
from rejects import RejectContract, without
from shapes import Row
from transforms import TransformContract

TERMS = ("scale", "local", "residual", "gate", "drop_scale")


class TestShrink(TransformContract, RejectContract, FuzzContract):
    operator = "shrink"
    few = ("1m_stage0_small", "excite_with_skip", "no_skip", "attention_only", "stride_2_13x9")
    traced = checked = ("excite_with_skip", "stride_2_13x9", "attention_only")
    integer_rows = ("pixel", "row_1x9", "stride_2_1x1", "excite_with_skip")
    tiny = (
        Row("tiny_all", c=3, m=4, o=3, h=2, w=3, se=2),
        Row("tiny_bare", c=3, m=4, o=5, h=2, w=2, n=1, kernel=0, skip=False),
    )
    reject_row = "excite_with_skip"
    map_name = "y"

    def integer_case(self, row: Row) -> Case:
        """silu is exact at zero alone: y and shift are zero, the other terms are integers."""
        case = integers(self.case(replace(row, h=min(row.h, 3), w=min(row.w, 3))), largest=1)
        for name in ("y", "shift"):
            case.tensors[name] = torch.zeros_like(case.tensors[name])
        return case

    # ------------------------------------------------------------------------ what it must satisfy

    @over("excite_with_skip", dtypes=("fp32", "bf16", "fp64"))
    def test_every_subset_of_terms(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """Each of affine, local skip, residual, gate and stochastic depth present or absent."""
        for subset in range(2 ** len(TERMS)):
            absent = [term for bit, term in enumerate(TERMS) if not subset >> bit & 1]
            absent += ["shift"] if "scale" in absent else []
            case = without(self.case(row, seed=subset), *absent)
            self.check(backend, case, dtype, name=f"shrink without {absent}")

    @over("excite_with_skip", dtypes=("fp32", "bf16", "fp64"))
    def test_a_dropped_image_is_its_residual(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Exactly, and no gradient flows into its branch."""
        case = self.case(row)
        case.tensors["drop_scale"] = torch.tensor([0.0, 1.25], dtype=torch.float64)
        inputs = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
        grad = torch.randn(row.n, row.o, *row.output_size).to(dtype)
        got = run(self.kernel(backend), inputs, {}, ["y", "local", "residual"], grad)
        residual = inputs["residual"]
        assert residual is not None and torch.equal(got["out"][0], residual[0])
        assert not got["y"][0].any() and not got["local"][0].any()
        assert torch.equal(got["residual"], grad)
        assert got["y"][1].any()

    @over("excite_with_skip", dtypes=("fp64",))
    def test_the_residual_is_added_and_nothing_else(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case = self.case(row)
        with_it = run(self.kernel(backend), case.tensors, {})["out"]
        bare = run(self.kernel(backend), without(case, "residual").tensors, {})["out"]
        residual = case.tensors["residual"]
        assert residual is not None
        assert float((with_it - bare - residual).norm()) <= 1e-13 * float(with_it.norm())

    @over("excite_with_skip", dtypes=("fp64",))
    def test_a_closed_gate_leaves_the_local_skip(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case = without(self.case(row), "drop_scale", "residual")
        case.tensors["gate"] = torch.zeros(row.n, row.m, dtype=torch.float64)
        got = run(self.kernel(backend), case.tensors, {})["out"]
        local, weight = case.tensors["local"], case.tensors["weight"]
        assert local is not None and weight is not None
        want = (local.movedim(1, -1) @ weight.flatten(1).T).movedim(-1, 1)
        assert float((got - want).norm()) <= 1e-13 * float(want.norm())

    @over("excite_with_skip", "stride_2_13x9", dtypes=("fp32", "fp64"))
    def test_silu_holds_far_from_zero(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """No overflow of exp: 0 at -1e4, the argument itself at 1e4."""
        case = self.case(row)
        y = case.tensors["y"]
        assert y is not None
        y[:, ::3], y[:, 1::3] = -1e4, 1e4
        self.check(backend, case, dtype)

    # ---------------------------------------------------------------------------------- bad input

    def test_rejects_half_of_the_affine(self) -> None:
        for missing, present in (("scale", "shift"), ("shift", "scale")):
            self.assert_rejects(without(self.good(), missing), missing, present)
        assert torch.isfinite(self.call(without(self.good(), "scale", "shift"))).all()

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("local", (2, 16, 9, 6)),
            ("local", (2, 40, 6, 9)),
            ("local", (1, 40, 9, 6)),
            ("residual", (2, 40, 9, 6)),
            ("residual", (2, 16, 9, 1)),
            ("gate", (2, 40, 1, 1)),
            ("gate", (1, 40)),
            ("gate", (2, 16)),
            ("drop_scale", (2, 1, 1, 1)),
            ("drop_scale", (1,)),
            ("weight", (16, 40)),
            ("weight", (16, 39, 1, 1)),
            ("weight", (16, 40, 3, 3)),
        ],
    )
    def test_rejects_a_wrong_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Also one that would broadcast."""
        bad = self.good()
        bad.tensors[name] = torch.randn(shape)
        self.assert_rejects(bad, name, str(shape))
