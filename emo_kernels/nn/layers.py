"""Layers of the block: convolution with norm and activation, norms, squeeze-excite, drop path.

Names of children are those of the published state dicts. All norms have epsilon 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd

import torch
from torch import Tensor, nn

from emo_kernels.nn.bad_input import check_integer, check_rate, unknown_name
from emo_kernels.reference.expand import normalize
from emo_kernels.spec import conv_padding

NORM_EPS = 1e-6


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of every pixel of an (N, C, H, W) map."""

    def __init__(self, channels: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), strides channels_last."""
        out: Tensor = self.norm(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


def _group_norm(channels: int) -> nn.GroupNorm:
    """32 groups where that divides the channels, else as many as do."""
    return nn.GroupNorm(gcd(32, channels), channels, eps=NORM_EPS)


def _no_norm(channels: int) -> nn.Identity:
    return nn.Identity()


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": _no_norm,
    "bn_2d": partial(nn.BatchNorm2d, eps=NORM_EPS),
    "ln_2d": LayerNorm2d,
    "gn": _group_norm,
    "in_2d": partial(nn.InstanceNorm2d, eps=NORM_EPS, affine=True),
}

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def get_norm(name: str, channels: int, owner: str = "get_norm") -> nn.Module:
    """The norm called ``name`` over ``channels``: none, bn_2d, ln_2d, gn or in_2d.

    Raises:
        ValueError: the name is unknown; the message has the close matches.

    Example:
        >>> get_norm("bn_2d", 8).eps
        1e-06
    """
    if name not in _NORMS:
        raise unknown_name(owner, "norm_layer", name, _NORMS)
    return _NORMS[name](channels)


def get_act(name: str, owner: str = "get_act") -> nn.Module:
    """The activation called ``name``: none, relu, gelu (exact, by erf), silu, ...

    Raises:
        ValueError: the name is unknown; the message has the close matches.

    Example:
        >>> get_act("silu")
        SiLU()
    """
    if name not in _ACTIVATIONS:
        raise unknown_name(owner, "act_layer", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]()


class ConvNormAct(nn.Module):
    """act(norm(conv(x))) with the published padding, ceil((k - s) / 2).

    Args:
        dim_in, dim_out: channels.
        kernel_size, stride, dilation, groups, bias: of the convolution.
        norm_layer, act_layer: names that :func:`get_norm` and :func:`get_act` know.
        pad_dilation: count dilation in the padding (ceil((d (k - 1) + 1 - s) / 2), as EMOv2 does);
            the published EMO block does not, so that a dilated convolution shrinks the map.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_layer: str = "bn_2d",
        act_layer: str = "relu",
        pad_dilation: bool = False,
    ) -> None:
        super().__init__()
        check_integer("ConvNormAct", "kernel_size", kernel_size, 1)
        check_integer("ConvNormAct", "stride", stride, 1)
        check_integer("ConvNormAct", "dilation", dilation, 1)
        extent = dilation * (kernel_size - 1) + 1 if pad_dilation else kernel_size
        padding = max(conv_padding(extent, stride), 0)
        self.conv = nn.Conv2d(
            dim_in, dim_out, kernel_size, stride, padding, dilation, groups, bias=bias
        )
        self.norm = get_norm(norm_layer, dim_out, "ConvNormAct")
        self.act = get_act(act_layer, "ConvNormAct")

    def forward(self, x: Tensor) -> Tensor:
        """(N, dim_in, H, W) to (N, dim_out, H', W')."""
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out


class SqueezeExcite(nn.Module):
    """x * sigmoid(W2 act(W1 mean(x) + b1) + b2), with R channels in the middle."""

    def __init__(self, channels: int, reduced: int, act_layer: str = "relu") -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = get_act(act_layer, "SqueezeExcite")
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        s = x.mean((2, 3), keepdim=True)
        gate: Tensor = self.gate(self.conv_expand(self.act1(self.conv_reduce(s))))
        return x * gate


class DropPath(nn.Module):
    """Drop whole samples with probability p while training, scale the others by 1 / (1 - p)."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        check_rate("DropPath", "drop_prob", drop_prob)
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """The probability."""
        return f"drop_prob={self.drop_prob:.4g}"


class LayerScale2d(nn.Module):
    """gamma[c] x, gamma a parameter."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return normalize(x, self.gamma, None, norm="affine", eps=0.0)
