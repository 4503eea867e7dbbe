"""Checks of operator arguments. Each message names operator, argument, expected, got, way out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_map(operator: str, x: Tensor) -> None:
    """``x`` is a floating (N, C, H, W) map with at least one channel and pixel."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{operator}: x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(
            f"{operator}: x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}; "
            "add the batch dimension with x[None] or reshape"
        )
    if not x.dtype.is_floating_point:
        raise ValueError(
            f"{operator}: x must be floating point (float32, bfloat16, float16 or float64), "
            f"got {x.dtype}; convert with x.float()"
        )
    if x.layout is not torch.strided:
        raise ValueError(f"{operator}: x must be a dense tensor, got layout {x.layout}")
    _, c, h, w = x.shape
    if c == 0 or h == 0 or w == 0:
        raise ValueError(f"{operator}: C, H and W must be at least 1, got shape {tuple(x.shape)}")


def check_like(operator: str, x: Tensor, name: str, tensor: Tensor) -> None:
    """``tensor`` shares dtype and device with ``x``."""
    if tensor.dtype is not x.dtype:
        raise ValueError(
            f"{operator}: {name} must have the dtype of x, {x.dtype}, got {tensor.dtype}; "
            f"convert one of them, or run under torch.autocast through the module"
        )
    if tensor.device != x.device:
        raise ValueError(
            f"{operator}: {name} must be on the device of x, {x.device}, got {tensor.device}; "
            f"move it with .to({str(x.device)!r})"
        )


def check_tensor(
    operator: str, x: Tensor, name: str, tensor: Tensor | None, shape: Sequence[int], form: str
) -> None:
    """``tensor`` is absent, or like ``x`` and of exactly ``shape``, which ``form`` spells out."""
    if tensor is None:
        return
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{operator}: {name} must be {form} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    check_like(operator, x, name, tensor)


def check_choice(operator: str, name: str, value: str, choices: Sequence[str]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{operator}: {name} must be one of {', '.join(choices)}, got {value!r}")


def check_integer(operator: str, name: str, value: int, least: int) -> None:
    """``value`` is an integer of at least ``least``."""
    if isinstance(value, (bool, float, str)) or value < least:
        raise ValueError(f"{operator}: {name} must be an integer >= {least}, got {value!r}")


def check_norm(
    operator: str, x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    """The prologue: ``none``, ``affine`` with both tensors given, or ``layer``."""
    check_choice(operator, "norm", norm, ("none", "affine", "layer"))
    c = x.shape[1]
    if norm == "none" and (weight is not None or bias is not None):
        raise ValueError(f"{operator}: norm_weight and norm_bias need norm='affine' or 'layer'")
    if norm == "affine" and (weight is None or bias is None):
        raise ValueError(f"{operator}: norm='affine' needs norm_weight and norm_bias, each (C,)")
    if norm == "layer" and not eps > 0:
        raise ValueError(f"{operator}: eps must be > 0, got {eps}")
    check_tensor(operator, x, "norm_weight", weight, (c,), "(C,)")
    check_tensor(operator, x, "norm_bias", bias, (c,), "(C,)")
