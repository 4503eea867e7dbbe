"""Layer norm, mean over pixels, linear head: the contract, and what only a tail can be asked."""

from __future__ import annotations

import pytest
import torch
from fuzz import FuzzContract
from grid import over
from numerics import run
from rejects import RejectContract, spoiled, without
from shapes import Row
from transforms import TransformContract


class TestNormPoolLinear(TransformContract, RejectContract, FuzzContract):
    operator = "norm_pool_linear"
    few = ("head_small", "head_21x3x5_no_bias", "head_one_output")
    integer_rows = ("head_one_channel",)  # others take the root of a variance
    traced = checked = ("head_small", "head_21x3x5_no_bias")
    tiny = (
        Row("tiny_head", c=3, m=3, o=4, h=2, w=3, n=2, norm="layer", skip=False),
        Row("tiny_bare_head", c=2, m=2, o=1, h=1, w=2, n=1, norm="none", bias=False, skip=False),
    )
    reject_row = "head_small"

    # ------------------------------------------------------------------------ what it must satisfy

    @over("few", dtypes=("fp32", "fp64", "bf16"))
    def test_each_vector_may_be_absent(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(row)
        for absent in (("bias",), ("norm_weight",), ("norm_bias", "bias")):
            here = [name for name in absent if name in case.tensors]
            self.check(backend, without(case, *here), dtype, name=f"without {here}")

    @over("few", dtypes=("fp32", "fp64", "bf16"))
    def test_eps_is_obeyed(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        for eps in (1e-5, 0.5):
            self.check(backend, spoiled(self.case(row), eps=eps), dtype, gradients=False)

    @over("head_small", dtypes=("fp32", "fp64"))
    def test_the_order_of_pixels_and_a_common_offset_change_nothing(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case, kernel = self.case(row), self.kernel(backend)
        tensors = {name: t.to(dtype) for name, t in case.tensors.items() if t is not None}
        want = run(kernel, tensors, case.options)["out"]
        x = tensors["x"]
        for other in (x.flip(2, 3), x.transpose(2, 3), x + 8.0):
            got = run(kernel, {**tensors, "x": other}, case.options)["out"]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

    # ---------------------------------------------------------------------------------- bad input

    def test_rejects_weights_of_another_form(self) -> None:
        for shape in ((100, 47), (100,), (100, 48, 1, 1), (0, 48)):
            bad = self.good()
            bad.tensors["weight"] = torch.randn(shape)
            self.assert_rejects(bad, "weight", "(O, C)", str(shape))

    @pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), "1e-6"])
    def test_rejects_a_wrong_eps(self, eps: object) -> None:
        self.assert_rejects(spoiled(self.good(), eps=eps), "eps", error=(TypeError, ValueError))
