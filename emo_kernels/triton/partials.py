"""Sum of partial results, one for each program of another kernel, in a fixed order.

Computes: out[i] = sum_r partials[r, i].
Tiling: a program owns BLOCK columns and walks the R rows BLOCK_R at a time.
Traffic: reads R * size * 4 bytes once, writes size elements; one addition for 4 bytes.
Numerics: accumulates in fp64, rounds once. The order depends on (R, size) and the architecture
    alone: the same bits on every run, no atomics.
Limits: partials are dense fp32 (fp64 is taken too); any R and size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout


@triton.jit
def _reduce_partials_kernel(
    partials_ptr,
    out_ptr,
    R,
    size,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    rows = tl.arange(0, BLOCK_R).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK), dtype=tl.float64)
    for start in range(0, R, BLOCK_R):
        at = (start + rows)[:, None] * size + offs[None, :]
        keep = ((start + rows) < R)[:, None] & mask[None, :]
        acc += tl.load(partials_ptr + at, mask=keep, other=0.0).to(tl.float64)
    total = tl.sum(acc, axis=0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def _reduce_partials_rule(arch: int, *, r: int, size: int) -> dict[str, int]:
    """Wide programs for a weight's gradient, tall ones for the few columns of statistics."""
    if arch == launch.INTERPRETER:
        block = min(triton.next_power_of_2(size), 1 << 16)
        return {"BLOCK": block, "BLOCK_R": 16 if block <= 4096 else 2, "num_warps": 4}
    block = 256 if size >= 1 << 15 else 32
    rows = min(triton.next_power_of_2(max(r, 1)), 2048 // block)
    return {"BLOCK": block, "BLOCK_R": rows, "num_warps": 4}


def reduce_partials(
    partials: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """Add partial results in a fixed order.

    Args:
        partials: (R, ...) in fp32.
        out_dtype: of the result; that of ``out``, else of ``partials``, by default.
        out: (...), takes the result, whatever its strides.

    Returns:
        (...), ``out`` where it is given.
    """
    shape = partials.shape[1:]
    if out is None:
        out = torch.empty(shape, dtype=out_dtype or partials.dtype, device=partials.device)
    dense = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    r, size = partials.shape[0], dense.numel()
    if size:
        tiles = launch.tiles("reduce_partials", _reduce_partials_rule, r=r, size=size)
        with layout.on_device(partials):
            _reduce_partials_kernel[(triton.cdiv(size, tiles["BLOCK"]),)](
                partials.contiguous(),
                dense,
                r,
                size,
                **tiles,
            )
    return out if dense is out else out.copy_(dense)
