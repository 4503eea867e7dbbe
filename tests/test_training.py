"""accelerate in training: the kernels' step in place of the block's own, number by number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import golden_data as golden
import numpy as np
import pytest
import torch
from block_kinds import KINDS, relative
from golden_data import assert_within
from grid import device_of
from test_golden import BLOCKS, load_block
from torch import Tensor, nn
from training_step import (  # noqa: F401  (the fixtures)
    WITHOUT_KERNELS,
    assert_as_near_as_autocast,
    assert_same_step,
    counted_steps,
    small,
    small_map,
    step,
    twins,
)

import emo_kernels as ek
from emo_kernels import backends
from emo_kernels.nn import iRMB

COMPOSED = [kind for kind in KINDS if kind not in WITHOUT_KERNELS]

OPERATOR = "irmb_training"
# Some of the blocks have no kernel for inference; what trains is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:accelerate. .* blocks are not accelerated")


@pytest.mark.parametrize("kind", COMPOSED)
def test_every_kind_of_block(backend: str, kind: str, x: Tensor, steps: list[str]) -> None:
    plain, fast = twins(small(kind), backend)
    assert_same_step(plain, fast, x)
    assert steps == ([] if (backend, kind) in REFUSED else [backend])


# Kinds that one backend alone has no kernels for; their own step runs.
REFUSED = {("cpu", "attention_v_group")}


@pytest.mark.parametrize("kind", WITHOUT_KERNELS)
def test_other_blocks_run_their_own_step(
    backend: str, kind: str, x: Tensor, steps: list[str]
) -> None:
    block = small(kind).to(device_of(backend))
    plain, fast = copy.deepcopy(block), ek.accelerate(block)
    assert_same_step(plain, fast, x)
    assert not steps


@pytest.mark.parametrize("entry", BLOCKS, ids=lambda e: e["name"])
def test_published_blocks(backend: str, entry: dict[str, Any]) -> None:
    """Outputs, gradients and statistics of the official code."""
    block, data = load_block(entry)
    block = block.to(device_of(backend)).train()
    ek.accelerate(block, backend=backend)
    x = golden.tensor(data["x"]).to(device_of(backend)).requires_grad_()
    y = block(x)
    assert_within(y.cpu(), data["y_train"], 2e-5 * largest(data["y_train"]), "output")
    y.backward(golden.tensor(data["g"]).to(y))
    assert_within(x.grad.cpu(), data["grad_x"], 1e-4 * largest(data["grad_x"]), "input gradient")
    for name, parameter in block.named_parameters():
        want = data[f"grad/{name}"]
        assert_within(parameter.grad.cpu(), want, 1e-4 * largest(want), f"gradient of {name}")
    for name, buffer in block.named_buffers():
        if not name.endswith("num_batches_tracked"):
            want = data[f"after/{name}"]
            assert_within(buffer.cpu(), want, 2e-5 * largest(want), f"buffer {name}")


def largest(array: np.ndarray) -> float:
    return float(np.abs(array).max(initial=0.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True])
def test_inference_on_the_same_kernels(
    backend: str, mode: Callable[[], Any], autocast: bool, x: Tensor
) -> None:
    plain, fast = twins(nn.Sequential(small("conv"), small("attention_pre")).eval(), backend)
    with mode(), torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        assert relative(fast(x), plain(x)) < (2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_momentum(backend: str, momentum: float | None, x: Tensor) -> None:
    block = small("conv")
    block.norm.momentum = block.conv_local.norm.momentum = momentum
    plain, fast = twins(block, backend)
    for _ in range(3):
        assert_same_step(plain, fast, x)
    assert int(fast.norm.num_batches_tracked) == 3


def test_untracked_statistics(backend: str, x: Tensor) -> None:
    block = small("conv")
    block.norm = nn.BatchNorm2d(4, track_running_stats=False)
    plain, fast = twins(block, backend)
    assert_same_step(plain, fast, x)
    plain.eval(), fast.eval()
    assert_same_step(plain, fast, x)


def test_frozen_batch_norms_inside_training(backend: str, x: Tensor, steps: list[str]) -> None:
    plain, fast = twins(small("attention_both_pre"), backend)
    for block in (plain, fast):
        block.norm.eval()
        for p in block.norm.parameters():
            p.requires_grad_(False)
    assert_same_step(plain, fast, x)
    for block in (plain, fast):
        block.eval()
    assert_same_step(plain, fast, x)
    assert steps == [backend] * 2


@pytest.mark.parametrize("frozen", ["all_but_proj", "all", "only_norm"])
def test_frozen_weights(backend: str, frozen: str, x: Tensor) -> None:
    plain, fast = twins(small("attention_pre"), backend)
    for block in (plain, fast):
        for name, p in block.named_parameters():
            keep = {"all_but_proj": "proj", "all": "nothing", "only_norm": "norm"}[frozen]
            p.requires_grad_(name.startswith(keep))
    assert_same_step(plain, fast, x)


def test_an_input_without_gradient(backend: str, x: Tensor) -> None:
    plain, fast = twins(small("attention_pre"), backend)
    for block in (plain, fast):
        block(x).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if name != "qk.conv.bias":
            assert relative(q.grad, p.grad) < 1e-4, name


def test_stochastic_depth_draws_what_the_layer_draws(backend: str, x: Tensor) -> None:
    plain, fast = twins(small("conv", drop_path=0.5), backend)
    x = x.repeat(4, 1, 1, 1)
    assert_same_step(plain, fast, x)


def test_dropout_runs_the_blocks_own_step(backend: str, x: Tensor, steps: list[str]) -> None:
    plain, fast = twins(small("attention_pre", attn_drop=0.3, drop=0.2), backend)
    assert_same_step(plain, fast, x, limit=1e-12)
    assert not steps


def test_batch_statistics_without_gradients(backend: str, x: Tensor) -> None:
    plain, fast = twins(small("conv"), backend)
    with torch.no_grad():
        assert relative(fast(x), plain(x)) < 1e-5
    assert relative(fast.norm.running_mean, plain.norm.running_mean) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_autocast(backend: str, dtype: torch.dtype, wide: bool, steps: list[str]) -> None:
    """fp32 masters, 16-bit maps: as near the fp64 block as eager under autocast."""
    options = {**KINDS["attention_pre"], "dim_head": 16, "window_size": 4, "exp_ratio": 2.0}
    block = iRMB(48, 48, qkv_bias=True, **options)
    plain, fast = twins(block.train(), backend)
    x = torch.randn(2, 48, 9, 8, device=device_of(backend))
    assert_as_near_as_autocast([(plain, fast, x if wide else x.to(dtype))], dtype)
    refused = (backend, dtype) == ("cpu", torch.float16)  # then the block's own step runs
    assert steps == ([] if refused else [backend])


def test_gradient_scaling_and_accumulation(backend: str, x: Tensor) -> None:
    plain, fast = twins(small("conv"), backend)
    for block in (plain, fast):
        for scale in (1.0, 1024.0):
            (block(x).square().sum() * scale).backward()
    for (name, p), q in zip(plain.named_parameters(), fast.named_parameters(), strict=True):
        assert relative(q[1].grad, p.grad) < 2e-5, name


def test_gradients_have_their_parameters_strides(backend: str, x: Tensor) -> None:
    _, fast = twins(small("conv").to(memory_format=torch.channels_last), backend)
    fast(x).sum().backward()
    for name, p in fast.named_parameters():
        assert p.grad.stride() == p.stride(), name


@pytest.mark.parametrize("make", ["expanded", "cat", "nchw", "sliced"])
def test_any_gradient(backend: str, make: str, x: Tensor) -> None:
    gradients: dict[str, Callable[[Tensor], Tensor]] = {
        "expanded": lambda y: y.mean((2, 3)).square().sum(),
        "cat": lambda y: torch.cat([y, 2 * y], 1).square().sum(),
        "nchw": lambda y: y.contiguous().flatten(1).cumsum(1).square().sum(),
        "sliced": lambda y: y[:, 1:3, ::2].square().sum(),
    }
    plain, fast = twins(small("attention_pre"), backend)
    for block in (plain, fast):
        gradients[make](block(x)).backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if name != "qk.conv.bias":
            assert relative(q.grad, p.grad) < 5e-5, name


def test_the_same_bits_again(backend: str, x: Tensor) -> None:
    _, fast = twins(small("attention_both_pre"), backend)
    state = copy.deepcopy(fast.state_dict())
    first = step(fast, x)
    fast.zero_grad()
    fast.load_state_dict(state)
    for name, again in step(fast, x).items():
        assert torch.equal(again, first[name]), name


def test_two_forwards_before_a_backward(backend: str, x: Tensor) -> None:
    """The statistics that the second moves are not what the first kept."""
    plain, fast = twins(small("conv"), backend)
    for block in (plain, fast):
        (block(x).square().sum() + block(2 * x).square().sum()).backward()
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert relative(q.grad, p.grad) < 2e-5, name


@pytest.mark.parametrize("between", ["nothing", "in_place", "copy"])
def test_a_block_sums_its_output_for_the_next(
    backend: str, between: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step on, and only where the next block reads what was summed."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = small("conv"), small("conv")

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if between == "in_place":
                y.detach().mul_(2)
            return self.second(y.clone() if between == "copy" else y)

    if not backends.has(backend, "shrink_statistics"):
        pytest.skip(f"{backend} does not sum what it shrinks")
    plain, fast = twins(Two(), backend)
    passes: list[int] = []
    monkeypatch.setattr("emo_kernels.cpu.repeated", lambda run, options, t: run(*options, *t))
    sums = backends.function(backend, "batch_norm_sums")
    namespace = backends._namespaces[backend]
    monkeypatch.setattr(namespace, "batch_norm_sums", lambda *a: passes.append(1) or sums(*a))
    for expected in (2, 1 if between == "nothing" else 2):
        passes.clear()
        assert_same_step(plain, fast, x)
        assert len(passes) == expected
    assert_same_step(copy.deepcopy(plain), copy.deepcopy(fast), x)


@pytest.mark.slow
def test_two_steps_of_emo_1m(backend: str) -> None:
    """Loss, every gradient and every statistic of two SGD steps, against plain PyTorch in fp64."""
    torch.manual_seed(0)
    device = device_of(backend)
    exact = ek.create_model("emo_1m", num_classes=10, drop_path_rate=0.0).train().double()
    plain = copy.deepcopy(exact).float().to(device)
    fast = ek.accelerate(copy.deepcopy(plain), backend=backend)
    exact.to(device)
    images = torch.randn(2, 4, 3, 32, 32, device=device)
    labels = torch.tensor([1, 5, 2, 9], device=device)

    def two_steps(model: nn.Module) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        results = {}
        for number, x in enumerate(images):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), labels)
            loss.backward()
            results[f"loss {number}"] = loss.detach()
            results |= {f"{n} {number}": p.grad.clone() for n, p in model.named_parameters()}
            optimizer.step()
        return results | {n: b.clone() for n, b in model.named_buffers()}

    want, eager, got = (two_steps(model) for model in (exact, plain, fast))
    for name, expected in want.items():
        if "qk.conv.bias" in name or name.startswith("stage0.0.convs.0.0.bias"):
            continue  # all or half of it has no influence: noise
        scale = float(expected.double().norm())
        errors = [float((t[name].double() - expected.double()).norm()) for t in (got, eager)]
        assert errors[0] <= 4 * errors[1] + 1e-5 * scale, f"{name}: {errors} of {scale:.2e}"
