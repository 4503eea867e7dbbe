"""Whole blocks in inference: a family of the campaign's CUDA kernels (campaign_cuda)."""

from __future__ import annotations

import importlib
import importlib.util
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels import cuda, ops, reference
from emo_kernels.accelerate import find_blocks
from emo_kernels.spec import IRMBSpec, IRMBWeights
from emo_kernels.structure import BlockReading

# One image shares its expanded channels out among blocks of threads. Attention runs in the block's
# own kernel or in another; which is faster is counted by the package, and measured here.
FUNCTIONS = ("irmb", "irmb of one image", "irmb, attention inside", "irmb, attention apart")
Tensors = namedtuple("Tensors", ("x", *IRMBWeights._fields))


@dataclass(frozen=True)
class Layer:
    """A block of a model: its weights and switches, and the size of its map."""

    name: str
    size: tuple[int, ...]  # (C, H, W)
    weights: IRMBWeights
    spec: IRMBSpec

    @property
    def shape(self) -> str:
        """For the report."""
        return "x".join(map(str, self.size))


def layers(models: tuple[str, ...], size: int) -> list[Layer]:
    """The distinct blocks of the models that the kernels take."""
    found: dict[Any, Layer] = {}
    for name in models:
        torch.manual_seed(0)
        model = ek.create_model(name).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        for path, block, map_size in _sizes(model, size):
            reading = BlockReading(block)
            layer = Layer(f"{name} {path}", map_size, reading.weights(), reading.spec)
            shapes = tuple(t.shape for _, t in layer.weights.present())
            if refusal(layer, torch.bfloat16, "cpu") is None:
                found.setdefault((map_size, shapes, layer.spec), layer)
    return list(found.values())


def _sizes(model: nn.Module, size: int) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """(path, block, (C, H, W)) of every block, from one image through the model."""
    seen: dict[nn.Module, tuple[int, ...]] = {}
    hooks = [
        block.register_forward_pre_hook(lambda b, x: seen.update({b: tuple(x[0].shape[1:])}))
        for _, block in find_blocks(model)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return ((path, block, seen[block]) for path, block in find_blocks(model))


def refusal(layer: Layer, dtype: torch.dtype, device: str) -> str | None:
    """Why the kernels do not take the block in that dtype on this machine, or ``None``."""
    t = tensors_of(layer, 1, dtype, device)
    return cuda.irmb_unsupported(t.x, IRMBWeights(*t[1:]), layer.spec)


def tensors_of(layer: Layer, n: int, dtype: torch.dtype, device: str) -> Any:
    """Random maps, channels_last, and the model's weights."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn((n, *layer.size), generator=generator, device=device).to(dtype)
    weights = (None if w is None else w.detach().to(device, dtype) for w in layer.weights)
    return Tensors(x.contiguous(memory_format=torch.channels_last), *weights)


def functions(layer: Layer, device: str) -> tuple[str, ...]:
    """Those of FUNCTIONS that the layer has on this machine."""
    t = tensors_of(layer, 1, torch.bfloat16, device)
    inside = cuda.irmb_report(t.x, IRMBWeights(*t[1:]), layer.spec)["image"]
    return FUNCTIONS if inside else FUNCTIONS[:2]


def _arguments(function: str, t: Any, layer: Layer) -> tuple[Tensor, IRMBWeights, IRMBSpec]:
    return t.x[:1] if function == "irmb of one image" else t.x, IRMBWeights(*t[1:]), layer.spec


def call_of(namespace: Any, function: str, t: Any, layer: Layer) -> Callable[[], list[Tensor]]:
    """The block in a backend's namespace."""
    arguments = _arguments(function, t, layer)
    attends = namespace is cuda and "attention" in function
    fits = attends and cuda.irmb_report(*arguments)["image"]  # in fp32 fewer do
    options = {"attend": function.split()[-1]} if fits else {}

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [namespace.irmb(*arguments, **options)]

    return run


def rivals(function: str, t: Any, layer: Layer) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """(name, context, call) of whatever computes the same."""
    yield "cuda", nullcontext(), call_of(cuda, function, t, layer)
    if "attention" in function:
        return  # the others are timed with "irmb"
    arguments = _arguments(function, t, layer)
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("emo_kernels.triton")
        if triton.irmb_unsupported(*arguments) is None:
            yield "triton", torch.no_grad(), lambda: ops.irmb(*arguments, backend="triton")
    yield "eager NHWC", nullcontext(), call_of(reference, function, t, layer)


def maps(function: str, t: Any, layer: Layer) -> tuple[Tensor, ...]:
    """x and what comes of it."""
    (out,) = call_of(reference, function, t, layer)()
    return _arguments(function, t, layer)[0], out
