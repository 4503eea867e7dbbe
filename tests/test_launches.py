"""Kernels held back until a block has given them all: in order, all or none, and the same bits."""

from __future__ import annotations

import copy
import ctypes
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels.cpu import launches


def test_launches_run_at_once_or_in_order_at_the_end() -> None:
    ran: list[int] = []
    launches.launch(ran.append, 0)
    with launches.held_back():
        launches.launch(ran.append, 1)
        with launches.held_back():
            launches.launch(ran.append, 2)
        launches.launch(ran.append, 3)
        assert ran == [0]
    assert ran == [0, 1, 2, 3]


def test_none_runs_where_one_could_not_be_given() -> None:
    ran: list[int] = []
    with pytest.raises(ZeroDivisionError), launches.held_back():
        launches.launch(ran.append, 1)
        raise ZeroDivisionError
    launches.launch(ran.append, 2)
    assert ran == [2]


def test_a_launch_that_fails_ends_the_rest() -> None:
    ran: list[int] = []
    with pytest.raises(ZeroDivisionError), launches.held_back():
        launches.launch(lambda: 1 / 0)
        launches.launch(ran.append, 1)
    launches.launch(ran.append, 2)
    assert ran == [2]


def test_tensors_live_until_their_launch() -> None:
    seen: list[float] = []
    with launches.held_back():
        for value in range(50):
            tensor = torch.full((1 << 12,), float(value))
            launches.launch(lambda t: seen.append(read(t.data_ptr())), tensor)
            del tensor
    assert seen == [float(value) for value in range(50)]


def read(address: int) -> float:
    return ctypes.c_float.from_address(address).value


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x)
    out.float().square().mean().backward()
    grads = [p.grad for p in model.parameters()]
    assert x.grad is not None
    assert all(g is not None for g in grads)
    return [out.detach(), x.grad, *(g for g in grads if g is not None), *model.buffers()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_step_gives_the_same_bits_either_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emo_kernels.cpu.repeated", lambda run, options, t: run(*options, *t))
    model = ek.create_model("emo_1m", drop_path_rate=0.2).train().to(dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype)
    other = copy.deepcopy(model)
    held: list[int] = []
    hold = launches.held_back
    monkeypatch.setattr("emo_kernels.cpu.held_back", lambda: held.append(1) or hold())
    found = step(ek.accelerate(model, backend="cpu"), x)
    assert len(held) > 20
    monkeypatch.setattr("emo_kernels.cpu.held_back", nullcontext)
    for got, want in zip(found, step(ek.accelerate(other, backend="cpu"), x), strict=True):
        assert torch.equal(got, want)
