"""Where the time of a model goes: operator by operator and block by block; plain and accelerated.

`--mode train` takes a training step apart, forward and backward. A floor is the time below which
the limits measured here let no program come: the arithmetic at the rate of large matrix products,
or what goes in and out at that of a stream. Operators are timed one by one, without the Python
between them; blocks with it. Ranges are named after their operator, as in `irmb stage3.1` and
`irmb stage3.1 backward`, in the traces and, with `--nvtx`, for NVIDIA's profilers:

    nsys profile -t nvtx,cuda emo-kernels profile emo_5m --device cuda --nvtx
"""

from __future__ import annotations

import argparse
import copy
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.autograd.profiler import emit_nvtx
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from emo_kernels.cli.options import (
    add_model,
    add_runtime,
    add_size,
    input_shape,
    settings,
    use_runtime,
)
from emo_kernels.measure import breakdown, operators
from emo_kernels.measure.limits import machine_limits
from emo_kernels.measure.machine import one_line
from emo_kernels.measure.pairs import build_pair, noise_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``profile``."""
    add_model(parser)
    add_size(parser)
    parser.add_argument("--mode", choices=("infer", "train"), default="infer")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=15, help="operators to list (default: 15)")
    parser.add_argument("--rounds", type=int, default=5, help="passes or steps (default: 5)")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="also write plain.json and accelerated.json there, for chrome://tracing",
    )
    parser.add_argument("--nvtx", action="store_true", help="emit NVTX ranges, on a GPU")
    add_runtime(parser)


def run(args: argparse.Namespace) -> int:
    """Print two tables for each model."""
    device = use_runtime(args)
    if args.nvtx and device.type != "cuda":
        raise ValueError(f"--nvtx needs --device cuda, got {args.device}; --trace DIR works here")
    if min(args.rounds, args.rows) < 1:
        raise ValueError(f"--rounds and --rows must be at least 1, got {args.rounds}, {args.rows}")
    x = torch.randn(input_shape(args.size, args.batch), device=device)
    fields = {"in_chans": x.shape[1], **settings(args)}
    pair = build_pair(args.model, fields, noise_images(x.shape[1], device), backend=args.backend)
    print(one_line())
    limits = machine_limits(device)
    loss = _loss(x) if args.mode == "train" else None
    what = "forward passes" if loss is None else "training steps"
    for variant, model in pair._asdict().items():
        with torch.inference_mode(loss is None):
            model.train(loss is not None)
            parts = breakdown.count(model, pair.plain, x, trains=loss is not None)
            breakdown.measure(model, x, copy.deepcopy(parts), 2, loss)  # warm-up
            with emit_nvtx() if args.nvtx else nullcontext():
                breakdown.measure(model, x, parts, args.rounds, loss)
            found = operators.measure(model, x, parts, args.rounds, limits, loss)
            print(f"\n{args.model}, {variant}, {args.rounds} {what} of {tuple(x.shape)}\n")
            print(operators.table(found, args.rows), end="\n\n")
            print(breakdown.table(parts, limits, "fp32"))
            if args.trace is not None:
                _write_trace(model, x, parts, args.trace / f"{variant}.json", loss)
    return 0


def _loss(x: torch.Tensor) -> breakdown.Loss:
    """Cross entropy with any labels."""
    labels = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    return lambda out: cross_entropy(out, labels)


def _write_trace(
    model: torch.nn.Module,
    x: torch.Tensor,
    parts: dict[str, breakdown.Part],
    path: Path,
    loss: breakdown.Loss | None,
) -> None:
    """Two passes for chrome://tracing; the profiler itself costs time."""
    activities = [ProfilerActivity.CPU]
    if x.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        breakdown.measure(model, x, copy.deepcopy(parts), 2, loss)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(path))
