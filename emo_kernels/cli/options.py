"""Options that several commands share, so that one name means one thing everywhere."""

from __future__ import annotations

import argparse
import ast
import json
from collections.abc import Sequence
from typing import Any

import torch


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: data on standard output instead of text."""
    parser.add_argument("--json", action="store_true", help="print data as JSON instead of text")


def add_model(parser: argparse.ArgumentParser) -> None:
    """``MODEL`` and ``--set``: what to build."""
    parser.add_argument("model", metavar="MODEL", help="emo_1m, emo_5m, emo2_5m, ...")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """``--set NAME=VALUE``: fields of the model's configuration."""
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="change fields of the configuration, as in --set window_sizes=10 num_classes=10",
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--set`` says, as keyword arguments of ``create_model``."""
    found = {}
    for item in args.set:
        name, equals, text = item.partition("=")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
        if not (name.isidentifier() and equals and text):
            raise ValueError(f"--set must be NAME=VALUE, got {item!r}")
    return found


def add_size(parser: argparse.ArgumentParser, default: Sequence[int] = (3, 224, 224)) -> None:
    """``--size``: channels, height, width of one input."""
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=list(default),
        metavar="N",
        help="input as C H W, H W, or one side of a square (default: %(default)s)",
    )


def add_runtime(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--threads`` and ``--backend``: where and how the model runs."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--backend", help="backend of the accelerated model (default: the best)")


def input_shape(size: Sequence[int], batch: int = 1) -> tuple[int, int, int, int]:
    """The (N, C, H, W) that ``--size`` asks for."""
    if not 1 <= len(size) <= 3 or min(size) < 1 or batch < 1:
        got = f"{' '.join(map(str, size))} at batch {batch}"
        raise ValueError(f"--size must be C H W, H W or one side, each at least 1, got {got}")
    channels = size[0] if len(size) == 3 else 3
    return batch, channels, size[-1 if len(size) == 1 else -2], size[-1]


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of ``224`` or ``800x1344``."""
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise ValueError(f"--size must be like 224 or 800x1344, got {text!r}")
    return int(sides[0]), int(sides[-1])


def use_runtime(args: argparse.Namespace) -> torch.device:
    """Set the thread count, check the device, and return it."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {args.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {args.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"--device {args.device} asks for a GPU; torch sees {found} here")
    return device


def print_json(data: Any) -> None:
    """Print ``data`` as indented JSON on standard output."""
    print(json.dumps(data, indent=2))
