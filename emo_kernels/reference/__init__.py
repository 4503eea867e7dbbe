"""The operators in plain PyTorch: differentiable, in any dtype, reading like the equations.

Every other backend is tested against this one, and falls back to it for what it lacks. The
``_backward`` functions and the pieces of batch norm say what the kernels of a training step owe.
"""

from __future__ import annotations

from emo_kernels.reference.batch_norm import (
    batch_norm_activate,
    batch_norm_activate_sums,
    batch_norm_backward,
    batch_norm_backward_finalize,
    batch_norm_finalize,
    batch_norm_sums,
)
from emo_kernels.reference.conv_norm_act import (
    conv_norm_act,
    conv_norm_act_backward,
    conv_norm_act_statistics,
)
from emo_kernels.reference.depthwise_conv2d import (
    depthwise_conv2d,
    depthwise_conv2d_backward,
    depthwise_conv2d_statistics,
)
from emo_kernels.reference.expand import (
    expand,
    expand_backward,
)
from emo_kernels.reference.expand_depthwise import (
    expand_depthwise,
    expand_depthwise_backward,
    expand_depthwise_statistics,
    expand_depthwise_with_maps,
)
from emo_kernels.reference.irmb import irmb
from emo_kernels.reference.norm_pool_linear import norm_pool_linear
from emo_kernels.reference.shrink import shrink, shrink_backward, shrink_statistics
from emo_kernels.reference.squeeze import squeeze, squeeze_backward
from emo_kernels.reference.window_attention import (
    window_attention,
    window_attention_backward,
    window_attention_with_maps,
)

__all__ = [
    "batch_norm_activate",
    "batch_norm_activate_sums",
    "batch_norm_backward",
    "batch_norm_backward_finalize",
    "batch_norm_finalize",
    "batch_norm_sums",
    "conv_norm_act",
    "conv_norm_act_backward",
    "conv_norm_act_statistics",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_statistics",
    "expand",
    "expand_backward",
    "expand_depthwise",
    "expand_depthwise_backward",
    "expand_depthwise_statistics",
    "expand_depthwise_with_maps",
    "irmb",
    "norm_pool_linear",
    "shrink",
    "shrink_backward",
    "shrink_statistics",
    "squeeze",
    "squeeze_backward",
    "window_attention",
    "window_attention_backward",
    "window_attention_with_maps",
]
