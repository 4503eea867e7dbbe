"""Convert a checkpoint: any known key layout to the published names, .pth to .safetensors or back.

The suffix of OUT decides the file's kind. The file is read without executing anything in it, fitted
to the model it belongs to, checked, and written whole or not at all.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from emo_kernels.cli.options import add_json, add_settings, print_json, settings
from emo_kernels.models import (
    CheckpointError,
    LoadResult,
    create_backbone,
    create_model,
    list_models,
    load_checkpoint,
    save_checkpoint,
)
from emo_kernels.models.checkpoint_file import read_tensors

_HEAD = re.compile(r"(?:^|\.)(?:head|head\.fc|classifier|fc)\.weight$")
_STEM = re.compile(r"(?:^|\.)(?:stage0|stem)\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``convert``."""
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT", help=".pth or .safetensors")
    parser.add_argument("--model", help="the model it belongs to (default: the one that fits)")
    add_settings(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what the file was."""
    tensors = read_tensors(args.source)
    names = [args.model] if args.model else list_models()
    what, model, result = _fit(args.source, names, _fields(tensors) | settings(args), tensors)
    save_checkpoint(model, args.target)
    report = {
        "model": what,
        "tensors": result.loaded,
        "left_out": result.left_out,
        "out": str(args.target),
    }
    if args.json:
        print_json(report)
    else:
        left = f", {len(result.left_out)} of other parts left out" if result.left_out else ""
        print(f"{args.source} is {what}: {result.loaded} tensors{left}; wrote {args.target}")
    return 0


def _fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Classes and image channels, as the shapes in the file tell them."""
    fields: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if _HEAD.search(name) and tensor.ndim == 2:
            fields["num_classes"] = tensor.shape[0]
        if _STEM.search(name) and tensor.ndim == 4:
            fields.setdefault("in_chans", tensor.shape[1])
    return fields


def _fit(
    path: Path, names: list[str], fields: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, nn.Module, LoadResult]:
    """The first of the models that the file fits, loaded."""
    problem: CheckpointError | None = None
    for what, model in _candidates(names, fields, any(_HEAD.search(name) for name in tensors)):
        try:
            return what, model, load_checkpoint(model, path)
        except CheckpointError as error:
            problem = error
    assert problem is not None
    if len(names) == 1:
        raise problem
    raise ValueError(
        f"convert: {path} fits none of {', '.join(names)}; name its model with --model to see "
        "where they differ, and --set what is special about it"
    )


def _candidates(
    names: list[str], fields: dict[str, Any], classifier: bool
) -> Iterator[tuple[str, nn.Module]]:
    backbone = {name: value for name, value in fields.items() if name != "num_classes"}
    for name in names:
        if classifier:
            yield name, create_model(name, **fields)
        else:
            yield f"{name} (backbone)", create_backbone(name, **backbone)
