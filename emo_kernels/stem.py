"""The convolution in front of a network, swapped for the fused operator.

Recognised by structure: ``convs``, one sequence of convolution, batch norm and activation (the
published patch embedding, and this library's), or a layer with ``conv``, ``norm`` and ``act``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels import backends, ops, reference
from emo_kernels.ops.registration import needs_gradient, runs_standard_operators
from emo_kernels.structure import BATCH_NORMS, OperatorReading, UnreadableError, looks_like_irmb
from emo_kernels.swap import (
    SwappedForward,
    choose,
    disagreement,
    own_forward,
    restore_module,
)
from emo_kernels.train_stem import train_stem

_MOST_INPUTS = 4  # channels of an image
_STEP = ("stride", "padding", "dilation")


def find_stems(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every convolution of an image with its norm and activation."""
    blocks = [path for path, module in model.named_modules() if looks_like_irmb(module)]
    taken: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}." if outer else "") for outer in (*blocks, *taken))
        if path not in blocks and not inside and _looks_like_stem(module):
            taken.append(path)
            yield path, module


def _layers(module: nn.Module) -> tuple[Any, ...] | None:
    """(owner of the layers, names of convolution, norm and activation)."""
    children = module._modules
    if children.keys() == {"convs"} and isinstance(children["convs"], nn.ModuleList):
        branches = children["convs"]._modules
        branch = branches.get("0")
        if len(branches) == 1 and type(branch) is nn.Sequential and len(branch) == 3:
            return (branch, *branch._modules)
    return (module, "conv", "norm", "act") if children.keys() == {"conv", "norm", "act"} else None


def _looks_like_stem(module: nn.Module) -> bool:
    layers = _layers(module)
    if layers is None:
        return False
    conv, norm = (layers[0]._modules[name] for name in layers[1:3])
    return (
        type(conv) is nn.Conv2d
        and type(norm) in BATCH_NORMS
        and conv.groups == 1
        and conv.in_channels <= _MOST_INPUTS
    )


class StemReading(OperatorReading):
    """Of one stem: what ``ops.conv_norm_act`` takes."""

    def _read(self, block: nn.Module) -> dict[str, Any]:
        layers = _layers(block)
        if layers is None:
            raise UnreadableError("it is no single sequence of convolution, norm and activation")
        owner, conv_name, norm_name, act_name = layers
        if owner is not block:
            self._child(self._child(block, "convs", "convs"), "convs.0", "0")
        conv = self._read_conv(owner, "stem", conv_name)
        norm = self._child(owner, "stem norm", norm_name)
        if type(norm) not in BATCH_NORMS or self._attribute(conv, "groups") != 1:
            raise UnreadableError("it is no dense convolution with a BatchNorm2d")
        sizes = [(name, self._attribute(conv, name)) for name in ("kernel_size", *_STEP)]
        square = all(isinstance(pair, tuple) and pair[0] == pair[1] for _, pair in sizes)
        if self._attribute(conv, "padding_mode") != "zeros" or not square:
            raise UnreadableError("its convolution is not the same for rows and columns")
        self._parameters(conv, "weight", "bias")
        self._read_batch_norm(norm)
        self.norm = norm
        act = self._read_act(owner, "stem", act_name)
        steps = {name: pair[0] for name, pair in sizes if name in _STEP}
        return {**steps, "eps": self._attribute(norm, "eps"), "act": act}


class AcceleratedStem(SwappedForward[StemReading]):
    """The forward of an accelerated stem."""

    read = StemReading

    def decide(self, x: Tensor, reading: StemReading) -> Tensor:
        """The backend's kernels if they take this call, else the stem's own forward."""
        tensors = reading.tensors()
        if runs_standard_operators(x):
            return own_forward(self.block, x)
        autocast = torch.is_autocast_enabled(x.device.type)
        if reading.batch_dependent or autocast or needs_gradient((x, *tensors)):
            requested = backends.requested(self.backend)
            trained = train_stem(x, tensors, reading.norm, reading.spec, requested)
            return own_forward(self.block, x) if trained is None else trained
        backend = None
        if all(t is None or t.dtype == x.dtype for t in tensors):
            backend = choose("conv_norm_act", self.backend, x, *tensors, **reading.spec)
        if backend is None:
            return own_forward(self.block, x)
        out = ops.conv_norm_act(x, *tensors, **reading.spec, backend=backend)
        if not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
            self.bound = None
            if backends.has(backend, "conv_norm_act_bind"):
                bind = backends.function(backend, "conv_norm_act_bind")
                self.bound = bind(x, *tensors, conditions=reading.conditions(), **reading.spec)
        return out


def accelerate_stems(model: nn.Module, backend: str | None) -> None:
    """Swap every stem that computes what its structure says; the others stay, which is no fault."""
    for _, stem in find_stems(model):
        if unreadable_stem(stem) is None:
            restore_module(stem)
            stem.forward = AcceleratedStem(stem, backend)


def unreadable_stem(stem: nn.Module) -> str | None:
    """Why ``stem`` computes something else than its structure says, or ``None``."""
    try:
        reading = StemReading(stem)
    except UnreadableError as reason:
        return str(reason)
    tensors = reading.tensors()
    if tensors[0] is None or tensors[0].is_meta:
        return "its weights hold no values"

    untracked = tensors[4] is None

    def computes(x: Tensor) -> Tensor:
        options = {**reading.spec, "batch_statistics": untracked}
        return reference.conv_norm_act(x, *tensors, **options)

    image = sample_image(tensors[0], reading.spec)
    return disagreement(stem, image, computes, "its layers in turn")


def sample_image(weight: Tensor, options: dict[str, Any]) -> Tensor:
    """A small image that fits the stem, on its device and in its dtype."""
    side = 9 + options["dilation"] * weight.shape[-1]
    x = torch.randn(1, weight.shape[1], side, side + 1, generator=torch.Generator().manual_seed(0))
    return x.to(weight)
