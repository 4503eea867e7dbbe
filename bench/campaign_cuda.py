"""The CUDA depthwise kernels: right on this GPU, and how fast beside cuDNN, native and Triton.

Where every check passes, ``cuda_proven.json`` in the campaign's directory is the proof by which the
package chooses these kernels: copy it to ``emo_kernels/cuda/proven.json``, or name it in the
environment variable ``EMO_KERNELS_CUDA_PROOF``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import roofline
import torch
from campaign_kernels import share_of_tolerance
from campaign_variants import Place
from torch import Tensor

from emo_kernels import _C, cuda, reference
from emo_kernels.cuda import proof
from emo_kernels.spec import conv_padding
from emo_kernels.triton.tune import milliseconds

Save = Callable[[dict[str, Any]], None]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FUNCTIONS = ("forward", "input", "weight", "both", "behind norm")


class Layer(NamedTuple):
    """A depthwise convolution: its map and its step."""

    name: str
    c: int
    h: int
    w: int
    k: int
    options: dict[str, int]


def layers(models: tuple[str, ...], size: int) -> list[Layer]:
    """The distinct depthwise convolutions of the models, and three that are odd."""
    found: dict[Any, Layer] = {}
    for model in models:
        for block in roofline.blocks(model, size):
            k, stride = block.kernel, block.stride
            step = {"stride": stride, "padding": conv_padding(k, stride), "dilation": 1}
            layer = Layer(f"{model} {block.name}", block.m, block.h, block.w, k, step)
            found.setdefault((*layer[1:5], stride), layer)
    odd = [
        Layer("odd channels", 31, 13, 9, 3, {"stride": 1, "padding": 1, "dilation": 1}),
        Layer("dilated", 84, 21, 17, 5, {"stride": 1, "padding": 4, "dilation": 2}),
        Layer("kernel 7", 40, 14, 15, 7, {"stride": 2, "padding": 3, "dilation": 1}),
    ]
    return [*found.values(), *odd]


class Tensors(NamedTuple):
    """The operands of a layer's calls."""

    x: Tensor
    weight: Tensor
    grad: Tensor
    y: Tensor
    coefficients: Tensor


def tensors_of(layer: Layer, n: int, dtype: torch.dtype, device: str) -> Tensors:
    """Random numbers, channels_last."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, device=device).to(dtype)
        return made.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else made

    x = random(n, layer.c, layer.h, layer.w)
    weight = (random(layer.c, 1, layer.k, layer.k) / layer.k).contiguous()
    y = reference.depthwise_conv2d(x, weight, **layer.options)
    y = y.contiguous(memory_format=torch.channels_last)
    return Tensors(x, weight, random(*y.shape), y, random(4, layer.c).float())


def call_of(namespace: Any, function: str, t: Tensors, layer: Layer) -> Callable[[], Any]:
    """One of FUNCTIONS in a backend's namespace."""
    if function == "forward":
        return lambda: namespace.depthwise_conv2d_statistics(t.x, t.weight, None, **layer.options)
    extras = (t.y, t.coefficients, t.x) if function == "behind norm" else ()
    needed = [function != "weight", function != "input"]
    return lambda: namespace.depthwise_conv2d_backward(
        t.grad, t.x, t.weight, *extras, needed=needed, **layer.options
    )


# -------------------------------------------------------------------------------------- right?


def check(layer: Layer, function: str, n: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The tolerance rule on each result; the same bits again."""
    t = tensors_of(layer, n, dtype, device)
    run = call_of(cuda, function, t, layer)
    got, again = run(), run()
    eager = call_of(reference, function, t, layer)()
    exact = call_of(reference, function, Tensors(*(v.double() for v in t)), layer)()
    shares = [
        share_of_tolerance(a, e.to(a.dtype), o, dtype)
        for a, e, o in zip(got, eager, exact, strict=True)
        if a.dtype != torch.float64  # sums of the stored map, which rounds elsewhere
    ]
    if function == "forward":
        sums = reference.batch_norm_sums(got[0], None)
        shares.append(float(((got[1] - sums).abs() / sums[1].clamp_min(1e-30)).max()) / 1e-5)
    repeats = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return {
        "ok": repeats and all(share <= 1.0 for share in shares),
        "of_tolerance": max(shares),
        "repeats": repeats,
    }


# --------------------------------------------------------------------------------------- fast?


def rivals(function: str, t: Tensors, layer: Layer) -> Iterator[tuple[str, Any, Callable[[], Any]]]:
    """(name, context, call) of whatever computes the same; convolutions alone, no norm."""
    yield "cuda", nullcontext(), call_of(cuda, function, t, layer)
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("emo_kernels.triton")
        yield "triton", nullcontext(), call_of(triton, function, t, layer)
    if function == "behind norm":
        return
    cudnn = torch.backends.cudnn
    for name, enabled, memory in (
        ("cudnn NHWC", True, torch.channels_last),
        ("native NHWC", False, torch.channels_last),
        ("native NCHW", False, torch.contiguous_format),
    ):
        x, grad = (v.contiguous(memory_format=memory) for v in (t.x, t.grad))
        context: AbstractContextManager[Any] = cudnn.flags(enabled=enabled, benchmark=True)
        yield name, context, _eager(function, x, grad, t.weight, layer)


def _eager(
    function: str, x: Tensor, grad: Tensor, weight: Tensor, layer: Layer
) -> Callable[[], Any]:
    stride, padding, dilation = ([v, v] for v in layer.options.values())
    if function == "forward":
        return lambda: torch.nn.functional.conv2d(
            x, weight, None, stride, padding, dilation, layer.c
        )
    wanted = [function != "weight", function != "input", False]
    return lambda: torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], layer.c, wanted
    )


def time_all(layer: Layer, function: str, n: int, place: Place) -> dict[str, Any]:
    """Milliseconds of each in bf16, and the share of the copy rate that ours reaches."""
    t = tensors_of(layer, n, torch.bfloat16, place.device)
    row: dict[str, Any] = {"layer": layer.name, "function": function, "ms": {}}
    how = {"budget": 1.0, "flush_bytes": 1} if place.dry else {"budget": 15.0}
    for name, context, run in rivals(function, t, layer):
        try:
            with context:
                row["ms"][name] = milliseconds(run, device=place.device, **how)
        except Exception as error:
            row.setdefault("absent", {})[name] = f"{type(error).__name__}: {str(error)[:200]}"
    maps = {
        "forward": (t.x, t.y),
        "input": (t.grad, t.x),
        "weight": (t.grad, t.x),
        "both": (t.grad, t.x, t.x),
        "behind norm": (t.grad, t.y, t.x, t.x, t.x),
    }[function]
    row["bytes"] = sum(m.numel() * m.element_size() for m in maps)
    return row


# ------------------------------------------------------------------------------------ the part


def prove(place: Place, out: Path, commit: str, save: Save) -> dict[str, Any]:
    """Check all layers in all dtypes, write the proof, then time them in bf16."""
    torch.backends.cudnn.allow_tf32 = False  # the yardstick is in fp32
    models, size = (("emo_1m",), 32) if place.dry else (("emo_5m", "emo_1m", "emo_2m"), 224)
    chosen = layers(models, size)
    chosen = chosen[:2] + chosen[-3:] if place.dry else chosen
    rows: list[dict[str, Any]] = []
    data: dict[str, Any] = {"rows": rows, "failed": 0, "timings": []}
    for layer in chosen:
        for dtype, kind in DTYPES.items():
            for function in FUNCTIONS:
                shape = f"{layer.name}: {layer.c}x{layer.h}x{layer.w} k{layer.k}"
                row: dict[str, Any] = {"function": function, "dtype": dtype, "shape": shape}
                try:
                    row |= check(layer, function, 2 if place.dry else 8, kind, place.device)
                except Exception as error:
                    row |= {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
                rows.append(row)
        data["failed"] = sum(not row["ok"] for row in rows)
        save(data)
    data["proof"] = write_proof(place, out, commit, len(rows), data["failed"])
    for layer in chosen[: 2 if place.dry else None]:
        data["timings"] += [time_all(layer, f, 2 if place.dry else 256, place) for f in FUNCTIONS]
        save(data)
    return data


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
