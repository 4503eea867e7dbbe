"""Shrink: the batch norm's affine, SiLU, local skip, projection and residual behind the stencil."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator, define_kernel, empty_map


def _output_shape(y: Tensor, weight: Tensor, *_: Tensor | None) -> tuple[int, ...]:
    n, _m, h, w = y.shape
    return (n, weight.shape[0], h, w)


_operator = Operator(
    "shrink",
    tensors="Tensor y, Tensor weight, Tensor? scale, Tensor? shift, Tensor? local, "
    "Tensor? residual, Tensor? gate, Tensor? drop_scale",
    options="",
    shape=_output_shape,
    extras="Tensor? affine",
    norm_at=2,
    identity_at=5,
)
forward, backward = _operator.forward, _operator.backward_op


def _statistics(y: Tensor, weight: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    out = empty_map(y, _output_shape(y, weight))
    return out, y.new_empty((2, weight.shape[0]), dtype=torch.float64)


statistics = define_kernel(
    "shrink_statistics",
    "Tensor y, Tensor weight, Tensor? scale, Tensor? shift, Tensor? local, Tensor? residual, "
    "Tensor? gate, Tensor? drop_scale, Tensor? pivot",
    "",
    "(Tensor, Tensor)",
    _statistics,
)


def shrink(
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    local: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    drop_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Shrink every pixel from M to O channels (steps 4 to 9 of the block, behind the stencil).

    out = residual + drop_scale[n] * W . (local + gate[n, m] * silu(scale[m] * y + shift[m])).

    Args:
        y: (N, M, H, W), output of the depthwise convolution.
        weight: (O, M, 1, 1).
        scale, shift: (M,) each, the batch norm as its affine; both or none.
        local: (N, M, H, W), the local skip.
        residual: (N, O, H, W), the block's input.
        gate: (N, M), squeeze-excite.
        drop_scale: (N,), stochastic depth: 0 or 1 / keep for each image.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, O, H, W).

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> y = torch.zeros(1, 2, 1, 1)
        >>> shrink(y, torch.ones(1, 2, 1, 1), local=y + 1, residual=y[:, :1] + 3).item()
        5.0
    """
    checks.check_map("shrink", y, "y")
    n, m, h, w = y.shape
    checks.check_pointwise("shrink", y, "weight", weight, 1, "groups")
    o = weight.shape[0]
    if (scale is None) != (shift is None):
        raise ValueError("shrink: scale and shift must come together, each (M,), got one of them")
    checks.check_tensor("shrink", y, "scale", scale, (m,), "(M,)")
    checks.check_tensor("shrink", y, "shift", shift, (m,), "(M,)")
    checks.check_tensor("shrink", y, "local", local, (n, m, h, w), "(N, M, H, W)")
    checks.check_tensor("shrink", y, "residual", residual, (n, o, h, w), "(N, O, H, W)")
    checks.check_tensor("shrink", y, "gate", gate, (n, m), "(N, M)")
    checks.check_tensor("shrink", y, "drop_scale", drop_scale, (n,), "(N,)")
    tensors = (y, weight, scale, shift, local, residual, gate, drop_scale)
    return _operator(tensors, {}, backend)
