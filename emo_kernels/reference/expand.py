"""Expanding pointwise convolution: act(W norm(x) + b)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.gradients import channel_sums, gradients
from emo_kernels.spec import activate


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    norm: str,
    eps: float,
) -> Tensor:
    """norm(x): ``none``, ``affine`` (x weight[c] + bias[c]) or ``layer`` (over C, per pixel).

    The layer norm is taken on the map seen as (N, H, W, C), so a channels_last map is neither
    copied nor re-laid; the result always has channels_last strides.
    """
    if norm == "none":
        return x
    if norm == "affine":
        if weight is not None:
            x = (x * weight.reshape(-1, 1, 1)).to(x.dtype)
        return x if bias is None else (x + bias.reshape(-1, 1, 1)).to(x.dtype)
    if norm == "layer":
        pixels = x.permute(0, 2, 3, 1)
        return F.layer_norm(pixels, (x.shape[1],), weight, bias, eps).permute(0, 3, 1, 2)
    raise ValueError(f"normalize: norm must be 'none', 'affine' or 'layer', got {norm!r}")


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    norm: str = "none",
    eps: float = 1e-6,
    act: str = "none",
    groups: int = 1,
) -> Tensor:
    """u = act(W norm(x) + b): steps 2 and 3 of the block without attention.

    Args:
        x: (N, C, H, W).
        weight: (M, C / groups, 1, 1).
        bias: (M,).
        norm_weight, norm_bias: (C,).
        norm: ``none``; ``affine``: x norm_weight[c] + norm_bias[c], a batch norm with known
            statistics; ``layer``: layer norm over C at every pixel.
        eps: of the layer norm.
        act: ``none``, ``relu``, ``gelu``, ``silu``.
        groups: of the 1x1 convolution.

    Returns:
        (N, M, H, W).

    Example:
        >>> import torch
        >>> expand(torch.ones(1, 2, 1, 1), torch.ones(3, 2, 1, 1), act="relu").flatten()
        tensor([2., 2., 2.])
    """
    h = normalize(x, norm_weight, norm_bias, norm=norm, eps=eps)
    return activate(F.conv2d(h, weight, bias, groups=groups), act)


def expand_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    affine: Tensor | None = None,
    out_grad: Tensor | None = None,
    out_weight: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    needed: Sequence[bool],
    norm: str = "none",
    eps: float = 1e-6,
    act: str = "none",
    groups: int = 1,
) -> list[Tensor]:
    """Gradients of (x, weight, bias, norm_weight, norm_bias), those that are needed.

    Args:
        grad: (N, M, H, W) at u, in part:
        out_grad, out_weight, drop_scale: (N, O, H, W), (O, M, 1, 1), (N,): where given,
            drop_scale[n] out_weight^T out_grad, the gradient of the local skip, is added to it.
        residual: (N, C, H, W), added to the gradient of x.
        affine: (4, C), a training batch norm whose first two rows are norm_weight and norm_bias:
            the gradient at norm(x) takes the place of x's, and (2, C) sums of it and of it times
            xhat, in float64, that of the norm's parameters.
    """
    if out_grad is not None and out_weight is not None:
        local = F.conv_transpose2d(out_grad, out_weight)
        grad = grad + (local if drop_scale is None else drop_scale[:, None, None, None] * local)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "act": act, "groups": groups}
    if affine is None:
        tensors = (x, weight, bias, norm_weight, norm_bias)
        grads = gradients(lambda *t: expand(*t, **options), tensors, grad, needed)
        if needed[0] and residual is not None:
            grads[0] = grads[0] + residual
        return grads
    h = normalize(x, affine[0], affine[1], norm="affine", eps=0.0)
    options["norm"] = "none"
    wanted = (True, *needed[1:3])
    grads = gradients(lambda *t: expand(*t, **options), (h, weight, bias), grad, wanted)
    sums = [channel_sums(grads[0], x, affine)] if needed[3] else []
    return [*grads[not needed[0] :], *sums]
