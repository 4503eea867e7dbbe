"""The whole inverted residual mobile block in inference, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops import checks
from emo_kernels.ops.irmb_step import ALONE, Plan, Step
from emo_kernels.ops.registration import Operator, Options, Tensors
from emo_kernels.ops.window_attention import check_heads
from emo_kernels.spec import (
    ACTIVATIONS,
    NORMS,
    OP_ORDERS,
    WINDOW_MODES,
    BatchNormMode,
    IRMBSpec,
    IRMBWeights,
    conv_output_size,
)


def _output_size(size: Sequence[int], stencil: Sequence[int] | None, spec: IRMBSpec) -> list[int]:
    """(H', W') of a (C, H, W) map behind a depthwise weight of shape ``stencil``."""
    if stencil is None:
        return [*size[1:]]
    step = (stencil[-1], spec.stride, spec.padding, spec.dilation)
    return [conv_output_size(side, *step) for side in size[1:]]


def _output_shape(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> tuple[int, ...]:
    assert weights.proj_weight is not None
    stencil = None if weights.dw_weight is None else weights.dw_weight.shape
    return (x.shape[0], weights.proj_weight.shape[0], *_output_size(x.shape[1:], stencil, spec))


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

    def _run(self, *args: Any) -> Tensor:
        if not backends.composes(args[-1], self.name):
            return super()._run(*args)
        (x, weights, spec), _ = self.from_schema(args[:-1])
        plan = Plan(spec, BatchNormMode(), BatchNormMode(), args[-1])
        return Step(plan, weights, None).forward(x, ALONE)[0]

    def replace(self, args: Sequence[Any], tensors: Tensors) -> tuple[Any, ...]:
        return (tensors[0], list(tensors[1:]), *args[2:])


_operator = _BlockOperator(
    "irmb",
    tensors="Tensor x, Tensor?[] weights",
    options=", ".join(f"{type(value).__name__} {n}" for n, value in IRMBSpec()._asdict().items()),
    shape=_output_shape,
)


Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def _expected_shapes(c: int, shapes: Shapes, spec: IRMBSpec) -> Shapes:
    """The one right shape of every tensor of a block with C input channels."""
    m = shapes["v_weight"][0] if "v_weight" in shapes else c
    o = shapes["proj_weight"][0]
    k = shapes["dw_weight"][-1] if "dw_weight" in shapes else 1
    r = shapes["se_reduce_weight"][0] if "se_reduce_weight" in shapes else 1
    expected: Shapes = {"proj_weight": (o, m, 1, 1), "gamma": (o,)}
    expected |= {"qk_weight": (2 * c, c, 1, 1), "qk_bias": (2 * c,)}
    expected |= {"v_weight": (m, c // spec.v_groups, 1, 1), "v_bias": (m,)}
    expected |= {"dw_weight": (m, 1, k, k)}
    expected |= {"se_reduce_weight": (r, m, 1, 1), "se_reduce_bias": (r,)}
    expected |= {"se_expand_weight": (m, r, 1, 1), "se_expand_bias": (m,)}
    expected |= dict.fromkeys(("norm_weight", "norm_bias", "norm_mean", "norm_var"), (c,))
    expected |= dict.fromkeys(("bn_weight", "bn_bias", "bn_mean", "bn_var"), (m,))
    return expected


def _check_switches(c: int, shapes: Shapes, spec: IRMBSpec) -> None:
    checks.check_choice("irmb", "spec.norm", spec.norm, NORMS)
    checks.check_choice("irmb", "spec.act", spec.act, ACTIVATIONS)
    checks.check_choice("irmb", "spec.window_mode", spec.window_mode, WINDOW_MODES)
    checks.check_choice("irmb", "spec.op_order", spec.op_order, OP_ORDERS)
    checks.check_epsilon("irmb", "spec.norm_eps", spec.norm_eps)
    checks.check_epsilon("irmb", "spec.bn_eps", spec.bn_eps)
    checks.check_integer("irmb", "spec.stride", spec.stride, 1)
    checks.check_integer("irmb", "spec.dilation", spec.dilation, 1)
    checks.check_integer("irmb", "spec.padding", spec.padding, 0)
    checks.check_integer("irmb", "spec.v_groups", spec.v_groups, 1)
    checks.check_integer("irmb", "spec.head_dim", spec.head_dim, 0)
    checks.check_integer("irmb", "spec.window_size", spec.window_size)
    if c % spec.v_groups:
        raise ValueError(f"irmb: spec.v_groups must divide C = {c}, got {spec.v_groups}")
    if spec.head_dim:
        over_v = not spec.attn_pre and "v_weight" in shapes
        check_heads("irmb", c, shapes["v_weight"][0] if over_v else None, spec.head_dim)


# The first of each group may be absent only with the rest of it: nothing is left out in silence.
_GROUPS = (
    ("qk_weight", "qk_bias"),
    ("v_weight", "v_bias"),
    ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias"),
    ("se_expand_weight", "se_expand_bias", "se_reduce_weight", "se_reduce_bias"),
    ("dw_weight", "bn_mean", "bn_var", "bn_weight", "bn_bias"),
)


def _check_present(shapes: Shapes, spec: IRMBSpec) -> None:
    for name, *others in _GROUPS:
        given = [other for other in others if other in shapes]
        if given and name not in shapes:
            raise ValueError(f"irmb: weights.{name} is needed with weights.{given[0]}, got None")
    for needed, group in ((spec.norm == "batch", "norm"), ("dw_weight" in shapes, "bn")):
        for statistic in (f"{group}_mean", f"{group}_var"):
            if needed and statistic not in shapes:
                raise ValueError(f"irmb: weights.{statistic} is needed by the batch norm, got None")
    if "proj_weight" not in shapes:
        raise ValueError("irmb: weights.proj_weight must be (O, M, 1, 1), got None")


def _check_shapes(size: Shape, present: tuple[tuple[str, Shape], ...], *switches: Any) -> None:
    """Switches and weights fit one another and a map of ``size`` (C, H, W)."""
    spec, shapes, c = IRMBSpec._make(switches), dict(present), size[0]
    _check_present(shapes, spec)
    _check_switches(c, shapes, spec)
    expected = _expected_shapes(c, shapes, spec)
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(
                f"irmb: weights.{name} must be {expected[name]} for a map of C = {c} channels, "
                f"got {shape}"
            )
    o = shapes["proj_weight"][0]
    h, w = _output_size(size, shapes.get("dw_weight"), spec)
    if h < 1 or w < 1:
        raise ValueError(f"irmb: the depthwise kernel does not fit a map of (C, H, W) = {size}")
    if spec.skip and (o, h, w) != size:
        raise ValueError(
            f"irmb: spec.skip needs an output shaped as the input, {size}, got {(o, h, w)}; "
            "set skip=False"
        )


# Maps that weights in fp32 may come with, as under autocast.
_ROUNDED = (torch.bfloat16, torch.float16)

# An accelerated block passes the same shapes at every call: 3 instead of 25 us.
_check_shapes_once = lru_cache(maxsize=4096, typed=True)(_check_shapes)


def _check_block(x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> None:
    if not isinstance(weights, IRMBWeights):
        raise TypeError(f"irmb: weights must be an IRMBWeights, got {type(weights).__name__}")
    if not isinstance(spec, IRMBSpec):
        raise TypeError(f"irmb: spec must be an IRMBSpec, got {type(spec).__name__}")
    dtype, device = x.dtype, x.device
    shapes = []
    for name, tensor in zip(IRMBWeights._fields, weights, strict=True):
        if tensor is None:
            continue
        checks.check_is_tensor("irmb", f"weights.{name}", tensor)
        rounded = tensor.dtype is torch.float32 and dtype in _ROUNDED
        if (tensor.dtype is not dtype and not rounded) or tensor.device != device:
            checks.check_like("irmb", x, f"weights.{name}", tensor)
        shapes.append((name, tuple(tensor.shape)))
    check = _check_shapes if torch.compiler.is_compiling() else _check_shapes_once
    check(tuple(x.shape[1:]), tuple(shapes), *spec)


def irmb(x: Tensor, weights: IRMBWeights, spec: IRMBSpec, *, backend: str | None = None) -> Tensor:
    """One inverted residual mobile block with known batch-norm statistics (steps 1 to 9).

    u = act(W_v . attention(norm(x)) + b_v); c = SE(silu(BN(dwconv(u)))); y = u + c with the skip,
    else c; out = x + W_p . y with the skip, else W_p . y.

    Args:
        x: (N, C, H, W), floating point, any strides; channels_last is the fast layout.
        weights: the block's tensors; shapes in :class:`emo_kernels.spec.IRMBWeights`. Of x's dtype,
            or in fp32 with a map of 16 bits: what autocast computes.
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
