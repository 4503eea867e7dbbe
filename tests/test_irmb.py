"""The whole block: the contract, and its agreement with the operators it is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import integers
from fuzz import FuzzContract
from grid import over
from numerics import Case, round_all, run
from rejects import RejectContract, spoiled, without
from shapes import Row, rows
from transforms import TransformContract

from emo_kernels import ops
from emo_kernels.spec import IRMBSpec, IRMBWeights


class TestIRMB(TransformContract, RejectContract, FuzzContract):
    operator = "irmb"
    few = (
        "odd_c21_m31",
        "stride_2_13x9",
        "excite_with_skip",
        "below_window",
        "conv_then_attention",
        "post_expansion_grouped",
        "unexpanded",
        "attention_only",
    )
    traced = ("odd_c21_m31", "excite_with_skip", "below_window")
    traced_slow = ("conv_then_attention", "post_expansion_grouped", "dilated")
    checked = ("odd_c21_m31", "excite_with_skip")
    checked_slow = ("below_window", "conv_then_attention")
    integer_rows = ("unexpanded", "one_to_three")
    batch_orders_sums = ("cuda",)
    integer_gradients = False  # they hold 1 / sqrt(var + eps)
    tiny = (
        Row("tiny_conv", c=3, m=4, o=3, h=3, w=2, n=1, se=2),
        Row("tiny_stride_2", c=2, m=3, o=4, h=3, w=4, n=1, stride=2, norm="layer", skip=False),
        Row(
            "tiny_attention",
            c=4,
            m=6,
            o=4,
            h=3,
            w=2,
            n=1,
            norm="layer",
            act="gelu",
            head_dim=2,
            window=2,
            gamma=True,
        ),
    )
    reject_row = "attention_and_excite"

    def integer_case(self, row: Row) -> Case:
        """silu is exact at zero alone: the stencil's weights and shifts are zero."""
        case = integers(self.case(row), largest=1)
        for name in ("dw_weight", "bn_bias", "bn_mean"):
            case.tensors[name] = torch.zeros_like(case.tensors[name])
        case.tensors["bn_var"] = torch.ones(row.m, dtype=torch.float64)
        return case

    # ------------------------------------------------------------------------ what it must satisfy

    @over("few", dtypes=("fp32", "fp64"))
    def test_images_do_not_mix(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(replace(row, n=3))
        inputs = round_all(case.tensors, dtype)
        clean = run(self.kernel(backend), inputs, case.options)["out"]
        assert inputs["x"] is not None
        inputs["x"][1] = float("nan")
        spoilt = run(self.kernel(backend), inputs, case.options)["out"]
        assert spoilt[1].isnan().all()
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])

    @over("odd_c21_m31", "unexpanded", "below_window", dtypes=("fp32", "fp64"))
    def test_a_zero_projection_leaves_the_input(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case = self.case(row)
        inputs = round_all(case.tensors, dtype)
        inputs["proj_weight"] = torch.zeros(row.o, row.m, 1, 1, dtype=dtype)
        assert row.skip and inputs["x"] is not None
        assert torch.equal(run(self.kernel(backend), inputs, case.options)["out"], inputs["x"])

    @over("odd_c21_m31", "excite_with_skip", "below_window", dtypes=("fp32", "fp64"))
    def test_batch_norms_may_be_folded_into_their_statistics(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """(mean, var, weight, bias) and the equal affine with mean 0 and variance 1 - eps."""
        case = self.case(row)
        t, spec = dict(case.tensors), case.options["spec"]
        mean, var, weight, bias = (t[f"bn_{p}"] for p in ("mean", "var", "weight", "bias"))
        assert mean is not None and var is not None and weight is not None and bias is not None
        scale = weight / (var + spec.bn_eps).sqrt()
        t |= {"bn_mean": torch.zeros_like(mean), "bn_var": torch.ones_like(var) - spec.bn_eps}
        t |= {"bn_weight": scale, "bn_bias": bias - mean * scale}
        once = run(self.kernel(backend), round_all(case.tensors, dtype), case.options)["out"]
        again = run(self.kernel(backend), round_all(t, dtype), case.options)["out"]
        bound = 1e-13 if dtype == torch.float64 else 1e-6
        assert float((again - once).double().norm()) <= bound * float(once.double().norm())

    @over("odd_c21_m31", "excite_with_skip", dtypes=("fp32", "fp64"))
    def test_weights_are_read_at_every_call(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Nothing is remembered of a weight that has since been changed in place."""
        case = self.case(row)
        inputs = round_all(case.tensors, dtype)
        kernel = self.kernel(backend)
        run(kernel, inputs, case.options)
        for name in case.tensors:
            tensor = inputs[name]
            if name == "x" or tensor is None:
                continue
            tensor.mul_(1.5)
            fresh = round_all(inputs, dtype)
            got = run(kernel, inputs, case.options)["out"]
            assert torch.equal(got, run(kernel, fresh, case.options)["out"]), name

    # ---------------------------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("norm", "affine"),
            ("act", "swish"),
            ("head_dim", 7),
            ("head_dim", -8),
            ("head_dim", 8.0),
            ("window_size", 7.5),
            ("window_mode", "strided"),
            ("op_order", "conv"),
            ("v_groups", 0),
            ("v_groups", 5),
            ("stride", 0),
            ("stride", 1.5),
            ("padding", -1),
            ("dilation", 0),
            ("norm_eps", -1.0),
            ("bn_eps", 0.0),
            ("bn_eps", float("nan")),
        ],
    )
    def test_rejects_a_wrong_switch(self, argument: str, value: object) -> None:
        bad = spoiled(self.good(), **{argument: value})
        self.assert_rejects(bad, argument, str(value), error=(TypeError, ValueError))

    def test_rejects_a_skip_that_does_not_fit(self) -> None:
        row = rows("stride_2_13x9")[0]
        case = self.case(row)
        good = replace(case, tensors=round_all(case.tensors, torch.float32))
        assert torch.isfinite(self.call(good)).all()
        message = self.assert_rejects(spoiled(good, skip=True), "skip", "(21, 13, 9)", "(33, 7, 5)")
        assert "skip=False" in message

    def test_rejects_heads_that_do_not_divide(self) -> None:
        bad = self.good()
        bad.tensors["v_weight"] = torch.randn(49, 24, 1, 1)
        self.assert_rejects(spoiled(bad, attn_pre=False), "M", "heads", "3", "49")

    @pytest.mark.parametrize(
        ("missing", "named"),
        [
            ("proj_weight", "proj_weight"),
            ("norm_mean", "norm_mean"),
            ("norm_var", "norm_var"),
            ("bn_mean", "bn_mean"),
            ("bn_var", "bn_var"),
            ("qk_weight", "qk_weight"),
            ("v_weight", "v_weight"),
            ("se_reduce_weight", "se_reduce_weight"),
            ("se_expand_weight", "se_expand_weight"),
        ],
    )
    def test_rejects_a_missing_tensor(self, missing: str, named: str) -> None:
        """Of a group whose other tensors were given: nothing is left out in silence."""
        self.assert_rejects(without(self.good(), missing), named, "None")

    def test_rejects_weights_and_spec_of_another_type(self) -> None:
        good = self.good()
        tensors = dict(good.tensors)
        x, spec = tensors.pop("x"), good.options["spec"]
        weights = IRMBWeights(**tensors)
        assert torch.isfinite(ops.irmb(x, weights, spec)).all()
        for wrong in (tensors, tuple(weights), None):
            with pytest.raises((TypeError, ValueError), match=r"irmb: weights .*IRMBWeights"):
                ops.irmb(x, wrong, spec)
        for wrong in (spec._asdict(), tuple(spec), str(spec), None):
            with pytest.raises((TypeError, ValueError), match=r"irmb: spec .*IRMBSpec"):
                ops.irmb(x, weights, wrong)

    def test_the_torch_op_takes_the_switches_in_their_order(self) -> None:
        arguments = torch.ops.emo_kernels.irmb.default._schema.arguments
        names = [argument.name for argument in arguments]
        assert names == ["x", "weights", *IRMBSpec._fields, "backend"]
