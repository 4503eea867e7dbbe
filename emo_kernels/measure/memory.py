"""Peak memory of a call, in this process or, for a forward pass alone, in one of its own.

``python -m emo_kernels.measure.memory REQUEST`` loads a model, runs it and prints megabytes as
JSON. On Linux the kernel's high-water mark of resident memory is reset after loading, so the number
is what the call itself adds: feature maps, packed weights, scratch.
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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels.backends import release_memory
from emo_kernels.measure.pairs import forward_of
from emo_kernels.models import create_model

_LARGE_BLOCK = 64 * 1024  # bytes
_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD = -3, 32 * 2**20  # of malloc.h; the largest glibc takes
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(
    model: nn.Module,
    name: str,
    settings: dict[str, Any],
    inputs: Sequence[Tensor],
    *,
    variant: str,
    backend: str | None,
) -> tuple[list[float], str]:
    """Peak megabytes that a call adds, one for each input, and how they were measured.

    Args:
        model: the plain model, for its weights.
        name, settings: what :func:`create_model` made it from.
        inputs: (N, C, H, W) each; run from the smallest to the largest.
        variant: one of :data:`emo_kernels.measure.pairs.VARIANTS`.
        backend: of the accelerated variant.
    """
    order = sorted(range(len(inputs)), key=lambda i: inputs[i].numel())
    request = {
        "name": name,
        "settings": settings,
        "state": model.state_dict(),
        "inputs": [inputs[i] for i in order],
        "variant": variant,
        "backend": backend,
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


def added_megabytes(
    call: Callable[[], object], module: nn.Module, device: torch.device
) -> float | None:
    """Peak megabytes that a warm call adds to what this process holds, gradients included.

    ``None`` where the system does not tell. Maps that the kernels keep for the next call count.

    On Linux the call is made in a new thread, where malloc begins with nothing left over, and
    blocks of 64 KB and more are mapped: they count while they are used and no longer.
    """
    if device.type == "cuda":
        module.zero_grad(set_to_none=True)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    with _large_blocks_mapped(), ThreadPoolExecutor(1) as thread:
        return thread.submit(_added_resident, call, module).result()


def _added_resident(call: Callable[[], object], module: nn.Module) -> float | None:
    call()
    module.zero_grad(set_to_none=True)
    _return_free_memory()
    if not _reset_peak():
        return None
    before, _ = _resident()
    call()
    return max(_resident()[1] - before, 0.0)  # the system's counters lag some pages behind


def kept_megabytes(build: Callable[[], Callable[[], object]]) -> float | None:
    """Megabytes from before an engine is built to the peak of its second call.

    For one that keeps what it takes: its weights, packed or not, its code, its feature maps.
    """
    with _large_blocks_mapped(), ThreadPoolExecutor(1) as thread:
        return thread.submit(_kept_resident, build).result()


def _kept_resident(build: Callable[[], Callable[[], object]]) -> float | None:
    _return_free_memory()
    before, _ = _resident()
    call = build()
    call()
    _return_free_memory()
    if not _reset_peak():  # what building alone needed does not count
        return None
    call()
    return max(_resident()[1] - before, 0.0)


@contextlib.contextmanager
def _large_blocks_mapped() -> Iterator[None]:
    """glibc's malloc maps large blocks, and unmaps them when they are freed."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)


def saved_megabytes(call: Callable[[], object], module: nn.Module) -> float:
    """Megabytes that autograd keeps of a step's forward pass for backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.setdefault(storage._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2**20


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
    """Free memory that malloc or the kernels keep would hide what a call takes."""
    release_memory()
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
    with torch.inference_mode():
        # Libraries load and set themselves up, those of the variant too: a copy leaves nothing.
        variant, backend = request["variant"], request["backend"]
        forward_of(variant, copy.deepcopy(model), backend)(inputs[0][..., :32, :32])
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
        call = forward_of(variant, model, backend)
        peaks = []
        for x in inputs:
            for _ in range(2):
                call(x)
            peaks.append(peak() - before)
    return {"peaks": peaks, "method": method}


def _model_and_inputs(request: dict[str, Any]) -> tuple[nn.Module, list[Tensor]]:
    inputs: list[Tensor] = request["inputs"]
    model = create_model(request["name"], **request["settings"]).eval()
    model.load_state_dict(request["state"])
    return model.to(inputs[0].device, inputs[0].dtype), inputs


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
