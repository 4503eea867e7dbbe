"""What modules and models say about arguments they cannot use: who, expected, got, the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor, fx


def unknown_name(owner: str, what: str, got: object, known: Iterable[str]) -> ValueError:
    """An error naming the known names, the closest ones first where there are such."""
    names = list(known)
    close = get_close_matches(str(got).lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return ValueError(f"{owner}: unknown {what} {got!r}; {hint}known: {', '.join(names)}")


def check_choice(owner: str, argument: str, got: str, known: Iterable[str]) -> None:
    """``got`` is one of the known names."""
    names = tuple(known)
    if got not in names:
        raise unknown_name(owner, argument, got, names)


def check_integer(owner: str, argument: str, got: object, least: int) -> None:
    """``got`` is an integer not below ``least``."""
    if not isinstance(got, int) or isinstance(got, bool) or got < least:
        raise ValueError(f"{owner}: {argument} must be an integer >= {least}, got {got!r}")


def check_rate(owner: str, argument: str, got: float) -> None:
    """``got`` is a probability of dropping something, below 1 so that something is left."""
    if isinstance(got, bool) or not 0.0 <= got < 1.0:
        raise ValueError(f"{owner}: {argument} must lie in [0, 1), got {got!r}")


def check_map(owner: str, x: object, channels: int, weight: object = None) -> None:
    """``x`` is a floating (N, channels, H, W) map that can meet ``weight``."""
    if torch.jit.is_tracing():
        return  # sizes are not numbers here
    if not isinstance(x, Tensor):
        if isinstance(x, fx.Proxy):
            return  # nor here
        raise ValueError(f"{owner}: x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(
            f"{owner}: x must have 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}; "
            "add the batch dimension with x[None]"
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"{owner}: x must be (N, C, H, W) with C = {channels}, got shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(
            f"{owner}: x must be floating point, got {x.dtype}; convert it with x.float()"
        )
    if isinstance(weight, Tensor):
        _check_like_weight(owner, x, weight)


def _check_like_weight(owner: str, x: Tensor, weight: Tensor) -> None:
    """``x`` has the device of the weights and, outside autocast, their dtype."""
    if x.device != weight.device:
        raise ValueError(
            f"{owner}: x is on {x.device}, the weights are on {weight.device}; "
            f"move one of them with .to({str(weight.device)!r})"
        )
    if x.dtype is not weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"{owner}: x has dtype {x.dtype}, the weights have {weight.dtype}; "
            f"convert one of them with .to({weight.dtype}), or run under torch.autocast"
        )
