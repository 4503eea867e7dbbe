"""Small blocks, one of each kind, and random weights for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DOUBLE = {"dtype": torch.float64}


def randomise(module: nn.Module) -> nn.Module:
    """Random parameters and statistics in fp64, batch norms in inference."""
    module = module.double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.4)
    return module


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


# Options of iRMB(4, 4, dim_head=2, window_size=2).
KINDS: dict[str, dict[str, Any]] = {
    "conv": {"attn_s": False, "exp_ratio": 1.5, "act_layer": "silu", "qkv_bias": True},
    "conv_layer_norm_se": {
        "attn_s": False,
        "norm_layer": "ln_2d",
        "act_layer": "gelu",
        "se_ratio": 0.5,
    },
    "downsampler": {"attn_s": False, "stride": 2, "has_skip": False, "exp_ratio": 2.0, "dw_ks": 5},
    "downsampler_layer_scale": {"attn_s": False, "stride": 2, "has_skip": False, "ls_value": 0.5},
    "no_expansion": {"attn_s": False, "v_proj": False, "norm_in": False, "has_skip": False},
    "attention_pre": {"attn_pre": True, "norm_layer": "ln_2d", "act_layer": "gelu"},
    "attention_post": {"attn_pre": False, "exp_ratio": 2.0, "act_layer": "gelu"},
    "attention_v_group": {"attn_pre": False, "v_group": True, "exp_ratio": 2.0},
    "attention_block": {"window_mode": "block", "act_layer": "gelu"},
    "attention_both": {"window_mode": "both", "exp_ratio": 2.0, "ls_value": 0.5},
    "attention_both_pre": {"window_mode": "both", "attn_pre": True, "act_layer": "silu"},
    "attention_of_x": {"qk_proj": False, "act_layer": "gelu"},
    "attention_last": {"op_order": "conv_attn", "exp_ratio": 2.0, "act_layer": "gelu"},
    "attention_last_se": {"op_order": "conv_attn", "se_ratio": 0.5, "act_layer": "silu"},
    "attention_only": {"dw_ks": 0, "attn_pre": True, "act_layer": "gelu"},
    "neither": {"dw_ks": 0, "attn_s": False, "act_layer": "gelu"},
}
