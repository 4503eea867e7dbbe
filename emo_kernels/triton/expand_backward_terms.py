"""What the kernels of an expansion's gradient have in common: inputs, results, the norm's backward.

Computes: for a tile of dn, the gradient at n = norm(x): v, with which the sums behind the norm's
    gradients are sum dn and sum dn v; and dx: none: dn; affine: dn weight; layer:
    rstd (g - mean(g) - xhat mean(g xhat)), g = dn weight; batch (a training batch norm's affine,
    whose backward needs the sums first): dn.
Tiling: a tile (BLOCK_P, BLOCK_C); layer norm wants whole rows.
Traffic: none.
Numerics: fp32. Partial sums are added in a fixed order, in two steps where they are many.
Limits: none.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton.normalize import layer_norm_backward, load_channels, standardize


class Tensors(NamedTuple):
    """The inputs of the gradient as its kernels take them; maps have dense pixels."""

    grad: Tensor  # (N, M, H, W)
    x: Tensor  # (N, C, H, W)
    weight: Tensor  # (M, C / groups), in the type of x
    bias: Tensor | None  # (M,)
    statistics: Tensor | None  # (2, P) fp32, of the layer norm
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor | None  # (C,)
    affine: Tensor | None  # (4, C) fp32, of the training batch norm
    out_grad: Tensor | None  # (N, O, H, W)
    out_weight: Tensor | None  # (O, M), in the type of x
    drop_scale: Tensor | None  # (N,)
    residual: Tensor | None  # (N, C, H, W)


class Wants(NamedTuple):
    """Which results are asked for."""

    dx: bool
    weight: bool
    bias: bool
    sums: bool


class Results(NamedTuple):
    """dx (dn with ``affine``), and partials in fp32 whose sums are the other gradients."""

    dx: Tensor | None
    weight: Tensor | None  # (parts, M, C / groups)
    bias: Tensor | None  # (parts, M)
    sums: Tensor | None  # (2, parts, C): of dn and dn v


@triton.jit
def summed_value(x, offs_c, mask_c, mean, rstd, affine_ptr, C: tl.constexpr, NORM: tl.constexpr):
    """v of a tile x, fp32: xhat, or x itself where NORM is "affine" or "none"."""
    value = x
    if NORM == "layer":
        value = tl.where(mask_c[None, :], standardize(x, mean, rstd), 0.0)
    elif NORM == "batch":
        center = load_channels(affine_ptr + 2 * C, offs_c, mask_c, 0.0)
        invstd = load_channels(affine_ptr + 3 * C, offs_c, mask_c, 0.0)
        value = (x - center[None, :]) * invstd[None, :]
    return value


@triton.jit
def input_gradient(
    dn, value, offs_c, mask_c, rstd, norm_weight_ptr, C: tl.constexpr, NORM: tl.constexpr
):
    """dx, without the residual, of a tile of dn and v, fp32; dn itself for "batch" and "none"."""
    dx = dn
    if NORM == "layer" or NORM == "affine":
        dx = dn * load_channels(norm_weight_ptr, offs_c, mask_c, 1.0)[None, :]
    if NORM == "layer":
        dx = layer_norm_backward(dx, value, rstd, C)
    return dx


def new_partials(wanted: bool, x: Tensor, *shape: int) -> Tensor | None:
    """A place for partial results, ``None`` unless wanted."""
    return torch.empty(shape, dtype=torch.float32, device=x.device) if wanted else None
