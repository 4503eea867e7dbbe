"""What modules refuse, and what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from emo_kernels.nn import DropPath, MetaMobileBlock, get_act, get_norm, iRMB


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"dim_head": 5}, "dim_in = 12, dim_head = 5; the nearest divisor is"),
            ({"dim_head": 0}, "dim_head must be an integer >= 1"),
            ({"dim_head": 4, "exp_ratio": 1.4}, "M = 16 expanded.*3 heads.*attn_pre to True"),
            ({"dim_head": 4, "exp_ratio": 1.4, "attn_pre": True, "v_group": True}, "divisible"),
            ({"dim_head": 4, "op_order": "conv_attn", "stride": 2}, "needs stride 1, got 2"),
            ({"norm_layer": "bn2d"}, "unknown norm_layer 'bn2d'; did you mean 'bn_2d'"),
            ({"act_layer": "swiish"}, "unknown act_layer 'swiish'; did you mean 'swish'"),
            ({"window_mode": "grids"}, "did you mean 'grid'"),
            ({"op_order": "attn_first"}, "unknown op_order.*attn_conv, conv_attn"),
            ({"stride": 0}, "stride must be an integer >= 1, got 0"),
            ({"stride": 1.5}, "stride must be an integer >= 1, got 1.5"),
            ({"dw_ks": -3}, "dw_ks must be an integer >= 0, got -3"),
            ({"dw_ks": 4}, "dw_ks = 4 .* an odd dw_ks"),
            ({"dilation": 2}, "dilation = 2 changes the map's sides by -2 .*pad_dilation"),
            ({"dw_ks": 0, "stride": 2}, "nothing to stride"),
            ({"dw_ks": 0, "se_ratio": 0.5}, "squeeze"),
            ({"exp_ratio": 0.01}, "at least one channel"),
            ({"se_ratio": -1.0}, "se_ratio must be 0 or"),
            ({"attn_s": False, "v_proj": False, "exp_ratio": 2.0}, "set exp_ratio to 1"),
            ({"window_size": 7.0}, "window_size must be an integer"),
            ({"drop": 1.0}, r"drop must lie in \[0, 1\)"),
            ({"attn_drop": -0.1}, "attn_drop must lie in"),
            ({"dim_out": 0}, "dim_out must be an integer >= 1"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_constructor(self, options: dict[str, Any], match: str) -> None:
        iRMB(12, 12, dim_head=4)
        with pytest.raises(ValueError, match=match) as caught:
            iRMB(**{"dim_in": 12, "dim_out": 12, "dim_head": 4, **options})
        assert str(caught.value).startswith(("iRMB: ", "ConvNormAct: "))

    @pytest.mark.parametrize(
        ("x", "match"),
        [
            (
                torch.zeros(4, 5, 5),
                r"4 dimensions \(N, C, H, W\), got shape \(4, 5, 5\); .*x\[None\]",
            ),
            (torch.zeros(1, 5, 5, 4), r"C = 4, got shape \(1, 5, 5, 4\)"),
            (torch.zeros(1, 4, 5, 5, dtype=torch.int64), r"got torch.int64; .*x.float\(\)"),
            (torch.zeros(1, 4, 5, 5, dtype=torch.bool), "got torch.bool"),
            (
                torch.zeros(1, 4, 5, 5, dtype=torch.float64),
                "float64, the weights have torch.float32",
            ),
            (torch.zeros(1, 4, 5, 5, device="meta"), "x is on meta, the weights are on cpu"),
            ([[1.0]], "got list"),
        ],
        ids=["rank", "channels", "integers", "booleans", "dtype", "device", "list"],
    )
    def test_forward(self, x: Any, match: str) -> None:
        block = iRMB(4, 4, dim_head=4)
        block(torch.zeros(1, 4, 5, 5))
        with pytest.raises(ValueError, match=match):
            block(x)

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: MetaMobileBlock(4, 0.1, nn.Identity()), "at least one channel"),
            (lambda: MetaMobileBlock(4, 2.0, torch.relu), "must be a torch.nn.Module"),
            (lambda: MetaMobileBlock.mhsa(10, num_heads=3), "divisible by num_heads, got 10 and 3"),
            (lambda: MetaMobileBlock.irb(4, kernel_size=2), "must be odd"),
            (lambda: MetaMobileBlock.irmb(8, dim_head=3), "share dim and dim_mid evenly"),
            (lambda: MetaMobileBlock.ffn(4)(torch.zeros(1, 5, 2, 2)), "C = 4"),
            (lambda: DropPath(1.0), r"drop_prob must lie in \[0, 1\)"),
            (lambda: get_norm("ln2d", 4), "unknown norm_layer 'ln2d'; did you mean 'ln_2d'"),
            (lambda: get_act("grelu"), "unknown act_layer 'grelu'; did you mean"),
        ],
    )
    def test_other_modules(self, make: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make()
