"""Gradient of shrink: the projection's two products, SiLU's derivative and the norm's sums.

Computes: with g the gradient at out and t = local + gate silu(z), z = scale y + shift:
    dt = drop W^T g, dW = g^T (drop t), dz = dt gate silu'(z), dy = scale dz; sums of dz and dz y, of
    dt silu(z) for the gate and of t W^T g for drop_scale; SPEC 1, DESIGN G1. In training (``affine``)
    dz is stored in place of dy, and its sums are with yhat = (y - mean) invstd.
Tiling: a program owns BLOCK_M channels and a fixed range of pixels. Its slice of W and its part of
    dW (BLOCK_M, O) stay on chip while it walks the range BLOCK_P pixels at a time; for O above 512
    (128 in fp32) one launch forms dt over O and another dW by blocks of O.
Traffic: reads y, local (M a pixel) once, g (O) M / BLOCK_M times, mostly from L2; writes dz (M)
    once, and 4 O M bytes of dW for each of at most PROGRAMS BLOCK_M / M ranges.
Numerics: dt, dz and sums in fp32; drop t is rounded to the map's dtype for the tensor cores, dz once
    when stored. The sums for a batch norm are of dz as stored, fp32 in a range, fp64 between ranges.
Limits: no fp64; any N (0 too), M, O and map size. dresidual is the incoming gradient: not computed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.activation import silu, silu_grad
from emo_kernels.triton.partials import reduce_partials
from emo_kernels.triton.shrink import (
    dense,
    dense_map,
    load_channels,
    load_tile,
    load_weight,
    output_blocks,
    precision,
    projection,
)


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
def _store_grads(dt, y, z, scale, mean, gate, dy_ptr, dlocal_ptr, base, at, mask):
    """Store dlocal, and dz (training) or dy; return dz, 0 where masked, and its sum's partner."""
    if dlocal_ptr is not None:
        _store_tile(dlocal_ptr + base, at, mask, dt)
    dz = dt * silu_grad(z)
    if gate is not None:
        dz *= gate
    if mean is not None:
        y -= mean
        if dy_ptr is not None:
            dz = _store_tile(dy_ptr + base, at, mask, dz)
    elif dy_ptr is not None:
        dy = dz
        if scale is not None:
            dy *= scale
        _store_tile(dy_ptr + base, at, mask, dy)
    return tl.where(mask, dz, 0.0), y


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
    dgate_ptr,  # (splits, spans, M) partials
    ddrop_ptr,  # (splits, CHUNKS_M, spans) partials
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
    scale, shift, mean = None, None, None
    if scale_ptr is not None:
        scale = load_channels(scale_ptr, offs_m, mask_m)
        shift = load_channels(shift_ptr, offs_m, mask_m)
    if affine_ptr is not None:
        mean = load_channels(affine_ptr + 2 * M, offs_m, mask_m)
    sum_dz = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)  # each thread its own until the end
    sum_dzy = tl.zeros((BLOCK_P, BLOCK_M), dtype=tl.float32)
    sum_gate = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sum_drop = tl.zeros((BLOCK_M,), dtype=tl.float32)
    pid_s, pid_n = pid_r % splits, pid_r // splits
    first = pid_n * span + pid_s * length
    end = tl.minimum(first + length, (pid_n + 1) * span)
    image = first // HW
    pixel = (first - image * HW).to(tl.int32)  # of the image
    rows = tl.arange(0, BLOCK_P)
    at = rows[:, None] * M + offs_m[None, :]  # offsets within a tile fit 32 bits
    for start in range(first, end, BLOCK_P):
        mask_p = rows < tl.minimum(end - start, BLOCK_P).to(tl.int32)
        mask = mask_p[:, None] & mask_m[None, :]
        y = load_tile(y_ptr + start * M, at, mask)
        z = y
        if scale_ptr is not None:
            z = y * scale + shift
        c = silu(z)
        t = c
        gate = None
        images = (pixel + rows) // HW  # behind ``image``
        if gate_ptr is not None:
            gate = load_tile(gate_ptr + image * M, images[:, None] * M + offs_m[None, :], mask)
            t *= gate
        if local_ptr is not None:
            t += load_tile(local_ptr + start * M, at, mask)
        drop = mask_p.to(tl.float32)[:, None]
        if drop_ptr is not None:
            drop = load_tile(drop_ptr + image, images, mask_p)[:, None]
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
                dt = _grad_branch(
                    grad_ptr + start * OUT,
                    weight_ptr,
                    rows,
                    mask_p,
                    offs_m,
                    mask_m,
                    M,
                    OUT,
                    BLOCK_O,
                    PRECISION,
                )
            if ddrop_ptr is not None:
                sum_drop += tl.sum(tl.where(mask, t * dt, 0.0), axis=0)
                if DT == "resident" and BLOCK_O2:
                    sum_drop += tl.sum(tl.where(mask, t * dt2, 0.0), axis=0)
            dt *= drop
            if DT == "resident" and BLOCK_O2:
                dt += dt2 * drop  # one dot onto the other would halve the warps of the first
            if dgate_ptr is not None:
                sum_gate += tl.sum(tl.where(mask, c * dt, 0.0), axis=0)
            dz, other = _store_grads(
                dt, y, z, scale, mean, gate, dy_ptr, dlocal_ptr, start * M, at, mask
            )
            if sums_ptr is not None:
                sum_dz += dz
                sum_dzy += dz * other
        if dweight_ptr is not None:
            if drop_ptr is not None:
                t *= drop
            t_rounded = tl.where(mask, t, 0.0).to(weight_ptr.dtype.element_ty).T
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


def _whole(size: int, largest: int) -> int:
    return min(max(16, triton.next_power_of_2(size)), largest)


def shrink_bwd_fused(o: int, bits: int) -> bool:
    """Whether dW (BLOCK_M, OUT) fits a program's registers beside dt: one pass over the pixels."""
    return o <= (512 if bits == 16 else 128)


def shrink_bwd_rule(arch: int, *, p: int, m: int, o: int, bits: int) -> dict[str, int]:
    """One pass: as many channels a program as the accumulator (BLOCK_M, OUT) has registers for."""
    if arch == launch.INTERPRETER:
        tiles = {"BLOCK_P": _whole(p, 1024), "BLOCK_M": _whole(m, 512), "BLOCK_O": _whole(o, 512)}
        return tiles | {"BLOCK_O2": 0, "PROGRAMS": 1, "num_warps": 4, "num_stages": 1}
    block_o, block_o2 = output_blocks(o)
    tiles = {"BLOCK_O": block_o, "BLOCK_O2": block_o2}
    if bits == 32:
        tiles |= {"BLOCK_P": 32, "BLOCK_M": 32, "PROGRAMS": 264}
        return tiles | {"num_warps": 8, "num_stages": 1}
    tiles |= {"BLOCK_P": 64, "BLOCK_M": _whole(m, 64), "PROGRAMS": 264}
    return tiles | {"num_warps": 8, "num_stages": 2}


def shrink_bwd_input_rule(arch: int, *, p: int, m: int, o: int, bits: int) -> dict[str, int]:
    """Large O, all but dW: W^T g by blocks of O."""
    if arch == launch.INTERPRETER:
        return shrink_bwd_rule(arch, p=p, m=m, o=o, bits=bits)
    sizes = (64, 64, 64) if bits == 16 else (32, 32, 32)
    tiles = dict(zip(("BLOCK_P", "BLOCK_M", "BLOCK_O"), sizes, strict=True))
    return tiles | {"BLOCK_O2": 0, "PROGRAMS": 528, "num_warps": 4, "num_stages": 2}


def shrink_bwd_weight_rule(arch: int, *, p: int, m: int, o: int, bits: int) -> dict[str, int]:
    """Large O, dW alone, by blocks of O."""
    return shrink_bwd_input_rule(arch, p=p, m=m, o=o, bits=bits)


class _Inputs(NamedTuple):
    """What the kernels read, dense, absent terms None; in the order of their arguments."""

    grad: Tensor
    y: Tensor
    weight: Tensor  # (O, M) in the dtype of the maps
    scale: Tensor | None
    shift: Tensor | None
    local: Tensor | None
    gate: Tensor | None
    drop: Tensor | None
    affine: Tensor | None


class _Gradients(NamedTuple):
    """What the kernels write, None where it is not needed; in the order of their arguments."""

    y: Tensor | None
    local: Tensor | None
    weight: Tensor | None  # partials from here on, ranges first
    sums: Tensor | None
    gate: Tensor | None
    drop_scale: Tensor | None


_ARGUMENTS = ("y", "weight", "scale", "shift", "local", "residual", "gate", "drop_scale")
_PARTS_OF = {
    "y": ("y",),
    "local": ("local",),
    "weight": ("weight",),
    "sums": ("scale", "shift"),
    "gate": ("gate",),
    "drop_scale": ("drop_scale",),
}
_RULES = {
    "shrink_bwd": shrink_bwd_rule,
    "shrink_bwd_input": shrink_bwd_input_rule,
    "shrink_bwd_weight": shrink_bwd_weight_rule,
}


def _run(kernel: str, inputs: _Inputs, parts: set[str]) -> dict[str, Tensor]:
    """Launch ``kernel`` for the named parts of :class:`_Gradients`."""
    n, m, h, w = inputs.y.shape
    o, hw = inputs.weight.shape[0], h * w
    bits = 8 * inputs.y.element_size()
    tiles = dict(launch.tiles(kernel, _RULES[kernel], p=n * hw, m=m, o=o, bits=bits))
    programs, block_p = tiles.pop("PROGRAMS"), tiles["BLOCK_P"]
    chunks_m = triton.cdiv(m, tiles["BLOCK_M"])
    chunks_o = triton.cdiv(o, tiles["BLOCK_O"] + tiles["BLOCK_O2"]) if "weight" in parts else 1
    spans, span = (n, hw) if parts & {"gate", "drop_scale"} else (1, n * hw)
    blocks = triton.cdiv(span, block_p)
    splits = min(blocks, max(1, programs // (chunks_m * chunks_o * spans)))
    length = triton.cdiv(blocks, splits) * block_p
    splits = triton.cdiv(span, length)
    ranges = spans * splits
    sums_shape = (2, ranges, m) if inputs.affine is None else (ranges, 2, m)

    def partials(name: str, *shape: int) -> Tensor | None:
        return inputs.y.new_empty(shape, dtype=torch.float32) if name in parts else None

    outputs = _Gradients(
        y=layout.new_map(inputs.y, n, m, h, w) if "y" in parts else None,
        local=layout.new_map(inputs.y, n, m, h, w) if "local" in parts else None,
        weight=partials("weight", ranges, o, m),
        sums=partials("sums", *sums_shape),
        gate=partials("gate", splits, spans, m),
        drop_scale=partials("drop_scale", splits * chunks_m, spans),
    )
    looped = "looped" if kernel == "shrink_bwd_input" else "resident"
    with layout.on_device(inputs.y):
        _shrink_bwd_kernel[(ranges * chunks_m * chunks_o,)](
            *inputs,
            *outputs,
            hw,
            span,
            spans,
            splits,
            length,
            m if inputs.affine is None else 2 * m,
            ranges * m if inputs.affine is None else m,
            M=m,
            OUT=o,
            CHUNKS_M=chunks_m,
            CHUNKS_O=chunks_o,
            DT="none" if parts == {"weight"} else looped,
            PRECISION=precision(),
            **tiles,
        )
    return {k: v for k, v in zip(_Gradients._fields, outputs, strict=True) if v is not None}


def _launches(parts: set[str], y: Tensor, o: int) -> list[tuple[str, set[str]]]:
    """Which kernel forms which parts: one pass where dW stays on chip and its partials are small."""
    m, bits = y.shape[1], 8 * y.element_size()
    of_images = parts & {"gate", "drop_scale"}  # their ranges end with an image: many
    if not shrink_bwd_fused(o, bits):
        calls = [
            ("shrink_bwd_input", parts - {"weight"}),
            ("shrink_bwd_weight", parts & {"weight"}),
        ]
    elif of_images and "weight" in parts and y.shape[0] * o * m > 1 << 24:
        calls = [("shrink_bwd", parts - of_images), ("shrink_bwd", of_images)]
    else:
        calls = [("shrink_bwd", parts)]
    return [(kernel, wanted) for kernel, wanted in calls if wanted]


def shrink_backward(
    grad: Tensor,
    y: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    local: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    drop_scale: Tensor | None,
    affine: Tensor | None = None,
    *,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of shrink, the needed ones alone, in the order of its arguments.

    Args:
        grad: (N, O, H, W), the gradient at out.
        y, weight, scale, shift, local, residual, gate, drop_scale: as in the forward.
        affine: (4, M) in fp32, training: scale, shift, mean, invstd of the batch norm, of which
            ``scale`` and ``shift`` are the first two.
        needed: which gradients, one for each of the eight arguments.

    Returns:
        dy, dweight, dscale, dshift, dlocal, dresidual, dgate, ddrop_scale. With ``affine``, in place
        of dy the gradient dz at scale y + shift, and in place of dscale and dshift one tensor
        (2, M) in fp64: the sums over pixels of dz and dz (y - mean) invstd, of dz as returned.
    """
    need = dict(zip(_ARGUMENTS, needed, strict=True))
    if affine is not None:
        need["shift"] = False  # its sum comes with that of scale
    parts = {part for part, arguments in _PARTS_OF.items() if any(need[a] for a in arguments)}
    tensors = dict(zip(_ARGUMENTS, (y, weight, scale, shift, local, residual, gate, drop_scale)))
    found: dict[str, Tensor] = {"residual": grad}
    if y.numel():
        found |= _run_all(grad, tensors, affine, parts)
    else:
        found |= {a: torch.zeros_like(t) for a, t in tensors.items() if t is not None}
        if affine is not None:
            found["scale"] = y.new_zeros((2, y.shape[1]), dtype=torch.float64)
    return [found[a] for a in _ARGUMENTS if need[a]]


def _run_all(
    grad: Tensor, tensors: dict[str, Tensor | None], affine: Tensor | None, parts: set[str]
) -> dict[str, Tensor]:
    """The gradients of the named parts, by argument."""
    y, weight = tensors["y"], tensors["weight"]
    assert y is not None and weight is not None
    inputs = _Inputs(
        layout.pixels(grad),
        layout.pixels(y),
        projection(weight, y.dtype),
        dense(tensors["scale"]),
        dense(tensors["shift"]),
        dense_map(tensors["local"]),
        dense(tensors["gate"]),
        dense(tensors["drop_scale"]),
        dense(affine),
    )
    found: dict[str, Tensor] = {}
    for kernel, wanted in _launches(parts, y, weight.shape[0]):
        found |= _run(kernel, inputs, wanted)
    for argument in ("weight", "gate", "drop_scale"):
        if argument in found:
            like = tensors[argument]
            assert like is not None
            partials = found[argument].view(-1, *like.shape)
            found[argument] = reduce_partials(partials, out=torch.empty_like(like))
    sums = found.pop("sums", None)
    if sums is not None and affine is not None:
        found["scale"] = reduce_partials(sums, torch.float64)
    elif sums is not None:
        for argument, partials in zip(("shift", "scale"), sums, strict=True):
            like = tensors[argument]
            assert like is not None
            found[argument] = reduce_partials(partials, out=torch.empty_like(like))
    return found
