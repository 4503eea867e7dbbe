"""The kernels one by one: are they right on this GPU, and how near to their floor are they.

One step of an accelerated model is recorded as calls of the functions of ``emo_kernels.triton``;
each distinct call is then made again on random numbers of the same shapes, dtypes and strides.
"""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import roofline
import torch
from campaign_variants import VARIANTS, Job, Place, build
from gpus import Gpu
from torch import Tensor

import emo_kernels.triton as kernels
from emo_kernels import reference
from emo_kernels.triton.record import Call, TensorSpec, distinct, functions, record
from emo_kernels.triton.tune import milliseconds

Save = Callable[[dict[str, Any]], None]


def calls_of_a_step(job: Job, place: Place, precision: str) -> list[Call]:
    """The calls of one step of the accelerated model."""
    step = build(job, replace(VARIANTS[job.mode]["ours"], precision=precision), place)
    step()  # what happens once, such as a probe of the blocks, is not of the step
    with record(kernels) as calls:
        step()
    return [call for call in calls if call.function != "irmb" and not call.inner]


# -------------------------------------------------------------------------------------- right?


def check(job: Job, precision: str, place: Place, save: Save) -> dict[str, Any]:
    """Every distinct call of a step against the reference in fp64, by the tolerance rule."""
    job = place.shrink(job)
    torch.backends.cudnn.allow_tf32 = False  # the yardstick is in fp32
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {"job": str(job), "rows": rows, "failed": 0}
    for call in distinct(calls_of_a_step(job, place, precision)):
        row: dict[str, Any] = {"function": call.function, "dtype": precision, "shape": _shape(call)}
        try:
            row |= _compare(call)
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        rows.append(row)
        data["failed"] = sum(not row["ok"] for row in rows)
        save(data)
    if not rows:
        raise RuntimeError(f"{job}: the step called no function of emo_kernels.triton")
    return data


def _compare(call: Call) -> dict[str, Any]:
    """The tolerance rule on every tensor of the outcome; the share of it that was used."""
    if not hasattr(reference, call.function):
        return {"ok": True, "of_tolerance": 0.0, "unchecked": "the reference has no such function"}
    ours, theirs = getattr(kernels, call.function), getattr(reference, call.function)
    dtype = _map_dtype(call)
    actual, again = _outcome(ours, call), _outcome(ours, call)
    rounded = () if call.function.startswith("batch_norm") else _ROUNDED
    plain = _outcome(theirs, call, lambda name, t: t.to(dtype) if name in rounded else t)
    oracle = _outcome(theirs, call, lambda name, t: t.double())
    shares = {
        name: share_of_tolerance(got, plain[name], exact, dtype)
        for name, exact in oracle.items()
        if (got := actual.get(name)) is not None
    }
    same = all(torch.equal(t.nan_to_num(), again[n].nan_to_num()) for n, t in actual.items())
    complete = oracle.keys() <= actual.keys()
    worst = max(shares, key=lambda name: shares[name], default="")
    return {
        "ok": complete and same and all(share <= 1.0 for share in shares.values()),
        "of_tolerance": shares.get(worst, 0.0),
        "worst": worst,
        "repeats": same,
    }


# What eager PyTorch rounds to the maps' dtype under autocast.
_ROUNDED = ("weight", "bias", "out_weight", "qk_weight", "qk_bias", "v_weight", "v_bias", "gate")


def _map_dtype(call: Call) -> torch.dtype:
    """Of the first map; fp32 for a call without one."""
    maps = (a for a in call.args if isinstance(a, TensorSpec) and len(a.shape) == 4)
    return next((spec.dtype for spec in maps), torch.float32)


def share_of_tolerance(got: Tensor, plain: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """How much of what the rule allows a result uses; infinite where it has a NaN of its own."""
    u = torch.finfo(dtype).eps / 2
    l2_factor, max_factor = (2.0, 4.0) if dtype == torch.float32 else (1.25, 2.0)
    exact = oracle.double()
    finite = exact.isfinite() & plain.isfinite()
    if got.shape != exact.shape or not bool(got.isfinite()[finite].all()):
        return math.inf
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    exact = torch.where(finite, exact, zero)
    error, usual = (torch.where(finite, t.double(), zero) - exact for t in (got, plain))
    l2 = l2_factor * float(usual.norm()) + u * float(exact.norm())
    most = max_factor * float(usual.abs().max()) + 2 * u * float(exact.abs().max())
    shares = [(float(error.norm()), l2), (float(error.abs().max()), most)]
    return max(0.0 if wrong == 0.0 else wrong / (allowed or 1e-300) for wrong, allowed in shares)


def _outcome(
    function: Callable[..., Any],
    call: Call,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """Tensors returned, and arguments changed in place, after a change of the arguments."""
    args, options = call.arguments()
    names = list(inspect.signature(getattr(reference, call.function)).parameters)

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value) if value.dtype.is_floating_point else value
        if isinstance(value, torch.dtype):  # of the result
            return change("", torch.empty(0, dtype=value)).dtype
        return value

    given = [changed(name, value) for name, value in zip(names, args)]
    given += args[len(names) :]
    before = [a.clone() if isinstance(a, Tensor) else None for a in given]
    with torch.no_grad():
        returned = function(*given, **{n: changed(n, v) for n, v in options.items()})
    several = list(returned) if isinstance(returned, list | tuple) else [returned]
    found = {f"result {i}": t for i, t in enumerate(several) if isinstance(t, Tensor) and t.numel()}
    for name, now, then in zip(names, given, before):
        if then is not None and not torch.equal(now.nan_to_num(), then.nan_to_num()):
            found[name] = now
    return found


# --------------------------------------------------------------------------------------- fast?


def time_kernels(job: Job, place: Place, gpu: Gpu, save: Save) -> dict[str, Any]:
    """Time of every distinct call of a step, beside the bytes and floor of roofline.py."""
    job = place.shrink(job)
    calls = calls_of_a_step(job, place, "bf16 autocast")
    counted, notes = _counts(job, calls, place)
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {"job": str(job), "rows": rows, "notes": notes}
    if not calls:
        notes.append("ours made no call of emo_kernels.triton in this step")
    for call in distinct(calls):
        row: dict[str, Any] = {"function": call.function, "shape": _shape(call)}
        row["count"] = call.count
        row["argument_bytes"] = call.bytes
        try:
            row["ms"] = _milliseconds(call, place)
        except Exception as error:
            row["absent"] = f"{type(error).__name__}: {str(error)[:200]}"
        _add_floor(row, counted.get(id(call)), gpu)
        rows.append(row)
        save(data)
    data["total_ms"] = sum(row["ms"] * row["count"] for row in rows if "ms" in row)
    save(data)
    return data


def _counts(
    job: Job, calls: list[Call], place: Place
) -> tuple[dict[int, list[roofline.Kernel]], list[str]]:
    """The counted kernels of each call: the i-th call of a function is its i-th in roofline.py."""
    if place.dry:
        return {}, ["a dry run's model is not one that roofline.py counts"]
    size = (job.size, job.size)
    if job.mode == "train":
        counted = roofline.training(job.model, job.batch, size=size)
    else:
        counted = roofline.inference(job.model, job.batch, size=size)
    groups = roofline.groups_by_function(counted)
    found: dict[int, list[roofline.Kernel]] = {}
    notes = []
    for name in sorted({call.function for call in calls}):
        made = [call for call in calls if call.function == name]
        expected = groups.get(name, [])
        if len(made) == len(expected):
            found |= {id(call): group for call, group in zip(made, expected)}
        else:
            notes.append(f"{name}: {len(made)} calls, roofline.py counts {len(expected)}: no floor")
    return found, notes


def _add_floor(row: dict[str, Any], group: list[roofline.Kernel] | None, gpu: Gpu) -> None:
    if group is not None:
        row["bytes"] = sum(kernel.bytes for kernel in group)
        row["flop"] = sum(kernel.products + kernel.stencil for kernel in group)
        row["floor_ms"] = 1e3 * sum(kernel.seconds(gpu) for kernel in group)
        row["block"] = group[0].block
    if row.get("ms"):
        moved = row.get("bytes", row["argument_bytes"])
        row["gigabytes_per_second"] = moved / row["ms"] / 1e6
        if "floor_ms" in row:
            row["of_floor"] = row["floor_ms"] / row["ms"]


def _milliseconds(call: Call, place: Place) -> float:
    args, options = call.arguments()
    function = functions(kernels)[call.function]

    def run() -> Any:
        return function(*args, **options)

    with torch.no_grad():
        if place.dry:
            return milliseconds(run, device=place.device, budget=0.0, flush_bytes=1)
        return milliseconds(run)


def _shape(call: Call) -> str:
    """The first tensor's shape, and the second's."""
    shapes = ["x".join(map(str, a.shape)) for a in call.args if isinstance(a, TensorSpec)]
    return " ".join(shapes[:2])


def profile(job: Job, names: list[str], place: Place, save: Save) -> dict[str, Any]:
    """Device time of every kernel in a step of each variant, by PyTorch's profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    job = place.shrink(job)
    data: dict[str, Any] = {"job": str(job), "variants": {}}
    for name in names:
        step = build(job, VARIANTS[job.mode][name], place)
        for _ in range(1 if place.dry else 4):
            step()
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU] + ([] if place.dry else [ProfilerActivity.CUDA])
        with profiler(activities=activities) as profiled:
            step()
            torch.cuda.synchronize()
        rows = [
            {
                "kernel": event.key[:120],
                "count": event.count,
                "ms": getattr(event, "self_device_time_total", 0.0) / 1e3,
            }
            for event in profiled.key_averages()
            if "CUDA" in str(getattr(event, "device_type", "")) or place.dry
        ]
        rows.sort(key=lambda row: -row["ms"])
        total = sum(row["ms"] for row in rows)
        data["variants"][name] = {"total_ms": total, "rows": rows[:60]}
        save(data)
    return data


def copy_bandwidth(place: Place) -> float:
    """Bytes/s of a device-to-device copy, read and written both counted."""
    size = 1 << (16 if place.dry else 31)
    source = torch.randint(0, 100, (size,), dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), place)


def matmul_rate(place: Place) -> float:
    """FLOP/s of a large bf16 product on random numbers."""
    n = 64 if place.dry else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=place.device) for _ in range(2))
    return 2 * n**3 / _best_seconds(lambda: torch.mm(a, b), place)


def _best_seconds(run: Callable[[], object], place: Place) -> float:
    """Median over batches of five calls between two events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(1 if place.dry else 9):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 5e3)
    return statistics.median(times)
