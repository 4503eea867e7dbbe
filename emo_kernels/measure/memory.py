"""Peak memory of a forward pass or a training step, measured in a process of its own.

``python -m emo_kernels.measure.memory REQUEST`` loads a model, runs it and prints megabytes as
JSON. On Linux the kernel's high-water mark of resident memory is reset after loading, so the number
is what the call itself adds: feature maps, packed weights, scratch, and gradients in training.
Elsewhere it is the peak of the whole process above what was resident before, which loading may
hide. On a GPU it is torch's allocator's peak.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from emo_kernels.cli.pairs import forward_of
from emo_kernels.models import create_model

_LARGE_BLOCK = 64 * 1024  # bytes
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(
    model: nn.Module,
    name: str,
    settings: dict[str, Any],
    inputs: Sequence[Tensor],
    *,
    variant: str,
    backend: str | None,
    training: bool = False,
) -> tuple[list[float], str]:
    """Peak megabytes that a call adds, one for each input, and how they were measured.

    Args:
        model: the plain model, for its weights.
        name, settings: what :func:`create_model` made it from.
        inputs: (N, C, H, W) each; run from the smallest to the largest.
        variant: one of :data:`emo_kernels.cli.pairs.VARIANTS`.
        backend: of the accelerated variant.
        training: a step, forward and backward, instead of a forward pass.
    """
    order = sorted(range(len(inputs)), key=lambda i: inputs[i].numel())
    request = {
        "name": name,
        "settings": settings,
        "state": model.state_dict(),
        "inputs": [inputs[i] for i in order],
        "variant": variant,
        "backend": backend,
        "training": training,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.pt"
        torch.save(request, path)
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(path)]
        # Large blocks go back to the system when freed: what is counted is in use, not left over.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(_LARGE_BLOCK)}
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
    if child.returncode != 0:
        raise OSError(f"measuring memory in a child process failed: {child.stderr.strip()[-300:]}")
    answer = json.loads(child.stdout)
    return [peak for _, peak in sorted(zip(order, answer["peaks"], strict=True))], answer["method"]


def _resident() -> tuple[float, float]:
    """Megabytes resident now, and the high-water mark."""
    if not _STATUS.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
        return peak, peak
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    kilobytes = (float(fields[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    now, peak = kilobytes
    return now / 1024, peak / 1024


def _cuda_peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**20


def _return_free_memory() -> None:
    """Free memory that malloc keeps would hide what a forward pass takes."""
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _measure(path: str) -> dict[str, Any]:
    request = torch.load(path, weights_only=True)
    torch.set_num_threads(request["threads"])
    model, inputs = _model_and_inputs(request)
    with torch.inference_mode(not request["training"]):
        # Libraries load and set themselves up, those of the variant too: a copy leaves nothing.
        _call_of(request["variant"], copy.deepcopy(model), request)(inputs[0][..., :32, :32])
        peak: Callable[[], float]
        if inputs[0].device.type == "cuda":
            method = "peak of torch's CUDA allocator above the loaded model"
            before, peak = torch.cuda.memory_allocated(inputs[0].device) / 2**20, _cuda_peak
            torch.cuda.reset_peak_memory_stats(inputs[0].device)
        else:
            method = "high-water mark of resident memory above the loaded model, in a child process"
            _return_free_memory()
            if not _reset_peak():
                method = (
                    "peak resident memory of a child process (ru_maxrss) above the loaded model"
                )
            before, peak = _resident()[0], lambda: _resident()[1]
        call = _call_of(request["variant"], model, request)
        peaks = []
        for x in inputs:
            for _ in range(2):
                call(x)
            peaks.append(peak() - before)
    return {"peaks": peaks, "method": method}


def _model_and_inputs(request: dict[str, Any]) -> tuple[nn.Module, list[Tensor]]:
    inputs: list[Tensor] = request["inputs"]
    model = create_model(request["name"], **request["settings"]).train(request["training"])
    model.load_state_dict(request["state"])
    model.to(inputs[0].device, inputs[0].dtype)
    if request["training"] and request["variant"] == "accelerated":  # the layout it is timed in
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    return model, inputs


def _call_of(variant: str, model: nn.Module, request: dict[str, Any]) -> Callable[[Tensor], object]:
    """The forward pass of a variant, or its training step."""
    forward = forward_of(variant, model, request["backend"])
    if not request["training"]:
        return forward

    def step(x: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        cross_entropy(forward(x), labels).backward()

    return step


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
