"""A training step through the whole block: the kernels of one backend, forward and backward.

Saved between the two: the input x, the attention's result s, the expanded map e (and the slope of
its activation where the backend wants that), the convolution's result y and four numbers a channel
for each batch norm. Recomputed: norms, q, k, the softmax, the other pre-activations, the
activations behind the convolution, and every other derivative. Of the expanded width the backward
pass writes two maps, dz and the gradient at e.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops.batch_norm import Statistics
from emo_kernels.ops.irmb_step import ALONE, Maps, Neighbours, Plan, Step, spread
from emo_kernels.ops.registration import define_composite, match, needs_gradient
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
    ) -> tuple[Tensor, Tensor | None]:
        step = Step(plan, IRMBWeights._make(weights), drop_scale)
        out, sums, maps = step.forward(x, known)
        ctx.plan = plan
        if sums is not None:
            ctx.mark_non_differentiable(sums)
        ctx.pixels = [s and s.pixels for s in (maps.norm, maps.bn)]
        statistics = [(None, None) if s is None else s[::2] for s in (maps.norm, maps.bn)]
        s = None if maps.s is x else maps.s
        kept = (x, s, maps.e, maps.slope, maps.y, maps.means)
        kept += (*statistics[0], *statistics[1], drop_scale)
        ctx.save_for_backward(*kept, *_unmoved(plan, step.weights))
        return out, sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
        x, s, e, slope, y, means, *saved = ctx.saved_tensors
        norm_affine, norm_total, affine, total, drop_scale, *tensors = saved
        weights = IRMBWeights._make(tensors)
        if torch.is_grad_enabled():
            grads = _differentiable(ctx, grad, x, drop_scale, weights)
            return (None, None, *grads)
        s = x if s is None else s
        norm = None if norm_affine is None else Statistics(norm_affine, ctx.pixels[0], norm_total)
        bn = Statistics(affine, ctx.pixels[1], total)
        maps = Maps(s, e, slope, y, norm, bn, means)
        names = ("x", "drop_scale", *IRMBWeights._fields)
        inputs = (x, drop_scale, *weights)
        needed = ctx.needs_input_grad[2:]
        wants = {n for n, is_needed in zip(names, needed, strict=True) if is_needed}
        step = Step(ctx.plan, weights, drop_scale)
        found = step.backward(grad, x, maps, needed[0], wants)
        return (
            None,
            None,
            *(
                match(found.get(name), like) if name in wants else None
                for name, like in zip(names, inputs, strict=True)
            ),
        )


def _unmoved(plan: Plan, weights: IRMBWeights) -> IRMBWeights:
    """Without the running statistics that steps move: a later one may come before our gradient."""
    for mode, norm in ((plan.norm, "norm"), (plan.bn, "bn")):
        if mode.batch_statistics:
            weights = weights._replace(**{f"{norm}_mean": None, f"{norm}_var": None})
    return weights


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor, drop_scale: Tensor | None, weights: IRMBWeights
) -> list[Tensor | None]:
    """Gradients that can be differentiated: through the reference composition."""
    plan, needed = ctx.plan, ctx.needs_input_grad[2:]
    if plan.norm.process_group is not None or plan.bn.process_group is not None:
        raise NotImplementedError(
            "irmb_training: a block whose batch norms span processes has no double backward; "
            "run it without create_graph, or restore(model)"
        )
    inputs = [t if t is None else t.to(x.dtype).view_as(t) for t in (x, drop_scale, *weights)]
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
    if needs_gradient((x, drop_scale, *weights)):
        return _Block.apply(plan, known, x, drop_scale, *weights)
    return Step(plan, weights, drop_scale).forward(x, known)[:2]


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
