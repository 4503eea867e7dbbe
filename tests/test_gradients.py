"""Derivatives of small blocks of each kind in fp64, and the functional block against the module."""

from __future__ import annotations

import pytest
import torch
from block_kinds import DOUBLE, KINDS, randomise
from torch import Tensor

from emo_kernels.nn import iRMB
from emo_kernels.reference import irmb
from emo_kernels.structure import BlockReading


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_fp64(kind: str) -> None:
    """Input and every parameter, batch norm by the batch, on a map that windows do not divide."""
    options = {"dim_head": 2, "window_size": 2, "qkv_bias": True, **KINDS[kind]}
    block = randomise(iRMB(4, 4, **options)).train()
    x = torch.randn(2, 4, 3, 5, requires_grad=True, **DOUBLE)
    parameters = list(block.parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return block(x)

    assert torch.autograd.gradcheck(run, (x, *parameters), atol=1e-7, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_in_fp64(kind: str) -> None:
    options = {"dim_head": 2, "window_size": 2, "qkv_bias": True, **KINDS[kind]}
    options["act_layer"] = "gelu"  # ReLU has no second derivative at its kink
    block = randomise(iRMB(4, 4, **options)).train()
    x = torch.randn(1, 4, 3, 4, requires_grad=True, **DOUBLE)
    assert torch.autograd.gradgradcheck(block, (x,), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_operator_is_the_module(kind: str) -> None:
    """The functional block, given this block's tensors and switches, computes the same."""
    options = {"dim_head": 2, "window_size": 2, "qkv_bias": True, **KINDS[kind]}
    block = randomise(iRMB(4, 4, **options))
    reading = BlockReading(block)
    for size in [(2, 4, 3, 5), (1, 4, 4, 4), (2, 4, 1, 1), (0, 4, 3, 2)]:
        x = torch.randn(size, **DOUBLE)
        got = irmb(x, reading.weights(), reading.spec)
        torch.testing.assert_close(got, block(x), rtol=1e-12, atol=1e-12)
