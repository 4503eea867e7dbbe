"""Depthwise convolutions and their gradients, for campaign_cuda.py: calls and rivals."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import roofline
import torch
from torch import Tensor

from emo_kernels import cuda, reference
from emo_kernels.spec import conv_padding

FUNCTIONS = ("forward", "input", "weight", "both", "behind norm")


class Layer(NamedTuple):
    """A depthwise convolution: its map and its step."""

    name: str
    c: int
    h: int
    w: int
    k: int
    options: dict[str, int]

    @property
    def shape(self) -> str:
        return f"{self.c}x{self.h}x{self.w} k{self.k}"


def layers(models: tuple[str, ...], size: int) -> list[Layer]:
    """The distinct depthwise convolutions of the models, and three that are odd."""
    found: dict[Any, Layer] = {}
    for model in models:
        for block in roofline.blocks(model, size):
            k, stride = block.kernel, block.stride
            step = {"stride": stride, "padding": conv_padding(k, stride), "dilation": 1}
            layer = Layer(f"{model} {block.name}", block.m, block.h, block.w, k, step)
            found.setdefault((*layer[1:5], stride), layer)
    odd = [
        Layer("odd channels", 31, 13, 9, 3, {"stride": 1, "padding": 1, "dilation": 1}),
        Layer("dilated", 84, 21, 17, 5, {"stride": 1, "padding": 4, "dilation": 2}),
        Layer("kernel 7", 40, 14, 15, 7, {"stride": 2, "padding": 3, "dilation": 1}),
    ]
    return [*found.values(), *odd]


class Tensors(NamedTuple):
    """The operands of a layer's calls."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    y: Tensor
    coefficients: Tensor


def tensors_of(layer: Layer, n: int, dtype: torch.dtype, device: str) -> Tensors:
    """Random numbers, channels_last."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    x = random(n, layer.c, layer.h, layer.w)
    weight = (random(layer.c, 1, layer.k, layer.k) / layer.k).contiguous()
    y = reference.depthwise_conv2d(x, weight, **layer.options)
    y = y.contiguous(memory_format=torch.channels_last)
    return Tensors(x, weight, random(*y.shape), y, random(4, layer.c).float())


def call_of(namespace: Any, function: str, t: Tensors, layer: Layer) -> Callable[[], Any]:
    """One of FUNCTIONS in a backend's namespace."""
    if function == "forward":
        return lambda: namespace.depthwise_conv2d_statistics(t.x, t.weight, None, **layer.options)
    extras = (t.y, t.coefficients, t.x) if function == "behind norm" else ()
    needed = [function != "weight", function != "input"]
    return lambda: namespace.depthwise_conv2d_backward(
        t.grad, t.x, t.weight, *extras, needed=needed, **layer.options
    )


def rivals(function: str, t: Tensors, layer: Layer) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """(name, context, call) of whatever computes the same; convolutions alone, no norm."""
    yield "cuda", nullcontext(), call_of(cuda, function, t, layer)
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("emo_kernels.triton")
        yield "triton", nullcontext(), call_of(triton, function, t, layer)
    if function == "behind norm":
        return
    cudnn = torch.backends.cudnn
    for name, enabled, memory in (
        ("cudnn NHWC", True, torch.channels_last),
        ("native NHWC", False, torch.channels_last),
        ("native NCHW", False, torch.contiguous_format),
    ):
        x, grad = (v.contiguous(memory_format=memory) for v in (t.x, t.grad))
        context: AbstractContextManager[Any] = cudnn.flags(enabled=enabled, benchmark=True)
        yield name, context, _eager(function, x, grad, t.weight, layer)


def _eager(
    function: str, x: Tensor, grad: Tensor, weight: Tensor, layer: Layer
) -> Callable[[], Any]:
    stride, padding, dilation = ([v, v] for v in layer.options.values())
    if function == "forward":
        return lambda: torch.nn.functional.conv2d(
            x, weight, None, stride, padding, dilation, layer.c
        )
    wanted = [function != "weight", function != "input", False]
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], layer.c, wanted
    )


def maps(function: str, t: Tensors, layer: Layer) -> tuple[Tensor, ...]:
    """What a call must read and write."""
    return {
        "forward": (t.x, t.y),
        "input": (t.grad, t.x),
        "weight": (t.grad, t.x),
        "both": (t.grad, t.x, t.x),
        "behind norm": (t.grad, t.y, t.x, t.x, t.x),
    }[function]
