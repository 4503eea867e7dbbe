"""Every operator stated a second time, in fp64, as sums over taps, channels and windows.

Nothing here is shared with the package: no convolution, no norm, no softmax of torch, no code of
``emo_kernels.reference``. Slices written out by the formulas of the windows and taps, einsum for
the sums. It is what the reference, and every backend behind it, is held against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from emo_kernels.spec import IRMBSpec


def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int, dilation: int = 1
) -> Tensor:
    """y[n, c, i, j] = sum_ab w[c, a, b] x[n, c, i s + a d - p, j s + b d - p], tap by tap."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    out_h = (h + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    out_w = (w + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    framed = x.new_zeros(n, c, h + 2 * padding, w + 2 * padding)
    framed[:, :, padding : padding + h, padding : padding + w] = x
    y = x.new_zeros(n, c, out_h, out_w)
    for a in range(k):
        for b in range(k):
            top, left = a * dilation, b * dilation
            rows = slice(top, top + stride * (out_h - 1) + 1, stride)
            cols = slice(left, left + stride * (out_w - 1) + 1, stride)
            y = y + weight[:, 0, a, b].reshape(1, c, 1, 1) * framed[:, :, rows, cols]
    return y


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float
) -> Tensor:
    """x, x w + b, or (x - mean) / sqrt(var + eps) w + b over the channels of a pixel."""
    if norm == "none":
        return x
    if norm == "layer":
        centred = x - x.sum(1, keepdim=True) / x.shape[1]
        x = centred / ((centred * centred).sum(1, keepdim=True) / x.shape[1] + eps).sqrt()
    if weight is not None:
        x = x * weight.reshape(1, -1, 1, 1)
    return x if bias is None else x + bias.reshape(1, -1, 1, 1)


def activate(u: Tensor, act: str) -> Tensor:
    """The activations from their definitions."""
    if act == "relu":
        return torch.where(u <= 0, 0.0, u)  # NaN stays
    if act == "gelu":
        return u * 0.5 * (1.0 + torch.erf(u / math.sqrt(2.0)))
    if act == "silu":
        return u * 0.5 * (1.0 + torch.tanh(u / 2.0))
    assert act == "none"
    return u


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """A 1x1 convolution: output channels of group g read the input channels of group g."""
    n, c, h, w = x.shape
    m = weight.shape[0]
    grouped = x.reshape(n, groups, c // groups, h, w)
    matrix = weight.reshape(groups, m // groups, c // groups)
    u = torch.einsum("gmc,ngchw->ngmhw", matrix, grouped).reshape(n, m, h, w)
    return u if bias is None else u + bias.reshape(1, -1, 1, 1)


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
    """act(W norm(x) + b)."""
    return activate(
        pointwise(normalize(x, norm_weight, norm_bias, norm, eps), weight, bias, groups), act
    )


def _windows(h: int, w: int, size: int, mode: str) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each window of an h x w map that windows divide."""
    wh, ww = (h, w) if size <= 0 else (size, size)
    n1, n2 = h // wh, w // ww
    for i in range(n1):
        for j in range(n2):
            if mode == "grid":  # every n1-th row from i, every n2-th column from j
                yield slice(i, None, n1), slice(j, None, n2)
            else:
                yield slice(i * wh, (i + 1) * wh), slice(j * ww, (j + 1) * ww)


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int, size: int, mode: str) -> Tensor:
    """Softmax attention in every window of maps that windows divide, one window at a time."""
    if mode == "both":
        return attend(q, k, v, head_dim, size, "grid") + attend(q, k, v, head_dim, size, "block")
    n, c, h, w = q.shape
    heads = c // head_dim
    out = torch.zeros_like(v)
    for rows, cols in _windows(h, w, size, mode):
        cut = v[:, :, rows, cols]
        tokens = cut.shape[2] * cut.shape[3]
        qw, kw, vw = (
            t[:, :, rows, cols].reshape(n, heads, t.shape[1] // heads, tokens) for t in (q, k, v)
        )
        logits = torch.einsum("ngdt,ngds->ngts", qw, kw) / math.sqrt(head_dim)
        power = (logits - logits.detach().amax(-1, keepdim=True)).exp()
        mixed = torch.einsum("ngts,ngds->ngdt", power, vw) / power.sum(-1).unsqueeze(2)
        out[:, :, rows, cols] = mixed.reshape(cut.shape)
    return out


def _padded(x: Tensor, size: int) -> Tensor:
    """Zeros below and to the right until windows divide the map."""
    n, c, h, w = x.shape
    if size <= 0:
        return x
    full = x.new_zeros(n, c, math.ceil(h / size) * size, math.ceil(w / size) * size)
    full[:, :, :h, :w] = x
    return full


def window_attention(
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
) -> Tensor:
    """Pad the normalised map, project, attend window by window, crop."""
    n, c, h, w = x.shape
    field = _padded(normalize(x, norm_weight, norm_bias, norm, eps), window_size)
    q = k = v = field
    if qk_weight is not None:
        both = pointwise(field, qk_weight, qk_bias)
        q, k = both[:, :c], both[:, c:]
    if v_weight is not None:
        v = activate(pointwise(field, v_weight, v_bias, v_groups), v_act)
    return attend(q, k, v, head_dim, window_size, window_mode)[:, :, :h, :w]


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_var: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int,
    dilation: int = 1,
    eps: float = 1e-6,
    act: str = "none",
) -> Tensor:
    """act(BN(W * x + b)), tap by tap."""
    n, c, h, w = x.shape
    k = weight.shape[-1]
    field = x.new_zeros(n, c, h + 2 * padding, w + 2 * padding)
    field[:, :, padding : padding + h, padding : padding + w] = x
    reach = dilation * (k - 1) + 1
    rows, cols = (range(0, side - reach + 1, stride) for side in field.shape[2:])
    y = x.new_zeros(n, weight.shape[0], len(rows), len(cols))
    for a in range(k):
        for b in range(k):
            top, left = a * dilation, b * dilation
            seen = field[:, :, top::stride, left::stride][:, :, : len(rows), : len(cols)]
            y = y + torch.einsum("oc,nchw->nohw", weight[:, :, a, b], seen)
    if bias is not None:
        y = y + bias.reshape(1, -1, 1, 1)
    if norm_mean is not None and norm_var is not None:
        mean, var = (t.reshape(1, -1, 1, 1) for t in (norm_mean, norm_var))
        y = normalize((y - mean) / (var + eps).sqrt(), norm_weight, norm_bias, "affine", 0.0)
    return activate(y, act)


def norm_pool_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """W mean(LN(x)) + b, sum by sum."""
    centred = x - x.mean(1, keepdim=True)
    y = centred / (centred.square().mean(1, keepdim=True) + eps).sqrt()
    y = normalize(y, norm_weight, norm_bias, "affine", 0.0)
    logits = torch.einsum("oc,nchw->no", weight, y) / (x.shape[2] * x.shape[3])
    return logits if bias is None else logits + bias


def shrink(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """residual + drop[n] W (local + gate[n, m] silu(scale[m] y + shift[m]))."""
    z = activate(normalize(y, scale, shift, "affine", 0.0), "silu")
    if gate is not None:
        z = torch.einsum("nm,nmhw->nmhw", gate, z)
    if local is not None:
        z = z + local
    out = pointwise(z, weight, None)
    if drop_scale is not None:
        out = torch.einsum("n,nohw->nohw", drop_scale, out)
    return out if residual is None else residual + out


def _batch_norm(x: Tensor, tensors: dict[str, Tensor], prefix: str, eps: float) -> Tensor:
    mean, var = (tensors[f"{prefix}_{part}"].reshape(1, -1, 1, 1) for part in ("mean", "var"))
    weight, bias = tensors.get(f"{prefix}_weight"), tensors.get(f"{prefix}_bias")
    return normalize((x - mean) / (var + eps).sqrt(), weight, bias, "affine", 0.0)


def _stencil(u: Tensor, tensors: dict[str, Tensor], spec: IRMBSpec) -> Tensor:
    """SE(silu(BN(depthwise(u)))) plus u with the skip (steps 4 to 6)."""
    if "dw_weight" not in tensors:
        return u
    step = {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
    c = depthwise_conv2d(u, tensors["dw_weight"], **step)
    c = activate(_batch_norm(c, tensors, "bn", spec.bn_eps), "silu")
    if "se_reduce_weight" in tensors:
        s = (c.sum((2, 3)) / (c.shape[2] * c.shape[3]))[:, :, None, None]
        s = pointwise(s, tensors["se_reduce_weight"], tensors["se_reduce_bias"])
        s = pointwise(activate(s, spec.act), tensors["se_expand_weight"], tensors["se_expand_bias"])
        c = c * 0.5 * (1.0 + torch.tanh(s / 2.0))
    return u + c if spec.skip else c


def irmb(x: Tensor, *, spec: IRMBSpec, **tensors: Tensor) -> Tensor:
    """Steps 1 to 9 of the block, with running statistics; tensors by their names in IRMBWeights."""
    h, t = x, tensors
    if spec.norm == "batch":
        h = _batch_norm(x, t, "norm", spec.norm_eps)
    elif spec.norm == "layer":
        h = normalize(x, t.get("norm_weight"), t.get("norm_bias"), "layer", spec.norm_eps)
    attention = {
        "qk_weight": t.get("qk_weight"),
        "qk_bias": t.get("qk_bias"),
        "head_dim": spec.head_dim,
        "window_size": spec.window_size,
        "window_mode": spec.window_mode,
    }
    v = {"v_weight": t.get("v_weight"), "v_bias": t.get("v_bias")}
    swapped = spec.op_order == "conv_attn"
    expands, attends = v["v_weight"] is not None, spec.head_dim > 0 and not swapped
    if attends and expands and not spec.attn_pre:
        u = window_attention(h, **attention, **v, v_act=spec.act, v_groups=spec.v_groups)
    else:
        u = window_attention(h, **attention) if attends else h
        if expands:
            u = activate(pointwise(u, t["v_weight"], t.get("v_bias"), spec.v_groups), spec.act)
    y = _stencil(u, t, spec)
    if swapped and spec.head_dim:
        field, values, c = _padded(h, spec.window_size), _padded(y, spec.window_size), x.shape[1]
        qk = torch.cat([field, field], 1)
        if "qk_weight" in t:
            qk = pointwise(field, t["qk_weight"], t.get("qk_bias"))
        where = (spec.head_dim, spec.window_size, spec.window_mode)
        y = attend(qk[:, :c], qk[:, c:], values, *where)[:, :, : x.shape[2], : x.shape[3]]
    out = pointwise(y, t["proj_weight"], None)
    if "gamma" in t:
        out = out * t["gamma"].reshape(1, -1, 1, 1)
    return x + out if spec.skip else out
