"""Accelerate a model and say plainly which backend runs how many of its blocks."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

from torch import Tensor, nn

from emo_kernels.accelerate import accelerate
from emo_kernels.backends import unavailable
from emo_kernels.explain import explain


def accelerate_quietly(model: nn.Module, backend: str | None = None) -> nn.Module:
    """:func:`accelerate` without its warning: the commands print :func:`describe` instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="accelerate: ", category=UserWarning)
        return accelerate(model, backend=backend)


def backend_use(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """How many blocks each backend runs on an input like ``x``, and why not another, as data."""
    rows = explain(model, x).rows
    return {
        "blocks": len(rows),
        "inference": dict(Counter(row.inference for row in rows)),
        "training": dict(Counter(row.training for row in rows)),
        "inference_reasons": _count_reasons([row.reasons for row in rows]),
        "training_reasons": _count_reasons([row.training_reasons for row in rows]),
    }


def describe(use: dict[str, Any], mode: str) -> str:
    """For a person: the backends of ``mode``, ``inference`` or ``training``, and why not another
    that works on this machine.
    """
    runs = ", ".join(
        f"{_PLAIN if name == 'reference' else name} runs {count} of {use['blocks']} blocks"
        for name, count in sorted(use[mode].items(), key=lambda item: -item[1])
    )
    lines = [f"Backends in {mode} of the accelerated model: {runs}."]
    if "reference" in use[mode]:
        lines += [
            f"  not {reason['backend']} for {reason['blocks']}: {reason['reason']}"
            for reason in use[f"{mode}_reasons"]
            if unavailable(reason["backend"]) is None
        ]
    return "\n".join(lines)


_PLAIN = "the plain block (PyTorch)"


def _count_reasons(reasons: list[dict[str, str]]) -> list[dict[str, Any]]:
    counts = Counter(pair for row in reasons for pair in row.items())
    return [
        {"backend": backend, "reason": reason, "blocks": count}
        for (backend, reason), count in counts.items()
    ]
