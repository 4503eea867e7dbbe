"""What is installed here, which backends work and why the others do not."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from emo_kernels.backends import available_backends
from emo_kernels.cli.options import add_json, print_json
from emo_kernels.explain import format_table

_PACKAGES = ("torch", "numpy", "triton")
_OPTIONAL = ("scikit-learn", "matplotlib", "pillow", "tqdm", "safetensors", "onnx", "onnxruntime")
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16")


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
            "emo_kernels": _version("emo_kernels"),
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES + _OPTIONAL},
        },
        "machine": machine(),
        "backends": dict(available_backends()),
        "compiled module": _build(),
    }


def machine() -> dict[str, Any]:
    """CPU, instruction sets, threads and GPUs of this machine."""
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction sets": [flag for flag in _FLAGS if flag in flags],
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def one_line() -> str:
    """The machine in one line, to stand above numbers measured on it."""
    here = machine()
    threads = f"{here['threads']} thread{'s' if here['threads'] != 1 else ''}"
    where = [here["cpu"], f"torch {torch.__version__}", threads, here["torch uses"], *here["gpus"]]
    return f"emo_kernels {_version('emo_kernels')} on " + " · ".join(where)


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
