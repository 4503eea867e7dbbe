"""Checks of operator arguments. Each message names operator, argument, expected, got, way out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_is_tensor(operator: str, name: str, value: Any) -> None:
    """``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{operator}: {name} must be a torch.Tensor, got {type(value).__name__}; "
            "convert with torch.as_tensor"
        )


def check_map(operator: str, x: Tensor, name: str = "x") -> None:
    """``x`` is a floating (N, C, H, W) map with at least one channel and pixel."""
    check_is_tensor(operator, name, x)
    if x.dim() != 4:
        raise ValueError(
            f"{operator}: {name} must have 4 dimensions (N, C, H, W), got shape "
            f"{tuple(x.shape)}; add the batch dimension with {name}[None] or reshape"
        )
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"{operator}: {name} must be floating point (float32, bfloat16, float16 or float64), "
            f"got {x.dtype}; convert with {name}.float()"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{operator}: {name} must be a dense tensor, got layout {x.layout}")
    _, c, h, w = x.shape
    if c == 0 or h == 0 or w == 0:
        raise ValueError(
            f"{operator}: {name} must have C, H and W of at least 1, got shape {tuple(x.shape)}"
        )


def check_like(operator: str, x: Tensor, name: str, tensor: Tensor) -> None:
    """``tensor`` shares dtype and device with ``x``."""
    if tensor.dtype is not x.dtype:
        raise ValueError(
            f"{operator}: {name} must have the dtype of the map, {x.dtype}, got {tensor.dtype}; "
            "convert one of them, or run under torch.autocast through the module"
        )
    if tensor.device != x.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of the map, {x.device}, got "
            f"{tensor.device}; move it with .to({str(x.device)!r})"
        )


def check_tensor(
    operator: str, x: Tensor, name: str, tensor: Tensor | None, shape: Sequence[int], form: str
) -> None:
    """``tensor`` is absent, or like ``x`` and of exactly ``shape``, which ``form`` spells out."""
    if tensor is None:
        return
    check_is_tensor(operator, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{operator}: {name} must be {form} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    check_like(operator, x, name, tensor)


def check_pointwise(
    operator: str, x: Tensor, name: str, weight: Tensor, groups: int, groups_name: str
) -> None:
    """``weight`` is a 1x1 convolution (M, C / groups, 1, 1) of x's channels."""
    check_is_tensor(operator, name, weight)
    check_integer(operator, groups_name, groups, 1)
    c = x.shape[1]
    if c % groups:
        raise ValueError(f"{operator}: {groups_name} must divide C = {c}, got {groups}")
    if weight.dim() != 4 or weight.shape[1:] != (c // groups, 1, 1) or weight.shape[0] % groups:
        raise ValueError(
            f"{operator}: {name} must be (M, C / groups, 1, 1) with C = {c}, groups = {groups} "
            f"and groups dividing M, got {tuple(weight.shape)}"
        )
    check_like(operator, x, name, weight)


def check_choice(operator: str, name: str, value: str, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{operator}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_integer(operator: str, name: str, value: int, least: int | None = None) -> None:
    """``value`` is an integer, of at least ``least`` if that is given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{operator}: {name} must be an integer, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{operator}: {name} must be an integer >= {least}, got {value!r}")


def check_epsilon(operator: str, name: str, value: float) -> None:
    """``value`` is a positive number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be a number > 0, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{operator}: {name} must be a number > 0, got {value!r}")


def check_norm(
    operator: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """The prologue: ``none``, ``affine`` with both tensors given, or ``layer``."""
    check_choice(operator, "norm", norm, ("none", "affine", "layer"))
    check_epsilon(operator, "eps", eps)
    if norm == "none" and (weight is not None or bias is not None):
        raise ValueError(f"{operator}: norm_weight and norm_bias need norm='affine' or 'layer'")
    if norm == "affine" and (weight is None or bias is None):
        raise ValueError(f"{operator}: norm='affine' needs norm_weight and norm_bias, each (C,)")
    c = x.shape[1]
    check_tensor(operator, x, "norm_weight", weight, (c,), "(C,)")
    check_tensor(operator, x, "norm_bias", bias, (c,), "(C,)")
