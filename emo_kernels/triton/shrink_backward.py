"""Gradient of shrink: which kernel of ``shrink_gradients.py`` runs, with which tiles, and its sums.

One pass over the pixels forms everything, where dW (BLOCK_M, O) fits a program's registers; else
one launch forms dt over O, and all that follows from it, and another dW by blocks of O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from emo_kernels.triton import launch, layout
from emo_kernels.triton.partials import reduce_partials
from emo_kernels.triton.shrink import output_blocks
from emo_kernels.triton.shrink_gradients import _shrink_bwd_kernel


def _whole(size: int, largest: int) -> int:
    return min(max(16, triton.next_power_of_2(size)), largest)


def shrink_bwd_fused(arch: int, o: int, bits: int) -> bool:
    """Whether dW (BLOCK_M, O) fits a program's registers beside dt: one pass over the pixels.

    Before sm_90 the tensor cores take W from registers too, which leaves fewer for dW.
    """
    if bits == 32:
        return o <= 128
    return o <= (320 if arch >= 90 or arch == launch.INTERPRETER else 48)


def shrink_bwd_rule(arch: int, *, p: int, m: int, o: int, bits: int) -> dict[str, int]:
    """One pass: as many channels a program as the accumulator (BLOCK_M, O) has registers for."""
    if arch == launch.INTERPRETER:
        tiles = {"BLOCK_P": _whole(p, 1024), "BLOCK_M": _whole(m, 512), "BLOCK_O": _whole(o, 512)}
        return tiles | {"BLOCK_O2": 0, "PROGRAMS": 1, "num_warps": 4, "num_stages": 1}
    block_o, block_o2 = output_blocks(o)
    tiles = {"BLOCK_O": block_o, "BLOCK_O2": block_o2}
    if bits == 32:
        tiles |= {"BLOCK_P": 32, "BLOCK_M": 32, "PROGRAMS": 264}
        return tiles | {"num_warps": 8, "num_stages": 1}
    if arch < 90:
        tiles |= {"BLOCK_P": 64, "BLOCK_M": _whole(m, 32), "PROGRAMS": 264}
        return tiles | {"num_warps": 8 if m <= 32 else 4, "num_stages": 2}
    narrow = m % 8 and block_o + block_o2 > 160  # rows off 16 bytes: twice the copies and addresses
    tiles |= {"BLOCK_P": 32 if narrow else 64, "BLOCK_M": _whole(m, 64), "PROGRAMS": 132}
    return tiles | {"num_warps": 8, "num_stages": 2}


def shrink_bwd_input_rule(arch: int, *, p: int, m: int, o: int, bits: int) -> dict[str, int]:
    """Large O, all but dW: W^T g by blocks of O."""
    if arch == launch.INTERPRETER:
        return shrink_bwd_rule(arch, p=p, m=m, o=o, bits=bits)
    sizes = (64, 64, 64) if bits == 16 else (32, 32, 32)
    tiles = dict(zip(("BLOCK_P", "BLOCK_M", "BLOCK_O"), sizes, strict=True))
    return tiles | {"BLOCK_O2": 0, "PROGRAMS": 264, "num_warps": 8, "num_stages": 2}


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
_OF_IMAGES = {"gate", "drop_scale"}  # their ranges end with an image: many
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
    spans, span = (n, hw) if parts & _OF_IMAGES else (1, n * hw)
    blocks = triton.cdiv(span, block_p)
    splits = min(blocks, max(1, programs // (chunks_m * chunks_o * spans)))
    length = triton.cdiv(blocks, splits) * block_p
    splits = triton.cdiv(span, length)
    ranges = spans * splits
    sums_shape = (2, ranges, m) if inputs.affine is None else (ranges, 2, m)

    def partials(name: str, *shape: int) -> Tensor | None:
        dtype = torch.float64 if name in _OF_IMAGES else torch.float32
        return inputs.y.new_empty(shape, dtype=dtype) if name in parts else None

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
            PRECISION=layout.precision(),
            **tiles,
        )
    return {k: v for k, v in zip(_Gradients._fields, outputs, strict=True) if v is not None}


def _launches(parts: set[str], y: Tensor, o: int) -> list[tuple[str, set[str]]]:
    """Which launch forms which parts: one pass where dW stays on chip, its partials being few."""
    m, bits = y.shape[1], 8 * y.element_size()
    of_images = parts & _OF_IMAGES
    if not shrink_bwd_fused(launch.architecture(), o, bits):
        calls = [
            ("shrink_bwd_input", parts - {"weight"}),
            ("shrink_bwd_weight", parts & {"weight"}),
        ]
    elif of_images and (m > 32 or y.shape[0] * o * m > 1 << 24):  # registers; partials of dW
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
        dy, dweight, dscale, dshift, dlocal, dresidual, dgate, ddrop_scale. With ``affine``, in
        place of dy the gradient dz at scale y + shift, and in place of dscale and dshift one
        tensor (2, M) in fp64: the sums over pixels of dz and of dz (y - mean) invstd, dz being
        as returned.
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
        layout.operand(weight, y),
        layout.dense(tensors["scale"]),
        layout.dense(tensors["shift"]),
        layout.dense_map(tensors["local"]),
        layout.dense(tensors["gate"]),
        layout.dense(tensors["drop_scale"]),
        layout.dense(affine),
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
