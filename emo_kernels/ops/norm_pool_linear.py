"""The end of a network: layer norm, mean over pixels, linear head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator


def _output_shape(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> tuple[int, ...]:
    return x.shape[0], weight.shape[0]


_operator = Operator(
    "norm_pool_linear",
    tensors="Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias",
    options="float eps",
    shape=_output_shape,
)


def norm_pool_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Normalise every pixel, take the mean over pixels, apply a linear layer: the tail of EMO.

    out = W mean_p((x_p - mean(x_p)) / sqrt(var(x_p) + eps) norm_weight + norm_bias) + b, mean and
    variance over the channels of pixel p.

    Args:
        x: (N, C, H, W), floating point; channels_last is the fast layout.
        weight: (O, C), dtype and device of x.
        bias: (O,).
        norm_weight, norm_bias: (C,) affine of the layer norm.
        eps: added to the variance, > 0.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, O).

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> norm_pool_linear(torch.ones(2, 3, 4, 4), torch.ones(5, 3)).shape
        torch.Size([2, 5])
    """
    name = "norm_pool_linear"
    checks.check_map(name, x)
    checks.check_is_tensor(name, "weight", weight)
    c = x.shape[1]
    if weight.dim() != 2 or weight.shape[1] != c or weight.shape[0] == 0:
        got = tuple(weight.shape)
        raise ValueError(f"{name}: weight must be (O, C) with C = {c}, got {got}")
    checks.check_like(name, x, "weight", weight)
    checks.check_tensor(name, x, "bias", bias, weight.shape[:1], "(O,)")
    for argument, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        checks.check_tensor(name, x, argument, vector, (c,), "(C,)")
    checks.check_epsilon(name, "eps", eps)
    return _operator((x, weight, bias, norm_weight, norm_bias), {"eps": eps}, backend)
