"""CPU backend: thin launchers over the kernels compiled into ``emo_kernels._C``."""

from emo_kernels.cpu.batch_norm import (
    batch_norm_activate,
    batch_norm_activate_sums,
    batch_norm_backward,
    batch_norm_backward_finalize,
    batch_norm_finalize,
    batch_norm_sums,
)
from emo_kernels.cpu.conv_norm_act import (
    conv_norm_act,
    conv_norm_act_backward,
    conv_norm_act_bind,
    conv_norm_act_statistics,
    conv_norm_act_training_unsupported,
    conv_norm_act_unsupported,
)
from emo_kernels.cpu.depthwise_conv2d import (
    depthwise_conv2d,
    depthwise_conv2d_backward,
    depthwise_conv2d_statistics,
    depthwise_conv2d_unsupported,
)
from emo_kernels.cpu.expand import (
    expand,
    expand_backward,
    expand_unsupported,
)
from emo_kernels.cpu.expand_depthwise import (
    expand_depthwise,
    expand_depthwise_backward,
    expand_depthwise_statistics,
    expand_depthwise_unsupported,
    expand_depthwise_with_maps,
)
from emo_kernels.cpu.irmb import irmb, irmb_bind, irmb_unsupported
from emo_kernels.cpu.irmb_training import irmb_training_unsupported
from emo_kernels.cpu.irmb_training import keeps_local_gradient as keeps_local_gradient
from emo_kernels.cpu.irmb_training import keeps_slope as keeps_slope
from emo_kernels.cpu.launches import held_back as held_back
from emo_kernels.cpu.layout import gradient_like as gradient_like
from emo_kernels.cpu.norm_pool_linear import (
    norm_pool_linear,
    norm_pool_linear_bind,
    norm_pool_linear_unsupported,
)
from emo_kernels.cpu.shrink import (
    shrink,
    shrink_backward,
    shrink_statistics,
    shrink_unsupported,
)
from emo_kernels.cpu.squeeze import squeeze, squeeze_backward
from emo_kernels.cpu.tapes import repeated as repeated
from emo_kernels.cpu.window_attention import (
    window_attention,
    window_attention_backward,
    window_attention_unsupported,
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
    "conv_norm_act_bind",
    "conv_norm_act_statistics",
    "conv_norm_act_training_unsupported",
    "conv_norm_act_unsupported",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_statistics",
    "depthwise_conv2d_unsupported",
    "expand",
    "expand_backward",
    "expand_depthwise",
    "expand_depthwise_backward",
    "expand_depthwise_statistics",
    "expand_depthwise_unsupported",
    "expand_depthwise_with_maps",
    "expand_unsupported",
    "irmb",
    "irmb_bind",
    "irmb_training_unsupported",
    "irmb_unsupported",
    "norm_pool_linear",
    "norm_pool_linear_bind",
    "norm_pool_linear_unsupported",
    "shrink",
    "shrink_backward",
    "shrink_statistics",
    "shrink_unsupported",
    "squeeze",
    "squeeze_backward",
    "window_attention",
    "window_attention_backward",
    "window_attention_unsupported",
    "window_attention_with_maps",
]
