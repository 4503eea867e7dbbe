"""A 20-second self-test of this machine: every usable backend against an fp64 oracle.

Each operator runs on small, odd shapes in fp32, forward and backward; then whole small models run
plain and accelerated. A result passes if it is at most about twice as far from the fp64 oracle as
the plain PyTorch composition is. Exit status 1 if anything fails.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emo_kernels.backends import available_backends, only_by_name
from emo_kernels.cli.check_cases import CASES, Case
from emo_kernels.cli.options import add_json, print_json
from emo_kernels.explain import format_table
from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.measure.machine import one_line
from emo_kernels.measure.pairs import Agreement, calibrate_batch_norm, compare
from emo_kernels.measure.progress import Progress
from emo_kernels.models import create_model

_MODELS = ("emo_1m", "emo2_1m")
_CEILING = 40 * 2.0**-24  # of the reference itself, against fp64


class Row(NamedTuple):
    """One line of the report."""

    backend: str
    what: str
    compared: int
    share: float | None  # worst error, as a share of what is allowed
    result: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``check``."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a row failed."""
    backends = {n: reason or only_by_name(n) for n, reason in available_backends().items()}
    usable = [name for name, reason in backends.items() if reason is None]
    tasks: list[Callable[[], Row]] = [
        *(partial(_check_operator, name, case) for name in usable for case in CASES),
        *(partial(_check_model, name, model) for name in (*usable, None) for model in _MODELS),
    ]
    rows = []
    with Progress("check", len(tasks), unit="test") as progress:
        for task in tasks:
            rows.append(task())
            progress.advance(rows[-1].what)
    failed = sum(row.result == "FAILED" for row in rows)
    absent = {name: reason for name, reason in backends.items() if reason is not None}
    if args.json:
        data = [row._asdict() for row in rows]
        print_json({"rows": data, "unusable": absent, "failed": failed})
    else:
        print(_text(rows, absent))
        ran = sum(row.share is not None for row in rows)
        print(f"{failed} of {ran} failed" if failed else f"all {ran} ok")
    return 1 if failed else 0


def _text(rows: list[Row], absent: dict[str, str]) -> str:
    """A table of what ran, and a line for each backend on what could not."""
    headers = ("backend", "what", "compared", "error / allowed", "result")
    ran = [
        (row.backend, row.what, row.compared, f"{row.share:.2f}", row.result)
        for row in rows
        if row.share is not None
    ]
    lines = [one_line(), format_table(headers, ran)]
    lines += [f"{name}: not usable here: {reason}" for name, reason in absent.items()]
    lacking = Counter((row.backend, row.what.split()[0]) for row in rows if row.share is None)
    lines += [
        f"{backend}: no kernel for {what} in {count} of the cases"
        for (backend, what), count in lacking.items()
    ]
    return "\n".join(lines)


def _check_operator(backend: str, case: Case) -> Row:
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    try:
        results = _results(case, backend, torch.float32, device)
    except NotImplementedError:
        return Row(backend, case.name, 0, None, "no kernel")
    oracle = _results(case, "reference", torch.float64, device)
    if backend == "reference":  # it is the plain composition itself: an absolute ceiling instead
        found = list(map(compare, results, results, oracle))
        share = max(a.error for a in found) / _CEILING
        passed = share <= 1 and all(a.ok for a in found)
        return Row(backend, case.name, len(results), share, "ok" if passed else "FAILED")
    plain = _results(case, "reference", torch.float32, device)
    return _row(backend, case.name, map(compare, results, plain, oracle))


def _results(case: Case, backend: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The output and, where the operator has a gradient, the gradient of every tensor."""
    tensors = {
        name: tensor.float().to(device, dtype).requires_grad_(case.differentiable)
        for name, tensor in case.tensors().items()
    }
    output = case.call(tensors, backend)
    if not case.differentiable:
        return [output]
    weight = torch.linspace(-1, 1, output.numel(), device=device, dtype=dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, list(tensors.values()), weight)]


def _check_model(backend: str | None, name: str) -> Row:
    """Logits, loss gradient and updated statistics of a whole model on a small image."""
    shown = backend or "automatic"
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    torch.manual_seed(0)
    x = torch.randn(4, 3, 72, 56, device=device)
    plain = create_model(name, num_classes=10, drop_path_rate=0.0).to(device)
    calibrate_batch_norm(plain, x)
    try:
        accelerated = accelerate_quietly(copy.deepcopy(plain), backend)
        results = _model_results(accelerated, x)
    except NotImplementedError:
        return Row(shown, f"{name}, whole model", 0, None, "not every block")
    oracle = _model_results(copy.deepcopy(plain).double(), x.double())
    return _row(
        shown, f"{name}, whole model", map(compare, results, _model_results(plain, x), oracle)
    )


def _model_results(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        logits = model.eval()(x)
    inputs = x.clone().requires_grad_()
    trained = model.train()(inputs)
    weight = torch.linspace(-1, 1, trained.numel(), device=x.device, dtype=x.dtype)
    (trained * weight.view_as(trained)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    statistics = [b.flatten() for b in model.buffers() if b.is_floating_point()]
    assert inputs.grad is not None
    return [logits, trained.detach(), inputs.grad, flat, torch.cat(statistics)]


def _row(backend: str, what: str, agreements: Iterator[Agreement]) -> Row:
    found = list(agreements)
    share = max(a.error / a.allowed for a in found)
    passed = all(a.ok for a in found)
    return Row(backend, what, len(found), share, "ok" if passed else "FAILED")
