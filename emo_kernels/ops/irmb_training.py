"""A training step through the whole block: the kernels of one backend, forward and backward.

Saved between the two: the input x, the attention's result s, the expanded map e, the convolution's
result y, four numbers a channel for each batch norm, and, where the backend wants them, q, k and
the slope of the expansion's activation. Recomputed: norms, else q and k, the softmax, the other
pre-activations, the activations behind the convolution, and every other derivative. Of the expanded
width the backward pass writes two maps, dz and the gradient at e.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops import batch_norm
from emo_kernels.ops.batch_norm import Statistics
from emo_kernels.ops.irmb_step import ALONE, Maps, Neighbours, Plan, Step, spread
from emo_kernels.ops.registration import (
    Tensors,
    define_composite,
    match,
    needs_gradient,
    watched,
)
from emo_kernels.spec import BatchNormMode, IRMBSpec, IRMBWeights


class _Block(torch.autograd.Function):
    """The step as PyTorch's autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        known: Neighbours,
        x: Tensor,
        drop_scale: Tensor | None,
        *weights: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        out, sums, *maps = _forward(x, weights, plan, drop_scale, known)
        ctx.plan = plan
        if sums is not None:
            ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(x, drop_scale, *maps, *_unmoved(plan, weights))
        return out, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        inputs = (*saved[:2], *saved[_SAVED:])
        if torch.is_grad_enabled():
            return (None, None, *_differentiable(ctx, grad, inputs))
        found = _run(_backward_pass, (ctx.plan, needed), (grad.resolve_neg(), *saved))
        pairs = zip(found, inputs, strict=True)
        return (None, None, *(None if g is None else match(g, like) for g, like in pairs))


# A pass is a function of options and of a flat row of tensors, and gives one: a backend may make it
# again without this module's help (``repeated``).


def _run(run: Callable[..., Tensors], options: tuple[Any, ...], tensors: Tensors) -> Tensors:
    plan: Plan = options[0]
    alone = plan.norm.process_group is None and plan.bn.process_group is None
    if alone and backends.has(plan.backend, "repeated") and not watched(tuple(tensors)):
        return backends.function(plan.backend, "repeated")(run, options, tensors)
    return run(*options, *tensors)


def _forward(
    x: Tensor, weights: Tensors, plan: Plan, drop_scale: Tensor | None, known: Neighbours
) -> Tensors:
    """What :func:`_forward_pass` gives."""
    tensors = (x, drop_scale, known.sums, known.next_pivot, *weights)
    return _run(_forward_pass, (plan, known.next_sums), tensors)


def _forward_pass(
    plan: Plan,
    next_sums: bool,
    x: Tensor,
    drop_scale: Tensor | None,
    sums: Tensor | None,
    next_pivot: Tensor | None,
    *weights: Tensor | None,
) -> Tensors:
    """(out, its sums, s where not x, qk, e, slope, y, means, affine and total of each norm)."""
    step = Step(plan, IRMBWeights._make(weights), drop_scale)
    out, out_sums, maps = step.forward(x, Neighbours(sums, next_sums, next_pivot))
    s = None if maps.s is x else maps.s
    norm = (None, None) if maps.norm is None else maps.norm[::2]
    return out, out_sums, s, maps.qk, maps.e, maps.slope, maps.y, maps.means, *norm, *maps.bn[::2]


_SAVED = 2 + 10  # x, drop_scale and the maps of _forward_pass, which the weights follow


def _backward_pass(
    plan: Plan, needed: tuple[bool, ...], grad: Tensor, *saved: Tensor | None
) -> Tensors:
    """The gradients of x, drop_scale and the weights, where they are needed."""
    x, drop_scale, s, qk, e, slope, y, means, *of_norms = saved[:_SAVED]
    norm_affine, norm_total, affine, total = of_norms
    assert x is not None and y is not None and affine is not None
    weights = IRMBWeights._make(saved[_SAVED:])
    norm = None
    if norm_affine is not None:
        norm = Statistics(norm_affine, batch_norm.pixel_count(x), norm_total)
    bn = Statistics(affine, batch_norm.pixel_count(y), total)
    maps = Maps(x if s is None else s, qk, e, slope, y, norm, bn, means)
    names = ("x", "drop_scale", *IRMBWeights._fields)
    wants = {n for n, is_needed in zip(names, needed, strict=True) if is_needed}
    step = Step(plan, weights, drop_scale)
    found = step.backward(grad, x, maps, needed[0], wants)
    return tuple([found.get(name) if name in wants else None for name in names])


_NORM_MEAN, _BN_MEAN = map(IRMBWeights._fields.index, ("norm_mean", "bn_mean"))


def _unmoved(plan: Plan, weights: Tensors) -> Tensors:
    """Without the running statistics that steps move: a later one may come before our gradient."""
    kept = list(weights)
    for mode, mean in ((plan.norm, _NORM_MEAN), (plan.bn, _BN_MEAN)):
        if mode.batch_statistics:
            kept[mean] = kept[mean + 1] = None  # and the variance
    return kept


def _differentiable(ctx: Any, grad: Tensor, tensors: Tensors) -> list[Tensor | None]:
    """Gradients that can be differentiated: through the reference composition.

    Args:
        tensors: x, drop_scale and the weights.
    """
    x = tensors[0]
    assert x is not None
    plan, needed = ctx.plan, ctx.needs_input_grad[2:]
    if plan.norm.process_group is not None or plan.bn.process_group is not None:
        raise NotImplementedError(
            "irmb_training: a block whose batch norms span processes has no double backward; "
            "run it without create_graph, or restore(model)"
        )
    inputs = [t if t is None else t.to(x.dtype).view_as(t) for t in tensors]
    irmb = backends.function("reference", "irmb")
    statistics = (plan.norm.batch_statistics, plan.bn.batch_statistics)
    out = irmb(
        inputs[0],
        IRMBWeights._make(inputs[2:]),
        plan.spec,
        batch_statistics=statistics,
        drop_scale=inputs[1],
    )
    sought = [t for t, n in zip(inputs, needed, strict=True) if t is not None and n]
    found = torch.autograd.grad(out, sought, grad, create_graph=True, materialize_grads=True)
    return spread(list(found), list(needed))


def irmb_training(
    x: Tensor, weights: IRMBWeights, plan: Plan, drop_scale: Tensor | None = None
) -> Tensor:
    """One block in a training step, its running statistics moved in place.

    Args:
        x: (N, C, H, W).
        weights: the block's tensors; they may be float32 where x has 16 bits.
        plan: switches, modes of the batch norms, backend.
        drop_scale: (N,), stochastic depth: 0 or 1 / keep for each image.

    Returns:
        (N, O, H', W') in the dtype of x.

    Raises:
        ValueError: a batch norm has one value for each channel.
    """
    if torch.compiler.is_compiling():
        return _traced(x, weights, plan, drop_scale)
    return irmb_training_among(x, weights, plan, drop_scale, ALONE)[0]


def irmb_training_among(
    x: Tensor, weights: IRMBWeights, plan: Plan, drop_scale: Tensor | None, known: Neighbours
) -> tuple[Tensor, Tensor | None]:
    """:func:`irmb_training`, and the sums of the output that ``known`` asks for; never traced."""
    x = x.resolve_neg()  # kernels read memory
    if needs_gradient((x, drop_scale, *weights)):
        return _Block.apply(plan, known, x, drop_scale, *weights)
    out, sums = _forward(x, weights, plan, drop_scale, known)[:2]
    assert out is not None
    return out, sums


# What a compiled graph holds of a step: plain arguments, and the buffers that it moves by name.
_MOVED = ("norm_mean", "norm_var", "bn_mean", "bn_var")


def _traced(x: Tensor, weights: IRMBWeights, plan: Plan, drop_scale: Tensor | None) -> Tensor:
    modes = [value for mode in (plan.norm, plan.bn) for value in mode[:2]]
    moved = [getattr(weights, name) for name in _MOVED]
    fixed = weights._replace(**dict.fromkeys(_MOVED))
    options = (*plan.spec, *modes, plan.adds_residual, plan.backend)
    return _composite(x, list(fixed), drop_scale, *moved, *options)


def _from_schema(
    x: Tensor, weights: list[Tensor | None], drop_scale: Tensor | None, *rest: Any
) -> Tensor:
    moved, options = rest[:4], rest[4:]
    spec, modes = IRMBSpec._make(options[: len(IRMBSpec._fields)]), options[len(IRMBSpec._fields) :]
    norm, bn = BatchNormMode(*modes[:2]), BatchNormMode(*modes[2:4])
    tensors = IRMBWeights._make(weights)._replace(**dict(zip(_MOVED, moved, strict=True)))
    plan = Plan(spec, norm, bn, modes[5], modes[4])
    return irmb_training_among(x, tensors, plan, drop_scale, ALONE)[0]


_composite = define_composite(
    "irmb_training(Tensor x, Tensor?[] weights, Tensor? drop_scale, Tensor(a!)? norm_mean, "
    "Tensor(b!)? norm_var, Tensor(c!)? bn_mean, Tensor(d!)? bn_var, "
    + ", ".join(f"{type(value).__name__} {name}" for name, value in IRMBSpec()._asdict().items())
    + ", bool norm_batch, float norm_momentum, bool bn_batch, float bn_momentum, "
    "bool adds_residual, str backend) -> Tensor",
    _from_schema,
)
