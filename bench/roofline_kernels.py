"""What each kernel of a block reads, writes and computes: the counts behind roofline.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from gpus import Gpu
from roofline_blocks import Block

MULTIPROCESSORS, ROWS_OF_A_PROGRAM = 132, 128
FP32 = 4


@dataclass(frozen=True)
class Kernel:
    """What one launch moves and computes."""

    block: str
    name: str  # "<function>" or "<function>/<kernel of it>"
    backward: bool
    read: int  # bytes of maps
    written: int  # bytes of maps
    products: int = 0  # FLOPs on the matrix units
    stencil: int = 0  # FLOPs elsewhere
    parameters: int = 0  # bytes of weights read and gradients written
    partials: int = 0  # bytes of partial sums of weight gradients, written and read

    @property
    def function(self) -> str:
        """The function of ``emo_kernels.triton`` that launches it."""
        return self.name.split("/")[0]

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.read + self.written + self.parameters + self.partials

    def seconds(self, gpu: Gpu, dtype: torch.dtype = torch.bfloat16) -> float:
        """No version of this kernel is faster."""
        rate = gpu.fp32 if dtype == torch.float32 else gpu.tensor
        return max(self.bytes / gpu.bandwidth, self.products / rate, self.stencil / gpu.fp32)


class Sizes(NamedTuple):
    """Bytes of one block's maps: x, s, n and their gradients are c; e, a, da are m; y, dz are y."""

    p: int  # input pixels of the batch
    q: int  # output pixels
    c: int
    m: int
    y: int
    o: int

    @staticmethod
    def of(block: Block, batch: int, element: int) -> Sizes:
        p = batch * block.h * block.w
        q = batch * block.output_size[0] * block.output_size[1]
        widths = (p * block.c, p * block.m, q * block.m, q * block.o)
        return Sizes(p, q, *(element * width for width in widths))


def _partials(rows: int, columns: int, pixels: int) -> int:
    copies = max(1, MULTIPROCESSORS // -(-rows // ROWS_OF_A_PROGRAM))
    copies = min(copies, -(-pixels // ROWS_OF_A_PROGRAM))
    return copies * rows * columns * FP32 * 2


def _attention_products(block: Block, batch: int) -> tuple[int, int]:
    """FLOPs of (one projection of C to 2C channels, one product of tokens with tokens)."""
    windows, tokens = block.window_pixels
    project = 4 * batch * block.h * block.w * block.c**2
    return project, 2 * batch * windows * tokens**2 * block.c


def forward(
    block: Block,
    batch: int,
    dtype: torch.dtype,
    *,
    training: bool,
    has_sums: bool = False,
    gives_sums: bool = False,
) -> list[Kernel]:
    """Kernels of one block's forward.

    Args:
        has_sums: what the norm in front needs to know of x comes with it.
        gives_sums: the next block wants them of the output.
    """
    z = Sizes.of(block, batch, dtype.itemsize)
    c, m, o, taps = block.c, block.m, block.o, block.kernel**2
    found: list[Kernel] = []

    def add(name: str, read: int, written: int, **more: int) -> None:
        found.append(Kernel(block.name, name, False, read, written, **more))

    if training and block.norm == "batch" and not has_sums:
        add("batch_norm_sums", z.c, 0, stencil=3 * z.p * c)
    if training and block.norm == "batch":
        add("batch_norm_finalize", 0, 0, parameters=8 * FP32 * c)
    if block.head_dim:
        project, scores = _attention_products(block, batch)
        weights = FP32 * (2 * c * c + 4 * c)
        add("window_attention", z.c, z.c, products=project + 2 * scores, parameters=weights)
    if block.expands:
        if not has_sums:
            _layer_norm_statistics("expand", block, z, add)
        weights = FP32 * (m * c + m + 2 * c)
        add("expand", z.c, z.m, products=2 * z.p * c * m, parameters=weights)
    name = "depthwise_conv2d_statistics" if training else "depthwise_conv2d"
    add(name, z.m, z.y, stencil=2 * z.q * m * taps, parameters=FP32 * m * taps)
    if training:
        add("batch_norm_finalize", 0, 0, parameters=8 * FP32 * m)
    if block.gated:
        add("squeeze", z.y, 0, parameters=FP32 * 2 * (m * m + m))
    skips = z.m + z.o if block.skip else 0
    weights = FP32 * (m * o + 2 * m)
    name = "shrink_statistics" if training and gives_sums else "shrink"
    add(name, z.y + skips, z.o, products=2 * z.q * m * o, parameters=weights)
    return found


def backward(block: Block, batch: int, dtype: torch.dtype, *, fused: bool = False) -> list[Kernel]:
    """Kernels of one block's backward; ``fused`` as the plan ``design``, else as ``ours``."""
    z = Sizes.of(block, batch, dtype.itemsize)
    c, m, o, taps = block.c, block.m, block.o, block.kernel**2
    found: list[Kernel] = []

    def add(name: str, read: int, written: int, **more: int) -> None:
        found.append(Kernel(block.name, name, True, read, written, **more))

    shrink = 2 * z.q * m * o
    weights = FP32 * (2 * m * o + 4 * m)
    read = z.o + z.y + (z.m if block.skip else 0)
    partials = _partials(m, o, z.q)
    if fused or o <= (320 if dtype.itemsize == 2 else 128):  # shrink_bwd_fused, on sm_90
        more = {"products": 2 * shrink, "parameters": weights, "partials": partials}
        add("shrink_backward", read, z.y, **more)
    else:
        half = {"products": shrink, "parameters": weights // 2}
        add("shrink_backward/input", read, z.y, **half)
        add("shrink_backward/weight", read, 0, partials=partials, **half)
    if block.gated:  # its own gradient first, then what it adds to dz; fused: dt again instead
        weights = FP32 * 4 * m * m
        if fused:
            add("squeeze_backward", z.o + z.y, 0, products=shrink, parameters=weights)
        else:
            add("squeeze_backward", 2 * z.y, z.y, parameters=weights)
    add("batch_norm_backward_finalize", 0, 0, parameters=10 * FP32 * m)
    stencil, weights = 2 * z.q * m * taps, FP32 * m * taps
    if fused:
        both = {"stencil": 2 * stencil, "parameters": 2 * weights}
        add("depthwise_conv2d_backward", 2 * z.y + z.m, z.m, **both)
    else:
        data = {"stencil": stencil, "parameters": weights}
        add("depthwise_conv2d_backward/data", 2 * z.y, z.m, **data)
        add("depthwise_conv2d_backward/weight", 2 * z.y + z.m, 0, **data)
    if block.expands:
        _expand_backward(block, z, add, fused, in_one=fused or _fits_one_kernel(block, dtype))
    if block.head_dim:
        _attention_backward(block, batch, z, add, fused)
    if block.norm == "batch":
        add("batch_norm_backward_finalize", 0, 0, parameters=10 * FP32 * c)
        add("batch_norm_backward", (3 if block.skip else 2) * z.c, z.c, stencil=5 * z.p * c)
    return found


def _fits_one_kernel(block: Block, dtype: torch.dtype) -> bool:
    """Whether ``expand_backward`` keeps da on chip: ``fuses`` of expand_backward_fused.py."""
    wide, narrow = (
        1 << (max(n, 16) - 1).bit_length()
        for n in (block.m, max(block.c, block.o if block.skip else 1))
    )
    return wide * narrow <= (8192 if dtype.itemsize == 2 else 2048)


def _expand_backward(
    block: Block, z: Sizes, add: Callable[..., None], fused: bool, in_one: bool
) -> None:
    """da from de, s and the gradient of the skip; dx; the weight's gradient."""
    c, m = block.c, block.m
    product, weight = 2 * z.p * c * m, FP32 * (m * c + m)
    skip = z.o if block.skip else 0
    recompute = product + (2 * z.q * block.o * m if block.skip else 0)
    partials = _partials(m, c, z.p)
    if not fused:
        _layer_norm_statistics("expand_backward", block, z, add)
    if in_one:
        more = {"parameters": 2 * weight, "partials": partials}
        add("expand_backward", z.m + z.c + skip, z.c, products=recompute + 2 * product, **more)
        return
    weights = weight + (FP32 * m * block.o if block.skip else 0)
    add("expand_backward/da", z.m + z.c + skip, z.m, products=recompute, parameters=weights)
    normed = not block.head_dim  # behind attention there is no norm, and the residual comes later
    residual = z.c if normed and block.skip and block.norm != "batch" else 0
    again = (z.c if normed else 0) + residual
    add("expand_backward/dx", z.m + again, z.c, products=product, parameters=weight)
    add("expand_backward/weight", z.m + z.c, 0, products=product, partials=partials,
        parameters=weight)  # fmt: skip


def _attention_backward(
    block: Block, batch: int, z: Sizes, add: Callable[..., None], fused: bool
) -> None:
    """dq, dk and the gradient at n from ds; then dx and the weight's gradient."""
    c = block.c
    project, scores = _attention_products(block, batch)
    weights, partials = FP32 * (2 * c * c + 4 * c), _partials(2 * c, c, z.p)
    name, products = "window_attention_backward", project + 5 * scores
    if fused:
        more = {"parameters": 2 * weights, "partials": partials}
        add(name, 3 * z.c, z.c, products=products + 2 * project, **more)
        return
    _layer_norm_statistics(name, block, z, add)
    add(f"{name}/attention", 2 * z.c, 3 * z.c, products=products, parameters=weights)
    more = {"products": project, "parameters": weights}
    add(f"{name}/weight", 3 * z.c, 0, partials=partials, **more)
    add(f"{name}/dx", 5 * z.c, z.c, **more)


def _layer_norm_statistics(function: str, block: Block, z: Sizes, add: Callable[..., None]) -> None:
    """Mean and 1 / std of each pixel; the 8 bytes that others read of it are not counted again.

    A forward of attention has whole rows at hand and needs none; behind attention is no norm.
    """
    if block.norm == "layer" and (not block.head_dim or function.startswith("window")):
        add(f"{function}/statistics", z.c, 2 * FP32 * z.p)
