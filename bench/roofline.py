"""Bytes, FLOPs and time floors of every kernel of a training step or a forward, from shapes alone.

    python bench/roofline.py                            # EMO-5M, batch 256, 224, bf16, on an H200
    python bench/roofline.py emo_1m --kernels --gpu A100
    python bench/roofline.py emo_6m --batch 32 --size 320 384 --dtype fp32 --json

A map is read or written whole, once by each kernel that takes or gives it: halos and second reads
of a tile are left to the caches. Parameters are read, and their gradients written, once in fp32.
Weight gradients also cost fp32 partial sums, written once and read once, as many as programs that
each own 128 rows of the weight fit on the GPU's 132 multiprocessors (and have 128 pixels to sum).

Two plans, both with the expanded map e in memory (level c1 of DESIGN.md, section 2):

* ``ours``: the launches of ``emo_kernels.triton`` on sm_90, from the second step on, when
  ``shrink`` sums its output for the next batch norm. Where the weight is too large for one kernel,
  ``expand_backward`` writes da once and reads it twice; ``depthwise_conv2d_backward`` is one kernel
  for the map and one for the weight; ``window_attention_backward`` writes dq, dk and dn; layer norm
  in front of an expansion reads its map for the statistics; the stem's convolution is PyTorch's.
* ``design``: as DESIGN.md counts c1, each of these fused into its neighbour.

Against DESIGN.md, batch 256, bf16 (tests/test_roofline.py holds them): ``design`` without
parameters gives its c1 in every block and in total: 17.6 / 22.9 / 32.7 / 33.2 GB for 1M / 2M /
5M / 6M; ``eager`` its (a): 61.4 / 84.4 / 115.3 / 120.8 GB in training, 20.1 / 28.1 / 38.2 / 40.4
in inference; ``saved`` its 5.2 GB; ``useful_flops`` its 1370 GFLOP. ``ours`` is 44.3 GB for
EMO-5M, 11.6 GB more than c1: 5.3 from expand_backward's three kernels behind stage 1, 3.1 from the
depthwise backward's two, 1.6 from the attention backward's three, 1.5 from the stem's convolution
in PyTorch, 0.2 from squeeze-excite, less than 0.1 from layer norms.

DESIGN's first step T0, 38.9 GB, is c1 and four more passes over maps of y's size (1.57 GB in all):
one for statistics and three for a dy that is written because cuDNN reads it. It does not count the
split of expand_backward, with which (3 m, 7.5 GB) it would be 46.4.

Floors: the largest of bytes over bandwidth, products over the matrix units' rate and stencil FLOPs
over the fp32 rate. Activations, index arithmetic and conversions are not in them; DESIGN.md
section 1 counts those too and finds them binding on an H200 (6.8 ms for c2 against 4.4 of bytes).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from gpus import GPUS, Gpu
from roofline_blocks import blocks, useful_flops
from roofline_eager import eager, eager_stem
from roofline_kernels import Kernel, Sizes, backward, forward

from emo_kernels.explain import format_table
from emo_kernels.models.configs import CONFIGS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# -------------------------------------------------------------------------------------- the totals


def training(
    model: str,
    batch: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int] = (224, 224),
    plan: str = "ours",
) -> list[Kernel]:
    """Kernels of a training step, forward and backward, of the plan ``ours`` or ``design``.

    The loss, the head and the optimizer are not in it. The stem's convolution is, as the kernel
    ``torch``.
    """
    if plan not in ("ours", "design"):
        raise ValueError(f"roofline: plan must be ours or design, got {plan!r}")
    fused = plan == "design"
    found = _stem_convolution(model, batch, dtype, size, training=True, fused=fused)
    chosen = blocks(model, *size)
    sums_of: list[bool] = [block.norm == "batch" and not fused for block in chosen]
    for block, has_sums, gives_sums in zip(chosen, sums_of, [*sums_of[1:], False]):
        sums = {"has_sums": has_sums or fused, "gives_sums": gives_sums}
        found += forward(block, batch, dtype, training=True, **sums)
    for block in reversed(chosen):
        found += backward(block, batch, dtype, fused=fused)
    return found


def inference(
    model: str,
    batch: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int] = (224, 224),
) -> list[Kernel]:
    """Kernels of a forward in evaluation mode, operator by operator."""
    found = _stem_convolution(model, batch, dtype, size, training=False, fused=False)
    for block in blocks(model, *size):
        found += forward(block, batch, dtype, training=False)
    return found


def _stem_convolution(
    model: str,
    batch: int,
    dtype: torch.dtype,
    size: tuple[int, int],
    *,
    training: bool,
    fused: bool,
) -> list[Kernel]:
    """The stem's 3x3 convolution and its batch norm: eager's passes, or fused both ways."""
    dim = CONFIGS[model].stem_dim
    h, w = (-(-side // 2) for side in size)
    product = 2 * batch * h * w * 27 * dim
    if fused:
        image, y = (dtype.itemsize * batch * n for n in (3 * size[0] * size[1], dim * h * w))
        found = [Kernel("stem.conv", "torch", False, image, y, products=product)]
        gradient = Kernel("stem.conv", "torch", True, 2 * y + image, 0, products=product)
        return [*found, gradient] if training else found
    passes = eager_stem(batch, dim, size, training=training, element=dtype.itemsize)
    found = []
    for is_backward in (False, True)[: 1 + training]:
        total = sum(op.bytes for op in passes if op.backward == is_backward)
        found.append(Kernel("stem.conv", "torch", is_backward, total, 0, products=product))
    return found


def saved(
    model: str,
    batch: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int] = (224, 224),
) -> int:
    """Bytes of maps kept for backward: each block's x, e and y, and s behind attention."""
    h, w = (-(-side // 2) for side in size)
    image, y = 3 * size[0] * size[1], CONFIGS[model].stem_dim * h * w
    total = dtype.itemsize * batch * (image + y)
    for block in blocks(model, *size):
        z = Sizes.of(block, batch, dtype.itemsize)
        total += z.c + z.y + (z.m if block.expands else 0) + (z.c if block.head_dim else 0)
    return total


def total_bytes(kernels: Iterable[Kernel], *, parameters: bool = True) -> int:
    """All bytes, with or without those of weights and their gradients."""
    return sum(k.bytes - (0 if parameters else k.parameters) for k in kernels)


def by_function(kernels: Iterable[Kernel]) -> dict[str, list[Kernel]]:
    """The kernels that each function launches."""
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(kernel.function, []).append(kernel)
    return groups


def groups_by_function(kernels: Iterable[Kernel]) -> dict[str, list[list[Kernel]]]:
    """For each function its calls in the order of the step, and the kernels of each call."""
    calls: dict[str, list[list[Kernel]]] = {}
    for (function, _), group in groupby(kernels, key=lambda k: (k.function, k.block)):
        calls.setdefault(function, []).append(list(group))
    return calls


# ------------------------------------------------------------------------------------- the program


def summary(
    model: str, batch: int, dtype: torch.dtype, size: tuple[int, int], gpu: Gpu
) -> dict[str, Any]:
    """Totals of a model as data: GB, GFLOP, and milliseconds no version beats."""
    plans = {
        "ours": training(model, batch, dtype=dtype, size=size),
        "design": training(model, batch, dtype=dtype, size=size, plan="design"),
        "inference": inference(model, batch, dtype=dtype, size=size),
    }
    totals: dict[str, Any] = {
        name: {
            "gigabytes": total_bytes(kernels) / 1e9,
            "kernels": len(kernels),
            "bytes_ms": total_bytes(kernels) / gpu.bandwidth * 1e3,
            "floor_ms": sum(k.seconds(gpu, dtype) for k in kernels) * 1e3,
        }
        for name, kernels in plans.items()
    }
    totals["saved_gigabytes"] = saved(model, batch, dtype=dtype, size=size) / 1e9
    totals["training_gflop"] = 3 * useful_flops(model, batch, size) / 1e9
    if dtype != torch.float32:
        for name, is_training in (("eager", True), ("eager inference", False)):
            passes = eager(model, batch, training=is_training, size=size)
            moved = sum(op.bytes for op in passes)
            totals[name] = {"gigabytes": moved / 1e9, "bytes_ms": moved / gpu.bandwidth * 1e3}
    return totals


def table(kernels: Iterable[Kernel], gpu: Gpu, dtype: torch.dtype, *, by_kernel: bool) -> str:
    """The kernels, or the blocks, as a table."""
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in kernels:
        way = "bwd" if kernel.backward else "fwd"
        key = (kernel.block, way, kernel.name) if by_kernel else (kernel.block, way)
        groups.setdefault(key, []).append(kernel)
    rows = [
        (
            *key,
            f"{sum(k.read for k in group) / 1e6:.1f}",
            f"{sum(k.written for k in group) / 1e6:.1f}",
            f"{sum(k.parameters + k.partials for k in group) / 1e6:.1f}",
            f"{sum(k.products + k.stencil for k in group) / 1e9:.2f}",
            f"{sum(k.seconds(gpu, dtype) for k in group) * 1e6:.1f}",
        )
        for key, group in groups.items()
    ]
    names = ("block", "pass", "kernel") if by_kernel else ("block", "pass")
    return format_table((*names, "read MB", "written MB", "weights MB", "GFLOP", "floor us"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="emo_5m")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, nargs="+", default=[224], metavar="N", help="H [W]")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--gpu", choices=GPUS, default="H200")
    parser.add_argument("--plan", choices=("ours", "design"), default="ours")
    parser.add_argument("--kernels", action="store_true", help="one row for each kernel")
    parser.add_argument("--json", action="store_true", help="print the totals as JSON only")
    args = parser.parse_args()
    gpu, dtype, size = GPUS[args.gpu], DTYPES[args.dtype], (args.size[0], args.size[-1])
    totals = summary(args.model, args.batch, dtype, size, gpu)
    if args.json:
        print(json.dumps(totals, indent=2))
        return
    kernels = training(args.model, args.batch, dtype=dtype, size=size, plan=args.plan)
    print(f"{args.model}, batch {args.batch}, {size[0]}x{size[1]}, {args.dtype}, {args.gpu}")
    print(table(kernels, gpu, dtype, by_kernel=args.kernels))
    for name, value in totals.items():
        numbers = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{name}: " + ", ".join(f"{number:.2f} {key}".rstrip() for key, number in numbers))


if __name__ == "__main__":
    main()
