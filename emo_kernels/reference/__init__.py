"""The operators in plain PyTorch: differentiable, in any dtype, reading like the equations.

Every other backend is tested against this one, and falls back to it for what it lacks.
"""

from __future__ import annotations

from emo_kernels.reference.depthwise_conv2d import depthwise_conv2d
from emo_kernels.reference.expand import expand
from emo_kernels.reference.irmb import irmb
from emo_kernels.reference.shrink import shrink
from emo_kernels.reference.window_attention import window_attention

__all__ = ["depthwise_conv2d", "expand", "irmb", "shrink", "window_attention"]
