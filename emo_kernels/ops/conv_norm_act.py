"""Dense convolution of a map of few channels with its batch norm and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator, define_kernel, empty_map
from emo_kernels.spec import ACTIVATIONS, conv_output_size, conv_padding


def _output_shape(x: Tensor, weight: Tensor, *_: Any, **options: Any) -> tuple[int, ...]:
    step = (weight.shape[-1], options["stride"], options["padding"], options["dilation"])
    sides = [conv_output_size(side, *step) for side in x.shape[2:]]
    return (x.shape[0], weight.shape[0], *sides)


_operator = Operator(
    "conv_norm_act",
    tensors="Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? norm_mean, Tensor? norm_var",
    options="int stride, int padding, int dilation, float eps, str act",
    shape=_output_shape,
    extras="Tensor? y, Tensor? norm, Tensor? coefficients",
)
forward, backward = _operator.forward, _operator.backward_op


def _statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, pivot: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    y = empty_map(x, _output_shape(x, weight, **options))
    return y, x.new_empty((2, weight.shape[0]), dtype=torch.float64)


statistics = define_kernel(
    "conv_norm_act_statistics",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? pivot",
    "int stride, int padding, int dilation",
    "(Tensor, Tensor)",
    _statistics,
)


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
    padding: int | None = None,
    dilation: int = 1,
    eps: float = 1e-6,
    act: str = "none",
    backend: str | None = None,
) -> Tensor:
    """Convolve, normalise by known statistics, activate: the stem of EMO and EMOv2.

    y = W * x + b with zeros outside the map; out = act((y - mean) / sqrt(var + eps) norm_weight +
    norm_bias), without the norm where there are no statistics.

    Args:
        x: (N, C, H, W), floating point; contiguous and channels_last are the fast layouts.
        weight: (O, C, K, K), dtype and device of x.
        bias: (O,).
        norm_weight, norm_bias: (O,) affine of the batch norm, with its statistics only.
        norm_mean, norm_var: (O,) statistics, both or neither; no gradient moves them.
        stride: step of the output grid in input pixels, >= 1.
        padding: zero pixels on each side; ``None`` is the published ceil((K - stride) / 2).
        dilation: step between taps in input pixels, >= 1.
        eps: added to the variance, > 0.
        act: none, relu, gelu (exact, by erf) or silu.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, O, H', W'), H' = (H + 2*padding - dilation*(K - 1) - 1) // stride + 1.

    Raises:
        ValueError: an argument is wrong, or the kernel does not fit the padded map.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> conv_norm_act(torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3), stride=2).shape
        torch.Size([1, 2, 2, 2])
    """
    name = "conv_norm_act"
    checks.check_map(name, x)
    checks.check_is_tensor(name, "weight", weight)
    c, h, w = x.shape[1:]
    if weight.dim() != 4 or weight.shape[1] != c or 0 in weight.shape:
        got = tuple(weight.shape)
        raise ValueError(f"{name}: weight must be (O, C, K, K) with C = {c}, got {got}")
    o, k = weight.shape[0], weight.shape[-1]
    checks.check_tensor(name, x, "weight", weight, (o, c, k, k), "(O, C, K, K)")
    vectors = {
        "bias": bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "norm_mean": norm_mean,
        "norm_var": norm_var,
    }
    for argument, vector in vectors.items():
        checks.check_tensor(name, x, argument, vector, (o,), "(O,)")
    _check_norm(norm_weight, norm_bias, norm_mean, norm_var)
    checks.check_integer(name, "stride", stride, 1)
    checks.check_integer(name, "dilation", dilation, 1)
    if padding is None:
        padding = max(conv_padding(k, stride), 0)
    checks.check_integer(name, "padding", padding, 0)
    checks.check_epsilon(name, "eps", eps)
    checks.check_choice(name, "act", act, ACTIVATIONS)
    if dilation * (k - 1) >= min(h, w) + 2 * padding:
        raise ValueError(
            f"{name}: a kernel of {k} taps at dilation {dilation} does not fit a {h} x {w} map "
            f"with padding {padding}; raise padding or lower dilation"
        )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "eps": eps, "act": act}
    return _operator((x, weight, *vectors.values()), options, backend)


def _check_norm(*norm: Tensor | None) -> None:
    weight, bias, mean, var = norm
    if (mean is None) != (var is None):
        missing = "norm_mean" if mean is None else "norm_var"
        raise ValueError(f"conv_norm_act: {missing} is needed beside the other statistic, got None")
    if mean is None and (weight is not None or bias is not None):
        raise ValueError(
            "conv_norm_act: norm_weight and norm_bias need norm_mean and norm_var, got None"
        )
