"""Compile a model's kernels side by side, so that the parts that time them find them in the cache.

A training step launches some 150 kernels that Triton compiles for a second or two each; one process
after the other would use up the campaign. Here each kind of block is run once in a process of its
own. What is compiled is marked in Triton's cache, for the same sources once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from campaign_variants import AUTOCAST, Job, Place, Variant, make_model
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels.accelerate import find_blocks

MOST_PROCESSES = 14


def warm(job: Job, precision: str, place: Place, out: Path, stamp: str, limit: float) -> float:
    """Compile what ``job`` launches in this precision; returns the seconds it took."""
    started = time.perf_counter()
    words = f"{job.model} {job.mode} {job.batch} {job.size} {precision}"
    digest = hashlib.sha256(f"{stamp} {words} {place}".encode()).hexdigest()
    mark = _cache() / f"campaign-{digest[:16]}"
    if mark.is_file():
        return 0.0
    count = 1 if place.dry else min(MOST_PROCESSES, len(block_kinds(job, precision, place)))
    command = [sys.executable, str(Path(__file__).with_name("gpu_campaign.py")), "--out", str(out)]
    command += ["--dry-run"] if place.dry else []
    children = [
        subprocess.Popen([*command, "--warm", words, "--share", str(i), str(count)])
        for i in range(count)
    ]
    try:
        for child in children:
            child.wait(max(limit - (time.perf_counter() - started), 0.1))
        if not any(child.returncode for child in children):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
    except subprocess.TimeoutExpired:
        print(f"warm {words}: not all compiled after {limit:.0f} s")
    finally:
        for child in children:
            child.kill()
            child.wait()
    return time.perf_counter() - started


def _cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def warm_share(words: str, share: int, of: int, place: Place) -> None:
    """Run every ``of``-th kind of block of a job, beginning with number ``share``."""
    model, mode, batch, size, precision = words.split(maxsplit=4)
    job = Job(model, mode, int(batch), int(size))
    for block, shape in block_kinds(job, precision, place)[share::of]:
        ek.accelerate(block, backend="triton" if place.dry else None)
        run_block(block, shape, job.mode, precision, place)


def block_kinds(job: Job, precision: str, place: Place) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """One block of each kind, and the shape of its input in the job."""
    job = place.shrink(job)
    model = make_model(job, Variant("plain", precision=precision), place)
    seen: dict[Any, tuple[nn.Module, tuple[int, ...]]] = {}

    def note(block: nn.Module, args: tuple[Any, ...]) -> None:
        parameters = tuple(tuple(p.shape) for p in block.parameters())
        kind = (tuple(args[0].shape), parameters, getattr(block, "has_skip", None))
        seen.setdefault(kind, (block, tuple(args[0].shape)))

    hooks = [block.register_forward_pre_hook(note) for _, block in find_blocks(model)]
    image = torch.zeros(job.batch, 3, job.size, job.size, device=place.device)
    with torch.no_grad():
        model.eval()(image.to(next(model.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return list(seen.values())


def run_block(
    block: nn.Module, shape: tuple[int, ...], mode: str, precision: str, place: Place
) -> Tensor:
    """The block alone, forward and in training backward, on a map as it gets in the model."""
    half = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(precision) or AUTOCAST[precision]
    x = torch.randn(shape, device=place.device).to(half)
    x = x.contiguous(memory_format=torch.channels_last)
    cast = torch.autocast(place.device, AUTOCAST.get(precision), enabled=precision in AUTOCAST)
    if mode == "infer":
        with torch.inference_mode(), cast:
            return block.eval()(x)
    with cast:
        y: Tensor = block.train()(x.requires_grad_())
    y.sum().backward()
    return y
