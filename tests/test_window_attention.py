"""Window attention: the contract, and what only softmax attention in windows can be asked."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from cases import CASES, function, integers
from fuzz import FuzzContract
from grid import over, refusal
from numerics import Case, check_draws, run
from rejects import RejectContract, spoiled, without
from shapes import Row
from torch import Tensor
from transforms import TransformContract

from emo_kernels import _C, ops, reference


class TestWindowAttention(TransformContract, RejectContract, FuzzContract):
    operator = "window_attention"
    few = ("ragged_c21", "below_window", "both_windows", "post_expansion_grouped", "q_k_x")
    traced = ("below_window",)
    traced_slow = ("both_windows", "post_expansion_grouped", "whole_map", "q_k_x")
    checked = ("whole_map",)
    checked_slow = ("below_window", "both_windows", "post_expansion_grouped")
    integer_rows = ("below_window", "row_1x9", "window_1", "head_dim_1")
    tiny = (
        Row("tiny_padded", c=4, m=4, o=4, h=3, w=4, n=1, norm="layer", head_dim=2, window=3),
        Row(
            "tiny_expanded",
            c=4,
            m=6,
            o=4,
            h=2,
            w=3,
            norm="batch",
            act="gelu",
            head_dim=2,
            window=2,
            window_mode="both",
            attn_pre=False,
            grouped_v=True,
        ),
        Row(
            "tiny_q_k_x", c=3, m=3, o=3, h=2, w=2, norm="none", head_dim=3, window=0, qk_proj=False
        ),
    )
    reject_row = "post_expansion"

    def integer_case(self, row: Row) -> Case:
        """Zero queries and keys: each result is the mean of 16 integers."""
        case = integers(self.case(replace(row, norm="none", window=4, attn_pre=True)))
        for name in ("qk_weight", "qk_bias"):
            case.tensors[name] = torch.zeros_like(case.tensors[name])
        return case

    def out(self, backend: str, case: Case, **changed: Tensor | None) -> Tensor:
        """The result with some tensors exchanged."""
        return run(self.kernel(backend), {**case.tensors, **changed}, case.options)["out"]

    # ------------------------------------------------------------------------ what it must satisfy

    @over("5m_stage3", "1m_stage4", "2m_stage4_10x10", dtypes=("fp32", "fp64"))
    def test_follows_a_circular_shift(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """A map that windows divide, shifted around its edges, gives the shifted result."""
        assert row.h % row.window == row.w % row.window == 0
        case = self.case(row)
        x = case.tensors["x"]
        assert x is not None
        inputs = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
        once = run(self.kernel(backend), inputs, case.options)["out"].double()
        for shift in ((1, 0), (0, 3), (2, 5)):
            moved = {**inputs, "x": x.to(dtype).roll(shift, (2, 3))}
            again = run(self.kernel(backend), moved, case.options)["out"].double()
            bound = 1e-14 if dtype == torch.float64 else 2e-6
            assert float((again.roll((-shift[0], -shift[1]), (2, 3)) - once).norm()) <= (
                bound * float(once.norm())
            )

    @over("few", dtypes=("fp32", "fp64"))
    def test_the_bias_of_the_keys_is_dead(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(row)
        bias = case.tensors.get("qk_bias")
        if bias is None:  # q = k = x has no bias to change
            assert not row.qk_proj
            return
        inputs = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
        once = run(self.kernel(backend), inputs, case.options)["out"].double()
        changed = bias.clone()
        changed[row.c :] = 3 * torch.randn(row.c, dtype=torch.float64)
        inputs["qk_bias"] = changed.to(dtype)
        again = run(self.kernel(backend), inputs, case.options)["out"].double()
        bound = 1e-13 if dtype == torch.float64 else 1e-5
        assert float((again - once).norm()) <= bound * float(once.norm())
        inputs["qk_bias"] = changed.flip(0).to(dtype)  # the queries' half is alive
        other = run(self.kernel(backend), inputs, case.options)["out"].double()
        assert float((other - once).norm()) > 1e-3 * float(once.norm())

    @over("ragged_c21", "below_window", "5m_stage3", dtypes=("fp64",))
    def test_zero_queries_average_the_window_with_its_padding(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Padded pixels are keys with value zero: they dilute the mean."""
        case = self.case(replace(row, norm="none"))
        case.tensors["qk_weight"] = torch.zeros(2 * row.c, row.c, 1, 1, dtype=torch.float64)
        got, x = self.out(backend, case), case.tensors["x"]
        assert x is not None
        n1, n2 = -(-row.h // row.window), -(-row.w // row.window)
        for i in range(min(n1, row.h)):
            for j in range(min(n2, row.w)):
                window = x[:, :, i::n1, j::n2]
                mean = window.sum((2, 3), keepdim=True) / row.window**2
                error = got[:, :, i::n1, j::n2] - mean
                assert float(error.abs().max()) <= 1e-14 * float(window.abs().max())

    @over("whole_map", "5m_stage3", "post_expansion", dtypes=("fp32", "fp64"))
    def test_weights_of_the_average_sum_to_one(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """Constant values stay constant, whatever the attention."""
        case = self.case(replace(row, attn_pre=False, act="none", bias=True))
        weight, bias = case.tensors["v_weight"], case.tensors["v_bias"]
        assert weight is not None and bias is not None
        inputs = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
        inputs["v_weight"] = torch.zeros_like(weight, dtype=dtype)
        got = run(self.kernel(backend), inputs, case.options)["out"].double()
        want = bias.to(dtype).double().reshape(1, -1, 1, 1).expand_as(got)
        bound = 1e-14 if dtype == torch.float64 else 1e-6
        assert float((got - want).norm()) <= bound * float(want.norm())

    @over("both_windows", dtypes=("fp64",))
    def test_both_is_the_sum_of_grid_and_block(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        case = self.case(row)
        both, grid, block = (
            run(self.kernel(backend), case.tensors, {**case.options, "window_mode": mode})["out"]
            for mode in ("both", "grid", "block")
        )
        assert float((both - grid - block).norm()) <= 1e-14 * float(both.norm())
        assert float((grid - block).norm()) > 1e-2 * float(both.norm())

    @over("5m_stage3", "whole_map", dtypes=("fp64",))
    def test_orders_agree_where_they_must(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """Linear values grouped by head commute with attention: rows of the softmax sum to 1."""
        m = 2 * row.c
        case = self.case(replace(row, m=m, attn_pre=False, grouped_v=True, act="none"))
        reason = refusal(self.operator, backend, case, dtype)
        if reason is not None:
            pytest.skip(f"{backend} refuses it: {reason}")
        after = self.out(backend, case)
        names = ("v_weight", "v_bias")
        before = run(
            self.kernel(backend),
            without(case, *names).tensors,
            {n: o for n, o in case.options.items() if n not in ("v_act", "v_groups")},
        )["out"]
        weight, bias = (case.tensors[n] for n in names)
        assert weight is not None
        padded = row.h % row.window or row.w % row.window if row.window > 0 else False
        assert not padded, "padding has value bias after the convolution and zero before it"
        want = torch.nn.functional.conv2d(before, weight, bias, groups=row.heads)
        assert float((after - want).norm()) <= 1e-13 * float(want.norm())

    @over("few", dtypes=("fp32", "fp64"))
    def test_images_do_not_mix(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(replace(row, n=3))
        inputs = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
        clean = run(self.kernel(backend), inputs, case.options)["out"]
        assert inputs["x"] is not None
        inputs["x"][1] = float("nan")
        spoilt = run(self.kernel(backend), inputs, case.options)["out"]
        assert spoilt[1].isnan().all()
        assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])

    # ---------------------------------------------------------------------------------- bad input

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            ("head_dim", 0),
            ("head_dim", -8),
            ("head_dim", 7),
            ("head_dim", 8.0),
            ("head_dim", None),
            ("head_dim", True),
            ("window_size", 7.0),
            ("window_size", "7"),
            ("window_size", None),
            ("window_size", (7, 7)),
            ("window_mode", "strided"),
            ("window_mode", None),
            ("norm", "batch"),
            ("v_act", "swish"),
            ("v_groups", 0),
            ("v_groups", 5),
            ("eps", -1.0),
            ("eps", float("nan")),
        ],
    )
    def test_rejects_a_wrong_option(self, argument: str, value: object) -> None:
        bad = spoiled(self.good(), **{argument: value})
        self.assert_rejects(bad, argument, str(value), error=(TypeError, ValueError))

    def test_rejects_heads_that_do_not_divide(self) -> None:
        """As attn_pre off in the smallest published model: 8 heads, 588 channels."""
        bad = self.good()
        bad.tensors |= {"v_weight": torch.randn(49, 24, 1, 1), "v_bias": torch.randn(49)}
        message = self.assert_rejects(bad, "M", "heads", "3", "49")
        assert "attn_pre" in message
        self.assert_rejects(spoiled(self.good(), head_dim=5), "head_dim", "24", "5")

    def test_rejects_tensors_that_do_not_belong_together(self) -> None:
        good = self.good()
        self.assert_rejects(without(good, "qk_weight"), "qk_bias", "qk_weight")
        self.assert_rejects(without(good, "v_weight"), "v_bias", "v_weight")
        self.assert_rejects(without(good, "v_weight", "v_bias"), "v_act", "v_weight")
        self.assert_rejects(spoiled(good, norm="none"), "norm_weight")
        self.assert_rejects(without(spoiled(good, norm="affine"), "norm_bias"), "norm_bias")

    def test_a_window_of_zero_or_less_is_the_whole_map(self) -> None:
        good = spoiled(self.good(), window_size=0)
        assert torch.equal(self.call(good), self.call(spoiled(good, window_size=-1)))


@pytest.mark.parametrize("isa", _C.available_isas())
def test_a_window_of_padding(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """61 of 64 keys score the same: a long chain of equal terms would round one way."""
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    row = Row("padding", c=16, m=16, o=16, h=1, w=17, n=1, head_dim=16, window=8, qk_proj=False)
    cases = [CASES["window_attention"](row, seed=seed) for seed in range(8)]
    kernel = function("window_attention", ops.window_attention, backend="cpu")
    plain = function("window_attention", reference.window_attention)
    check_draws(kernel, plain, cases, torch.float32, oracle=oracle.window_attention, name=isa)
