"""What is installed here, which backends work and why the others do not."""

from __future__ import annotations

import argparse
import importlib
import platform
from typing import Any

from emo_kernels.backends import available_backends
from emo_kernels.cli.options import add_json, print_json
from emo_kernels.explain import format_table
from emo_kernels.measure.machine import machine, version

_PACKAGES = ("torch", "numpy", "triton")
_OPTIONAL = ("scikit-learn", "matplotlib", "pillow", "tqdm", "safetensors", "onnx", "onnxruntime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``info``."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = collect()
    if args.json:
        print_json(report)
        return 0
    for title, section in report.items():
        absent = {"backends": "works", "versions": "not installed"}.get(title, "none")
        rows = [(name, _text(value, absent)) for name, value in section.items()]
        print(format_table((title, ""), rows), end="\n\n")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Versions, machine, backends (``None``: works, else why not) and build of ``_C``."""
    return {
        "versions": {
            "emo_kernels": version("emo_kernels"),
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES + _OPTIONAL},
        },
        "machine": machine(),
        "backends": dict(available_backends()),
        "compiled module": _build(),
    }


def _build() -> dict[str, Any]:
    try:
        compiled = importlib.import_module("emo_kernels._C")
    except ImportError as error:
        return {"missing": str(error)}
    return dict(compiled.build_info())


def _text(value: Any, absent: str) -> str:
    if value is None:
        return absent
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return str(value)
