"""Expand: the contract, and what only a norm and a pointwise convolution can be asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import shapes
import torch
from cases import integers
from fuzz import FuzzContract
from grid import over
from numerics import Case, round_all, run
from rejects import RejectContract, spoiled, without
from shapes import Row
from transforms import TransformContract


class TestExpand(TransformContract, RejectContract, FuzzContract):
    operator = "expand"
    few = ("odd_c21_m31", "ragged_c21", "post_expansion_grouped", "neither", "no_bias", "no_norm")
    traced = checked = ("odd_c21_m31", "post_expansion_grouped", "no_norm")
    integer_rows = ("no_norm", "excite_with_skip", "one_to_three", "pixel_global")
    tiny = (
        Row("tiny_layer", c=4, m=6, o=4, h=2, w=3, norm="layer", act="gelu"),
        Row("tiny_affine", c=3, m=5, o=3, h=3, w=2, n=1, norm="batch", act="silu"),
        Row("tiny_grouped", c=4, m=6, o=4, h=2, w=2, norm="none", head_dim=2, grouped_v=True),
    )
    reject_row = "odd_c21_m31"

    def integer_case(self, row: Row) -> Case:
        case = integers(self.case(replace(row, act="relu")), largest=1)
        assert case.options["norm"] != "layer"
        return case

    # ------------------------------------------------------------------------ what it must satisfy

    @over("ragged_c21", "neither", "5m_stage3", dtypes=("fp32", "fp64"))
    def test_layer_norm_forgets_scale_and_offset(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """x -> 3x + 5 changes nothing but the share of eps."""
        case = self.case(row)
        x = case.tensors["x"]
        assert x is not None and case.options["norm"] == "layer"
        inputs = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
        once = run(self.kernel(backend), inputs, case.options)["out"].double()
        moved = {**inputs, "x": (3 * x + 5).to(dtype)}
        again = run(self.kernel(backend), moved, case.options)["out"].double()
        assert float((again - once).norm()) <= 1e-5 * float(once.norm())

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    def test_eps_is_obeyed(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        for eps in (1e-5, 0.5):
            case = self.case(row)
            self.check(backend, spoiled(case, eps=eps), dtype, gradients=False)

    @over("ragged_c21", "neither", dtypes=("fp32", "bf16", "fp64"))
    def test_a_pixel_of_equal_channels_is_normalised_to_the_bias(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Zero variance: nothing is divided by zero, forward or backward."""
        case = self.case(row)
        x = case.tensors["x"]
        assert x is not None
        x[:, :, ::2] = 3.0
        self.check(backend, case, dtype, gradients=dtype == torch.float64)

    @over("few", dtypes=("fp64",))
    def test_pixels_do_not_mix(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(row)
        x = case.tensors["x"]
        assert x is not None
        order = torch.randperm(row.h * row.w)

        def shuffle(t: torch.Tensor) -> torch.Tensor:
            return t.flatten(2)[:, :, order].unflatten(2, (row.h, row.w))

        once = run(self.kernel(backend), case.tensors, case.options)["out"]
        again = run(self.kernel(backend), {**case.tensors, "x": shuffle(x)}, case.options)["out"]
        assert float((again - shuffle(once)).norm()) <= 1e-13 * float(once.norm())

    @over("no_norm", "one_to_three", dtypes=("fp64",))
    def test_without_norm_and_activation_it_is_a_matrix(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case = spoiled(without(self.case(row), "norm_weight", "norm_bias"), act="none")
        x, weight, bias = (case.tensors[n] for n in ("x", "weight", "bias"))
        assert x is not None and weight is not None and bias is not None
        got = run(self.kernel(backend), case.tensors, case.options)["out"]
        want = x.movedim(1, -1) @ weight.flatten(1).T + bias
        assert float((got.movedim(1, -1) - want).norm()) <= 1e-13 * float(want.norm())

    # ---------------------------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("norm", "batch"),
            ("norm", "Layer"),
            ("norm", None),
            ("act", "swish"),
            ("act", None),
            ("groups", 0),
            ("groups", -1),
            ("groups", 2.0),
            ("groups", 5),
        ],
    )
    def test_rejects_a_wrong_option(self, argument: str, value: object) -> None:
        bad = spoiled(self.good(), **{argument: value})
        self.assert_rejects(bad, argument, str(value), error=(TypeError, ValueError))

    @pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan"), "1e-6"])
    def test_rejects_a_wrong_eps(self, eps: object) -> None:
        layer = replace(shapes.rows(self.reject_row)[0], norm="layer")
        case = self.case(layer)
        good = replace(case, tensors=round_all(case.tensors, torch.float32))
        assert torch.isfinite(self.call(good)).all()
        bad = spoiled(good, eps=eps)
        self.assert_rejects(bad, "eps", str(eps), error=(TypeError, ValueError))

    def test_rejects_a_norm_and_tensors_that_do_not_belong_together(self) -> None:
        good = self.good()
        for missing in ("norm_weight", "norm_bias"):
            self.assert_rejects(without(good, missing), missing, "affine")
        self.assert_rejects(spoiled(good, norm="none"), "norm_weight", "layer")
        plain = without(spoiled(good, norm="none"), "norm_weight", "norm_bias")
        assert torch.isfinite(self.call(plain)).all()

    def test_rejects_weights_of_another_form(self) -> None:
        for shape in ((31, 21), (31, 21, 3, 3), (31, 20, 1, 1)):
            bad = self.good()
            bad.tensors["weight"] = torch.randn(shape)
            self.assert_rejects(bad, "weight", "(M, C / groups, 1, 1)", "21", str(shape))
