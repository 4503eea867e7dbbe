"""Gradient of shrink: what one program of its kernel forms. ``shrink_backward.py`` launches it.

Computes: with g the gradient at out and t = local + gate silu(z), z = scale y + shift:
    dt = drop W^T g, dW = g^T (drop t), dz = dt gate silu'(z), dy = scale dz; sums of dz and dz y,
    of dt silu(z) for the gate and of t W^T g for drop_scale; SPEC 1, DESIGN G1. In training
    (``affine``) dz is stored in place of dy, and summed with yhat = (y - mean) invstd.
Tiling: a program owns BLOCK_M channels and a fixed range of pixels. Its slice of W and its part of
    dW (BLOCK_M, O) stay on chip while it walks the range BLOCK_P pixels at a time; for O above 320
    (128 in fp32, 48 before sm_90) one launch forms dt over O and another dW by blocks of O.
Traffic: reads y, local (M a pixel) once, g (O) M / BLOCK_M times, mostly from L2; writes dz (M)
    once, and 4 O M bytes of dW for each of at most PROGRAMS BLOCK_M / M ranges.
Numerics: dt, dz and sums in fp32; drop t is rounded to the map's dtype for the tensor cores, dz
    when it is stored. The sums for a batch norm are of dz as stored: fp32 in a range, then fp64.
Limits: no fp64; any N (0 too), M, O and map size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from emo_kernels.triton.activation import silu, silu_grad
from emo_kernels.triton.shrink import load_channels, load_tile, load_weight


@triton.jit
def _load_grad(grad_ptr, rows, mask_p, offs_o, OUT: tl.constexpr):
    """A tile (BLOCK_P, BLOCK_O) of the incoming gradient."""
    mask = mask_p[:, None] & (offs_o < OUT)[None, :]
    return tl.load(grad_ptr + rows[:, None] * OUT + offs_o[None, :], mask=mask, other=0.0)


@triton.jit
def _grad_branch(
    grad_ptr,
    weight_ptr,
    rows,
    mask_p,
    offs_m,
    mask_m,
    M: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W^T g of a tile, where O is too large to stay on chip."""
    acc = tl.zeros((rows.shape[0], offs_m.shape[0]), dtype=tl.float32)
    for start in range(0, OUT, BLOCK_O):
        offs_o = start + tl.arange(0, BLOCK_O)
        g = _load_grad(grad_ptr, rows, mask_p, offs_o, OUT)
        w = load_weight(weight_ptr, offs_o, offs_m, mask_m, M, OUT)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_tile(ptr, at, mask, value):
    """Store a tile; return it in fp32 after the rounding of the store."""
    stored = value.to(ptr.dtype.element_ty)
    tl.store(ptr + at, stored, mask=mask)
    return stored.to(tl.float32)


@triton.jit
def _load_branch(
    y_ptr,
    scale,
    shift,
    local_ptr,
    gate_ptr,
    start,
    image,
    images,
    rows,
    mask,
    offs_m,
    M: tl.constexpr,
):
    """A tile of y, silu(z), the gate (where there is one) and t, in fp32."""
    at = rows[:, None] * M + offs_m[None, :]  # offsets within a tile fit 32 bits
    y = load_tile(y_ptr + start * M, at, mask)
    z = y
    if scale is not None:
        z = y * scale + shift
    c = silu(z)
    t = c
    gate = c  # a tensor in any case
    if gate_ptr is not None:
        gate = load_tile(gate_ptr + image * M, images[:, None] * M + offs_m[None, :], mask)
        t *= gate
    if local_ptr is not None:
        t += load_tile(local_ptr + start * M, at, mask)
    return y, c, gate, t


@triton.jit
def _store_grads(
    dt,
    y,
    gate,
    gate_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    dy_ptr,
    dlocal_ptr,
    start,
    rows,
    mask,
    offs_m,
    mask_m,
    M: tl.constexpr,
):
    """Store dlocal, and dz (training) or dy; return dz and what its second sum is with.

    The channels' vectors come from L1 again and z is formed again: registers are short, and dt has
    another layout than t.
    """
    at = rows[:, None] * M + offs_m[None, :]
    if dlocal_ptr is not None:
        _store_tile(dlocal_ptr + start * M, at, mask, dt)
    z = y
    if scale_ptr is not None:
        scale = load_channels(scale_ptr, offs_m, mask_m)
        z = y * scale + load_channels(shift_ptr, offs_m, mask_m)
    dz = dt * silu_grad(z)
    if gate_ptr is not None:
        dz *= gate
    if mean_ptr is not None:
        y -= load_channels(mean_ptr, offs_m, mask_m)
        if dy_ptr is not None:
            dz = _store_tile(dy_ptr + start * M, at, mask, dz)
    elif dy_ptr is not None:
        dy = dz
        if scale_ptr is not None:
            dy *= scale
        _store_tile(dy_ptr + start * M, at, mask, dy)
    return dz, y


@triton.jit
def _column_sums(a, b, live):
    """Sums over the live pixels of a * b in fp64: few numbers, in which much cancels."""
    return tl.sum(tl.where(live, a.to(tl.float64) * b.to(tl.float64), 0.0), axis=0)


@triton.jit
def _store_weight(ptr, acc, offs_o, offs_m, mask_m, M: tl.constexpr, OUT: tl.constexpr):
    """Store a range's part of dW, (BLOCK_M, BLOCK_O) here and (O, M) in memory."""
    at = offs_o[None, :] * M + offs_m[:, None]
    tl.store(ptr + at, acc, mask=mask_m[:, None] & (offs_o < OUT)[None, :])


@triton.jit
def _shrink_bwd_kernel(
    grad_ptr,
    y_ptr,
    weight_ptr,
    scale_ptr,
    shift_ptr,
    local_ptr,
    gate_ptr,
    drop_ptr,
    affine_ptr,
    dy_ptr,  # dz in training
    dlocal_ptr,
    dweight_ptr,  # (ranges, O, M) partials
    sums_ptr,  # partials: row k of range r at r * stride_sr + k * stride_sk
    dgate_ptr,  # (splits, spans, M) fp64 partials
    ddrop_ptr,  # (splits, CHUNKS_M, spans) fp64 partials
    HW,
    span,  # pixels that no range crosses: an image's, or all
    spans,
    splits,  # ranges of a span
    length,  # pixels of a range
    stride_sr,
    stride_sk,
    M: tl.constexpr,
    OUT: tl.constexpr,
    CHUNKS_M: tl.constexpr,
    CHUNKS_O: tl.constexpr,
    DT: tl.constexpr,  # W^T g: "resident" slice of W, "looped" over O, or "none"
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_O2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    pid_r = pid // (CHUNKS_M * CHUNKS_O)  # programs of one range run side by side: g stays in L2
    pid_m = pid % CHUNKS_M
    offs_m = pid_m.to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    first_o = (pid // CHUNKS_M % CHUNKS_O).to(tl.int32) * (BLOCK_O + BLOCK_O2)
    offs_o = first_o + tl.arange(0, BLOCK_O)
    acc = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    if BLOCK_O2:
        offs_o2 = first_o + BLOCK_O + tl.arange(0, BLOCK_O2)
        acc2 = tl.zeros((BLOCK_M, BLOCK_O2), dtype=tl.float32)
    if DT == "resident":
        w = load_weight(weight_ptr, offs_o, offs_m, mask_m, M, OUT)
        if BLOCK_O2:
            w2 = load_weight(weight_ptr, offs_o2, offs_m, mask_m, M, OUT)
    scale, shift = None, None
    if scale_ptr is not None:
        scale = load_channels(scale_ptr, offs_m, mask_m)
        shift = load_channels(shift_ptr, offs_m, mask_m)
    mean_ptr = affine_ptr
    if affine_ptr is not None:
        mean_ptr += 2 * M
    sum_dz = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)  # each thread its own until the end
    sum_dzy = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    sum_gate = tl.zeros((BLOCK_M,), dtype=tl.float64)
    sum_drop = tl.zeros((BLOCK_M,), dtype=tl.float64)
    pid_s, pid_n = pid_r % splits, pid_r // splits
    first = pid_n * span + pid_s * length
    end = tl.minimum(first + length, (pid_n + 1) * span)
    image = first // HW
    pixel = (first - image * HW).to(tl.int32)  # of the image
    rows = tl.arange(0, BLOCK_P)
    for start in range(first, end, BLOCK_P):
        mask_p = rows < tl.minimum(end - start, BLOCK_P).to(tl.int32)
        live = mask_p[:, None]  # beyond its columns a tile holds zeros
        mask = live & mask_m[None, :]
        if DT == "resident" or dweight_ptr is not None:
            g = _load_grad(grad_ptr + start * OUT, rows, mask_p, offs_o, OUT)
            if BLOCK_O2:
                g2 = _load_grad(grad_ptr + start * OUT, rows, mask_p, offs_o2, OUT)
        if DT != "none":
            if DT == "resident":
                dt = tl.dot(g, w, input_precision=PRECISION)
                if BLOCK_O2:
                    dt2 = tl.dot(g2, w2, input_precision=PRECISION)
            else:
                g_ptr = grad_ptr + start * OUT
                dt = _grad_branch(
                    g_ptr, weight_ptr, rows, mask_p, offs_m, mask_m, M, OUT, BLOCK_O, PRECISION
                )
        images = (pixel + rows) // HW  # behind ``image``
        y, c, gate, t = _load_branch(
            y_ptr, scale, shift, local_ptr, gate_ptr, start, image, images, rows, mask, offs_m, M
        )
        drop = mask_p.to(tl.float32)[:, None]
        if drop_ptr is not None:
            drop = load_tile(drop_ptr + image, images, mask_p)[:, None]
        if DT != "none":
            if ddrop_ptr is not None:
                sum_drop += _column_sums(t, dt, live)
                if DT == "resident" and BLOCK_O2:
                    sum_drop += _column_sums(t, dt2, live)
            dt *= drop
            if DT == "resident" and BLOCK_O2:
                dt += dt2 * drop  # one dot onto the other would halve the warps of the first
            if dgate_ptr is not None:
                sum_gate += _column_sums(c, dt, live)
            dz, other = _store_grads(
                dt, y, gate, gate_ptr, scale_ptr, shift_ptr, mean_ptr, dy_ptr, dlocal_ptr, start,
                rows, mask, offs_m, mask_m, M,
            )  # fmt: skip
            if sums_ptr is not None:
                dz = tl.where(live, dz, 0.0)
                sum_dz += dz
                sum_dzy += dz * other
        if dweight_ptr is not None:
            if drop_ptr is not None:
                t *= drop
            t_rounded = tl.where(live, t, 0.0).to(weight_ptr.dtype.element_ty).T
            acc = tl.dot(t_rounded, g, acc, input_precision=PRECISION)
            if BLOCK_O2:
                acc2 = tl.dot(t_rounded, g2, acc2, input_precision=PRECISION)
        image += (pixel + BLOCK_P) // HW
        pixel = (pixel + BLOCK_P) % HW
    if sums_ptr is not None:
        tl.store(sums_ptr + pid_r * stride_sr + offs_m, tl.sum(sum_dz, axis=0), mask=mask_m)
        total = tl.sum(sum_dzy, axis=0)
        if affine_ptr is not None:
            total *= tl.load(affine_ptr + 3 * M + offs_m, mask=mask_m, other=0.0)
        tl.store(sums_ptr + pid_r * stride_sr + stride_sk + offs_m, total, mask=mask_m)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + (pid_s * spans + pid_n) * M + offs_m, sum_gate, mask=mask_m)
    if ddrop_ptr is not None:
        at_drop = (pid_s * CHUNKS_M + pid_m) * spans + pid_n
        tl.store(ddrop_ptr + at_drop, tl.sum(tl.where(mask_m, sum_drop, 0.0), axis=0))
    if dweight_ptr is not None:
        dweight_ptr += pid_r * (OUT * M)
        _store_weight(dweight_ptr, acc, offs_o, offs_m, mask_m, M, OUT)
        if BLOCK_O2:
            _store_weight(dweight_ptr, acc2, offs_o2, offs_m, mask_m, M, OUT)
