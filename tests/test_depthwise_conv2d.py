"""Depthwise convolution: the contract, and what only a stencil can be asked."""

from __future__ import annotations

import oracle
import pytest
import torch
from fuzz import FuzzContract
from grid import over
from numerics import Case, run
from rejects import RejectContract, spoiled
from shapes import Row
from transforms import TransformContract


class TestDepthwiseConv2d(TransformContract, RejectContract, FuzzContract):
    operator = "depthwise_conv2d"
    few = ("odd_c21_m31", "stride_2_8x15_k5", "dilated", "row_1x9", "narrow_2x31")
    traced = checked = ("odd_c21_m31", "stride_2_8x15_k5", "dilated")
    integer_rows = ("odd_c21_m31", "stride_2_13x9", "stride_2_8x15_k5", "pixel", "column_9x1")
    tiny = (
        Row("tiny", c=3, m=3, o=3, h=4, w=5, n=2),
        Row("tiny_stride_2", c=2, m=2, o=2, h=5, w=3, n=1, kernel=5, stride=2),
    )
    reject_row = "odd_c21_m31"

    # ------------------------------------------------------------------------ what it must satisfy

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    def test_a_delta_kernel_shifts_the_map(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Exactly, in every dtype: each tap in turn picks its neighbour, or zero outside."""
        case = self.case(row)
        x = case.tensors["x"]
        assert x is not None
        k = row.kernel
        for tap in range(k * k):
            weight = torch.zeros(row.m, 1, k, k, dtype=torch.float64)
            weight.view(row.m, -1)[:, tap] = 1
            inputs = {"x": x.to(dtype), "weight": weight.to(dtype)}
            got = run(self.kernel(backend), inputs, case.options)["out"]
            want = oracle.depthwise_conv2d(x.to(dtype).double(), weight, **case.options)
            assert torch.equal(got.double(), want), f"tap {divmod(tap, k)}"

    @over("few", dtypes=("fp64",))
    def test_backward_is_the_adjoint(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """<f(x), g> = <x, f'(g)> = <w, f_w'(g)>."""
        case = self.case(row)
        out = run(self.kernel(backend), case.tensors, case.options)["out"]
        grad = torch.randn_like(out)
        grads = run(self.kernel(backend), case.tensors, case.options, ["x", "weight"], grad)
        forward = float((out * grad).sum())
        scale = float(out.norm() * grad.norm())
        for name in ("x", "weight"):
            tensor = case.tensors[name]
            assert tensor is not None
            assert abs(float((tensor * grads[name]).sum()) - forward) <= 1e-12 * scale, name

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    def test_is_linear_in_powers_of_two(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(row)
        inputs = {n: t.to(dtype) for n, t in case.tensors.items() if t is not None}
        once = run(self.kernel(backend), inputs, case.options)["out"]
        for name in inputs:
            doubled = {**inputs, name: inputs[name] * 2}
            assert torch.equal(run(self.kernel(backend), doubled, case.options)["out"], once * 2)

    @over("odd_c21_m31", "narrow_31x2_k5", "kernel_7", dtypes=("fp64",))
    def test_flipping_map_and_kernel_flips_the_result(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case = self.case(row)
        for axes in ((2,), (3,), (2, 3)):
            flipped = {n: t.flip(axes) for n, t in case.tensors.items() if t is not None}
            once = run(self.kernel(backend), case.tensors, case.options)["out"]
            again = run(self.kernel(backend), flipped, case.options)["out"].flip(axes)
            assert float((again - once).norm()) <= 1e-14 * float(once.norm())

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    def test_channels_do_not_mix(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """NaN in one channel of one image stays there."""
        case = self.case(row)
        inputs = {n: t.to(dtype) for n, t in case.tensors.items() if t is not None}
        clean = run(self.kernel(backend), inputs, case.options)["out"]
        inputs["x"][-1, row.m // 2] = float("nan")
        spoilt = run(self.kernel(backend), inputs, case.options)["out"]
        touched = spoilt.isnan()
        assert touched[-1, row.m // 2].all()
        assert int(touched.sum()) == touched[-1, row.m // 2].numel()
        assert torch.equal(spoilt[~touched], clean[~touched])

    # ------------------------------------------------------------------------------- padding=None

    def test_padding_defaults_to_the_published_one(self) -> None:
        """ceil((k - s) / 2), which makes 14 -> 14 at stride 1 and 13 -> 7, 14 -> 7 at stride 2."""
        x = torch.randn(1, 2, 14, 13)
        for k, stride, padding, size in (
            (3, 1, 1, (14, 13)),
            (5, 1, 2, (14, 13)),
            (3, 2, 1, (7, 7)),
            (5, 2, 2, (7, 7)),
            (2, 1, 1, (15, 14)),
            (1, 1, 0, (14, 13)),
        ):
            weight = torch.randn(2, 1, k, k)
            arguments = Case({"x": x, "weight": weight}, {"stride": stride})
            default = self.call(arguments)
            assert default.shape[2:] == size
            assert torch.equal(default, self.call(arguments, padding=padding))

    # ---------------------------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("stride", 0),
            ("stride", -1),
            ("stride", 1.5),
            ("stride", True),
            ("stride", "1"),
            ("stride", (1, 1)),
            ("stride", None),
            ("padding", -1),
            ("padding", 0.5),
            ("padding", "same"),
            ("dilation", 0),
            ("dilation", -2),
            ("dilation", 1.0),
        ],
    )
    def test_rejects_a_wrong_number(self, argument: str, value: object) -> None:
        bad = spoiled(self.good(), **{argument: value})
        self.assert_rejects(bad, argument, repr(value), error=(TypeError, ValueError))

    def test_rejects_a_kernel_that_does_not_fit(self) -> None:
        bad = spoiled(self.good(), padding=0, dilation=7)
        self.assert_rejects(bad, "padding", "3", "7", "13 x 9")

    def test_rejects_kernels_of_another_form(self) -> None:
        for shape in ((31, 3, 3), (31, 1, 3, 5), (31, 2, 3, 3), (30, 1, 3, 3), (1, 31, 3, 3)):
            bad = self.good()
            bad.tensors["weight"] = torch.randn(shape)
            self.assert_rejects(bad, "weight", "(C, 1, K, K)", "31", str(shape))
        bad.tensors["weight"] = torch.randn(31, 1, 0, 0)
        self.assert_rejects(bad, "weight", "(31, 1, 0, 0)")
