"""Swap the forward of every block in a model for the fused operators, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels import backends, ops, reference
from emo_kernels.graphs import GraphedForward, check_capturable
from emo_kernels.link import Link
from emo_kernels.ops.registration import needs_gradient, runs_standard_operators
from emo_kernels.sequence import accelerate_sequences
from emo_kernels.spec import IRMBSpec, IRMBWeights
from emo_kernels.stem import accelerate_stems
from emo_kernels.structure import BlockReading, UnreadableError, looks_like_irmb
from emo_kernels.swap import SwappedForward, disagreement, own_forward, restore_module
from emo_kernels.tail import accelerate_tails
from emo_kernels.train_block import train


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = None,
    strict: bool = False,
    cuda_graphs: bool = False,
) -> nn.Module:
    """Run every inverted residual mobile block of ``model`` on fused kernels, in place.

    Blocks are found by structure: this library's, the published class pasted into any code base,
    and subclasses; the stem in front of them goes along, and, in inference, this library's tail
    behind them (norm, mean, head). Each is swapped only if its own forward agrees with the
    reference on a probe input. On a CPU, in inference, a ``torch.nn.Sequential`` of blocks, and a
    whole model of this library, becomes one call when it is repeated. Weights, buffers, hooks,
    ``state_dict``, copies and pickles stay as they are; each call reads the weights as they are
    then, and moves running statistics as the block does. Calls that no kernel covers (training and
    autocast where no backend has training kernels, dropout, tracing, export) run the block's own
    forward.

    Args:
        model: any module; blocks at every depth are found.
        backend: the backend of every block, or ``None`` to choose at each call.
        strict: raise if a block stays as it is, and then change nothing.
        cuda_graphs: capture the whole model's inference as a CUDA graph at the first call with a
            shape, dtype and layout, and replay it from then on (at most 8 such kinds are kept).
            Weights may change in place; whatever else changes is captured anew. Calls with
            gradients, hooks, modules in training mode or tensors elsewhere run as without it.
            Flags of ``torch.backends`` hold as they were at the capture.

    Returns:
        The same model.

    Raises:
        ValueError: no backend has that name, ``strict`` and a block is not accelerated, or
            ``cuda_graphs`` and the model is not on one CUDA device.
        NotImplementedError: that backend is not usable on this machine, or ``cuda_graphs`` and
            there is no GPU.

    Example:
        >>> from emo_kernels.nn import iRMB
        >>> block = accelerate(iRMB(8, 8, attn_s=False).eval())
        >>> block(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """
    if backend is not None:
        backends.check_usable(backend, "accelerate: backend")
    if cuda_graphs:
        check_capturable(model)
    found = list(find_blocks(model))
    changed = {path: reason for path, block in found if (reason := unreadable(block))}
    left = changed | {
        path: reason
        for path, block in found
        if path not in changed and (reason := _no_kernel(block, backend))
    }
    if not found:
        left[""] = "it contains no inverted residual mobile block"
    if left:
        message = _describe(model, left, len(found))
        if strict:
            raise ValueError(f"{message}. Use strict=False to accelerate the others")
        warnings.warn(message, stacklevel=2)
    if isinstance(forward := model.__dict__.get("forward"), GraphedForward):
        forward.take_off()
    for path, block in found:
        # Where any backend may run it, a block without a kernel here may have one elsewhere.
        if path not in (changed if backend is None else left):
            restore_module(block)
            block.forward = AcceleratedForward(block, backend)
    if found:
        accelerate_stems(model, backend)
        accelerate_tails(model, backend)
        accelerate_sequences(model)
    if cuda_graphs:
        model.forward = GraphedForward(model)
    return model


def _describe(model: nn.Module, left: dict[str, str], total: int) -> str:
    """One line: which blocks are not accelerated, grouped by reason."""
    paths: dict[str, list[str]] = {}
    for path, reason in left.items():
        paths.setdefault(reason, []).append(path or type(model).__name__)
    reasons = "; ".join(f"{', '.join(where)}: {reason}" for reason, where in paths.items())
    return f"accelerate: {len(left)} of {total} blocks are not accelerated: {reasons}"


def restore(model: nn.Module) -> nn.Module:
    """Give every module of ``model`` its own forward back. Returns the same model."""
    for module in model.modules():
        restore_module(module)
    return model


def find_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, block) of every inverted residual mobile block in ``model``."""
    return ((path, m) for path, m in model.named_modules() if looks_like_irmb(m))


class AcceleratedForward(SwappedForward[BlockReading]):
    """The forward of an accelerated block."""

    read = BlockReading

    def __init__(self, block: nn.Module, backend: str | None) -> None:
        super().__init__(block, backend)
        self._link = Link()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_link": Link()}

    def decide(self, x: Tensor, reading: BlockReading) -> Tensor:
        """A training step's kernels, the whole block's in inference, or the block's own forward."""
        eager = not torch.compiler.is_compiling()
        weights = reading.weights()
        autocast = torch.is_autocast_enabled(x.device.type)
        differentiated = reading.batch_dependent or needs_gradient((x, *weights))
        if autocast or differentiated:
            out = None
            if eager and not differentiated:
                out = self._infer_under_autocast(x, weights, reading.spec)
            if out is None:
                out = train(x, weights, reading, backends.requested(self.backend), self._link)
            if out is not None:
                return out
            if reading.batch_dependent or autocast:
                return own_forward(self.block, x)
        out = self._call(x, weights, reading.spec)
        if eager and not torch.is_grad_enabled() and not runs_standard_operators(x):
            self._bind(x, weights, reading)
        return out

    def _infer_under_autocast(
        self, x: Tensor, weights: IRMBWeights, spec: IRMBSpec
    ) -> Tensor | None:
        """By a backend that has one kernel for the block; ``None`` where none has.

        It gives a map of autocast's dtype: what eager gives but where a wider map is added to it.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        widens = weights.gamma is not None or (spec.skip and x.dtype != dtype)
        if widens or runs_standard_operators(x):
            return None
        requested = backends.requested(self.backend)
        x = x.to(dtype)
        for name in backends.candidates("irmb", device) if requested is None else (requested,):
            if name == "reference" or backends.why_not(name, "irmb", device, x, weights, spec):
                continue
            if not backends.composes(name, "irmb"):
                return ops.irmb(x, weights, spec, backend=name)
        return None

    def _call(self, x: Tensor, weights: IRMBWeights, spec: IRMBSpec) -> Tensor:
        """Choose the backend, or obey, and run the operator."""
        backend = self.backend
        if backends.requested(backend) is None:
            backend = backends.resolve("irmb", None, x, weights, spec)
            if backend == "reference" or (
                self.block.training
                and needs_gradient((x, *weights))
                and not backends.has(backend, "irmb_backward")
            ):
                return own_forward(self.block, x)
        return ops.irmb(x, weights, spec, backend=backend)

    def _bind(self, x: Tensor, weights: IRMBWeights, reading: BlockReading) -> None:
        """Keep the call that was just made for the next one."""
        self.bound = None
        backend = backends.resolve("irmb", self.backend, x, weights, reading.spec)
        if backends.has(backend, "irmb_bind"):
            bind = backends.function(backend, "irmb_bind")
            self.bound = bind(x, weights, reading.spec, reading.conditions())


def unreadable(block: nn.Module) -> str | None:
    """Why ``block`` is not the published block after all, or ``None``."""
    try:
        reading = BlockReading(block)
    except UnreadableError as reason:
        return str(reason)
    weights = reading.weights()
    assert weights.proj_weight is not None
    return None if weights.proj_weight.is_meta else _probe(block, weights, reading.spec)


def sample_input(weights: IRMBWeights, spec: IRMBSpec) -> Tensor:
    """A small map that a block with these weights takes, on its device and in its dtype."""
    v, proj = weights.v_weight, weights.proj_weight
    assert proj is not None
    channels = proj.shape[1] if v is None else v.shape[1] * spec.v_groups
    return proj.new_empty(1, channels, 9, 10)


def _no_kernel(block: nn.Module, backend: str | None) -> str | None:
    """Why no kernel runs this block in inference where it is now, or ``None``."""
    reading = BlockReading(block)
    weights, spec = reading.weights(), reading.spec
    x = sample_input(weights, spec)
    device = x.device.type
    if backend is not None:
        return backends.why_not(backend, "irmb", device, x, weights, spec)
    reasons = {
        name: backends.why_not(name, "irmb", device, x, weights, spec)
        for name in backends.NAMES
        if name != "reference"
    }
    if None in reasons.values():
        return None
    return ", ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _probe(block: nn.Module, weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Whether the block's own forward computes what its structure says."""
    x = sample_input(weights, spec)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    untracked = (weights.norm_mean is None, weights.bn_mean is None)

    def computes(x: Tensor) -> Tensor:
        return reference.irmb(x, weights, spec, batch_statistics=untracked)

    return disagreement(block, x, computes, "the published block")
