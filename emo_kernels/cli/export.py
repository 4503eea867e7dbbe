"""Write a model as ONNX, built from standard operators; --check compares it in ONNX Runtime."""

from __future__ import annotations

import argparse
import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from torch import Tensor, nn

from emo_kernels.cli.options import add_json, add_model, add_size, input_shape, print_json, settings
from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.models import create_model, load_checkpoint

_TOLERANCE = 1e-4  # of the largest logit; an honest fp32 runtime is at 1e-6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``export``."""
    add_model(parser)
    parser.add_argument("out", type=Path, metavar="OUT.onnx")
    parser.add_argument("--checkpoint", type=Path, help="weights (default: random ones)")
    add_size(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--opset", type=int, help="ONNX operator set (default: torch's choice)")
    parser.add_argument("--check", action="store_true", help="compare with ONNX Runtime")
    add_json(parser)


@torch.inference_mode()
def run(args: argparse.Namespace) -> int:
    """Export; with ``--check`` 1 if ONNX Runtime's numbers differ."""
    runtime = importlib.import_module("onnxruntime") if args.check else None
    torch.manual_seed(0)
    x = torch.randn(input_shape(args.size, args.batch))
    model = create_model(args.model, in_chans=x.shape[1], **settings(args)).eval()
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    plain = model(x)
    report: dict[str, Any] = {"model": args.model, "out": str(args.out), "input": list(x.shape)}
    _export(accelerate_quietly(model), x, args.out, args.opset)
    proto = onnx.load(args.out)
    report["megabytes"] = args.out.stat().st_size / 1e6
    report["nodes"] = len(proto.graph.node)
    report["operator_domains"] = sorted({node.domain or "ai.onnx" for node in proto.graph.node})
    if runtime is not None:
        report |= _check(runtime, args.out, x, plain)
    if args.json:
        print_json(report)
    else:
        print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return 0 if report.get("match", True) else 1


def _export(model: nn.Module, x: Tensor, out: Path, opset: int | None) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, (x,), dynamo=True, opset_version=opset, verbose=False, input_names=["images"]
        )
    assert program is not None
    program.save(str(out), external_data=False)


def _check(runtime: ModuleType, path: Path, x: Tensor, expected: Tensor) -> dict[str, Any]:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    difference = float(np.abs(got - expected.numpy()).max() / np.abs(expected.numpy()).max())
    return {
        "onnxruntime": runtime.__version__,
        "onnxscript": onnxscript.__version__,
        "largest_relative_difference": difference,
        "allowed": _TOLERANCE,
        "match": difference <= _TOLERANCE,
    }
