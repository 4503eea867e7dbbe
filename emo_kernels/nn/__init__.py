"""Modules with parameters: the block, the general form it is an instance of, and their layers."""

from __future__ import annotations

from emo_kernels.nn.irmb import iRMB
from emo_kernels.nn.layers import (
    ConvNormAct,
    DropPath,
    LayerNorm2d,
    LayerScale2d,
    SqueezeExcite,
    get_act,
    get_norm,
)
from emo_kernels.nn.meta import MetaFormerBlock, MetaMobileBlock

__all__ = [
    "ConvNormAct",
    "DropPath",
    "LayerNorm2d",
    "LayerScale2d",
    "MetaFormerBlock",
    "MetaMobileBlock",
    "SqueezeExcite",
    "get_act",
    "get_norm",
    "iRMB",
]
