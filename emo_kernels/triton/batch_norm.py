"""Batch norm of a training step, in the pieces between which sums may cross processes.

Computes: sums of a map and of its square, the affine map norm(x) = scale x + shift with the running
    statistics (Ioffe & Szegedy, 2015, as PyTorch), and dx = c1 dz + c2 (x - mean) + c3 + residual.
Tiling: sums: a program walks a fixed range of pixels of BLOCK_C channels, BLOCK_P at a time; one
    more kernel adds the programs' partial sums. The two finalizes: a program has BLOCK_C channels.
    Backward: BLOCK_P x BLOCK_C tiles of the map, as a stream.
Traffic: sums read P C elements; backward reads 2 P C (3 with a residual), writes P C. Streams.
Numerics: a thread sums deviations from the program's first pixel in fp32; threads are added, and
    moved to the pivot, in fp64, as all that follows. So nothing cancels however far the pivot is,
    and integers stay exact. The order of additions depends on the shape alone.
Limits: fp32, fp16 and bf16 maps; weights, biases, running statistics of any of these types.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.reduce_tall import reduce_tall, whole_groups

PROGRAMS = 1056  # 8 for each of an H200's 132 multiprocessors


# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def load_or(ptr, offs, mask, other: tl.constexpr):
    """A vector in fp64; ``other`` where the tensor is absent."""
    if ptr is None:
        return tl.full(offs.shape, other, tl.float64)
    else:
        return tl.load(ptr + offs, mask=mask, other=other).to(tl.float64)


@triton.jit
def about_pivot(s1, s2, n, delta):
    """Sums of n values and of their squares, in fp64, moved to an origin lower by delta."""
    return s1 + n * delta, s2 + delta * (2.0 * s1 + n * delta)


@triton.jit
def _batch_norm_sums_kernel(
    x_ptr,  # (P, C)
    pivot_ptr,  # (C,) or None
    partials_ptr,  # (programs, 2, C) fp64
    P,
    rows,  # pixels of one program, a multiple of BLOCK_P
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid_p = pid // blocks_c
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start = pid_p * rows
    end = tl.minimum(start + rows, P)
    count = tl.maximum(end - start, 0)  # programs may be left over

    shift = tl.load(x_ptr + start * C + offs_c, mask=mask_c & (count > 0), other=0.0)
    shift = shift.to(tl.float32)
    offs_p = start + tl.arange(0, BLOCK_P)
    s1 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for _ in range(0, rows, BLOCK_P):
        mask = (offs_p < end)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_p[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        deviation = tl.where(mask, x.to(tl.float32) - shift[None, :], 0.0)
        s1 += deviation
        s2 += deviation * deviation
        offs_p += BLOCK_P
    s1, s2 = tl.sum(s1.to(tl.float64), axis=0), tl.sum(s2.to(tl.float64), axis=0)
    delta = shift.to(tl.float64) - load_or(pivot_ptr, offs_c, mask_c, 0.0)
    s1, s2 = about_pivot(s1, s2, count.to(tl.float64), delta)
    at = partials_ptr + pid_p * 2 * C + offs_c
    tl.store(at, s1, mask=mask_c)
    tl.store(at + C, s2, mask=mask_c)


@triton.jit
def _move_running(ptr, offs, mask, new, momentum):
    """running <- (1 - momentum) running + momentum new, in fp64."""
    old = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float64)
    moved = (1.0 - momentum) * old + momentum * new
    tl.store(ptr + offs, moved.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _batch_norm_finalize_kernel(
    sums_ptr,  # (2, C) fp64
    global_count_ptr,  # (1,) fp64 or None
    pivot_ptr,  # (C,) or None, as the next four
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    affine_ptr,  # (4, C)
    count: tl.float64,
    momentum: tl.float64,
    eps: tl.float64,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < C
    n = tl.zeros((BLOCK_C,), tl.float64)
    n += count if global_count_ptr is None else tl.load(global_count_ptr).to(tl.float64)
    learn = mask & (n > 0.5)  # of no pixel, nothing is learned
    n = tl.where(n > 0.5, n, 1.0)
    s1 = tl.load(sums_ptr + offs, mask=mask, other=0.0) / n
    var = tl.load(sums_ptr + C + offs, mask=mask, other=0.0) / n - s1 * s1
    # Not tl.maximum, which drops NaN. One value has no variance.
    var = tl.where((var < 0.0) | (n < 1.5), 0.0, var)
    mean = s1 + load_or(pivot_ptr, offs, mask, 0.0)
    if running_mean_ptr is not None:
        _move_running(running_mean_ptr, offs, learn, mean, momentum)
    if running_var_ptr is not None:  # its unbiased estimate from one value is NaN, as PyTorch's
        unbiased = var * (n / tl.where(n > 1.5, n - 1.0, 1.0))
        unbiased = tl.where(n > 1.5, unbiased, float("nan"))
        _move_running(running_var_ptr, offs, learn, unbiased, momentum)
    invstd = 1.0 / tl.sqrt(var + eps)
    scale = load_or(weight_ptr, offs, mask, 1.0) * invstd
    shift = load_or(bias_ptr, offs, mask, 0.0) - mean * scale
    dtype = affine_ptr.dtype.element_ty
    tl.store(affine_ptr + offs, scale.to(dtype), mask=mask)
    tl.store(affine_ptr + C + offs, shift.to(dtype), mask=mask)
    tl.store(affine_ptr + 2 * C + offs, mean.to(dtype), mask=mask)
    tl.store(affine_ptr + 3 * C + offs, invstd.to(dtype), mask=mask)


@triton.jit
def _batch_norm_backward_finalize_kernel(
    sums_ptr,  # (2, C) fp64
    affine_ptr,  # (4, C)
    global_count_ptr,  # (1,) fp64 or None
    coefficients_ptr,  # (4, C)
    count: tl.float64,
    C: tl.constexpr,
    BATCH_STATISTICS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs < C
    scale = tl.load(affine_ptr + offs, mask=mask, other=0.0)
    mean = tl.load(affine_ptr + 2 * C + offs, mask=mask, other=0.0)
    dtype = coefficients_ptr.dtype.element_ty
    c2 = tl.zeros((BLOCK_C,), tl.float64)
    c3 = tl.zeros((BLOCK_C,), tl.float64)
    if BATCH_STATISTICS:
        n = c2 + (count if global_count_ptr is None else tl.load(global_count_ptr).to(tl.float64))
        invstd = tl.load(affine_ptr + 3 * C + offs, mask=mask, other=0.0).to(tl.float64)
        per_pixel = -scale.to(tl.float64) / n
        c2 = per_pixel * invstd * tl.load(sums_ptr + C + offs, mask=mask, other=0.0)
        c3 = per_pixel * tl.load(sums_ptr + offs, mask=mask, other=0.0)
    tl.store(coefficients_ptr + offs, scale.to(dtype), mask=mask)
    tl.store(coefficients_ptr + C + offs, c2.to(dtype), mask=mask)
    tl.store(coefficients_ptr + 2 * C + offs, c3.to(dtype), mask=mask)
    tl.store(coefficients_ptr + 3 * C + offs, mean.to(dtype), mask=mask)


@triton.jit
def load_coefficients(ptr, offs, mask, C: tl.constexpr):
    """c1, c2, c3 and mean of some channels, in fp32."""
    c1 = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    c2 = tl.load(ptr + C + offs, mask=mask, other=0.0).to(tl.float32)
    c3 = tl.load(ptr + 2 * C + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(ptr + 3 * C + offs, mask=mask, other=0.0).to(tl.float32)
    return c1, c2, c3, mean


@triton.jit
def _batch_norm_backward_kernel(
    grad_ptr,  # (P, C), as x, residual, dx
    x_ptr,
    coefficients_ptr,  # (4, C)
    residual_ptr,  # or None
    dx_ptr,
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = pid // blocks_c * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_c = offs_c < C
    mask = (offs_p < P)[:, None] & mask_c[None, :]
    offs = offs_p[:, None] * C + offs_c[None, :]
    c1, c2, c3, mean = load_coefficients(coefficients_ptr, offs_c, mask_c, C)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dx = c1[None, :] * grad + (c2[None, :] * (x - mean[None, :]) + c3[None, :])
    if residual_ptr is not None:
        dx += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------- launchers


def channel_block(c: int, largest: int = 128) -> int:
    """Channels of a program: a power of two from 16 up, large, that wastes few lanes on c.

    Example:
        >>> [channel_block(c) for c in (24, 48, 96, 216, 640)]
        [32, 16, 32, 32, 128]
    """
    blocks = [b for b in (16, 32, 64, 128) if b <= largest]
    return max(blocks, key=lambda b: (-8 * (-(-c // b) * b) // c, b))


def _rule(arch: int, *, c: int, p: int) -> dict[str, int]:
    """Tiles of 2048 elements, 16 a thread: loads enough in flight, room for fp64 sums."""
    if arch == launch.INTERPRETER:
        block_c = min(triton.next_power_of_2(c), 128)
        return {"BLOCK_P": min(1024, 65536 // block_c), "BLOCK_C": block_c, "num_warps": 4}
    block_c = channel_block(c)
    return {"BLOCK_P": 2048 // block_c, "BLOCK_C": block_c, "num_warps": 4}


def _pixel_count(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def new_partial_sums(x: Tensor, rows: int) -> Tensor:
    """Room (rows, 2, C) for partial sums, with rows rounded up to what can be added in two steps.

    Every row must be written: as many programs are launched, some of them without pixels.
    """
    rows = whole_groups(rows)
    return torch.empty((rows, 2, x.shape[1]), dtype=torch.float64, device=x.device)


def batch_norm_sums(x: Tensor, pivot: Tensor | None) -> Tensor:
    """Sums over the pixels of each channel: of x - pivot and of its square, (2, C) in fp64.

    Args:
        x: (N, C, H, W).
        pivot: (C,), a fixed number near the mean; ``None``: 0.
    """
    p, c = _pixel_count(x), x.shape[1]
    if p == 0:
        return torch.zeros((2, c), dtype=torch.float64, device=x.device)
    x = layout.pixels(x)
    tiles = launch.tiles("batch_norm_sums", _rule, c=c, p=p)
    blocks_c, block_p = triton.cdiv(c, tiles["BLOCK_C"]), tiles["BLOCK_P"]
    programs = min(triton.cdiv(p, block_p), max(PROGRAMS // blocks_c, 2))
    rows = triton.cdiv(triton.cdiv(p, programs), block_p) * block_p
    partials = new_partial_sums(x, triton.cdiv(p, rows))
    programs = partials.shape[0]
    with layout.on_device(x):
        _batch_norm_sums_kernel[(programs * blocks_c,)](
            x_ptr=x,
            pivot_ptr=pivot if pivot is None else pivot.contiguous(),
            partials_ptr=partials,
            P=p,
            rows=rows,
            C=c,
            **tiles,
        )
    return reduce_tall(partials, torch.float64)


_CHANNELS = {"BLOCK_C": 128, "num_warps": 4}


def batch_norm_finalize(
    sums: Tensor,
    count: float,
    global_count: Tensor | None,
    pivot: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """From sums to the norm's affine map; running statistics move in place, as PyTorch's.

    Args:
        sums: (2, C) of :func:`batch_norm_sums`, perhaps added up over processes.
        count: pixels behind the sums. Of none, the running statistics learn nothing.
        global_count: (1,), the count where it is known on the device alone.
        pivot: (C,), as given to the sums.
        weight, bias: (C,).
        running_mean, running_var: (C,), moved by ``momentum`` towards mean and unbiased variance,
            which one value per channel does not have: NaN, as PyTorch's own kernels give.
        dtype: of the result.

    Returns:
        (4, C): scale, shift, mean and 1 / sqrt(var + eps).
    """
    c = sums.shape[1]
    affine = torch.empty((4, c), dtype=dtype, device=sums.device)
    with layout.on_device(sums):
        _batch_norm_finalize_kernel[(triton.cdiv(c, _CHANNELS["BLOCK_C"]),)](
            sums_ptr=sums.contiguous(),
            global_count_ptr=global_count,
            pivot_ptr=pivot if pivot is None else pivot.contiguous(),
            weight_ptr=weight if weight is None else weight.contiguous(),
            bias_ptr=bias if bias is None else bias.contiguous(),
            running_mean_ptr=running_mean,
            running_var_ptr=running_var,
            affine_ptr=affine,
            count=float(count),
            momentum=float(momentum),
            eps=float(eps),
            C=c,
            **_CHANNELS,
        )
    return affine


def batch_norm_backward_finalize(
    sums: Tensor,
    affine: Tensor,
    count: float,
    global_count: Tensor | None,
    batch_statistics: bool,
) -> Tensor:
    """From the sums of a backward pass to dx = c1 dz + c2 (x - mean) + c3.

    Args:
        sums: (2, C), float64: sum dz and sum dz xhat.
        affine: (4, C) of :func:`batch_norm_finalize`.
        count, global_count: as there.
        batch_statistics: whether mean and variance were the batch's; else c2 = c3 = 0.

    Returns:
        (4, C): c1, c2, c3 and mean, in the dtype of ``affine``.
    """
    coefficients = torch.empty(affine.shape, dtype=affine.dtype, device=affine.device)
    c = affine.shape[1]
    with layout.on_device(affine):
        _batch_norm_backward_finalize_kernel[(triton.cdiv(c, _CHANNELS["BLOCK_C"]),)](
            sums_ptr=sums.contiguous(),
            affine_ptr=affine.contiguous(),
            global_count_ptr=global_count,
            coefficients_ptr=coefficients,
            count=float(count),
            C=c,
            BATCH_STATISTICS=batch_statistics,
            **_CHANNELS,
        )
    return coefficients


def batch_norm_backward(
    grad: Tensor, x: Tensor, coefficients: Tensor, residual: Tensor | None
) -> Tensor:
    """dx = c1 grad + c2 (x - mean) + c3 + residual.

    Args:
        grad, x, residual: (N, C, H, W).
        coefficients: (4, C) of :func:`batch_norm_backward_finalize`.
    """
    n, c, h, w = x.shape
    dx = layout.new_map(x, n, c, h, w)
    p = _pixel_count(x)
    if p == 0:
        return dx
    tiles = launch.tiles("batch_norm_backward", _rule, c=c, p=p)
    blocks_c = triton.cdiv(c, tiles["BLOCK_C"])
    with layout.on_device(x):
        _batch_norm_backward_kernel[(triton.cdiv(p, tiles["BLOCK_P"]) * blocks_c,)](
            grad_ptr=layout.pixels(grad),
            x_ptr=layout.pixels(x),
            coefficients_ptr=coefficients.contiguous(),
            residual_ptr=residual if residual is None else layout.pixels(residual),
            dx_ptr=dx,
            P=p,
            C=c,
            **tiles,
        )
    return dx
