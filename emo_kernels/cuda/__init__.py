"""CUDA C++ kernels: thin launchers over what is compiled into ``emo_kernels._C``."""

from emo_kernels.cuda.depthwise_conv2d import (
    depthwise_conv2d,
    depthwise_conv2d_backward,
    depthwise_conv2d_statistics,
    depthwise_conv2d_unsupported,
)
from emo_kernels.cuda.expand_depthwise import (
    expand_depthwise,
    expand_depthwise_statistics,
    expand_depthwise_unsupported,
)
from emo_kernels.cuda.irmb import irmb, irmb_report, irmb_unsupported
from emo_kernels.cuda.irmb_training import irmb_training_unsupported

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_statistics",
    "depthwise_conv2d_unsupported",
    "expand_depthwise",
    "expand_depthwise_statistics",
    "expand_depthwise_unsupported",
    "irmb",
    "irmb_report",
    "irmb_training_unsupported",
    "irmb_unsupported",
]
