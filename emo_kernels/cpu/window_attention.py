"""Window attention of a training step and its gradient: launchers.

Attention over expanded values reads them as a map that the expansion's kernel wrote; its gradient
goes back through the expansion's gradient, which both add up to one at norm(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.cpu.expand import expand, expand_backward
from emo_kernels.cpu.launches import launch
from emo_kernels.spec import activate


def window_attention_unsupported(
    x: Tensor, *_: Tensor | None, v_groups: int = 1, **__: Any
) -> str | None:
    """Why the kernels cannot take these arguments, or ``None`` if they can."""
    if v_groups != 1:
        return f"the cpu kernels have no grouped expansion, got v_groups = {v_groups}"
    return layout.wrong_dtype(x)


def _sizes(x: Tensor, m: int, head_dim: int, window_size: int, mode: str, norm: str) -> list[int]:
    n, c, h, w = x.shape
    windows, kind = layout.WINDOWS[mode], layout.NORMS[norm]
    return [n, c, h, w, m, head_dim, window_size, windows, kind]


def _padded_value(v_bias: Tensor | None, v_act: str, dtype: torch.dtype) -> Tensor | None:
    """(M,): the expanded values at a padded pixel; ``None``: zero."""
    bias = layout.dense(v_bias, dtype)
    return None if bias is None else activate(bias, v_act)


def _forward(
    x: Tensor,
    qk_weight: Tensor | None = None,
    qk_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    head_dim: int,
    window_size: int = 7,
    window_mode: str = "grid",
    norm: str = "none",
    eps: float = 1e-6,
    v_act: str = "none",
    v_groups: int = 1,
    qk: Tensor | None = None,
) -> Tensor:
    """z; into ``qk``, where it is given, q and k."""
    assert v_groups == 1
    n, c, h, w = x.shape
    m, dtype = c if v_weight is None else v_weight.shape[0], x.dtype
    out = layout.new_map(x, n, m, h, w)
    if out.numel() == 0:
        return out
    v = padding = None
    if v_weight is not None:
        v = expand(x, v_weight, v_bias, norm_weight, norm_bias, norm=norm, eps=eps, act=v_act)
        padding = _padded_value(v_bias, v_act, dtype)
    vectors = [layout.dense(t, dtype) for t in (qk_weight, qk_bias)]
    norms = [layout.dense(t, dtype) for t in (norm_weight, norm_bias)]
    x = layout.pixels(x)
    sizes = _sizes(x, m, head_dim, window_size, window_mode, norm)
    kernel = _C.window_attention(layout.DTYPES[dtype], tuple(sizes), eps)
    launch(kernel, x, *vectors, v, padding, *norms, out, qk)
    return out


def window_attention(*tensors: Any, **options: Any) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in windows, as ``emo_kernels.ops.window_attention`` defines it."""
    return _forward(*tensors, **options)


def window_attention_with_maps(*tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """:func:`window_attention` and, from the same pass, q and k, (N, 2C, H, W).

    Of what a training step would compute again they are the most arithmetic for their bytes: of
    EMO-5M at batch 8, 1.8 of 44 GFLOP for 18 MB.
    """
    n, c, h, w = tensors[0].shape
    qk = layout.new_map(tensors[0], n, 2 * c, h, w)
    return _forward(*tensors, qk=qk, **options), qk


def window_attention_backward(
    grad: Tensor,
    x: Tensor,
    qk_weight: Tensor | None = None,
    qk_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    affine: Tensor | None = None,
    residual: Tensor | None = None,
    qk: Tensor | None = None,
    *,
    needed: Sequence[bool],
    head_dim: int,
    window_size: int = 7,
    window_mode: str = "grid",
    norm: str = "none",
    eps: float = 1e-6,
    v_act: str = "none",
    v_groups: int = 1,
) -> list[Tensor]:
    """Gradients of the seven tensors of :func:`window_attention`, those that are needed.

    With ``affine``: the gradient at norm(x) and its sums, as the reference defines them. qk is what
    :func:`window_attention_with_maps` gave, or computed again.
    """
    n, c, h, w = x.shape
    m, dtype = c if v_weight is None else v_weight.shape[0], x.dtype
    expands, trains_norm = v_weight is not None, affine is not None
    mean = invstd = None
    if affine is not None:
        norm, (norm_weight, norm_bias, mean, invstd) = "affine", affine
    wants_sums = needed[5] or (needed[6] and not trains_norm)
    dx = layout.new_map(x, n, c, h, w) if needed[0] or (expands and wants_sums) else None
    dqk = layout.empty((2 * c, c), layout.computed_in(dtype)) if needed[1] else None
    dbias = layout.doubles(2 * c) if needed[2] else None
    sums = layout.doubles(2, c) if wants_sums and not expands else None
    dv = dv_padding = v = padding = None
    if v_weight is not None:
        v = expand(x, v_weight, v_bias, norm_weight, norm_bias, norm=norm, eps=eps, act=v_act)
        padding = _padded_value(v_bias, v_act, dtype)
        dv = layout.new_map(x, n, m, h, w)
        dv_padding = layout.doubles(m) if needed[4] else None
    if x.numel() == 0:
        for empty in (dx, dqk, dbias, sums, dv, dv_padding):
            if empty is not None:
                empty.zero_()
    else:
        tensors: list[Tensor | None] = [layout.pixels(grad), layout.pixels(x)]
        tensors += [layout.dense(qk_weight, dtype), layout.dense(qk_bias, dtype), v, padding]
        tensors += [layout.dense(t, dtype) for t in (norm_weight, norm_bias, mean, invstd)]
        tensors += [None if trains_norm or expands else layout.dense_map(residual)]
        tensors += [layout.dense_map(qk)]
        tensors += [dx, dqk, dv, dbias, dv_padding, sums]
        sizes = _sizes(x, m, head_dim, window_size, window_mode, norm)
        sizes.append(trains_norm or expands)
        if dbias is not None:  # its K half: a shift of all keys' logits changes nothing
            double = layout.DTYPES[torch.float64]
            launch(_C.convert(double, double, 2 * c), None, dbias)
        kernel = _C.window_attention_backward(layout.DTYPES[dtype], tuple(sizes), eps)
        launch(kernel, *tensors)
    of_qk = [layout.gradient_like(dqk, qk_weight), layout.gradient_like(dbias, qk_bias)]
    if v_weight is None or dv is None:
        if trains_norm:
            return layout.chosen([dx, *of_qk, None, None, sums, None], needed)
        rows = (None, None) if sums is None else (sums[1], sums[0])
        norms = map(layout.gradient_like, rows, (norm_weight, norm_bias))
        return layout.chosen([dx, *of_qk, None, None, *norms], needed)
    behind_values = [needed[0], *needed[3:]]
    bias = layout.dense(v_bias, dtype)  # its gradient has two parts: rounded once they are one
    found = expand_backward(
        dv,
        x,
        v_weight,
        bias,
        norm_weight,
        norm_bias,
        affine,
        residual=residual,
        needed=behind_values,
        norm=norm,
        eps=eps,
        act=v_act,
        norm_grad=dx,
    )
    if v_bias is not None and dv_padding is not None:
        place = sum(behind_values[:2])
        both = found[place] + _through_padding(dv_padding, v_bias, v_act)
        found[place] = both.to(v_bias.dtype)
    return [*found[: needed[0]], *layout.chosen(of_qk, needed[1:3]), *found[needed[0] :]]


def _through_padding(grad: Tensor, v_bias: Tensor, v_act: str) -> Tensor:
    """(M,), float64: what the bias of the values gets through padded pixels."""
    with torch.enable_grad():
        bias = v_bias.detach().double().requires_grad_()
        (found,) = torch.autograd.grad(activate(bias, v_act), bias, grad)
    return found
