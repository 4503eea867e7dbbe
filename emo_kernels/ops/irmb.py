"""The whole inverted residual mobile block in inference, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emo_kernels.ops import checks
from emo_kernels.ops.registration import Operator, Options, Tensors
from emo_kernels.ops.window_attention import check_heads
from emo_kernels.spec import (
    ACTIVATIONS,
    NORMS,
    OP_ORDERS,
    WINDOW_MODES,
    IRMBSpec,
    IRMBWeights,
    conv_output_size,
)


def _output_shape(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> tuple[int, ...]:
    n, _c, h, w = x.shape
    assert weights.proj_weight is not None
    o = weights.proj_weight.shape[0]
    if weights.dw_weight is None:
        return (n, o, h, w)
    step = (weights.dw_weight.shape[-1], spec.stride, spec.padding, spec.dilation)
    return (n, o, conv_output_size(h, *step), conv_output_size(w, *step))


class _BlockOperator(Operator):
    """The torch op takes the weights as one list: 19 named tensors cost 10 us more a call."""

    def to_schema(self, positional: Sequence[Any], keyword: Options) -> tuple[Any, ...]:
        x, weights, spec = positional
        return x, list(weights), *spec

    def from_schema(self, args: Sequence[Any]) -> tuple[Sequence[Any], Options]:
        x, weights, *spec = args
        return (x, IRMBWeights._make(weights), IRMBSpec._make(spec)), {}

    def tensors(self, args: Sequence[Any]) -> Tensors:
        return (args[0], *args[1])

    def replace(self, args: Sequence[Any], tensors: Tensors) -> tuple[Any, ...]:
        return (tensors[0], list(tensors[1:]), *args[2:])


_operator = _BlockOperator(
    "irmb",
    tensors="Tensor x, Tensor?[] weights",
    options=", ".join(f"{type(value).__name__} {n}" for n, value in IRMBSpec()._asdict().items()),
    shape=_output_shape,
)


def _expected_shapes(c: int, weights: IRMBWeights, spec: IRMBSpec) -> dict[str, tuple[int, ...]]:
    """The one right shape of every tensor of a block with C input channels."""
    proj, v, dw, se = (
        weights.proj_weight,
        weights.v_weight,
        weights.dw_weight,
        weights.se_reduce_weight,
    )
    assert proj is not None
    m = c if v is None else v.shape[0]
    o = proj.shape[0]
    k = 1 if dw is None else dw.shape[-1]
    r = 1 if se is None else se.shape[0]
    shapes: dict[str, tuple[int, ...]] = {"proj_weight": (o, m, 1, 1), "gamma": (o,)}
    shapes |= {"qk_weight": (2 * c, c, 1, 1), "qk_bias": (2 * c,)}
    shapes |= {"v_weight": (m, c // spec.v_groups, 1, 1), "v_bias": (m,), "dw_weight": (m, 1, k, k)}
    shapes |= {"se_reduce_weight": (r, m, 1, 1), "se_reduce_bias": (r,)}
    shapes |= {"se_expand_weight": (m, r, 1, 1), "se_expand_bias": (m,)}
    shapes |= dict.fromkeys(("norm_weight", "norm_bias", "norm_mean", "norm_var"), (c,))
    shapes |= dict.fromkeys(("bn_weight", "bn_bias", "bn_mean", "bn_var"), (m,))
    return shapes


def _check_switches(c: int, weights: IRMBWeights, spec: IRMBSpec) -> None:
    checks.check_choice("irmb", "spec.norm", spec.norm, NORMS)
    checks.check_choice("irmb", "spec.act", spec.act, ACTIVATIONS)
    checks.check_choice("irmb", "spec.window_mode", spec.window_mode, WINDOW_MODES)
    checks.check_choice("irmb", "spec.op_order", spec.op_order, OP_ORDERS)
    checks.check_integer("irmb", "spec.stride", spec.stride, 1)
    checks.check_integer("irmb", "spec.dilation", spec.dilation, 1)
    checks.check_integer("irmb", "spec.padding", spec.padding, 0)
    checks.check_integer("irmb", "spec.v_groups", spec.v_groups, 1)
    if c % spec.v_groups:
        raise ValueError(f"irmb: spec.v_groups must divide C = {c}, got {spec.v_groups}")
    v = weights.v_weight
    if spec.head_dim:
        check_heads("irmb", c, None if spec.attn_pre or v is None else v.shape[0], spec.head_dim)
    for norm, group in ((spec.norm == "batch", "norm"), (weights.dw_weight is not None, "bn")):
        for statistic in (f"{group}_mean", f"{group}_var"):
            if norm and getattr(weights, statistic) is None:
                raise ValueError(f"irmb: weights.{statistic} is needed by the batch norm, got None")


def _check_block(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> None:
    if weights.proj_weight is None:
        raise ValueError("irmb: weights.proj_weight must be (O, M, 1, 1), got None")
    c = x.shape[1]
    _check_switches(c, weights, spec)
    shapes = _expected_shapes(c, weights, spec)
    for name, tensor in weights.present():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"irmb: weights.{name} must be {shapes[name]} for a map of C = {c} channels, "
                f"got {tuple(tensor.shape)}"
            )
        checks.check_like("irmb", x, f"weights.{name}", tensor)
    _n, o, h, w = _output_shape(x, weights, spec)
    if h < 1 or w < 1:
        raise ValueError(f"irmb: the depthwise kernel does not fit the map {tuple(x.shape)}")
    if spec.skip and (o, h, w) != tuple(x.shape[1:]):
        raise ValueError(
            f"irmb: spec.skip needs an output shaped as the input, {tuple(x.shape[1:])}, "
            f"got {(o, h, w)}; set skip=False"
        )


def irmb(x: Tensor, weights: IRMBWeights, spec: IRMBSpec, *, backend: str | None = None) -> Tensor:
    """One inverted residual mobile block with known batch-norm statistics (steps 1 to 9).

    u = act(W_v . attention(norm(x)) + b_v); c = SE(silu(BN(dwconv(u)))); y = u + c with the skip,
    else c; out = x + W_p . y with the skip, else W_p . y.

    Args:
        x: (N, C, H, W), floating point, any strides; channels_last is the fast layout.
        weights: the block's tensors; shapes in :class:`emo_kernels.spec.IRMBWeights`.
        spec: the block's switches.
        backend: who runs it; ``None`` chooses the best that can.

    Returns:
        (N, O, H', W').

    Raises:
        ValueError: an argument is wrong.
        NotImplementedError: the backend asked for cannot run this call.

    Example:
        >>> import torch
        >>> weights = IRMBWeights(proj_weight=torch.ones(2, 2, 1, 1))
        >>> irmb(torch.ones(1, 2, 1, 1), weights, IRMBSpec()).flatten()
        tensor([3., 3.])
    """
    checks.check_map("irmb", x)
    _check_block(x, weights, spec)
    return _operator((x, weights, spec), {}, backend)
