"""The sums that the cpu kernels give a batch norm, of maps far from the running mean.

A kernel is told the running mean to sum around. Where the batch's is many deviations off, squares
around it would lose the variance to rounding, as they once did.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emo_kernels import _C, cpu

C, FAR = 21, 3.0
DEVIATIONS = torch.logspace(-3, 0, C)  # from FAR, the running mean of every channel
PASSES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}


def one_pass(run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """A call that gives x back, and its sums around a pivot."""
    PASSES[run.__name__] = run


def centre_tap(channels: int) -> Tensor:
    return torch.nn.functional.pad(torch.ones(channels, 1, 1, 1), (1, 1, 1, 1))


@one_pass
def batch_norm_sums(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    return x, cpu.batch_norm_sums(x, pivot)


@one_pass
def depthwise_conv2d(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    options = {"stride": 1, "padding": 1, "dilation": 1}
    return cpu.depthwise_conv2d_statistics(x, centre_tap(C), pivot, **options)


@one_pass
def expand_depthwise(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    eye, taps = torch.eye(C).reshape(C, C, 1, 1), centre_tap(C)
    options = {"norm": "none", "eps": 1e-6, "act": "none", "groups": 1}
    options |= {"stride": 1, "padding": 1, "dilation": 1}
    return cpu.expand_depthwise_statistics(x, eye, None, None, None, taps, pivot, **options)


@one_pass
def conv_norm_act(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(C, C, 3, 3)
    weight[range(C), range(C)] = centre_tap(C)[:, 0]
    options = {"stride": 1, "padding": 1, "dilation": 1}
    return cpu.conv_norm_act_statistics(x, weight, None, pivot, **options)


@one_pass
def shrink(x: Tensor, pivot: Tensor) -> tuple[Tensor, Tensor]:
    y, weight = torch.zeros(x.shape[0], 4, *x.shape[2:]), torch.zeros(C, 4, 1, 1)
    return cpu.shrink_statistics(y, weight, None, None, None, x, None, None, pivot)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("name", PASSES)
def test_a_variance_far_from_the_running_mean(
    name: str, isa: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    torch.set_num_threads(threads)
    x = torch.randn(3, C, 11, 9) * DEVIATIONS.reshape(C, 1, 1)
    pivot = torch.full((C,), FAR)
    y, sums = PASSES[name](x.contiguous(memory_format=torch.channels_last), pivot)
    assert torch.equal(y, x)
    pixels = x.numel() // C
    off, squares = sums / pixels
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    u = 2.0**-24
    assert ((squares - off.square() - variance).abs() <= 2 * u * variance).all()
    assert ((off + FAR - mean).abs() <= u * variance.sqrt()).all()
