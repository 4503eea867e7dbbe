"""The kernels of one training step of the block in order, forward and backward.

What :mod:`emo_kernels.ops.irmb_training` differentiates; shapes and saved maps are described there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emo_kernels import backends
from emo_kernels.ops import batch_norm
from emo_kernels.ops.batch_norm import Statistics
from emo_kernels.ops.depthwise_conv2d import backward as depthwise_conv2d_backward
from emo_kernels.ops.depthwise_conv2d import forward as depthwise_conv2d_forward
from emo_kernels.ops.depthwise_conv2d import statistics as depthwise_conv2d_statistics
from emo_kernels.ops.expand import backward as expand_backward
from emo_kernels.ops.expand import forward as expand_forward
from emo_kernels.ops.expand_depthwise import backward as expand_depthwise_backward
from emo_kernels.ops.expand_depthwise import forward as expand_depthwise_forward
from emo_kernels.ops.expand_depthwise import statistics as expand_depthwise_statistics
from emo_kernels.ops.expand_depthwise import with_maps as expand_depthwise_with_maps
from emo_kernels.ops.registration import watched
from emo_kernels.ops.shrink import backward as shrink_backward
from emo_kernels.ops.shrink import forward as shrink_forward
from emo_kernels.ops.shrink import statistics as shrink_statistics
from emo_kernels.ops.squeeze import squeeze, squeeze_backward
from emo_kernels.ops.window_attention import backward as window_attention_backward
from emo_kernels.ops.window_attention import forward as window_attention_forward
from emo_kernels.ops.window_attention import with_maps as window_attention_with_maps
from emo_kernels.spec import BatchNormMode, IRMBSpec, IRMBWeights, activate

_NORM = ("norm_weight", "norm_bias")
_EXCITATION = {n for n in IRMBWeights._fields if n.startswith("se_")}
_BELOW_THE_CONVOLUTION = {*_NORM, "qk_weight", "qk_bias", "v_weight", "v_bias"}


class Plan(NamedTuple):
    """What one step is, besides its tensors.

    Attributes:
        spec: the block's switches.
        norm, bn: how the batch norms in front of the block and behind its convolution run.
        backend: whose kernels run it.
        adds_residual: whether a block with skips adds its input, or leaves that to the caller.
    """

    spec: IRMBSpec
    norm: BatchNormMode
    bn: BatchNormMode
    backend: str
    adds_residual: bool = True


class Neighbours(NamedTuple):
    """What the blocks before and behind save one another: a pass over the map between them.

    Attributes:
        sums: (2, C), float64, of x around the running mean of the batch norm in front.
        next_sums: whether the batch norm that reads the output wants such sums of it,
        next_pivot: (O,), around its own running mean.
    """

    sums: Tensor | None = None
    next_sums: bool = False
    next_pivot: Tensor | None = None


ALONE = Neighbours()


class Maps(NamedTuple):
    """What the backward pass needs of the forward pass, besides x and the weights."""

    s: Tensor  # (N, C, H, W) behind the attention; x without
    qk: Tensor | None  # (N, 2C, H, W), the attention's q and k, where they are kept
    e: Tensor | None  # (N, M, H, W) expanded; None: s without expansion, else to be computed again
    slope: Tensor | None  # (N, M, H, W) of the expansion's activation, where it is kept
    y: Tensor  # (N, M, H', W') behind the convolution
    norm: Statistics | None
    bn: Statistics
    means: Tensor | None  # (N, M), what squeeze-excite saw


class Step:
    """One block in one step; its two methods read like the equations."""

    def __init__(self, plan: Plan, weights: IRMBWeights, drop_scale: Tensor | None) -> None:
        spec = plan.spec
        self.plan, self.spec, self.backend = plan, spec, plan.backend
        self.weights, self.drop_scale = weights, drop_scale
        self.attends = spec.head_dim > 0
        # Attention over the expanded map, which then is its result.
        self.attends_over_v = self.attends and not spec.attn_pre and weights.v_weight is not None
        self.expands = weights.v_weight is not None and not self.attends_over_v
        self.conv = (spec.stride, spec.padding, spec.dilation, plan.backend)
        # What the local skip sends back is a map, or recomputed by the expansion's gradient.
        keeps = not self.expands or backends.provides(plan.backend, "keeps_local_gradient")
        self.writes_local = spec.skip and keeps
        self.recomputes_local = spec.skip and not keeps
        assert weights.proj_weight is not None
        self.proj = weights.proj_weight
        if weights.gamma is not None:
            gamma = weights.gamma.to(torch.promote_types(weights.gamma.dtype, torch.float32))
            self.proj = gamma.reshape(-1, 1, 1, 1) * self.proj

    def _held_back(self, x: Tensor) -> AbstractContextManager[None]:
        """Where the backend wants that: its kernels run when all of this pass are given.

        Not where torch reads in between what they write, nor where somebody watches them.
        """
        w, plan = self.weights, self.plan
        reads = w.se_reduce_weight is not None or w.gamma is not None or self.attends_over_v
        reads = reads or not (self.expands or self.attends)
        reads = reads or any(m.process_group is not None for m in (plan.norm, plan.bn))
        if reads or watched((x,)) or not backends.has(self.backend, "held_back"):
            return nullcontext()
        return backends.function(self.backend, "held_back")()

    # -------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, known: Neighbours) -> tuple[Tensor, Tensor | None, Maps]:
        """The block's output, its sums where the next block wants them, and the kept maps."""
        with self._held_back(x):
            return self._forward(x, known)

    def _forward(self, x: Tensor, known: Neighbours) -> tuple[Tensor, Tensor | None, Maps]:
        w, spec, plan = self.weights, self.spec, self.plan
        norm = None
        if spec.norm == "batch":
            norm = self._normalize_input(x, known.sums)
        s, qk = self._attend(x, norm)
        e, slope, y, sums = self._convolve(s, norm)
        parameters = (w.bn_weight, w.bn_bias, w.bn_mean, w.bn_var)
        if sums is not None:
            bn = batch_norm.measured(sums, y, parameters, spec.bn_eps, plan.bn, self.backend)
        else:
            bn = batch_norm.known(y, parameters, spec.bn_eps)
        scale, shift = bn.affine[0], bn.affine[1]
        means = gate = None
        if w.se_reduce_weight is not None:
            means = squeeze(y, scale, shift, self.backend)
            gate = self._excite(means, w)
        local = e if spec.skip else None
        residual = x if spec.skip and plan.adds_residual else None
        tensors = (y, self.proj, scale, shift, local, residual, gate, self.drop_scale)
        maps = Maps(s, qk, None if e is s else e, slope, y, norm, bn, means)
        if known.next_sums:
            return *shrink_statistics(*tensors, known.next_pivot, self.backend), maps
        return shrink_forward(*tensors, self.backend), None, maps

    def _normalize_input(self, x: Tensor, sums: Tensor | None) -> Statistics:
        w, spec, mode = self.weights, self.spec, self.plan.norm
        parameters = (w.norm_weight, w.norm_bias, w.norm_mean, w.norm_var)
        if not mode.batch_statistics:
            return batch_norm.known(x, parameters, spec.norm_eps)
        if sums is None:
            sums = batch_norm.sums(x, w.norm_mean, self.backend)
        return batch_norm.measured(sums, x, parameters, spec.norm_eps, mode, self.backend)

    def _norm_arguments(self, norm: Statistics | None) -> tuple[Any, Any, str, float]:
        """(norm_weight, norm_bias, norm, eps) of the first operator."""
        w, spec = self.weights, self.spec
        if norm is not None:
            return norm.affine[0], norm.affine[1], "affine", spec.norm_eps
        return w.norm_weight, w.norm_bias, spec.norm, spec.norm_eps

    def _attention_tensors(self, norm: Statistics | None) -> tuple[Any, ...]:
        w = self.weights
        v = (w.v_weight, w.v_bias) if self.attends_over_v else (None, None)
        return (w.qk_weight, w.qk_bias, *v, *self._norm_arguments(norm)[:2])

    def _attention_options(self, norm: Statistics | None) -> tuple[Any, ...]:
        spec = self.spec
        v = (spec.act, spec.v_groups) if self.attends_over_v else ("none", 1)
        windows = (spec.head_dim, spec.window_size, spec.window_mode)
        return (*windows, *self._norm_arguments(norm)[2:], *v, self.backend)

    def _attend(self, x: Tensor, norm: Statistics | None) -> tuple[Tensor, Tensor | None]:
        """(s, q and k where they are kept)."""
        if not self.attends:
            return x, None
        tensors, options = self._attention_tensors(norm), self._attention_options(norm)
        projects = self.weights.qk_weight is not None
        if projects and backends.has(self.backend, "window_attention_with_maps"):
            return window_attention_with_maps(x, *tensors, *options)
        return window_attention_forward(x, *tensors, *options), None

    def _expand_arguments(self, norm: Statistics | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """(tensors behind the map, options) of the expansion."""
        w, spec = self.weights, self.spec
        none = (None, None, "none", 1e-6)
        norm_weight, norm_bias, kind, eps = none if self.attends else self._norm_arguments(norm)
        options = (kind, eps, spec.act, spec.v_groups, self.backend)
        return (w.v_weight, w.v_bias, norm_weight, norm_bias), options

    def _expand(self, s: Tensor, norm: Statistics | None) -> Tensor:
        if not self.expands:
            return s
        tensors, options = self._expand_arguments(norm)
        return expand_forward(s, *tensors, *options)

    def _keeps_slope(self, s: Tensor) -> bool:
        # The gradient that it is for must be there as one map.
        if self.recomputes_local or not backends.has(self.backend, "keeps_slope"):
            return False
        return backends.function(self.backend, "keeps_slope")(s)

    def _convolve(
        self, s: Tensor, norm: Statistics | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """(e, slope, y, sums of y where a batch norm wants them).

        e is None where one kernel skips it; the slope where it is not kept.
        """
        dw_weight, pivot = self.weights.dw_weight, self.weights.bn_mean
        counts = self.plan.bn.batch_statistics
        tensors, options = self._expand_arguments(norm)
        both = (*options[:-1], *self.conv)
        if self._skips_e(s, norm):
            if counts:
                return (
                    None,
                    None,
                    *expand_depthwise_statistics(s, *tensors, dw_weight, pivot, *both),
                )
            y = expand_depthwise_forward(s, *tensors, dw_weight, *both)
            return None, None, y, None
        if self.expands and backends.has(self.backend, "expand_depthwise_with_maps"):
            arguments = (s, *tensors, dw_weight, pivot, counts)
            found = expand_depthwise_with_maps(*arguments, self._keeps_slope(s), *both)
            y, sums, e, slope = spread(found, [True, counts, True, self._keeps_slope(s)])
            return e, slope, y, sums
        e = self._expand(s, norm)
        if counts:
            return e, None, *depthwise_conv2d_statistics(e, dw_weight, pivot, *self.conv)
        return e, None, depthwise_conv2d_forward(e, dw_weight, *self.conv), None

    def _skips_e(self, s: Tensor, norm: Statistics | None) -> bool:
        """Whether one kernel expands and convolves, and nothing else wants e in this pass."""
        operator, spec = "expand_depthwise", self.spec
        if not self.expands or spec.skip or not backends.has(self.backend, operator):
            return False
        tensors, (kind, eps, act, groups, _) = self._expand_arguments(norm)
        options = {"norm": kind, "eps": eps, "act": act, "groups": groups}
        options |= {"stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation}
        call = (s, *tensors, self.weights.dw_weight)
        return backends.why_not(self.backend, operator, s.device.type, *call, **options) is None

    def _excite(self, means: Tensor, w: IRMBWeights) -> Tensor:
        """gate = sigmoid(W2 act(W1 means + b1) + b2), (N, M).

        In fp64: a few numbers an image, which must not depend on how many images there are.
        """

        def linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            assert weight is not None
            return F.linear(x, weight.double().flatten(1), None if bias is None else bias.double())

        hidden = linear(means.double(), w.se_reduce_weight, w.se_reduce_bias)
        hidden = activate(hidden, self.spec.act)
        return linear(hidden, w.se_expand_weight, w.se_expand_bias).sigmoid().to(means.dtype)

    # ------------------------------------------------------------------------------- backward

    def backward(
        self, grad: Tensor, x: Tensor, maps: Maps, x_needed: bool, wants: set[str]
    ) -> dict[str, Tensor | None]:
        """Gradients by name: ``x``, ``drop_scale`` and the weights'; those that ``wants`` names."""
        with self._held_back(x):
            return self._backward(grad, x, maps, x_needed, wants)

    def _backward(
        self, grad: Tensor, x: Tensor, maps: Maps, x_needed: bool, wants: set[str]
    ) -> dict[str, Tensor | None]:
        spec, norm = self.spec, maps.norm
        below = x_needed or bool(wants & _BELOW_THE_CONVOLUTION)
        in_one = below and self._convolves_with_expansion()
        if maps.e is None and not in_one:
            maps = maps._replace(e=self._expand(maps.s, norm))
        grads: dict[str, Any] = {}
        dz, local_grad = self._shrink_backward(grad, maps, wants, grads)
        residual = grad if spec.skip and self.plan.adds_residual else None
        # The norm's affine map and the residual belong to the operator that reads x.
        first: tuple[Any, ...] = (None, residual) if norm is None else (norm.affine, None)
        at_x = (None, None) if self.attends else first
        dx: Tensor | None
        if in_one:
            dx = self._expand_convolve_backward(dz, maps, local_grad, at_x, wants, grads)
        else:
            dx = self._convolve_backward(dz, maps, local_grad, below, wants, grads)
            if below and self.expands:
                skip = (grad, self.proj, self.drop_scale) if self.recomputes_local else 3 * (None,)
                dx = self._expand_backward(dx, maps, at_x, skip, wants, grads)
        if below and self.attends:
            dx = self._attend_backward(dx, x, maps, first, wants, grads)
        if not (self.expands or self.attends) and dx is not None and residual is not None:
            dx = dx + residual
        if below and norm is not None:
            sums = grads.pop("norm_sums")
            c = batch_norm.coefficients(sums, norm, self.plan.norm, self.backend)
            grads |= self._of_batch_norm("norm", sums, wants)
            dx = batch_norm.backward(dx, x, c, residual, self.backend) if x_needed else None
        grads["x"] = dx
        return grads

    def _shrink_backward(
        self, grad: Tensor, maps: Maps, wants: set[str], grads: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """dz, the gradient behind the batch norm, and what the local skip sends past it.

        The latter is written where no expansion follows that recomputes it, and where the
        backend says that a map costs less than its product again.
        """
        w, affine, y = self.weights, maps.bn.affine, maps.y
        gate, excitation = self._excite_again(maps, wants)
        local = maps.e if self.spec.skip else None
        asked = [False] * 8
        asked[0] = True
        asked[1] = bool(wants & {"proj_weight", "gamma"})
        asked[2] = gate is None
        asked[4] = self.writes_local
        asked[6] = gate is not None
        asked[7] = "drop_scale" in wants
        tensors = (y, self.proj, affine[0], affine[1], local, None, gate, self.drop_scale)
        found = shrink_backward(grad, *tensors, affine, asked, self.backend)
        dz, dproj, sums, _, local_grad, _, dgate, grads["drop_scale"] = spread(found, asked)
        if gate is not None:
            means, *squeezed = torch.autograd.grad(gate, list(excitation.values()), dgate)
            grads |= zip(list(excitation)[1:], squeezed, strict=True)
            dz, sums = squeeze_backward(means, y, affine, dz, self.backend)
        grads |= {"bn_sums": sums, **self._of_batch_norm("bn", sums, wants)}
        if dproj is not None and w.gamma is not None:
            grads["gamma"] = (dproj * w.proj_weight).sum((1, 2, 3))
            dproj = w.gamma.reshape(-1, 1, 1, 1) * dproj
        grads["proj_weight"] = dproj
        return dz, local_grad

    def _excite_again(self, maps: Maps, wants: set[str]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The gate as a function of its leaves, by name: the means and the wanted weights."""
        if maps.means is None:
            return None, {}
        with torch.enable_grad():
            leaves = {"means": maps.means.detach().requires_grad_()}
            for name in _EXCITATION & wants:
                leaves[name] = getattr(self.weights, name).detach().requires_grad_()
            weights = self.weights._replace(**{n: t for n, t in leaves.items() if n != "means"})
            return self._excite(leaves["means"], weights), leaves

    def _convolve_backward(
        self,
        dz: Tensor,
        maps: Maps,
        local_grad: Tensor | None,
        below: bool,
        wants: set[str],
        grads: dict[str, Any],
    ) -> Tensor | None:
        """The gradient at e, but for the local skip where an expansion follows."""
        c = self._coefficients(maps, grads)
        asked = [below, "dw_weight" in wants]
        dw_weight = self.weights.dw_weight
        found = depthwise_conv2d_backward(
            dz, maps.e, dw_weight, maps.y, c, local_grad, asked, *self.conv
        )
        de, grads["dw_weight"] = spread(found, asked)
        return de

    def _coefficients(self, maps: Maps, grads: dict[str, Any]) -> Tensor:
        """What takes the batch norm behind the convolution back."""
        sums = grads.pop("bn_sums")
        return batch_norm.coefficients(sums, maps.bn, self.plan.bn, self.backend)

    def _convolves_with_expansion(self) -> bool:
        """Whether one kernel takes both gradients, and writes nothing between them."""
        return (
            self.expands
            and not self.recomputes_local
            and backends.has(self.backend, "expand_depthwise_backward")
        )

    def _expand_convolve_backward(
        self,
        dz: Tensor,
        maps: Maps,
        local_grad: Tensor | None,
        at_x: tuple[Any, ...],
        wants: set[str],
        grads: dict[str, Any],
    ) -> Tensor:
        c = self._coefficients(maps, grads)
        tensors, options = self._expand_arguments(None if self.attends else maps.norm)
        asked = [*self._asked_of_expansion(at_x[0], wants), "dw_weight" in wants]
        kept = (None, None) if maps.slope is None else (maps.e, maps.slope)
        arguments = (maps.s, *tensors, self.weights.dw_weight, maps.y, c, local_grad, *kept, *at_x)
        found = spread(
            expand_depthwise_backward(dz, *arguments, asked, *options[:-1], *self.conv), asked
        )
        grads["dw_weight"] = found.pop()
        return self._keep_expansion(at_x[0], found, grads)

    def _expand_backward(
        self,
        grad: Tensor | None,
        maps: Maps,
        at_x: tuple[Any, ...],
        skip: tuple[Any, ...],
        wants: set[str],
        grads: dict[str, Any],
    ) -> Tensor:
        affine, residual = at_x
        norm = None if self.attends else maps.norm
        tensors, options = self._expand_arguments(norm)
        asked = self._asked_of_expansion(affine, wants)
        arguments = (maps.s, *tensors, affine, *skip, residual)
        found = expand_backward(grad, *arguments, asked, *options)
        return self._keep_expansion(affine, spread(found, asked), grads)

    def _asked_of_expansion(self, affine: Tensor | None, wants: set[str]) -> list[bool]:
        of_norm = self._asked_of_norm(affine, wants) if not self.attends else [False, False]
        return [True, *self._asked(("v_weight", "v_bias"), wants), *of_norm]

    def _keep_expansion(
        self, affine: Tensor | None, found: list[Any], grads: dict[str, Any]
    ) -> Tensor:
        dx, grads["v_weight"], grads["v_bias"], *of_norm = found
        if not self.attends:
            self._keep_norm(affine, of_norm, grads)
        return dx

    def _attend_backward(
        self,
        grad: Tensor | None,
        x: Tensor,
        maps: Maps,
        at_x: tuple[Any, ...],
        wants: set[str],
        grads: dict[str, Any],
    ) -> Tensor:
        affine = at_x[0]
        tensors = self._attention_tensors(maps.norm)
        options = self._attention_options(maps.norm)
        names = ("qk_weight", "qk_bias", "v_weight", "v_bias")
        asked = [True, *self._asked(names, wants)]
        if not self.attends_over_v:
            asked[3:] = [False, False]
        asked += self._asked_of_norm(affine, wants)
        found = window_attention_backward(grad, x, *tensors, *at_x, maps.qk, asked, *options)
        dx, *parameters = spread(found, asked)
        grads |= {n: g for n, g in zip(names, parameters[:4], strict=True) if g is not None}
        self._keep_norm(affine, parameters[4:], grads)
        return dx

    def _of_batch_norm(self, norm: str, sums: Tensor, wants: set[str]) -> dict[str, Tensor]:
        """Gradients of its bias and weight, by name; in their dtype if the backend has a kernel."""
        found = {f"{norm}_bias": sums[0], f"{norm}_weight": sums[1]}
        found = {name: row for name, row in found.items() if name in wants}
        if backends.has(self.backend, "gradient_like") and not watched((sums,)):
            like = backends.function(self.backend, "gradient_like")
            found = {name: like(row, getattr(self.weights, name)) for name, row in found.items()}
        return found

    def _asked(self, names: tuple[str, ...], wants: set[str]) -> list[bool]:
        return [name in wants for name in names]

    def _asked_of_norm(self, affine: Tensor | None, wants: set[str]) -> list[bool]:
        """Sums for a batch norm, else the gradients of the norm's parameters."""
        return [True, False] if affine is not None else self._asked(_NORM, wants)

    def _keep_norm(
        self, affine: Tensor | None, found: list[Tensor | None], grads: dict[str, Any]
    ) -> None:
        names = _NORM if affine is None else ("norm_sums",)
        grads |= zip(names, found)


def spread(found: list[Tensor], asked: list[bool]) -> list[Any]:
    """What was found, in the places where it was asked for."""
    rest = iter(found)
    return [next(rest) if a else None for a in asked]
