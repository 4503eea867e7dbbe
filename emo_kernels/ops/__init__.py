"""The operators: contract, dispatch, autograd. Arithmetic lives in the backends."""

from emo_kernels.ops.conv_norm_act import conv_norm_act
from emo_kernels.ops.depthwise_conv2d import depthwise_conv2d
from emo_kernels.ops.expand import expand
from emo_kernels.ops.irmb import irmb
from emo_kernels.ops.norm_pool_linear import norm_pool_linear
from emo_kernels.ops.shrink import shrink
from emo_kernels.ops.window_attention import window_attention

__all__ = [
    "conv_norm_act",
    "depthwise_conv2d",
    "expand",
    "irmb",
    "norm_pool_linear",
    "shrink",
    "window_attention",
]
