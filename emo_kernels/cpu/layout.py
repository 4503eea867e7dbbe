"""Tensors as the compiled kernels take them: dense, channels innermost, by address."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu.launches import launch, made

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
NORMS = {"none": 0, "affine": 1, "layer": 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
WINDOWS = {"grid": 0, "block": 1, "both": 2}

_LARGE_MAP = 256 << 10  # bytes from which malloc may ask for new pages at every call
# Torch's own view of tensors in C, through which the module makes one; not every torch has it.
DLPACK = getattr(Tensor, "__dlpack_c_exchange_api__", None)


def wrong_dtype(x: Tensor) -> str | None:
    """Why the kernels do not take the maps' dtype, or ``None``."""
    if x.dtype not in DTYPES:
        return f"the cpu kernels take float32, bfloat16 and float64 maps, got {x.dtype}"
    return None


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """What maps of ``dtype`` are computed in: also what the kernels take vectors and weights in."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def pixels(x: Tensor) -> Tensor:
    """(N, C, H, W) with dense pixels, (N, H, W, C) in memory; a copy only if need be."""
    return x.contiguous(memory_format=torch.channels_last)


def strides(c: int, h: int, w: int) -> tuple[int, int, int, int]:
    """Of an (N, C, H, W) map with dense pixels."""
    return h * w * c, 1, w * c, c


def new_map(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised (N, C, H, W) map with dense pixels.

    A step's large maps come where those of the step before lay: new pages would be cleared and
    mapped one by one, 3 to 7 % of a training step.
    """
    if DLPACK is None or n * c * h * w * like.element_size() < _LARGE_MAP:
        return made(torch.empty_strided((n, c, h, w), strides(c, h, w), dtype=like.dtype))
    return made(_C.new_map(DLPACK, like, n, c, h, w))


def dense(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A vector or matrix without gaps, in what maps of ``dtype`` are computed in."""
    wanted = computed_in(dtype)
    if value is None or (value.dtype is wanted and value.is_contiguous()):
        return value
    if value.is_contiguous() and value.dtype in DTYPES:
        return converted(value, wanted, tuple(value.shape))
    return value.to(wanted).contiguous()


def converted(value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A dense tensor in another dtype, by a launch."""
    result = empty(shape, dtype)
    kernel = _C.convert(DTYPES[value.dtype], DTYPES[dtype], value.numel())
    launch(kernel, value, result)
    return result


def dense_map(value: Tensor | None) -> Tensor | None:
    """A map as :func:`pixels` gives it, if there is one."""
    return None if value is None else pixels(value)


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Where the tensors lie; 0 for those absent. The caller keeps them alive."""
    return tuple([0 if t is None else t.data_ptr() for t in tensors])


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised, dense."""
    return made(torch.empty(shape, dtype=dtype))


def doubles(*shape: int) -> Tensor:
    """Uninitialised float64."""
    return empty(shape, torch.float64)


def gradient_like(values: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A gradient in the dtype, shape and strides of its parameter, if there are both.

    In memory of its own, which no other gradient shares.
    """
    if values is None or parameter is None:
        return None
    dense = parameter.is_contiguous() and values.is_contiguous()
    if not dense or parameter.dtype not in DTYPES:
        result = torch.empty_like(parameter)
        launch(result.copy_, values.reshape(parameter.shape))
        return result
    if values.dtype is not parameter.dtype or values._is_view():
        values = converted(values, parameter.dtype, tuple(parameter.shape))
    return values.as_strided(parameter.shape, parameter.stride())


def chosen(grads: list[Tensor | None], needed: Any) -> list[Tensor]:
    """Those of the gradients that are needed, in order."""
    return [g for g, n in zip(grads, needed, strict=True) if n and g is not None]
