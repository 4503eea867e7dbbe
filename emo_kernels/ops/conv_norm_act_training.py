"""A training step through the stem: the kernels of one backend, forward and backward.

Saved between the two: the image x, the convolution's result y and four numbers a channel for the
batch norm. Recomputed: norm, activation and its derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops import batch_norm
from emo_kernels.ops.batch_norm import Statistics
from emo_kernels.ops.conv_norm_act import backward as conv_norm_act_backward
from emo_kernels.ops.conv_norm_act import forward as conv_norm_act_forward
from emo_kernels.ops.conv_norm_act import statistics as conv_norm_act_statistics
from emo_kernels.ops.irmb_step import spread
from emo_kernels.ops.registration import match, needs_gradient
from emo_kernels.spec import BatchNormMode

_NO_NORM = (None,) * 4


class StemPlan(NamedTuple):
    """What one step is, besides its tensors.

    Attributes:
        stride, padding, dilation: of the convolution.
        eps: of the batch norm.
        act: none, relu, gelu or silu.
        norm: how the batch norm runs.
        backend: whose kernels run it.
    """

    stride: int
    padding: int
    dilation: int
    eps: float
    act: str
    norm: BatchNormMode
    backend: str

    @property
    def step(self) -> tuple[int, int, int]:
        """What places the kernel on the map."""
        return self.stride, self.padding, self.dilation


class _Stem(torch.autograd.Function):
    """The step as PyTorch's autograd sees it."""

    @staticmethod
    def forward(
        ctx: Any, plan: StemPlan, x: Tensor, weight: Tensor, *vectors: Tensor | None
    ) -> Tensor:
        out, y, norm = _forward(plan, x, weight, *vectors)
        ctx.plan, ctx.pixels = plan, norm.pixels
        # A later step may move the running statistics before our gradient comes.
        still = (None, None) if plan.norm.batch_statistics else vectors[3:]
        ctx.save_for_backward(x, weight, *vectors[:3], *still, y, norm.affine, norm.total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, y, affine, total = ctx.saved_tensors
        plan, needed = ctx.plan, ctx.needs_input_grad[1:6]
        if torch.is_grad_enabled():
            grads = _differentiable(plan, grad, tensors, needed)
        else:
            norm = Statistics(affine, ctx.pixels, total)
            found = _backward(plan, grad, tensors, y, norm, needed)
            places = zip(found, tensors, needed, strict=False)
            grads = [match(g, t) if n else None for g, t, n in places]
        return (None, *grads, None, None)


def _forward(
    plan: StemPlan, x: Tensor, weight: Tensor, bias: Tensor | None, *norm: Any
) -> tuple[Tensor, Tensor, Statistics]:
    """The output, what the convolution gave, and the batch norm as it ran on it."""
    if plan.norm.batch_statistics:
        y, sums = conv_norm_act_statistics(x, weight, bias, norm[2], *plan.step, plan.backend)
        ran = batch_norm.measured(sums, y, norm, plan.eps, plan.norm, plan.backend)
    else:
        options = (*plan.step, plan.eps, "none", plan.backend)
        y = conv_norm_act_forward(x, weight, bias, *_NO_NORM, *options)
        ran = batch_norm.known(y, norm, plan.eps)
    # Behind the centred map comes the bias itself: no shift that cancels a large mean.
    scale, shift, mean, invstd = ran.affine
    bias = torch.zeros_like(shift) if norm[1] is None else norm[1].to(shift.dtype)
    ran = ran._replace(affine=torch.stack([scale, bias, mean, invstd]))
    return batch_norm.act(y, ran.affine, plan.act, plan.backend), y, ran


def _backward(
    plan: StemPlan,
    grad: Tensor,
    tensors: list[Any],
    y: Tensor,
    norm: Statistics,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of x, weight, bias and the norm's two."""
    x, weight, bias, *_ = tensors
    sums = batch_norm.act_sums(grad, y, norm.affine, plan.act, plan.backend)
    coefficients = batch_norm.coefficients(sums, norm, plan.norm, plan.backend)
    asked = [*needed[:2], *5 * [False]]
    dx = dweight = None
    if any(asked):
        options = (*plan.step, plan.eps, plan.act, plan.backend)
        kept = (*_NO_NORM, y, norm.affine, coefficients)
        found = conv_norm_act_backward(grad, x, weight, bias, *kept, asked, *options)
        dx, dweight, *_ = spread(found, asked)
    # The batch's mean takes a bias away again: its gradient, over all that share it, is zero.
    share = 0.0 if plan.norm.batch_statistics else norm.affine[0]
    return [dx, dweight, share * sums[0], sums[1], sums[0]]


def _differentiable(
    plan: StemPlan,
    grad: Tensor,
    tensors: list[Tensor | None],
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients that can be differentiated: through the reference composition."""
    if plan.norm.process_group is not None:
        raise NotImplementedError(
            "conv_norm_act_training: a stem whose batch norm spans processes has no double "
            "backward; run it without create_graph, or restore(model)"
        )
    x = tensors[0]
    assert x is not None
    inputs = [t if t is None else t.to(x.dtype).view_as(t) for t in tensors]
    out = backends.function("reference", "conv_norm_act")(
        *inputs,
        stride=plan.stride,
        padding=plan.padding,
        dilation=plan.dilation,
        eps=plan.eps,
        act=plan.act,
        batch_statistics=plan.norm.batch_statistics,
    )
    sought = [t for t, n in zip(inputs, needed, strict=False) if t is not None and n]
    found = torch.autograd.grad(out, sought, grad, create_graph=True, materialize_grads=True)
    return spread(list(found), list(needed))


def conv_norm_act_training(
    x: Tensor, weight: Tensor, *vectors: Tensor | None, plan: StemPlan
) -> Tensor:
    """act(BN(W * x + b)) in a training step, its running statistics moved in place.

    Args:
        x: (N, C, H, W).
        weight: (O, C, K, K); like the others it may be float32 where x has 16 bits.
        vectors: bias, the norm's weight and bias, running mean and variance: (O,) or ``None``.
        plan: the step besides its tensors.

    Returns:
        (N, O, H', W') in the dtype of x.

    Raises:
        ValueError: the batch norm has one value for each channel.
    """
    if needs_gradient((x, weight, *vectors)):
        out: Tensor = _Stem.apply(plan, x, weight, *vectors)
        return out
    if plan.norm.batch_statistics:
        return _forward(plan, x, weight, *vectors)[0]
    options = (*plan.step, plan.eps, plan.act, plan.backend)
    return conv_norm_act_forward(x, weight, *vectors, *options)
