"""Dense convolution with norm and activation: the contract, and what only a stem can be asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import integers
from fuzz import FuzzContract
from grid import over
from numerics import Case, Layouts, run
from rejects import RejectContract, spoiled, without
from shapes import Row
from torch import Tensor
from transforms import TransformContract


class TestConvNormAct(TransformContract, RejectContract, FuzzContract):
    operator = "conv_norm_act"
    few = ("stem_small", "stem_no_norm", "stem_grey_k5_dilated", "stem_k7_o21")
    traced = checked = ("stem_small", "stem_no_norm", "stem_grey_k5_dilated")
    integer_rows = ("stem_small", "stem_patches_4x4", "stem_one_pixel", "stem_pointwise")
    tiny = (
        Row("tiny_stem", c=2, m=3, o=3, h=4, w=5, n=2, stride=2, act="silu"),
        Row("tiny_bare_stem", c=1, m=2, o=2, h=3, w=3, n=1, norm="none", act="gelu"),
    )
    reject_row = "stem_small"

    def integer_case(self, row: Row) -> Case:
        """Without the norm, whose square root no integers keep exact."""
        return integers(self.case(replace(row, act="relu", norm="none")), largest=1)

    # ------------------------------------------------------------------------ what it must satisfy

    @over("few", dtypes=("fp32", "fp64", "bf16"))
    def test_the_norm_is_an_affine_of_the_convolution(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Each of bias, affine and statistics present or absent."""
        case = self.case(row)
        for absent in (
            (),
            ("bias",),
            ("norm_weight",),
            ("norm_bias", "bias"),
            ("norm_weight", "norm_bias", "norm_mean", "norm_var"),
        ):
            here = [name for name in absent if name in case.tensors]
            self.check(backend, without(case, *here), dtype, name=f"without {here}")

    @over("few", dtypes=("fp32", "fp64", "bf16"))
    def test_vectors_may_be_strided(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """torch's own gradient of a batch norm is wrong then, on a channels_last map."""
        layouts = Layouts(maps="channels_last", weights="strided", grad="channels_last")
        self.check(backend, self.case(row), dtype, layouts=layouts)

    @over("stem_small", "stem_no_bias", dtypes=("fp32", "fp64", "bf16"))
    def test_eps_is_obeyed(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        for eps in (1e-5, 0.5):
            self.check(backend, spoiled(self.case(row), eps=eps), dtype, gradients=False)

    @over("few", dtypes=("fp32", "fp64", "bf16"))
    def test_a_delta_kernel_shifts_the_map(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Exactly: each tap of each channel in turn picks its neighbour, or zero outside."""
        case = self.case(row)
        x = case.tensors["x"]
        assert x is not None
        k, p = row.kernel, row.padding
        field = torch.nn.functional.pad(x.to(dtype), (p, p, p, p))
        h, w = row.output_size
        for tap in range(row.c * k * k):
            c, a, b = tap // (k * k), tap // k % k * row.dilation, tap % k * row.dilation
            weight = torch.zeros(row.o, row.c * k * k, dtype=dtype)
            weight[:, tap] = 1
            inputs: dict[str, Tensor | None] = {"x": x.to(dtype)}
            inputs["weight"] = weight.view(row.o, row.c, k, k)
            options = {**case.options, "act": "none"}
            got = run(self.kernel(backend), inputs, options)["out"]
            want = field[:, c, a :: row.stride, b :: row.stride][:, None, :h, :w]
            assert torch.equal(got, want.expand_as(got)), f"tap {tap}"

    # ---------------------------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("stride", 0), ("stride", True), ("padding", -1), ("padding", "same"), ("dilation", 1.0)],
    )
    def test_rejects_a_wrong_number(self, argument: str, value: object) -> None:
        bad = spoiled(self.good(), **{argument: value})
        self.assert_rejects(bad, argument, repr(value), error=(TypeError, ValueError))

    def test_rejects_a_kernel_that_does_not_fit(self) -> None:
        self.assert_rejects(spoiled(self.good(), padding=0, dilation=10), "padding", "19 x 22")

    def test_rejects_half_a_norm(self) -> None:
        self.assert_rejects(without(self.good(), "norm_var"), "norm_var", "None")
        bad = without(self.good(), "norm_mean", "norm_var")
        self.assert_rejects(bad, "norm_weight", "norm_mean", "None")

    def test_rejects_unknown_activations(self) -> None:
        self.assert_rejects(spoiled(self.good(), act="tanh"), "act", "'tanh'", "silu")

    def test_rejects_kernels_of_another_form(self) -> None:
        for shape in ((24, 3, 3), (24, 3, 3, 5), (24, 4, 3, 3), (0, 3, 3, 3)):
            bad = self.good()
            bad.tensors["weight"] = torch.randn(shape)
            self.assert_rejects(bad, "weight", "(O, C, K, K)", str(shape))
