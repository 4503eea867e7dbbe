"""A plain model and its accelerated twin, and whether their numbers agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.models import create_model

# What is timed and measured: a plain model in both memory formats is compared with, so that a
# speed-up is over the better one.
VARIANTS = ("plain", "plain, channels_last", "accelerated")


class Pair(NamedTuple):
    """Two models with the same weights, both in evaluation mode."""

    plain: nn.Module
    accelerated: nn.Module


class Agreement(NamedTuple):
    """How two results compare with each other and with the fp64 oracle.

    Attributes:
        difference: largest absolute difference of the two, relative to the largest value.
        plain_error, error: relative L2 distance of each from the oracle.
        allowed: the largest ``error`` the tolerance rule lets pass.
        ok: the tolerance rule holds.
    """

    difference: float
    plain_error: float
    error: float
    allowed: float
    ok: bool


def build_pair(
    name: str,
    settings: dict[str, Any],
    calibration: Tensor,
    *,
    backend: str | None = None,
    seed: int = 0,
) -> Pair:
    """Model ``name`` with random weights and realistic batch norm statistics, and its twin.

    Args:
        name, settings: as :func:`create_model` takes them.
        calibration: (N, C, H, W) images that give the batch norms their statistics; the models
            come to their device.
        backend: as :func:`accelerate` takes it.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    plain = create_model(name, **settings).to(calibration.device)
    calibrate_batch_norm(plain, calibration)
    return Pair(plain.eval(), accelerate_quietly(copy.deepcopy(plain), backend).eval())


def noise_images(channels: int, device: torch.device) -> Tensor:
    """Images to calibrate on where no photos are at hand."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, channels, 96, 96, generator=generator).to(device)


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every batch norm to those of ``images``."""
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().reset_running_stats()
        norm.momentum = None  # a plain average over what it sees
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def forward_of(variant: str, model: nn.Module, backend: str | None) -> Callable[[Tensor], Tensor]:
    """The forward of a plain ``model`` turned into one of :data:`VARIANTS`, in place."""
    if variant == "accelerated":
        return accelerate_quietly(model, backend)
    if variant == "plain":
        return model
    channels_last(model)
    return lambda x: model(x.contiguous(memory_format=torch.channels_last))


def channels_last(model: nn.Module) -> nn.Module:
    """``model`` with its weights in that memory format, in place."""
    layout = torch.channels_last
    return model.to(memory_format=layout)  # type: ignore[call-overload]  # documented, undeclared


def variants(pair: Pair, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The calls to compare on ``x``, one for each of :data:`VARIANTS`."""
    other = forward_of("plain, channels_last", copy.deepcopy(pair.plain), None)
    forwards: tuple[Callable[[Tensor], Tensor], ...]
    forwards = (pair.plain, other, pair.accelerated)
    return {name: partial(call, x) for name, call in zip(VARIANTS, forwards, strict=True)}


@torch.inference_mode()
def compare_pair(pair: Pair, x: Tensor) -> Agreement:
    """Run both on ``x`` and judge the accelerated result by the tolerance rule."""
    oracle = copy.deepcopy(pair.plain).double()(x.double())
    return compare(pair.accelerated(x), pair.plain(x), oracle)


def compare(result: Tensor, plain: Tensor, oracle: Tensor) -> Agreement:
    """The tolerance rule: ``result`` may be twice as far from the fp64 oracle as ``plain`` is.

    In fp32 (16-bit types in brackets), with u the unit roundoff: relative L2 error at most
    2 (1.25) * plain + u, largest error at most 4 (2) * plain + 2 u max|oracle|; NaN and infinities
    exactly where the oracle has them.
    """
    u = torch.finfo(result.dtype).eps / 2
    wide = result.dtype in (torch.float32, torch.float64)
    l2_factor, max_factor = (2.0, 4.0) if wide else (1.25, 2.0)
    finite = oracle.isfinite()
    same_places = torch.equal(result.isfinite(), finite)
    exact, got, usual = (torch.where(finite, t.double(), 0.0) for t in (oracle, result, plain))
    norm, peak = float(exact.norm()) or 1.0, _largest(exact)
    error, plain_error = float((got - exact).norm()) / norm, float((usual - exact).norm()) / norm
    allowed = l2_factor * plain_error + u
    within = _largest(got - exact) <= max_factor * _largest(usual - exact) + 2 * u * peak
    return Agreement(
        difference=_largest(got - usual) / (peak or 1.0),
        plain_error=plain_error,
        error=error,
        allowed=allowed,
        ok=bool(same_places and within and error <= allowed),
    )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
