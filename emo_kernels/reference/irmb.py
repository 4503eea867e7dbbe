"""The whole inverted residual mobile block in inference, composed of the other operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.batch_norm import batch_norm
from emo_kernels.reference.depthwise_conv2d import depthwise_conv2d
from emo_kernels.reference.expand import expand, normalize
from emo_kernels.reference.shrink import shrink
from emo_kernels.reference.window_attention import (
    Windows,
    attend,
    crop,
    pad_to_windows,
    window_attention,
)
from emo_kernels.spec import IRMBSpec, IRMBWeights, activate, batch_norm_affine


def irmb(
    x: Tensor,
    weights: IRMBWeights,
    spec: IRMBSpec,
    *,
    batch_statistics: tuple[bool, bool] = (False, False),
    drop_scale: Tensor | None = None,
) -> Tensor:
    """One block: out = x + gamma Wp (u + SE(SiLU(BN(DWConv(u))))), u = attention and expansion.

    Without ``spec.skip`` the terms x and u drop out; without a depthwise weight,
    out = x + gamma Wp u.

    Args:
        x: (N, C, H, W).
        weights: the block's tensors, of x's dtype, or wider than a map of 16 bits: then used as
            autocast uses them.
        spec: the block's switches.
        batch_statistics: for the batch norm in front and the one behind the convolution, whether
            they take the batch's statistics (and move nothing) or the running ones.
        drop_scale: (N,), stochastic depth: the branch times 0 or 1 / keep for each image.

    Returns:
        (N, O, H', W').

    Example:
        >>> import torch
        >>> from emo_kernels.spec import IRMBSpec, IRMBWeights
        >>> dw, proj = torch.ones(4, 1, 3, 3), torch.ones(4, 4, 1, 1)
        >>> weights = IRMBWeights(dw_weight=dw, proj_weight=proj)
        >>> irmb(torch.ones(1, 4, 6, 6), weights, IRMBSpec()).shape
        torch.Size([1, 4, 6, 6])
    """
    device = x.device.type
    if _rounds_weights(x, weights) and not torch.is_autocast_enabled(device):
        with torch.autocast(device, x.dtype):
            return irmb(x, weights, spec, batch_statistics=batch_statistics, drop_scale=drop_scale)
    w = weights
    h = _norm(x, w, spec, batch_statistics[0])
    if spec.head_dim > 0 and spec.op_order == "attn_conv":
        u = _attend_and_expand(h, w, spec)
    else:
        u = _expand(h, w, spec)
    attention_last = spec.head_dim > 0 and spec.op_order == "conv_attn"
    residual = x if spec.skip and w.gamma is None else None

    if attention_last or w.dw_weight is None:
        y = _local(u, w, spec, batch_statistics[1])
        y = _attend_over(h, y, w, spec) if attention_last else y
        out = F.conv2d(y, _present(w.proj_weight, "proj_weight"))
        out = out if residual is None else residual + out
    else:
        y, scale, shift = _convolve(u, w, spec, batch_statistics[1])
        gate = _squeeze_excite(F.silu(normalize(y, scale, shift, norm="affine", eps=0.0)), w, spec)
        local = u if spec.skip else None
        proj = _present(w.proj_weight, "proj_weight")
        drop = drop_scale if w.gamma is None else None
        out = shrink(y, proj, scale, shift, local, residual, gate, drop)

    if w.gamma is None:
        return out
    out = w.gamma.reshape(-1, 1, 1) * out
    if drop_scale is not None:
        out = drop_scale[:, None, None, None] * out
    return x + out if spec.skip else out


def _rounds_weights(x: Tensor, w: IRMBWeights) -> bool:
    """Whether a map of 16 bits comes with wider weights."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return narrow and any(t.dtype != x.dtype for _, t in w.present())


def _norm(x: Tensor, w: IRMBWeights, spec: IRMBSpec, batch_statistics: bool) -> Tensor:
    """h: the block's normalised input."""
    if spec.norm != "batch":
        return normalize(x, w.norm_weight, w.norm_bias, norm=spec.norm, eps=spec.norm_eps)
    mean = var = None
    if not batch_statistics:
        mean, var = _present(w.norm_mean, "norm_mean"), _present(w.norm_var, "norm_var")
    return batch_norm(x, mean, var, w.norm_weight, w.norm_bias, spec.norm_eps)


def _expand(h: Tensor, w: IRMBWeights, spec: IRMBSpec) -> Tensor:
    """u = act(Wv h + bv), or h where the block does not expand."""
    if w.v_weight is None:
        return h
    return expand(h, w.v_weight, w.v_bias, act=spec.act, groups=spec.v_groups)


def _attend_and_expand(h: Tensor, w: IRMBWeights, spec: IRMBSpec) -> Tensor:
    """u = act(Wv (A h) + bv) with ``attn_pre``, else A act(Wv h + bv)."""
    pre = spec.attn_pre or w.v_weight is None
    z = window_attention(
        h,
        w.qk_weight,
        w.qk_bias,
        None if pre else w.v_weight,
        None if pre else w.v_bias,
        head_dim=spec.head_dim,
        window_size=spec.window_size,
        window_mode=spec.window_mode,
        v_act=spec.act,
        v_groups=spec.v_groups,
    )
    return _expand(z, w, spec) if pre else z


def _attend_over(h: Tensor, y: Tensor, w: IRMBWeights, spec: IRMBSpec) -> Tensor:
    """A y with A from h: attention behind the depthwise convolution (the swapped ablation)."""
    height, width = h.shape[-2:]
    windows = Windows.of(h, spec.window_size)
    h, y = pad_to_windows(h, windows), pad_to_windows(y, windows)
    q, k = (h, h) if w.qk_weight is None else F.conv2d(h, w.qk_weight, w.qk_bias).chunk(2, dim=1)
    z = attend(q, k, y, head_dim=spec.head_dim, windows=windows, window_mode=spec.window_mode)
    return crop(z, height, width)


def _convolve(
    u: Tensor, w: IRMBWeights, spec: IRMBSpec, batch_statistics: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, scale, shift): the batch norm of DWConv(u) is scale y + shift, or y if both are None."""
    assert w.dw_weight is not None
    y = depthwise_conv2d(
        u, w.dw_weight, stride=spec.stride, padding=spec.padding, dilation=spec.dilation
    )
    if batch_statistics:
        return batch_norm(y, None, None, w.bn_weight, w.bn_bias, spec.bn_eps), None, None
    return y, *_bn_affine(w, spec)


def _local(u: Tensor, w: IRMBWeights, spec: IRMBSpec, batch_statistics: bool) -> Tensor:
    """u + SE(SiLU(BN(DWConv(u)))), the first term with skips only; u without a convolution."""
    if w.dw_weight is None:
        return u
    c, scale, shift = _convolve(u, w, spec, batch_statistics)
    c = F.silu(normalize(c, scale, shift, norm="affine", eps=0.0))
    gate = _squeeze_excite(c, w, spec)
    c = c if gate is None else gate[:, :, None, None] * c
    return u + c if spec.skip else c


def _bn_affine(w: IRMBWeights, spec: IRMBSpec) -> tuple[Tensor | None, Tensor | None]:
    """The batch norm behind the depthwise convolution as (scale, shift), at least in fp32."""
    if w.bn_mean is None or w.bn_var is None:
        return w.bn_weight, w.bn_bias
    dtype = torch.promote_types(w.bn_var.dtype, torch.float32)
    mean, var = w.bn_mean.to(dtype), w.bn_var.to(dtype)
    return batch_norm_affine(w.bn_weight, w.bn_bias, mean, var, spec.bn_eps)


def _squeeze_excite(c: Tensor, w: IRMBWeights, spec: IRMBSpec) -> Tensor | None:
    """gate = sigmoid(W2 act(W1 mean(c) + b1) + b2), (N, M); None where the block has none."""
    if w.se_reduce_weight is None or w.se_expand_weight is None:
        return None
    s = c.mean((2, 3), keepdim=True)
    s = activate(F.conv2d(s, w.se_reduce_weight, w.se_reduce_bias), spec.act)
    return F.conv2d(s, w.se_expand_weight, w.se_expand_bias).sigmoid().flatten(1)


def _present(tensor: Tensor | None, name: str) -> Tensor:
    """The tensor, which this block cannot do without."""
    if tensor is None:
        raise ValueError(f"irmb: weights.{name} is required by this spec, got None")
    return tensor
