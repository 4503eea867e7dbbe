"""The CUDA kernels: right on this GPU, and how fast beside cuDNN, native PyTorch and Triton.

Where every check passes, ``cuda_proven.json`` in the campaign's directory is the proof by which the
package chooses these kernels: copy it to ``emo_kernels/cuda/proven.json``, or name it in the
environment variable ``EMO_KERNELS_CUDA_PROOF``.

A family of kernels is a module with ``FUNCTIONS`` and, for each of its ``layers(models, size)``,
operands ``tensors_of(layer, n, dtype, device)``, a backend's call ``call_of(namespace, function,
tensors, layer)``, what else computes the same, ``rivals(function, tensors, layer)``, and the
``maps(function, tensors, layer)`` that a call must move. It may have a ``refusal(layer, dtype,
device)``: why the kernels leave a layer to others on this machine, and a ``functions(layer,
device)``: those of FUNCTIONS that the layer has there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign_cuda_blocks
import campaign_cuda_depthwise
import campaign_cuda_expand
import torch
from campaign_kernels import share_of_tolerance
from campaign_variants import Place
from torch import Tensor

from emo_kernels import _C, cuda, reference
from emo_kernels.cuda import proof
from emo_kernels.triton.tune import milliseconds

Save = Callable[[dict[str, Any]], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FAMILIES: tuple[Any, ...] = (
    campaign_cuda_depthwise,
    campaign_cuda_expand,
    campaign_cuda_blocks,
)


def check(
    family: Any, layer: Any, function: str, n: int, dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The tolerance rule on each result; the same bits again."""
    t = family.tensors_of(layer, n, dtype, device)
    run = family.call_of(cuda, function, t, layer)
    got, again = run(), run()
    eager = family.call_of(reference, function, t, layer)()
    wide = type(t)(*(None if v is None else v.double() for v in t))
    exact = family.call_of(reference, function, wide, layer)()
    shares: list[float] = []
    for actual, plain, oracle in zip(got, eager, exact, strict=True):
        if actual.dtype == torch.float64:  # sums of the map that is there, which rounds elsewhere
            sums = reference.batch_norm_sums(got[0], None)
            share = ((actual - sums).abs() / sums[1].clamp_min(1e-30)).max() / 1e-5
        else:
            share = share_of_tolerance(actual, plain.to(actual.dtype), oracle, dtype)
        shares.append(float(share))
    repeats = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return {
        "ok": repeats and all(share <= 1.0 for share in shares),
        "of_tolerance": max(shares),
        "repeats": repeats,
    }


def time_all(family: Any, layer: Any, function: str, n: int, place: Place) -> dict[str, Any]:
    """Milliseconds of each in bf16, and the bytes that ours must move."""
    t = family.tensors_of(layer, n, torch.bfloat16, place.device)
    row: dict[str, Any] = {"layer": layer.name, "function": function, "ms": {}}
    how = {"budget": 1.0, "flush_bytes": 1} if place.dry else {"budget": 15.0}
    for name, context, run in family.rivals(function, t, layer):
        try:
            with context:
                row["ms"][name] = milliseconds(run, device=place.device, **how)
        except Exception as error:
            row.setdefault("absent", {})[name] = f"{type(error).__name__}: {str(error)[:200]}"
    maps: tuple[Tensor, ...] = family.maps(function, t, layer)
    row["bytes"] = sum(m.numel() * m.element_size() for m in maps)
    return row


def prove(place: Place, out: Path, commit: str, save: Save) -> dict[str, Any]:
    """Check all layers in all dtypes, write the proof, then time them in bf16."""
    torch.backends.cudnn.allow_tf32 = False  # the yardstick is in fp32
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {"rows": rows, "failed": 0, "timings": []}
    calls = [
        (family, layer, function)
        for family in FAMILIES
        for layer in _layers(family, place)
        for function in _functions(family, layer, place)
    ]
    for family, layer, function in calls:
        for dtype, kind in DTYPES.items():
            shape = f"{layer.name}: {layer.shape}"
            row: dict[str, Any] = {"function": function, "dtype": dtype, "shape": shape}
            try:
                if (reason := _refusal(family, layer, kind, place)) is not None:
                    rows.append(row | {"ok": True, "refused": reason})
                    continue
                row |= check(family, layer, function, 2 if place.dry else 8, kind, place.device)
            except Exception as error:
                row |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            rows.append(row)
        data["failed"] = sum(not row["ok"] for row in rows)
        save(data)
    data["proof"] = write_proof(place, out, commit, len(rows), data["failed"])
    for call in calls:
        data["timings"].append(time_all(*call, 2 if place.dry else 256, place))
        save(data)
    return data


def _functions(family: Any, layer: Any, place: Place) -> tuple[str, ...]:
    asked = getattr(family, "functions", None)
    return family.FUNCTIONS if asked is None else asked(layer, place.device)


def _refusal(family: Any, layer: Any, dtype: torch.dtype, place: Place) -> str | None:
    asked = getattr(family, "refusal", None)
    return None if asked is None else asked(layer, dtype, place.device)


def _layers(family: Any, place: Place) -> list[Any]:
    if not place.dry:
        return family.layers(("emo_5m", "emo_1m", "emo_2m"), 224)
    found = family.layers(("emo_1m",), 32)
    return [found[0], *found[-2:]]


def write_proof(place: Place, out: Path, commit: str, checks: int, failed: int) -> str:
    """The proof's file, if there is one to be had; what it says."""
    if failed:
        return f"{failed} of {checks} checks failed: nothing is proven"
    if place.dry:
        return "a dry run proves nothing"
    name = proof.name_of(torch.cuda.get_device_capability())
    gpu = torch.cuda.get_device_name()
    row = {"sources": _C.cuda_sources(), "gpu": gpu, "commit": commit, "checks": checks}
    path = out / "cuda_proven.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**earlier, name: row}, indent=1) + "\n")
    return f"{name} is proven: copy {path.name} to emo_kernels/cuda/proven.json"


# -------------------------------------------------------------------------------------- sanitizer

TOOLS = ("memcheck", "racecheck")
# Of the kernels' own tests, those whose maps are small: every kernel, in pairs and single elements.
SANITIZED = "not walk and (repeats or whole_numbers or integers or pieces or padding)"


def sanitize(place: Place, root: Path, limit: float) -> dict[str, Any]:
    """The kernels' tests on small shapes under NVIDIA's compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None or place.dry:
        return {"absent": "a dry run" if place.dry else "compute-sanitizer is not on PATH"}
    tests = sorted(str(path) for path in (root / "tests").glob("test_cuda_*.py"))
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    found: dict[str, Any] = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "7", *pytest, "-k", SANITIZED]
        try:
            child = subprocess.run(
                command, cwd=root, check=False, capture_output=True, text=True, timeout=limit / 2
            )
            found[tool] = {"ok": child.returncode == 0, "says": child.stdout[-2000:]}
        except subprocess.TimeoutExpired:
            found[tool] = {"ok": False, "says": f"not done in {limit / 2:.0f} s"}
    return {"tools": found, "failed": sum(not row["ok"] for row in found.values())}
