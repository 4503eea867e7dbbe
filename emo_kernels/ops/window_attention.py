"""Window attention: normalise, project to q and k, attend inside strided or contiguous windows."""

from __future__ import annotations

from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator, define_kernel, empty_map
from emo_kernels.spec import ACTIVATIONS, WINDOW_MODES


def _output_shape(
    x: Tensor,
    qk_weight: Tensor | None,
    qk_bias: Tensor | None,
    v_weight: Tensor | None,
    *_: Tensor | None,
    **__: object,
) -> tuple[int, ...]:
    n, c, h, w = x.shape
    return (n, c if v_weight is None else v_weight.shape[0], h, w)


def _with_maps(x: Tensor, *tensors: Tensor | None, **_: object) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    return empty_map(x, _output_shape(x, *tensors)), empty_map(x, (n, 2 * c, h, w))


_TENSORS = (
    "Tensor x, Tensor? qk_weight, Tensor? qk_bias, Tensor? v_weight, Tensor? v_bias, "
    "Tensor? norm_weight, Tensor? norm_bias"
)
_OPTIONS = (
    "int head_dim, int window_size, str window_mode, str norm, float eps, str v_act, int v_groups"
)
_operator = Operator(
    "window_attention",
    tensors=_TENSORS,
    options=_OPTIONS,
    shape=_output_shape,
    extras="Tensor? affine, Tensor? residual, Tensor? qk",
    norm_at=5,
)
forward, backward = _operator.forward, _operator.backward_op
with_maps = define_kernel(
    "window_attention_with_maps", _TENSORS, _OPTIONS, "(Tensor, Tensor)", _with_maps
)


def check_heads(operator: str, c: int, m: int | None, head_dim: int) -> None:
    """``head_dim`` divides C, and the number of heads divides M where V is expanded."""
    checks.check_integer(operator, "head_dim", head_dim, 1)
    if c % head_dim:
        raise ValueError(
            f"{operator}: head_dim must divide C = {c}, got {head_dim}; "
            f"choose one of {[d for d in range(1, c + 1) if c % d == 0]}"
        )
    heads = c // head_dim
    if m is not None and m % heads:
        raise ValueError(
            f"{operator}: the {heads} heads (C / head_dim = {c} / {head_dim}) must divide the "
            f"expanded channels M when attention runs over the expanded V (attn_pre off), "
            f"got M = {m}; use attn_pre=True or another expansion ratio"
        )


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
    backend: str | None = None,
) -> Tensor:
    """Attention inside windows (steps 2 and 3c of the block): softmax(q k^T / sqrt(head_dim)) v.

    n = norm(x) is padded with zeros at the right and bottom to whole windows; the padded pixels
    take part in the softmax. q and k are the halves of W_qk . n + b_qk, head-major; without
    qk_weight both are n. The values are n itself (attention before the expansion, ``attn_pre``),
    or, where v_weight is given, v_act(W_v . n + b_v).

    Args:
        x: (N, C, H, W), floating point, any strides; channels_last is the fast layout.
        qk_weight: (2C, C, 1, 1); qk_bias: (2C,).
        v_weight: (M, C / v_groups, 1, 1); v_bias: (M,).
        norm_weight, norm_bias: (C,) each.
        head_dim: channels of a head; divides C, and C / head_dim divides M where V is given.
        window_size: side of a window in pixels; <= 0 is the whole map.
        window_mode: ``grid``: every n-th pixel, as published; ``block``: contiguous;
            ``both``: the sum of the two.
        norm, eps: as in :func:`emo_kernels.ops.expand`.
        v_act: activation of the values; v_groups: groups of their convolution.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, C, H, W), or (N, M, H, W) where v_weight is given.

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> window_attention(torch.ones(1, 4, 7, 7), head_dim=2).mean().round(decimals=3)
        tensor(1.)
    """
    checks.check_map("window_attention", x)
    c = x.shape[1]
    checks.check_tensor(
        "window_attention", x, "qk_weight", qk_weight, (2 * c, c, 1, 1), "(2C, C, 1, 1)"
    )
    checks.check_tensor("window_attention", x, "qk_bias", qk_bias, (2 * c,), "(2C,)")
    if qk_weight is None and qk_bias is not None:
        raise ValueError("window_attention: qk_bias needs qk_weight, (2C, C, 1, 1)")
    if v_weight is None and (v_bias is not None or v_act != "none" or v_groups != 1):
        raise ValueError("window_attention: v_bias, v_act and v_groups need v_weight")
    if v_weight is not None:
        checks.check_pointwise("window_attention", x, "v_weight", v_weight, v_groups, "v_groups")
        checks.check_tensor("window_attention", x, "v_bias", v_bias, v_weight.shape[:1], "(M,)")
    check_heads("window_attention", c, None if v_weight is None else v_weight.shape[0], head_dim)
    checks.check_integer("window_attention", "window_size", window_size)
    checks.check_choice("window_attention", "window_mode", window_mode, WINDOW_MODES)
    checks.check_choice("window_attention", "v_act", v_act, ACTIVATIONS)
    checks.check_norm("window_attention", x, norm, norm_weight, norm_bias, eps)
    tensors = (x, qk_weight, qk_bias, v_weight, v_bias, norm_weight, norm_bias)
    options = {
        "head_dim": head_dim,
        "window_size": window_size,
        "window_mode": window_mode,
        "norm": norm,
        "eps": eps,
        "v_act": v_act,
        "v_groups": v_groups,
    }
    return _operator(tensors, options, backend)
