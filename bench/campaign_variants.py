"""What the campaign compares: one training step or one forward of a model, run in different ways.

A variant is built, warmed up and measured for memory one after the other; then all of them take
turns, so that a change of clocks meets them alike. One that fails is absent, with its reason.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import emo_kernels as ek

Step = Callable[[], object]
LIMIT_OF_LOSSES = 0.02  # relative: first losses that differ by more are flagged
AUTOCAST = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}


@dataclass(frozen=True)
class Job:
    """What is run: a model in a mode at a batch size."""

    model: str
    mode: str  # train, infer
    batch: int
    size: int = 224

    def __str__(self) -> str:
        return f"{self.model} {self.mode} b{self.batch}"


@dataclass(frozen=True)
class Place:
    """Where it runs. ``dry``: on the CPU with stand-ins for the GPU's interface, tiny sizes."""

    device: str
    dry: bool = False

    @property
    def tiny(self) -> dict[str, Any]:
        """Fields of the model's configuration in a dry run."""
        if not self.dry:
            return {}
        sizes = {"depths": (1, 1, 2, 1), "dims": (16, 24, 40, 42), "dim_heads": (8, 8, 20, 21)}
        return {**sizes, "stem_dim": 8, "num_classes": 10}

    def shrink(self, job: Job) -> Job:
        """The job, or in a dry run a tiny one."""
        return replace(job, batch=min(job.batch, 2), size=32) if self.dry else job


@dataclass(frozen=True)
class Variant:
    """How it is run."""

    name: str
    ours: bool = False
    channels_last: bool = True
    precision: str = "bf16 autocast"  # fp16 autocast; bf16: weights and maps; fp32
    depthwise: str | None = None  # torch.backends.cudnn.depthwise_kernel, where torch has it
    compile: str | None = None  # mode of torch.compile
    graph: bool = False  # captured as a CUDA graph
    own_graph: bool = False  # by accelerate(cuda_graphs=True)
    backend: str | None = None  # of ours


_TRAIN = [
    Variant("eager channels_last"),
    Variant("eager NCHW", channels_last=False),
    Variant("eager channels_last, cudnn depthwise", depthwise="cudnn"),
    Variant("eager channels_last, native depthwise", depthwise="native"),
    Variant("eager NCHW, native depthwise", channels_last=False, depthwise="native"),
    Variant("eager graph", graph=True),
    Variant("compile default", compile="default"),
    Variant("compile reduce-overhead", compile="reduce-overhead"),
    Variant("compile max-autotune", compile="max-autotune"),
    Variant("ours", ours=True),
    Variant("ours graph", ours=True, graph=True),
    Variant("ours compile", ours=True, compile="default"),
]
_INFER = [
    *(v for v in _TRAIN if not v.compile),
    Variant("eager bf16 channels_last", precision="bf16"),
    Variant("eager bf16 NCHW", precision="bf16", channels_last=False),
    Variant("eager bf16 graph", precision="bf16", graph=True),
    *(replace(v, precision="bf16") for v in _TRAIN if v.compile),
    Variant("ours bf16", ours=True, precision="bf16"),
    Variant("ours bf16 graph", ours=True, precision="bf16", graph=True),
    Variant("ours bf16 cuda_graphs", ours=True, precision="bf16", own_graph=True),
    Variant("ours bf16 triton graph", ours=True, precision="bf16", graph=True, backend="triton"),
]
VARIANTS = {"train": {v.name: v for v in _TRAIN}, "infer": {v.name: v for v in _INFER}}


def eager_names(mode: str) -> list[str]:
    """The variants that are plain PyTorch without a compiler."""
    return [v.name for v in VARIANTS[mode].values() if not v.ours and not v.compile]


# ------------------------------------------------------------------------------------ building one


def make_model(job: Job, variant: Variant, place: Place) -> nn.Module:
    """The model with the same random weights each time, in the variant's layout and dtype."""
    torch.manual_seed(0)
    model = ek.create_model(job.model, **place.tiny).to(place.device)
    if variant.channels_last:
        model.to(memory_format=torch.channels_last)
    if variant.precision == "bf16":
        model.to(torch.bfloat16)
    return model.train(job.mode == "train")


def build(job: Job, variant: Variant, place: Place) -> Step:
    """One step of the job, run this way; it returns the loss, or the logits."""
    model = make_model(job, variant, place)
    if variant.ours:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            backend = "triton" if place.dry else variant.backend
            ek.accelerate(model, backend=backend, cuda_graphs=variant.own_graph)
    images = _images(job, variant, place)
    step = (_train_step if job.mode == "train" else _forward)(model, images, variant, place)
    step = _with_depthwise(step, variant.depthwise)
    return _captured(step) if variant.graph else step


def _images(job: Job, variant: Variant, place: Place) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(job.batch, 3, job.size, job.size, generator=generator).to(place.device)
    if variant.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(torch.bfloat16) if variant.precision == "bf16" else images


def _compiled(model: nn.Module, variant: Variant, place: Place) -> Callable[[Tensor], Tensor]:
    if variant.compile is None:
        return model
    torch._dynamo.reset()
    if place.dry:  # inductor takes a minute on a CPU; everything in front of it runs
        return torch.compile(model, backend="aot_eager", dynamic=False)
    return torch.compile(model, mode=variant.compile, dynamic=False)


def _autocast(variant: Variant, place: Place) -> Any:
    if variant.precision not in AUTOCAST:
        return nullcontext()
    # A cache of cast weights would outlive the graph that holds them.
    dtype = AUTOCAST[variant.precision]
    return torch.autocast(place.device, dtype, cache_enabled=not variant.graph)


def _train_step(model: nn.Module, images: Tensor, variant: Variant, place: Place) -> Step:
    """Forward, loss, backward and AdamW."""
    on_gpu = place.device == "cuda"
    labels = torch.arange(len(images), device=place.device) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)
    forward = _compiled(model, variant, place)

    def step() -> Tensor:
        if variant.compile:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad(set_to_none=True)
        with _autocast(variant, place):
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _forward(model: nn.Module, images: Tensor, variant: Variant, place: Place) -> Step:
    forward = _compiled(model, variant, place)

    def step() -> Tensor:
        if variant.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.inference_mode(), _autocast(variant, place):
            return forward(images)

    return step


def _with_depthwise(step: Step, kernel: str | None) -> Step:
    """The step with that depthwise kernel, where this torch lets one choose."""
    if kernel is None:
        return step
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "depthwise_kernel"):
        raise NotImplementedError("this torch has no torch.backends.cudnn.depthwise_kernel")

    def chosen() -> object:
        usual = cudnn.depthwise_kernel
        cudnn.depthwise_kernel = kernel
        try:
            return step()
        finally:
            cudnn.depthwise_kernel = usual

    return chosen


def _captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> object:
        graph.replay()
        return result

    return replay


# ----------------------------------------------------------------------------------- measuring them


@contextmanager
def _benchmarking() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def measure(
    job: Job,
    names: list[str],
    place: Place,
    save: Callable[[dict[str, Any]], None],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Build the variants, then time them in turns; what is known is saved after each step."""
    job = place.shrink(job)
    rows: dict[str, dict[str, Any]] = {}
    data = {"job": str(job), "images": job.batch, "variants": rows}
    steps: dict[str, Step] = {}
    with _benchmarking():
        for name in names:
            started = time.perf_counter()
            try:
                steps[name], rows[name] = _prepare(job, VARIANTS[job.mode][name], place)
            except Exception as error:  # a variant that fails is reported, not fatal
                rows[name] = {"absent": f"{type(error).__name__}: {_first_line(error)}"}
            rows[name]["prepare_seconds"] = round(time.perf_counter() - started, 2)
            save(data)
        inner = 1 if place.dry or job.batch == 1 else 3
        limits: dict[str, Any] = {
            "seconds": 0.0 if place.dry else seconds,
            "least": 1 if place.dry else 12,
        }
        for name, times in take_turns(steps, inner=inner, **limits).items():
            rows[name] |= summary(times)
    _flag_losses(rows)
    save(data)
    return data


def _prepare(job: Job, variant: Variant, place: Place) -> tuple[Step, dict[str, Any]]:
    """The step, warmed up, and a row with its first result and its peak memory."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build(job, variant, place)
    row: dict[str, Any] = {}
    torch.manual_seed(0)
    if variant.ours and not (variant.graph or variant.own_graph):
        first, row["calls"] = _count_calls(step)
    else:
        first = step()
    if isinstance(first, Tensor):  # a captured training step was preceded by others
        name = "later" if variant.graph and job.mode == "train" else "first"
        row[name] = float(first.float().abs().mean())
    for _ in range(0 if place.dry else 5):
        step()
    torch.cuda.synchronize()
    if not variant.graph:  # a graph's memory was taken while it was captured
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        row["peak_megabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return step, row


def _count_calls(step: Step) -> tuple[object, int]:
    """The step's result, and how many functions of ``emo_kernels.triton`` it called."""
    if ek.available_backends()["triton"] is not None:
        return step(), 0
    kernels = importlib.import_module("emo_kernels.triton")
    record = importlib.import_module("emo_kernels.triton.record").record
    with record(kernels) as calls:
        return step(), len(calls)


def take_turns(
    steps: dict[str, Step], *, inner: int, seconds: float, least: int, most: int = 200
) -> dict[str, list[float]]:
    """Milliseconds of one call, for every round and step: ``inner`` calls between two events."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    rounds = 0
    while steps and (rounds < least or (time.perf_counter() < end and rounds < most)):
        for name, step in steps.items():
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(inner):
                step()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / inner)
        rounds += 1
    return times


def summary(times: list[float]) -> dict[str, Any]:
    """Median and spread of milliseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "ms": statistics.median(ordered),
        "p10": ordered[round(0.1 * last)],
        "p90": ordered[round(0.9 * last)],
        "rounds": len(ordered),
    }


def _flag_losses(rows: dict[str, dict[str, Any]]) -> None:
    """Mark variants that ran none of our kernels, or whose first result is not the first one's."""
    for row in rows.values():
        if row.get("calls") == 0:
            row["differs"] = "ran no kernel of emo_kernels.triton: this is PyTorch's time"
    for row in rows.values():
        if not math.isfinite(row.get("later", 0.0)):
            row["differs"] = "the loss is not finite"
    firsts = {name: row["first"] for name, row in rows.items() if "first" in row}
    usual = next(iter(firsts.values()), None)
    for name, first in firsts.items():
        if usual is not None and not abs(first - usual) <= LIMIT_OF_LOSSES * abs(usual):
            rows[name]["differs"] = f"first result {first:.4g} against {usual:.4g}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
