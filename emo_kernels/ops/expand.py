"""Expand: normalise, widen every pixel from C to M channels, activate."""

from __future__ import annotations

from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator
from emo_kernels.spec import ACTIVATIONS


def _output_shape(x: Tensor, weight: Tensor, *_: Tensor | None, **__: object) -> tuple[int, ...]:
    n, _c, h, w = x.shape
    return (n, weight.shape[0], h, w)


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"
_NORM_AT = 3
_OPTIONS = "str norm, float eps, str act, int groups"

_operator = Operator(
    "expand",
    tensors=_TENSORS,
    options=_OPTIONS,
    shape=_output_shape,
    extras="Tensor? affine, Tensor? out_grad, Tensor? out_weight, Tensor? drop_scale, "
    "Tensor? residual",
    norm_at=_NORM_AT,
)
forward, backward = _operator.forward, _operator.backward_op


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
    backend: str | None = None,
) -> Tensor:
    """Expand every pixel (steps 2 and 3a of the block): act(W . norm(x) + b).

    Args:
        x: (N, C, H, W), floating point, any strides; channels_last is the fast layout.
        weight: (M, C / groups, 1, 1).
        bias: (M,).
        norm_weight, norm_bias: (C,) each, of the norm.
        norm: ``none``; ``affine``: norm_weight[c] * x + norm_bias[c], a batch norm given as its
            affine; ``layer``: layer norm over the channels of each pixel.
        eps: of the layer norm.
        act: ``none``, ``relu``, ``gelu`` (exact, by erf) or ``silu``.
        groups: of the 1x1 convolution.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, M, H, W).

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> expand(torch.ones(1, 2, 1, 1), torch.ones(3, 2, 1, 1), act="relu").flatten()
        tensor([2., 2., 2.])
    """
    checks.check_map("expand", x)
    checks.check_pointwise("expand", x, "weight", weight, groups, "groups")
    checks.check_tensor("expand", x, "bias", bias, weight.shape[:1], "(M,)")
    checks.check_norm("expand", x, norm, norm_weight, norm_bias, eps)
    checks.check_choice("expand", "act", act, ACTIVATIONS)
    tensors = (x, weight, bias, norm_weight, norm_bias)
    options = {"norm": norm, "eps": eps, "act": act, "groups": groups}
    return _operator(tensors, options, backend)
