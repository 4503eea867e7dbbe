"""Triton kernels for CUDA GPUs: one file for each operator and direction, named as the operator."""

from __future__ import annotations

from emo_kernels.triton.batch_norm import (
    batch_norm_backward,
    batch_norm_backward_finalize,
    batch_norm_finalize,
    batch_norm_sums,
)
from emo_kernels.triton.depthwise_conv2d import (
    depthwise_conv2d,
    depthwise_conv2d_statistics,
    depthwise_conv2d_unsupported,
)
from emo_kernels.triton.depthwise_conv2d_backward import depthwise_conv2d_backward
from emo_kernels.triton.expand import expand, expand_unsupported
from emo_kernels.triton.expand_backward import expand_backward
from emo_kernels.triton.irmb import irmb_training_unsupported, irmb_unsupported
from emo_kernels.triton.shrink import shrink, shrink_statistics, shrink_unsupported
from emo_kernels.triton.shrink_backward import shrink_backward
from emo_kernels.triton.squeeze import squeeze, squeeze_backward
from emo_kernels.triton.window_attention import window_attention, window_attention_unsupported
from emo_kernels.triton.window_attention_backward import window_attention_backward

__all__ = [
    "batch_norm_backward",
    "batch_norm_backward_finalize",
    "batch_norm_finalize",
    "batch_norm_sums",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_statistics",
    "depthwise_conv2d_unsupported",
    "expand",
    "expand_backward",
    "expand_unsupported",
    "irmb_training_unsupported",
    "irmb_unsupported",
    "shrink",
    "shrink_backward",
    "shrink_statistics",
    "shrink_unsupported",
    "squeeze",
    "squeeze_backward",
    "window_attention",
    "window_attention_backward",
    "window_attention_unsupported",
]
