"""Gradients of the depthwise convolution: for its input here, for its filters next door.

Computes: dx[n, i, j, c] = sum_ab weight[c, a, b] dy[n, (i + P - a D) / S, (j + P - b D) / S, c]
    where these divide, + local_grad. With coefficients, dy = c1 grad + c2 (y - mean) + c3 (a batch
    norm behind the convolution) is formed in the loads.
Tiling: as forward, with tiles of dx, whose sides are multiples of the stride, over patches of dy.
Traffic: reads grad, y and local_grad once (halos from the caches), writes dx. Forming dy costs 7
    instructions an element of the patch, so that large tiles pay.
Numerics: dy, products and sums in fp32, dx rounded once.
Limits: unrolled for K <= 7, stride and dilation <= 2; beyond, ``depthwise_conv2d_general.py``,
    which stores dy rounded.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.batch_norm import batch_norm_backward
from emo_kernels.triton.depthwise_conv2d import (
    correlate,
    first_row,
    stencil_tiles,
    tap_rows,
    tile_indices,
    unrolls,
)
from emo_kernels.triton.depthwise_conv2d_general import convolve_general, weight_partials_general
from emo_kernels.triton.depthwise_conv2d_weight import add_up, weight_partials

# ---------------------------------------------------------------------------------------- kernels


@triton.jit
def _depthwise_conv2d_bwd_input_kernel(
    grad_ptr,  # (N HO WO, C)
    weight_ptr,  # (K K, C)
    y_ptr,  # (N HO WO, C) or None
    coefficients_ptr,  # (4, C) or None
    local_grad_ptr,  # (N H W, C) or None
    dx_ptr,  # (N H W, C)
    N,
    H,
    W,
    HO,
    WO,
    tiles_h,
    tiles_w,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    R_H: tl.constexpr,
    R_W: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    offs_c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    n, tile_i, tile_j = tile_indices(pid // blocks_c, tiles_h, tiles_w, BLOCK_T)
    live = (n < N)[:, None] & mask_c[None, :]
    acc = correlate(
        grad_ptr,
        y_ptr,
        coefficients_ptr,
        weight_ptr,
        n,
        tile_i * (R_H // STRIDE) + first_row(K, STRIDE, PADDING, DILATION, True),
        tile_j * (R_W // STRIDE) + first_row(K, STRIDE, PADDING, DILATION, True),
        HO,
        WO,
        live,
        offs_c,
        mask_c,
        C,
        K,
        STRIDE,
        PADDING,
        DILATION,
        True,
        R_H,
        R_W,
    )
    i, j = tile_i * R_H, tile_j * R_W
    offs = ((n * H + i) * W + j)[:, None] * C + offs_c[None, :]
    for r in tl.static_range(R_H * R_W):
        mask = live & ((i + r // R_W < H) & (j + r % R_W < W))[:, None]
        at = offs + (W.to(tl.int64) * (r // R_W) + r % R_W) * C
        dx = acc[r]
        if local_grad_ptr is not None:
            dx += tl.load(local_grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# -------------------------------------------------------------------------------------- launchers


def _bwd_input_rule(
    arch: int, *, c: int, k: int, s: int, d: int, h: int, w: int, p: int
) -> dict[str, int]:
    """As forward; the sides are multiples of the stride, and dy costs more to form than x."""
    if arch == launch.INTERPRETER:
        return stencil_tiles(arch, c, [(s, 2, 0.0)])
    pixels = 16 if k <= 3 or s > 1 else 8 if k <= 5 else 4
    sides = []
    for r_h, r_w in (
        (4, 8),
        (4, 7),
        (2, 8),
        (2, 7),
        (4, 4),
        (2, 4),
        (1, 7),
        (1, 4),
        (2, 2),
        (1, 1),
    ):
        if r_h * r_w <= pixels and r_h % s == 0 and r_w % s == 0:
            patch = ((r_h + (k - 1) * d) // s + 1) * ((r_w + (k - 1) * d) // s + 1)
            wasted = -(-h // r_h) * r_h * -(-w // r_w) * r_w / (h * w)
            sides.append((r_h, r_w, wasted * (k * k / s**2 + 6 * patch / (r_h * r_w) + 6)))
    return stencil_tiles(arch, c, sides)


def _grad_input(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    coefficients: Tensor | None,
    local_grad: Tensor | None,
    geometry: dict[str, int],
) -> Tensor:
    n, c, h, w = x.shape
    ho, wo = grad.shape[2:]
    k, stride, dilation = weight.shape[-1], geometry["STRIDE"], geometry["DILATION"]
    dx = layout.new_map(x, n, c, h, w)
    tiles = launch.tiles(
        "depthwise_conv2d_bwd_input",
        _bwd_input_rule,
        c=c,
        k=k,
        s=stride,
        d=dilation,
        h=h,
        w=w,
        p=n * h * w,
    )
    assert tiles["R_H"] % stride == 0 and tiles["R_W"] % stride == 0, tiles
    tiles_h, tiles_w = triton.cdiv(h, tiles["R_H"]), triton.cdiv(w, tiles["R_W"])
    programs = triton.cdiv(n * tiles_h * tiles_w, tiles["BLOCK_T"])
    with layout.on_device(x):
        _depthwise_conv2d_bwd_input_kernel[(programs * triton.cdiv(c, tiles["BLOCK_C"]),)](
            grad_ptr=grad,
            weight_ptr=tap_rows(weight),
            y_ptr=y,
            coefficients_ptr=coefficients,
            local_grad_ptr=None if local_grad is None else layout.pixels(local_grad),
            dx_ptr=dx,
            N=n,
            H=h,
            W=w,
            HO=ho,
            WO=wo,
            tiles_h=tiles_h,
            tiles_w=tiles_w,
            C=c,
            K=k,
            **geometry,
            **tiles,
        )
    return dx


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None = None,
    coefficients: Tensor | None = None,
    local_grad: Tensor | None = None,
    *,
    needed: Sequence[bool],
    stride: int,
    padding: int,
    dilation: int,
) -> list[Tensor]:
    """Gradients of x and weight, those that are needed.

    Args:
        grad: (N, C, H', W') at y, or, with ``y`` and ``coefficients`` (4, C), behind a batch norm
            of y: then c1 grad + c2 (y - mean) + c3 is the gradient at y.
        x: (N, C, H, W).
        weight: (C, 1, K, K).
        local_grad: (N, C, H, W), added to the gradient of x.
        needed: for x and for weight.
    """
    n, c, h, w = x.shape
    k = weight.shape[-1]
    normed = coefficients is not None and y is not None
    grad = layout.pixels(grad)
    grads: list[Tensor] = []
    if n == 0:
        return [torch.zeros_like(t) for t, wanted in zip((x, weight), needed) if wanted]
    if not unrolls(k, stride, dilation):
        if coefficients is not None and y is not None:
            grad = batch_norm_backward(grad, y, coefficients, None)
        if needed[0]:
            dx = convolve_general(
                grad,
                tap_rows(weight),
                k,
                h,
                w,
                stride,
                padding,
                dilation,
                backward=True,
                add=local_grad,
            )
            grads.append(dx)
        if needed[1]:
            partials = weight_partials_general(grad, x, k, stride, padding, dilation)
            grads.append(add_up(partials, weight))
        return grads
    y = layout.pixels(y) if normed and y is not None else None
    coefficients = coefficients.contiguous() if normed and coefficients is not None else None
    geometry = {"STRIDE": stride, "PADDING": padding, "DILATION": dilation}
    if needed[0]:
        grads.append(_grad_input(grad, x, weight, y, coefficients, local_grad, geometry))
    if needed[1]:
        partials = weight_partials(grad, x, k, y, coefficients, geometry)
        grads.append(add_up(partials, weight))
    return grads
