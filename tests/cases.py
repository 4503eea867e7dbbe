"""Calls of every operator for a row of ``shapes.TABLE``: tensors in fp64, options, dead gradients.

``CASES[stem](row)`` is a :class:`numerics.Case`; ``function(stem, run)`` adapts an operator, which
takes ``IRMBWeights`` in the one case of ``irmb``, to the keyword call that the driver makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import shapes
import torch
from numerics import Case
from shapes import Row
from torch import Tensor

from emo_kernels import ops
from emo_kernels.spec import IRMBSpec, IRMBWeights, batch_norm_affine

STEMS = (
    "conv_norm_act",
    "depthwise_conv2d",
    "expand",
    "window_attention",
    "shrink",
    "norm_pool_linear",
    "irmb",
)


class MakeCase(Protocol):
    """How a row becomes the call of one operator."""

    def __call__(
        self, row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0
    ) -> Case: ...


def _map(row: Row, salt: str, shape: tuple[int, ...], seed: int, data: str = "shifted") -> Tensor:
    return shapes.random_map(shape, shapes.generator(row, salt, seed), data)


def _vector(row: Row, salt: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=shapes.generator(row, salt, seed), dtype=torch.float64)


def depthwise_case(
    row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0
) -> Case:
    """The row's depthwise convolution on a map of its M channels."""
    x = _map(row, "u", (row.n, row.m, row.h, row.w), seed, data)
    options = {"stride": row.stride, "padding": row.padding, "dilation": row.dilation}
    return Case({"x": x, "weight": shapes.weights(row, data=data, seed=seed).dw_weight}, options)


def conv_norm_act_case(
    row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0
) -> Case:
    """The row as a stem: C channels of an image to O, the norm and the bias where it has them."""
    shaped: dict[str, tuple[int, ...]] = {"weight": (row.o, row.c, row.kernel, row.kernel)}
    if row.bias:
        shaped["bias"] = (row.o,)
    if row.norm == "batch":
        names = ("norm_weight", "norm_bias", "norm_mean", "norm_var")
        shaped |= dict.fromkeys(names, (row.o,))
    options = {"stride": row.stride, "padding": row.padding, "dilation": row.dilation}
    return Case(
        {
            "x": shapes.feature_map(row, data=data, seed=seed),
            **shapes.trained(row, shaped, data=data, seed=seed),
        },
        {**options, "act": row.act},
        constant=("norm_mean", "norm_var"),
    )


def _norm(row: Row, weights: IRMBWeights) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """The row's norm as the operators take it: batch norm as its affine."""
    if row.norm == "batch":
        assert weights.norm_mean is not None and weights.norm_var is not None
        scale, shift = batch_norm_affine(
            weights.norm_weight, weights.norm_bias, weights.norm_mean, weights.norm_var, 1e-6
        )
        return {"norm_weight": scale, "norm_bias": shift}, {"norm": "affine"}
    tensors = {"norm_weight": weights.norm_weight, "norm_bias": weights.norm_bias}
    return tensors, {"norm": row.norm, "eps": 1e-6}


def expand_case(row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0) -> Case:
    """The row's norm, expanding convolution and activation."""
    w = shapes.weights(row, data=data, seed=seed)
    tensors, options = _norm(row, w)
    x = shapes.feature_map(row, data=data, seed=seed)
    return Case(
        {"x": x, "weight": w.v_weight, "bias": w.v_bias, **tensors},
        {**options, "act": row.act, "groups": row.v_groups},
    )


def attention_case(
    row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0
) -> Case:
    """The row's norm and attention, over the expanded V where the row expands first."""
    w = shapes.weights(row, data=data, qk_scale=qk_scale, seed=seed)
    tensors, options = _norm(row, w)
    tensors |= {"qk_weight": w.qk_weight, "qk_bias": w.qk_bias}
    options |= {
        "head_dim": row.head_dim,
        "window_size": row.window,
        "window_mode": row.window_mode,
    }
    if not row.attn_pre:
        tensors |= {"v_weight": w.v_weight, "v_bias": w.v_bias}
        options |= {"v_act": row.act, "v_groups": row.v_groups}
    dead = ("qk_weight", "qk_bias") if row.tokens == 1 else ()
    return Case({"x": shapes.feature_map(row, data=data, seed=seed), **tensors}, options, dead=dead)


def shrink_case(row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0) -> Case:
    """The row's second half; skips, gate and stochastic depth where the row has them."""
    w = shapes.weights(row, data=data, seed=seed)
    n, m, size = row.n, row.m, row.output_size
    tensors: dict[str, Tensor | None] = {
        "y": _map(row, "y", (n, m, *size), seed, data),
        "weight": w.proj_weight,
    }
    if w.bn_mean is not None and w.bn_var is not None:
        affine = batch_norm_affine(w.bn_weight, w.bn_bias, w.bn_mean, w.bn_var, 1e-6)
        tensors |= dict(zip(("scale", "shift"), affine, strict=True))
    if row.skip:
        tensors |= {
            "local": _map(row, "local", (n, m, *size), seed, data),
            "residual": _map(row, "residual", (n, row.o, *size), seed, data),
            "drop_scale": 1.25 * (_vector(row, "drop", (n,), seed) > 0.2).double(),
        }
    if row.se:
        tensors["gate"] = _vector(row, "gate", (n, m), seed)
    return Case(tensors)


def irmb_case(row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0) -> Case:
    """The whole block."""
    weights = shapes.weights(row, data=data, qk_scale=qk_scale, seed=seed)
    return Case(
        {"x": shapes.feature_map(row, data=data, seed=seed), **dict(weights.present())},
        {"spec": row.spec()},
        dead=("qk_weight", "qk_bias") if row.head_dim and row.tokens == 1 else (),
        constant=("norm_mean", "norm_var", "bn_mean", "bn_var"),
    )


def norm_pool_linear_case(
    row: Row, *, data: str = "shifted", qk_scale: float = 1.0, seed: int = 0
) -> Case:
    """The row as the end of a network: layer norm of C channels, mean, a linear layer to O."""
    shaped: dict[str, tuple[int, ...]] = {"weight": (row.o, row.c)}
    if row.bias:
        shaped["bias"] = (row.o,)
    if row.norm == "layer":
        shaped |= dict.fromkeys(("norm_weight", "norm_bias"), (row.c,))
    vectors = {name: _vector(row, name, shape, seed) - 0.3 for name, shape in shaped.items()}
    x = _map(row, "x", (row.n, row.c, row.h, row.w), seed, data)
    # One channel less its mean is nothing.
    dead = {"x", "norm_weight"} & {"x", *vectors} if row.c == 1 else ()
    return Case({"x": x, **vectors}, {"eps": 1e-6}, tuple(dead))


CASES: dict[str, MakeCase] = {
    "conv_norm_act": conv_norm_act_case,
    "depthwise_conv2d": depthwise_case,
    "expand": expand_case,
    "window_attention": attention_case,
    "shrink": shrink_case,
    "norm_pool_linear": norm_pool_linear_case,
    "irmb": irmb_case,
}


def function(stem: str, run: Callable[..., Tensor], **fixed: Any) -> Callable[..., Tensor]:
    """``run`` as a function of keyword tensors and options, with ``fixed`` ones set."""
    if stem != "irmb":
        return partial(run, **fixed)

    def block(x: Tensor, *, spec: IRMBSpec, **tensors: Tensor | None) -> Tensor:
        return run(x, IRMBWeights(**tensors), spec, **fixed)

    return block


def positional(stem: str, case: Case) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """A case's tensors in the order of the operator's arguments, and its options made complete."""
    if stem == "irmb":
        tensors = {**dict.fromkeys(IRMBWeights._fields), **case.tensors}
        ordered = (tensors["x"], *(tensors[name] for name in IRMBWeights._fields))
        return ordered, {"spec": case.options["spec"]}
    names, defaults = [], {}
    for name, parameter in inspect.signature(getattr(ops, stem)).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            defaults[name] = parameter.default
        else:
            names.append(name)
    del defaults["backend"]
    return tuple(case.tensors.get(name) for name in names), {**defaults, **case.options}


def registered(stem: str, backend: str) -> Callable[..., Tensor]:
    """``torch.ops.emo_kernels.<stem>`` on one backend, as a function of keywords."""
    op = getattr(torch.ops.emo_kernels, stem)

    def run(**arguments: Any) -> Tensor:
        tensors = {n: t for n, t in arguments.items() if t is None or isinstance(t, Tensor)}
        options = {n: o for n, o in arguments.items() if n not in tensors}
        return op(*registered_arguments(stem, Case(tensors, options), backend))

    return run


def registered_arguments(stem: str, case: Case, backend: str) -> tuple[Any, ...]:
    """The arguments of ``torch.ops.emo_kernels.<stem>`` for a case."""
    ordered, options = positional(stem, case)
    if stem == "irmb":
        return (ordered[0], list(ordered[1:]), *options["spec"], backend)
    return (*ordered, *options.values(), backend)


def integers(case: Case, *, largest: int = 2, seed: int = 0) -> Case:
    """The same call with small integers in every tensor."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        shape = tuple(t.shape)
        return torch.randint(-largest, largest + 1, shape, generator=generator).double()

    tensors = {name: draw(t) for name, t in case.tensors.items()}
    return Case(tensors, dict(case.options), case.dead, case.constant)
