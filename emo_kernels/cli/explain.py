"""Which backend runs each block of a model for inference and for training, and why not another."""

from __future__ import annotations

import argparse
import json

import torch

from emo_kernels.cli.options import (
    add_json,
    add_model,
    add_runtime,
    add_size,
    input_shape,
    print_json,
    settings,
    use_runtime,
)
from emo_kernels.explain import explain
from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.models import create_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``explain``."""
    add_model(parser)
    add_size(parser)
    parser.add_argument("--batch", type=int, default=1)
    add_runtime(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report of :func:`emo_kernels.explain`."""
    device = use_runtime(args)
    shape = input_shape(args.size, args.batch)
    model = create_model(args.model, in_chans=shape[1], **settings(args)).eval().to(device)
    report = explain(accelerate_quietly(model, args.backend), torch.zeros(shape, device=device))
    if args.json:
        print_json(json.loads(report.to_json()))
    else:
        print(report)
    return 0
