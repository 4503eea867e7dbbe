"""Expansion and depthwise convolution in one kernel, for campaign_cuda.py: calls and rivals.

The rivals write the expanded map: Triton's expansion in front of each depthwise convolution.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import roofline
import torch
from torch import Tensor

from emo_kernels import cuda, reference
from emo_kernels.spec import conv_output_size, conv_padding

FUNCTIONS = ("expand + forward",)


class Layer(NamedTuple):
    """An expansion and its convolution: their maps and options."""

    name: str
    c: int
    m: int
    h: int
    w: int
    k: int
    norm: str  # in front: none, affine, layer
    options: dict[str, Any]

    @property
    def shape(self) -> str:
        return f"{self.c} to {self.m}x{self.h}x{self.w} k{self.k}"


def _options(act: str, k: int, stride: int) -> dict[str, Any]:
    step = {"stride": stride, "padding": conv_padding(k, stride), "dilation": 1}
    return {"eps": 1e-6, "act": act, "groups": 1, **step}


def layers(models: tuple[str, ...], size: int) -> list[Layer]:
    """The distinct expansions of the models, and two that are odd."""
    found: dict[Any, Layer] = {}
    for model in models:
        for block in roofline.blocks(model, size):
            if not block.expands:
                continue
            options = _options(block.act, block.kernel, block.stride)
            norm = "affine" if block.norm == "batch" else block.norm
            norm = "none" if block.head_dim else norm
            sizes = (block.c, block.m, block.h, block.w, block.kernel, norm)
            layer = Layer(f"{model} {block.name}", *sizes, options)
            found.setdefault((*sizes, block.stride), layer)
    odd = [
        Layer("single elements", 21, 34, 13, 9, 3, "layer", _options("gelu", 3, 1)),
        Layer("a wide map", 24, 52, 5, 150, 5, "none", _options("relu", 5, 2)),
    ]
    return [*found.values(), *odd]


class Tensors(NamedTuple):
    """The operands of a layer's calls."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    dw_weight: Tensor


def tensors_of(layer: Layer, n: int, dtype: torch.dtype, device: str) -> Tensors:
    """Random numbers, the map in channels_last."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    c, m, k = layer.c, layer.m, layer.k
    x = random(n, c, layer.h, layer.w).contiguous(memory_format=torch.channels_last)
    norm = [random(c), random(c)] if layer.norm != "none" else [None, None]
    return Tensors(x, random(m, c, 1, 1) / c**0.5, random(m), *norm, random(m, 1, k, k) / k)


def call_of(namespace: Any, function: str, t: Tensors, layer: Layer) -> Callable[[], Any]:
    """The map and its sums."""
    run = namespace.expand_depthwise_statistics
    return lambda: run(*t, None, norm=layer.norm, **layer.options)


def maps(function: str, t: Tensors, layer: Layer) -> tuple[Tensor, ...]:
    """What a call must read and write."""
    step = (layer.k, *(layer.options[name] for name in ("stride", "padding", "dilation")))
    sides = (conv_output_size(side, *step) for side in (layer.h, layer.w))
    return (t.x, t.x.new_empty((t.x.shape[0], layer.m, *sides), device="meta"))


def rivals(function: str, t: Tensors, layer: Layer) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """(name, context, call) of whatever computes the same."""
    yield "cuda", nullcontext(), call_of(cuda, function, t, layer)
    eager = call_of(reference, function, t, layer)
    yield "eager NHWC", torch.backends.cudnn.flags(enabled=True, benchmark=True), eager
    if importlib.util.find_spec("triton") is None:
        return
    triton = importlib.import_module("emo_kernels.triton")
    step = {name: layer.options[name] for name in ("stride", "padding", "dilation")}
    expansion = {name: layer.options[name] for name in ("eps", "act", "groups")}
    expansion["norm"] = layer.norm

    def behind(convolve: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return lambda: convolve(triton.expand(*t[:5], **expansion))

    def counted(namespace: Any) -> Callable[[], Any]:
        run = namespace.depthwise_conv2d_statistics
        return behind(lambda e: run(e, t.dw_weight, None, **step))

    yield "triton", nullcontext(), counted(triton)
    yield "triton + cuda", nullcontext(), counted(cuda)
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=True)
    cudnn = behind(lambda e: reference.depthwise_conv2d(e, t.dw_weight, **step))
    yield "triton + cudnn, no sums", flags, cudnn
