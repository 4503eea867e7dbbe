"""Where the time of a model goes: block by block, and in torch's profile; plain and accelerated.

A block's floor is the time below which the limits measured here let no program come: its arithmetic
at the rate of large matrix products, or its input, output and weights at that of a stream.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from emo_kernels.cli.info import one_line
from emo_kernels.cli.options import (
    add_model,
    add_runtime,
    add_size,
    input_shape,
    settings,
    use_runtime,
)
from emo_kernels.cli.pairs import build_pair, noise_images
from emo_kernels.measure import breakdown
from emo_kernels.measure.limits import machine_limits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``profile``."""
    add_model(parser)
    add_size(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rows", type=int, default=15, help="operators to list (default: 15)")
    parser.add_argument("--rounds", type=int, default=5, help="forward passes (default: 5)")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="DIR",
        help="also write plain.json and accelerated.json there, for chrome://tracing",
    )
    add_runtime(parser)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Print a table for each model."""
    device = use_runtime(args)
    x = torch.randn(input_shape(args.size, args.batch), device=device)
    fields = {"in_chans": x.shape[1], **settings(args)}
    pair = build_pair(args.model, fields, noise_images(x.shape[1], device), backend=args.backend)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    print(one_line())
    limits = machine_limits(device)
    for variant, model in pair._asdict().items():
        model(x)  # warm-up
        parts = breakdown.count(model, pair.plain, x)
        breakdown.measure(model, x, parts, args.rounds)
        with profile(activities=activities) as profiled:  # it costs time itself
            breakdown.measure(model, x, copy.deepcopy(parts), args.rounds)
        print(f"\n{args.model}, {variant}, {args.rounds} forward passes of {tuple(x.shape)}")
        print(breakdown.table(parts, limits, "fp32"))
        averages = profiled.key_averages()
        print(
            averages.table(
                sort_by=f"self_{device.type}_time_total",
                row_limit=args.rows,
                max_name_column_width=40,
            )
        )
        if args.trace is not None:
            args.trace.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(args.trace / f"{variant}.json"))
    return 0
