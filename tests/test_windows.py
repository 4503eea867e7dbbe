"""Attention inside windows: the index formula, padding, heads, and what commutes with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_kinds import DOUBLE, randomise, relative
from torch import nn

from emo_kernels.nn import iRMB
from emo_kernels.reference.window_attention import Windows, merge, pad_to_windows, partition


class TestWindows:
    @pytest.mark.parametrize(
        ("height", "width", "size"),
        [(14, 14, 7), (10, 13, 7), (8, 8, 4), (5, 20, 3), (6, 9, 0), (1, 1, 7), (7, 7, 7)],
    )
    @pytest.mark.parametrize("mode", ["grid", "block"])
    def test_formula(self, height: int, width: int, size: int, mode: str) -> None:
        """Feed pixel indices: row a n1 + i and column b n2 + j, or tiles; 0 marks padding."""
        pixels = torch.arange(1, 2 * height * width + 1).reshape(2, 1, height, width)
        windows = Windows.of(pixels, size)
        wh, ww, n1, n2 = windows
        padded = pad_to_windows(pixels, windows)
        tokens = partition(padded, 1, windows, mode)
        assert tokens.shape == (2 * n1 * n2, wh * ww, 1)
        for n, i, j in itertools.product(range(2), range(n1), range(n2)):
            window = tokens[n * n1 * n2 + i * n2 + j, :, 0].reshape(wh, ww)
            for a, b in itertools.product(range(wh), range(ww)):
                row, col = (a * n1 + i, b * n2 + j) if mode == "grid" else (i * wh + a, j * ww + b)
                inside = row < height and col < width
                want = int(pixels[n, 0, row, col]) if inside else 0
                assert int(window[a, b]) == want
        assert torch.equal(merge(tokens, 2, 1, windows, mode), padded)

    def test_padding_is_spread_over_all_grid_windows(self) -> None:
        ones = torch.ones(1, 1, 10, 13)
        windows = Windows.of(ones, 7)
        tokens = partition(pad_to_windows(ones, windows), 1, windows, "grid")
        assert (tokens == 0).sum((1, 2)).tolist() == [14, 19, 14, 19]

    def test_heads_are_contiguous_channels(self) -> None:
        x = torch.arange(6.0).reshape(1, 6, 1, 1)
        tokens = partition(x, 3, Windows(1, 1, 1, 1), "grid")
        assert tokens[:, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert torch.equal(merge(tokens, 1, 3, Windows(1, 1, 1, 1), "grid"), x)

    def test_one_window_is_torch_attention_over_the_map(self) -> None:
        """The block's attention against torch's, on a map that is one window."""
        block = randomise(iRMB(8, 8, norm_in=False, dim_head=4, qkv_bias=True, attn_pre=True))
        x = torch.randn(2, 8, 5, 5, **DOUBLE)
        block.window_size = 5
        q, k = block.qk(x).reshape(2, 2, 2, 4, 25).transpose(-1, -2).unbind(1)
        v = x.reshape(2, 2, 4, 25).transpose(-1, -2)
        want = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        got = block._attend_over(x, x)
        torch.testing.assert_close(got, want.reshape(2, 8, 5, 5), rtol=1e-12, atol=1e-12)

    def test_both_is_the_sum_of_grid_and_block(self) -> None:
        block = randomise(iRMB(8, 8, dim_head=4, window_size=3, attn_pre=False, exp_ratio=2.0))
        x = torch.randn(1, 8, 8, 7, **DOUBLE)
        u = {}
        for mode in ("grid", "block", "both"):
            block.window_mode = mode
            u[mode] = block._attend_and_expand(x)
        torch.testing.assert_close(u["both"], u["grid"] + u["block"])
        assert relative(u["grid"], u["block"]) > 0.01

    def test_window_size_zero_is_the_whole_map(self) -> None:
        block = randomise(iRMB(8, 8, dim_head=4, window_size=0, qkv_bias=True))
        x = torch.randn(1, 8, 6, 6, **DOUBLE)
        whole = block(x)
        block.window_size = 6
        torch.testing.assert_close(block(x), whole)

    def test_k_bias_has_no_influence(self) -> None:
        block = randomise(
            iRMB(12, 12, dim_head=4, window_size=4, qkv_bias=True, norm_layer="ln_2d")
        )
        x = torch.randn(2, 12, 7, 9, **DOUBLE)
        y = block(x)
        y.square().sum().backward()
        q_half, k_half = block.qk.conv.bias.grad.chunk(2)
        assert k_half.abs().max() < 1e-12 * q_half.abs().max()
        with torch.no_grad():
            block.qk.conv.bias[12:] += torch.randn(12, **DOUBLE)
        torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


class TestOrderOfAttentionAndExpansion:
    """Attention acts on pixels, the 1x1 convolution on channels: when do they commute?"""

    @pytest.mark.parametrize(
        ("heads", "act", "v_group", "bias", "drop", "equal"),
        [
            (3, "none", True, True, 0.0, True),
            (3, "none", True, False, 0.0, True),
            (1, "none", False, True, 0.0, True),
            (3, "none", False, True, 0.0, False),
            (1, "gelu", False, True, 0.0, False),
            (3, "gelu", True, True, 0.0, False),
            (3, "silu", False, True, 0.0, False),
            (3, "none", True, True, 0.3, False),
            (3, "none", True, False, 0.3, True),
        ],
    )
    def test_commutation(
        self, heads: int, act: str, v_group: bool, bias: bool, drop: float, equal: bool
    ) -> None:
        block = randomise(
            iRMB(
                24,
                24,
                norm_in=False,
                act_layer=act,
                exp_ratio=2.0,
                dim_head=24 // heads,
                window_size=4,
                qkv_bias=bias,
                v_group=v_group,
                attn_drop=drop,
            )
        )
        block.attn_drop.train()
        x = torch.randn(2, 24, 9, 8, **DOUBLE)
        u = []
        for attn_pre in (True, False):
            block.attn_pre = attn_pre
            torch.manual_seed(5)
            u.append(block._attend_and_expand(x))
        difference = relative(u[0], u[1])
        assert difference < 1e-14 if equal else difference > 0.01
