"""The block as a module: switches, layers, memory formats, hooks, and graphs taken of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from block_kinds import DOUBLE, KINDS, randomise, relative
from torch import nn

from emo_kernels.nn import DropPath, LayerNorm2d, get_act, get_norm, iRMB


class TestSwitches:
    def test_positional_and_defaults(self) -> None:
        block = iRMB(64, 64)
        assert (block.num_head, block.dim_head, block.window_size, block.attn_pre) == (
            1,
            64,
            7,
            False,
        )
        assert isinstance(block.v.act, nn.ReLU) and isinstance(block.norm, nn.BatchNorm2d)
        assert block.conv_local.conv.kernel_size == (3, 3) and block.qk.conv.bias is None
        assert block.has_skip and isinstance(block.drop_path, nn.Identity)

    def test_order_of_arguments(self) -> None:
        by_name = iRMB(8, 8, exp_ratio=2.0, norm_layer="ln_2d", act_layer="gelu", dim_head=4)
        by_place = iRMB(8, 8, True, True, 2.0, "ln_2d", "gelu", True, 3, 1, 1, 0.0, 4)
        assert str(by_name) == str(by_place)

    @pytest.mark.parametrize(
        ("ratio", "se_ratio", "mid", "reduced"),
        [(1.0, 0.25, 10, 2), (1.4, 0.25, 14, 4), (1.35, 1.0, 13, 13)],
    )
    def test_rounding(self, ratio: float, se_ratio: float, mid: int, reduced: int) -> None:
        """int(C ratio) truncates, round(M se_ratio) rounds halves to even."""
        block = iRMB(10, 10, exp_ratio=ratio, se_ratio=se_ratio, attn_s=False)
        assert block.v.conv.out_channels == mid
        assert block.se.conv_reduce.out_channels == reduced

    @pytest.mark.parametrize(
        ("k", "s", "padding"), [(1, 1, 0), (3, 1, 1), (5, 1, 2), (3, 2, 1), (5, 2, 2), (2, 1, 1)]
    )
    def test_padding(self, k: int, s: int, padding: int) -> None:
        block = iRMB(4, 4, attn_s=False, dw_ks=k, stride=s, has_skip=False)
        assert block.conv_local.conv.padding == (padding, padding)

    @pytest.mark.parametrize("options", [{"dim_out": 6}, {"stride": 2}, {"has_skip": False}])
    def test_without_skip_there_is_no_drop_path(self, options: dict[str, Any]) -> None:
        block = iRMB(**{"dim_in": 4, "dim_out": 4, "attn_s": False, "drop_path": 0.9, **options})
        assert not block.has_skip and isinstance(block.drop_path, nn.Identity)

    def test_drop_path_draws_one_number_for_each_sample(self) -> None:
        x = torch.randn(64, 3, 2, 2)
        drop = DropPath(0.25)
        torch.manual_seed(7)
        got = drop(x)
        torch.manual_seed(7)
        want = x * x.new_empty((64, 1, 1, 1)).bernoulli_(0.75).div_(0.75)
        assert torch.equal(got, want)
        kept = got.abs().sum((1, 2, 3)) > 0
        assert 30 < int(kept.sum()) < 60
        torch.testing.assert_close(got[kept], x[kept] / 0.75)
        assert torch.equal(drop.eval()(x), x)

    def test_no_depthwise_convolution_is_the_expanded_map_once(self) -> None:
        block = randomise(iRMB(4, 4, attn_s=False, dw_ks=0, exp_ratio=2.0))
        x = torch.randn(1, 4, 3, 3, **DOUBLE)
        want = x + block.proj(block.v(block.norm(x)))
        torch.testing.assert_close(block(x), want)

    def test_attention_behind_the_convolution(self) -> None:
        """A of the normalised input acts on u + c."""
        block = randomise(
            iRMB(8, 8, dim_head=4, window_size=0, op_order="conv_attn", exp_ratio=2.0)
        )
        x = torch.randn(1, 8, 4, 5, **DOUBLE)
        h = block.norm(x)
        q, k = block.qk(h).reshape(1, 2, 2, 4, 20).transpose(-1, -2).unbind(1)
        maps = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        u = block.v(h)
        y = (u + block.conv_local(u)).reshape(1, 2, 8, 20).transpose(-1, -2)
        y = (maps @ y).transpose(-1, -2).reshape(1, 16, 4, 5)
        torch.testing.assert_close(block(x), x + block.proj(y))

    def test_layer_scale(self) -> None:
        block = randomise(iRMB(4, 4, attn_s=False, ls_value=1e-6))
        x = torch.randn(1, 4, 5, 5, **DOUBLE)
        y = block(x)
        block.ls.gamma.data.mul_(3)
        torch.testing.assert_close(block(x) - x, 3 * (y - x))
        assert (
            "ls.gamma" in block.state_dict() and iRMB(4, 4, dim_head=4).ls.__class__ is nn.Identity
        )

    @pytest.mark.parametrize("name", ["none", "bn_2d", "ln_2d", "gn", "in_2d"])
    def test_norms(self, name: str) -> None:
        x = torch.randn(2, 6, 5, 4, **DOUBLE) * 1e-3 + 1
        got = get_norm(name, 6).double()(x)
        axes = {"bn_2d": (0, 2, 3), "ln_2d": (1,), "in_2d": (2, 3)}.get(name)
        if axes:
            mean, var = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
            torch.testing.assert_close(got, (x - mean) / (var + 1e-6).sqrt())
        elif name == "gn":
            groups = x.reshape(2, 2, 3, 5, 4)
            mean = groups.mean((2, 3, 4), keepdim=True)
            var = groups.var((2, 3, 4), keepdim=True, unbiased=False)
            want = (groups - mean) / (var + 1e-6).sqrt()
            torch.testing.assert_close(got, want.reshape(x.shape))
        else:
            assert got is x

    def test_gelu_is_exact(self) -> None:
        x = torch.linspace(-3, 3, 50, **DOUBLE)
        want = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        torch.testing.assert_close(get_act("gelu")(x), want)

    def test_layer_norm_keeps_channels_last(self) -> None:
        x = torch.randn(2, 8, 4, 5).to(memory_format=torch.channels_last)
        assert LayerNorm2d(8)(x).is_contiguous(memory_format=torch.channels_last)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_memory_formats_agree(self, layout: torch.memory_format) -> None:
        block = randomise(iRMB(8, 8, dim_head=4, window_size=3, norm_layer="ln_2d", dw_ks=5))
        x = torch.randn(2, 8, 7, 5, **DOUBLE)
        want = block(x)
        wide = torch.full((2, 10, 9, 5), torch.nan, **DOUBLE).to(memory_format=layout)
        wide[:, 1:9, 1:8] = x
        torch.testing.assert_close(block(wide[:, 1:9, 1:8]), want, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("kind", KINDS)
    def test_batch_of_none_copy_and_pickle(self, kind: str) -> None:
        block = iRMB(4, 4, dim_head=2, window_size=2, **KINDS[kind]).eval()
        x = torch.randn(1, 4, 5, 3)
        y = block(x)
        assert block(x[:0]).shape == (0, *y.shape[1:])
        assert torch.equal(copy.deepcopy(block)(x), y)
        assert torch.equal(pickle.loads(pickle.dumps(block))(x), y)

    def test_hooks_on_children_fire(self) -> None:
        block = iRMB(8, 8, dim_head=4, se_ratio=0.5, drop_path=0.1, attn_drop=0.1, ls_value=1.0)
        fired = set()
        for name, child in block.named_children():
            child.register_forward_hook(lambda *args, name=name: fired.add(name))
        block(torch.randn(2, 8, 5, 5))
        assert fired == {name for name, _ in block.named_children()}

    def test_autocast(self) -> None:
        block = iRMB(8, 8, dim_head=4, norm_layer="ln_2d").eval()
        x = torch.randn(1, 8, 9, 9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x)
        assert relative(y.float(), block(x)) < 0.05


class TestTracing:
    """Graphs taken at one size, run at another."""

    options = {"dim_head": 2, "window_size": 3}
    x, other = torch.randn(2, 4, 7, 8), torch.randn(3, 4, 10, 4)
    kinds = pytest.mark.parametrize(
        "kind",
        [
            "conv",
            "attention_pre",
            pytest.param("attention_post", marks=pytest.mark.slow),
            pytest.param("attention_both", marks=pytest.mark.slow),
            pytest.param("attention_last", marks=pytest.mark.slow),
        ],
    )

    def block(self, kind: str) -> nn.Module:
        return iRMB(4, 4, **{**self.options, **KINDS[kind]}).eval().requires_grad_(False)

    @kinds
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
    def test_jit_trace(self, kind: str) -> None:
        block = self.block(kind)
        traced = torch.jit.trace(block, self.x)
        for x in (self.x, self.other):
            torch.testing.assert_close(traced(x), block(x))

    @kinds
    def test_fx(self, kind: str) -> None:
        block = self.block(kind)
        traced = torch.fx.symbolic_trace(block)
        for x in (self.x, self.other):
            torch.testing.assert_close(traced(x), block(x))

    @kinds
    def test_compile(self, kind: str) -> None:
        block = self.block(kind)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
        for x in (self.x, self.other):
            torch.testing.assert_close(compiled(x), block(x))

    @kinds
    def test_export(self, kind: str) -> None:
        block = self.block(kind)
        dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        program = torch.export.export(block, (self.x,), dynamic_shapes=(dynamic,))
        x = torch.randn(5, 4, 13, 11)  # neither side divides into windows, as in the example
        torch.testing.assert_close(program.module()(x), block(x))
