"""The operator calls of the self-test: small, odd shapes that reach every option once."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels import ops
from emo_kernels.spec import IRMBSpec, IRMBWeights

Tensors = Mapping[str, Any]  # tensors; Any, so that they can be passed by keyword
Shape = tuple[int, ...]


class Case(NamedTuple):
    """One call of an operator.

    Attributes:
        name: operator and what is special.
        shapes: of its tensors; the values follow from the case's name.
        call: (tensors, backend) to the output.
        differentiable: whether the gradients are compared too.
    """

    name: str
    shapes: Mapping[str, Shape]
    call: Callable[[Tensors, str], Tensor]
    differentiable: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """The tensors in fp64: maps and vectors of unit deviation, matrices scaled to keep it."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        made = {}
        for name, shape in self.shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            fan_in = shape[1] * shape[2] * shape[3] if "weight" in name and len(shape) == 4 else 1
            made[name] = values.abs() + 0.5 if name.endswith("var") else values / fan_in**0.5
        return made


def _conv_norm_act(act: str) -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        with torch.inference_mode():
            return ops.conv_norm_act(**t, stride=2, act=act, backend=backend)

    shapes: dict[str, Shape] = {"x": (2, 3, 13, 10), "weight": (21, 3, 3, 3), "bias": (21,)}
    shapes |= dict.fromkeys(("norm_weight", "norm_bias", "norm_mean", "norm_var"), (21,))
    return Case(f"conv_norm_act {act}", shapes, call, differentiable=False)


def _norm_pool_linear() -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        with torch.inference_mode():
            return ops.norm_pool_linear(**t, backend=backend)

    shapes: dict[str, Shape] = {"x": (2, 21, 7, 5), "weight": (33, 21), "bias": (33,)}
    shapes |= dict.fromkeys(("norm_weight", "norm_bias"), (21,))
    return Case("norm_pool_linear", shapes, call, differentiable=False)


def _depthwise_conv2d(kernel: int, stride: int) -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        return ops.depthwise_conv2d(t["x"], t["weight"], stride=stride, backend=backend)

    shapes = {"x": (2, 21, 13, 10), "weight": (21, 1, kernel, kernel)}
    return Case(f"depthwise_conv2d k{kernel} s{stride}", shapes, call)


def _expand(norm: str, act: str) -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        return ops.expand(**t, norm=norm, act=act, backend=backend)

    shapes: dict[str, Shape] = {"x": (2, 21, 9, 7), "weight": (44, 21, 1, 1), "bias": (44,)}
    if norm != "none":
        shapes |= {"norm_weight": (21,), "norm_bias": (21,)}
    return Case(f"expand {norm} norm, {act}", shapes, call)


def _window_attention(mode: str, expanded: bool) -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        act = "gelu" if expanded else "none"
        return ops.window_attention(
            **t, head_dim=20, window_mode=mode, norm="layer", v_act=act, backend=backend
        )

    shapes: dict[str, Shape] = {
        "x": (2, 40, 9, 13),
        "qk_weight": (80, 40, 1, 1),
        "qk_bias": (80,),
        "norm_weight": (40,),
        "norm_bias": (40,),
    }
    if expanded:
        shapes |= {"v_weight": (60, 40, 1, 1), "v_bias": (60,)}
    what = "over the expanded map" if expanded else "before the expansion"
    return Case(f"window_attention {mode}, {what}", shapes, call)


def _shrink() -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        return ops.shrink(**t, backend=backend)

    m, o, size = 44, 21, (9, 7)
    shapes: dict[str, Shape] = {"y": (2, m, *size), "weight": (o, m, 1, 1), "scale": (m,)}
    shapes |= {"shift": (m,), "local": (2, m, *size), "residual": (2, o, *size), "gate": (2, m)}
    return Case("shrink with every term", shapes, call)


def _irmb(what: str, spec: IRMBSpec, c: int, m: int, o: int, kernel: int) -> Case:
    def call(t: Tensors, backend: str) -> Tensor:
        x, *weights = t.items()
        with torch.inference_mode():
            return ops.irmb(x[1], IRMBWeights(**dict(weights)), spec, backend=backend)

    shapes: dict[str, Shape] = {"x": (2, c, 13, 10), "norm_weight": (c,), "norm_bias": (c,)}
    if spec.norm == "batch":
        shapes |= {"norm_mean": (c,), "norm_var": (c,)}
    if spec.head_dim:
        shapes |= {"qk_weight": (2 * c, c, 1, 1), "qk_bias": (2 * c,)}
    shapes |= {"v_weight": (m, c, 1, 1), "v_bias": (m,), "dw_weight": (m, 1, kernel, kernel)}
    shapes |= dict.fromkeys(("bn_weight", "bn_bias", "bn_mean", "bn_var"), (m,))
    shapes |= {"proj_weight": (o, m, 1, 1)}
    return Case(f"irmb {what}", shapes, call, differentiable=False)


_CONV = IRMBSpec(norm="batch", act="silu")
_DOWN = IRMBSpec(norm="layer", act="gelu", stride=2, padding=2, skip=False)
_ATTN = IRMBSpec(norm="layer", act="gelu", head_dim=20, attn_pre=True, padding=2)

CASES = (
    *(_conv_norm_act(act) for act in ("none", "silu")),
    *(_depthwise_conv2d(kernel, stride) for kernel in (3, 5) for stride in (1, 2)),
    _expand("none", "none"),
    _expand("affine", "silu"),
    _expand("layer", "gelu"),
    *(_window_attention(mode, wide) for mode in ("grid", "block") for wide in (False, True)),
    _shrink(),
    _norm_pool_linear(),
    _irmb("batch norm, silu, k3", _CONV, 24, 50, 24, 3),
    _irmb("layer norm, gelu, k5 s2", _DOWN, 21, 84, 40, 5),
    _irmb("layer norm, gelu, k5, attention", _ATTN, 40, 120, 40, 5),
)
