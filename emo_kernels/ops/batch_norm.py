"""Batch norm of a training step in pieces: torch ops over the backends' kernels.

Semantics: :mod:`emo_kernels.reference.batch_norm`. Between the pieces, sums may be added up over
processes (:func:`all_reduce_sums`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from emo_kernels.ops.registration import define_kernel, empty_map
from emo_kernels.spec import BatchNormMode, batch_norm_affine

# weight, bias, running mean and running variance, (C,) each.
Parameters = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _sums(x: Tensor, pivot: Tensor | None) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _affine(sums: Tensor, *_: Any) -> Tensor:
    return sums.new_empty((4, sums.shape[1]), dtype=_[-1])


sums = define_kernel("batch_norm_sums", "Tensor x, Tensor? pivot", "", "Tensor", _sums)

finalize = define_kernel(
    "batch_norm_finalize",
    "Tensor sums, SymInt count, Tensor? global_count, Tensor? pivot, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, "
    "ScalarType dtype",
    "",
    "Tensor",
    _affine,
)

backward_finalize = define_kernel(
    "batch_norm_backward_finalize",
    "Tensor sums, Tensor affine, SymInt count, Tensor? global_count, bool batch_statistics",
    "",
    "Tensor",
    lambda sums, affine, *_: torch.empty_like(affine),
)

backward = define_kernel(
    "batch_norm_backward",
    "Tensor grad, Tensor x, Tensor coefficients, Tensor? residual",
    "",
    "Tensor",
    lambda grad, x, *_: empty_map(x, x.shape),
)

act = define_kernel(
    "batch_norm_activate",
    "Tensor x, Tensor norm",
    "str act",
    "Tensor",
    lambda x, *_, **__: empty_map(x, x.shape),
)

act_sums = define_kernel(
    "batch_norm_activate_sums",
    "Tensor grad, Tensor x, Tensor norm",
    "str act",
    "Tensor",
    lambda grad, x, *_, **__: _sums(x, None),
)


class Statistics(NamedTuple):
    """A batch norm as it ran on one map: what its backward pass needs.

    Attributes:
        affine: (4, C): scale, shift, mean, 1 / standard deviation.
        pixels: behind mean and deviation, on this process.
        total: (1,), float64: pixels on all processes, where they share the batch.
    """

    affine: Tensor
    pixels: int
    total: Tensor | None


def pixel_count(x: Tensor) -> int:
    """N H W of an (N, C, H, W) map."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def known(x: Tensor, parameters: Parameters, eps: float) -> Statistics:
    """The batch norm of x with its running statistics."""
    weight, bias, mean, var = parameters
    dtype = torch.promote_types(x.dtype, torch.float32)
    assert mean is not None and var is not None
    mean, var = mean.to(dtype), var.to(dtype)
    scale, shift = batch_norm_affine(weight, bias, mean, var, eps)
    rows = [scale.to(dtype), shift.to(dtype), mean, torch.rsqrt(var + eps)]
    return Statistics(torch.stack(rows), pixel_count(x), None)


def measured(
    sums: Tensor, x: Tensor, parameters: Parameters, eps: float, mode: BatchNormMode, backend: str
) -> Statistics:
    """The batch norm of x with the batch's statistics; moves the running ones.

    Args:
        sums: of x around the running mean, over this process's pixels.
    """
    weight, bias, mean, var = parameters
    count, pivot, total = pixel_count(x), mean, None
    if mode.process_group is not None:
        sums, total = all_reduce_sums(sums, count, pivot, mode.process_group)
        pivot = None
    elif isinstance(count, int) and count == 1:
        raise ValueError(
            "batch norm: the batch must have more than 1 value per channel when training, got "
            f"shape {tuple(x.shape)}; use more images or pixels, or call eval()"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    affine = finalize(
        sums, count, total, pivot, weight, bias, mean, var, mode.momentum, eps, dtype, backend
    )
    return Statistics(affine, count, total)


def coefficients(sums: Tensor, statistics: Statistics, mode: BatchNormMode, backend: str) -> Tensor:
    """(4, C): c1, c2, c3, mean of dx = c1 dz + c2 (x - mean) + c3.

    Args:
        sums: (2, C): sum dz and sum dz xhat over this process's pixels.
    """
    affine, count, total = statistics
    if mode.batch_statistics and mode.process_group is not None:
        sums = sums.clone()
        distributed.all_reduce(sums, group=mode.process_group)
    return backward_finalize(sums, affine, count, total, mode.batch_statistics, backend)


def all_reduce_sums(
    sums: Tensor, count: int, pivot: Tensor | None, group: Any
) -> tuple[Tensor, Tensor]:
    """The sums of x and x^2, and the count, of all processes of ``group``.

    Args:
        sums: (2, C), float64, of x - pivot and its square over this process's ``count`` pixels.

    Returns:
        (2, C) without a pivot, and the count as a (1,) tensor, both float64.
    """
    first, second = sums
    if pivot is not None:  # every process may have another pivot
        pivot = pivot.double()
        second = second + 2 * pivot * first + count * pivot * pivot
        first = first + count * pivot
    both = torch.cat([first, second, first.new_full((1,), count)])
    distributed.all_reduce(both, group=group)
    return both[:-1].view(2, -1), both[-1:]
