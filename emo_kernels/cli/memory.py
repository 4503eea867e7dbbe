"""Peak memory of a forward pass, measured in a process of its own.

``python -m emo_kernels.cli.memory REQUEST`` loads a model, runs it and prints megabytes as JSON. On
Linux the kernel's high-water mark of resident memory is reset after loading, so the number is what
the forward pass itself adds: feature maps, packed weights, scratch. Elsewhere it is the peak of the
whole process above what was resident before, which loading may hide. On a GPU it is torch's
allocator's peak.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels.cli.backend_use import accelerate_quietly
from emo_kernels.models import create_model

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(
    model: nn.Module,
    name: str,
    settings: dict[str, Any],
    inputs: Sequence[Tensor],
    *,
    accelerated: bool,
    backend: str | None,
) -> tuple[list[float], str]:
    """Peak megabytes that a forward pass adds, one for each input, and how they were measured.

    Args:
        model: the plain model, for its weights.
        name, settings: what :func:`create_model` made it from.
        inputs: (N, C, H, W) each; run from the smallest to the largest.
        accelerated, backend: as :func:`accelerate` takes it.
    """
    order = sorted(range(len(inputs)), key=lambda i: inputs[i].numel())
    request = {
        "name": name,
        "settings": settings,
        "state": model.state_dict(),
        "inputs": [inputs[i] for i in order],
        "accelerated": accelerated,
        "backend": backend,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.pt"
        torch.save(request, path)
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(path)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
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


def _reset_peak() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


@torch.inference_mode()
def _measure(path: str) -> dict[str, Any]:
    request = torch.load(path, weights_only=True)
    torch.set_num_threads(request["threads"])
    model = create_model(request["name"], **request["settings"]).eval()
    model.load_state_dict(request["state"])
    device = request["inputs"][0].device
    model.to(device)
    if request["accelerated"]:
        accelerate_quietly(model, request["backend"])
    peaks = []
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) / 2**20
        for x in request["inputs"]:
            torch.cuda.reset_peak_memory_stats(device)
            model(x)
            peaks.append(torch.cuda.max_memory_allocated(device) / 2**20 - before)
        return {"peaks": peaks, "method": "peak of torch's CUDA allocator above the loaded model"}
    method = "high-water mark of resident memory above the loaded model, in a child process"
    if not _reset_peak():
        method = "peak resident memory of a child process (ru_maxrss) above the loaded model"
    before = _resident()[0]
    for x in request["inputs"]:
        for _ in range(2):
            model(x)
        peaks.append(_resident()[1] - before)
    return {"peaks": peaks, "method": method}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
