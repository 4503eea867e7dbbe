"""What every kernel of a training step takes of a GPU, compiled here for GPUs that are not here.

`bench MODEL --resources`: the launches of each distinct block, forward and backward, in bf16 over
fp32 weights. `blocks` run on a multiprocessor at a time; `MB` are the tensors a launch is given.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emo_kernels.accelerate import find_blocks
from emo_kernels.cli.options import image_size, print_json, settings
from emo_kernels.explain import format_table
from emo_kernels.measure.case import DTYPES
from emo_kernels.measure.progress import Progress
from emo_kernels.models import create_model
from emo_kernels.ops.irmb_step import Plan
from emo_kernels.ops.irmb_training import irmb_training
from emo_kernels.spec import BatchNormMode, IRMBSpec, IRMBWeights
from emo_kernels.structure import BlockReading
from emo_kernels.triton import resources


class Layer(NamedTuple):
    """One block of a model on the map it gets there; all its tensors are meta tensors."""

    path: str
    spec: IRMBSpec
    weights: IRMBWeights
    shape: tuple[int, ...]


def run(args: argparse.Namespace) -> int:
    """Print one row for each launch; 1 if a kernel spills, does not fit or misses tensor cores."""
    unknown = sorted(set(args.arch) - set(resources.MULTIPROCESSORS))
    if unknown:
        known = ", ".join(map(str, resources.MULTIPROCESSORS))
        raise ValueError(f"--arch must be of {known}, got {unknown[0]}")
    layers = [(name, layer) for name in args.models for layer in _layers(name, args)]
    rows = []
    dtype, mode = DTYPES[(args.dtype or ["bf16"])[0]], BatchNormMode(not args.frozen)
    with Progress("compile", len(layers) * len(args.arch), unit="block") as progress:
        for arch in args.arch:
            for name, layer in layers:
                rows += measure(layer, arch, dtype, mode, name)
                progress.advance(f"{name} {layer.path} sm_{arch}")
    if args.json:
        print_json({"rows": rows})
    else:
        print(_table(rows))
    return 1 if any(row["faults"] for row in rows) else 0


def _layers(name: str, args: argparse.Namespace) -> list[Layer]:
    fields = settings(args)
    shape = ((args.batch or [1])[0], fields.get("in_chans", 3), *image_size(args.size[0]))
    with torch.device("meta"):
        layers = list(distinct_layers(name, fields, shape))
    paths = [layer.path for layer in layers]
    absent = [path for path in args.blocks or () if path not in paths]
    if absent:
        raise ValueError(f"--blocks of {name} must be of {', '.join(paths)}, got {absent[0]}")
    return [layer for layer in layers if args.blocks is None or layer.path in args.blocks]


def distinct_layers(
    name: str, fields: dict[str, Any], shape: tuple[int, int, int, int]
) -> Iterator[Layer]:
    """The blocks of a model that differ; to be called under ``torch.device("meta")``."""
    model = create_model(name, **{"in_chans": shape[1], "drop_path_rate": 0.0, **fields})
    seen = set()
    for path, block, x in _blocks_and_inputs(model, torch.empty(shape)):
        reading = BlockReading(block)
        weights = reading.weights()
        key = (reading.spec, tuple((n, t.shape) for n, t in weights.present()), x.shape)
        if key not in seen:
            seen.add(key)
            yield Layer(path, reading.spec, weights, tuple(x.shape))


def _blocks_and_inputs(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, Tensor]]:
    found: list[tuple[str, nn.Module, Tensor]] = []

    def remember(path: str) -> Any:
        return lambda block, args: found.append((path, block, args[0]))

    handles = [b.register_forward_pre_hook(remember(path)) for path, b in find_blocks(model)]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return found


def measure(
    layer: Layer, arch: int, dtype: torch.dtype, mode: BatchNormMode, model: str
) -> list[dict[str, Any]]:
    """One row for each distinct launch of a forward and a backward pass."""
    with resources.recorded(arch) as launches:
        step(layer, dtype, mode)
    found = resources.measure(launches, arch, processes=os.cpu_count() or 1)
    rows = {}
    for one, result in zip(launches, found, strict=True):
        row = {"model": model, "block": layer.path, **result._asdict()}
        row |= {"grid": one.grid, "bytes": one.bytes, "faults": result.faults}
        rows[repr(row)] = row
    return list(rows.values())


def step(layer: Layer, dtype: torch.dtype, mode: BatchNormMode) -> None:
    """One training step of the block on meta tensors, on the triton backend."""
    x = torch.empty(layer.shape, dtype=dtype, device="meta", requires_grad=True)
    plan = Plan(layer.spec, mode, mode, "triton")
    drop_scale = torch.empty(layer.shape[0], device="meta") if layer.spec.skip else None
    with torch.enable_grad():
        out = irmb_training(x, layer.weights, plan, drop_scale)
        out.backward(torch.empty_like(out))


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ["kernel", "arch", "model", "block", "grid", "warps", "stages", "regs", "spills"]
    headers += ["shared", "blocks", "occupancy", "limit", "tensor cores", "MB", "fault"]
    lines = [
        (
            row["kernel"],
            f"sm_{row['arch']}",
            row["model"],
            row["block"],
            "x".join(map(str, row["grid"])),
            row["warps"],
            row["stages"],
            row["registers"],
            row["spills"],
            row["shared"],
            row["blocks"],
            f"{row['occupancy']:.0%}",
            row["limit"],
            " ".join(f"{name} {count}" for name, count in row["matrix_ops"].items()) or "-",
            f"{row['bytes'] / 1e6:.1f}",
            "; ".join(row["faults"]) or "-",
        )
        for row in rows
    ]
    return format_table(headers, lines)
