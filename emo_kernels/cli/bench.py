"""Time whole models in inference, plain against accelerated, taking turns in one process.

The plain model is timed in both memory formats; the speed-up is over the faster one. `match` holds
the accelerated logits against the plain ones by the tolerance rule, with an fp64 oracle.
`--resources` times nothing: it compiles the Triton kernels for GPUs that need not be here.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch

from emo_kernels.cli.info import machine, one_line
from emo_kernels.cli.options import (
    add_json,
    add_runtime,
    add_settings,
    add_size,
    input_shape,
    print_json,
    settings,
    use_runtime,
)
from emo_kernels.cli.pairs import build_pair, compare_pair, noise_images, variants
from emo_kernels.cli.timing import interleaved
from emo_kernels.explain import format_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="emo_1m, emo_5m, emo2_5m, ...")
    add_settings(parser)
    add_size(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--mode", choices=("infer",), default="infer")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for one row")
    add_runtime(parser)
    group = parser.add_argument_group("compiling for absent GPUs")
    group.add_argument("--resources", action="store_true", help="compile the kernels, time nothing")
    group.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], metavar="SM")
    group.add_argument(
        "--blocks", nargs="+", metavar="PATH", help="such as stage3.1 (default: all)"
    )
    group.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of maps")
    group.add_argument("--frozen", action="store_true", help="batch norms do not see the batch")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print one row for each model and batch size; 1 if any does not match."""
    if args.resources:
        return importlib.import_module("emo_kernels.cli.resources").run(args)  # needs triton
    device = use_runtime(args)
    results = []
    for name in args.models:
        for batch in args.batch:
            shape = input_shape(args.size, batch)
            results.append(_measure(name, settings(args), shape, device, args))
    if args.json:
        print_json({"machine": machine(), "results": results})
    else:
        print(one_line())
        print(_table(results))
    return 0 if all(result["match"] for result in results) else 1


def _measure(
    name: str,
    fields: dict[str, Any],
    shape: tuple[int, int, int, int],
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device)
    fields = {"in_chans": shape[1], **fields}
    pair = build_pair(name, fields, noise_images(shape[1], device), backend=args.backend)
    agreement = compare_pair(pair, x[:1])
    with torch.inference_mode():
        timings = interleaved(
            variants(pair, x),
            seconds=args.seconds,
            device=device,
            label=f"bench {name} {'x'.join(map(str, shape))}",
        )
    plain = min(t.median for key, t in timings.items() if key != "accelerated")
    return {
        "model": name,
        "shape": shape,
        "milliseconds": {key: timing._asdict() for key, timing in timings.items()},
        "speed_up": plain / timings["accelerated"].median,
        "agreement": agreement._asdict(),
        "match": agreement.ok,
    }


def _table(results: list[dict[str, Any]]) -> str:
    variants_timed = list(results[0]["milliseconds"])
    timed = (f"{variant} ms (p10-p90)" for variant in variants_timed)
    headers = ("model", "input", *timed, "speed-up", "match")
    rows = []
    for result in results:
        times = (result["milliseconds"][key] for key in variants_timed)
        rows.append(
            (
                result["model"],
                "x".join(map(str, result["shape"])),
                *(f"{t['median']:.1f} ({t['p10']:.1f}-{t['p90']:.1f})" for t in times),
                f"{result['speed_up']:.2f}x",
                "yes" if result["match"] else "NO",
            )
        )
    return format_table(headers, rows)
