"""The channel means that squeeze-excite takes of a map: torch ops over the backends' kernels.

Semantics: :mod:`emo_kernels.reference.squeeze`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels.ops.registration import define_kernel, empty_map


def _completed(grad: Tensor, y: Tensor, affine: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    return empty_map(dz, dz.shape), affine.new_empty((2, y.shape[1]), dtype=torch.float64)


squeeze = define_kernel(
    "squeeze",
    "Tensor y, Tensor scale, Tensor shift",
    "",
    "Tensor",
    lambda y, scale, _: scale.new_empty(y.shape[:2]),
)

squeeze_backward = define_kernel(
    "squeeze_backward",
    "Tensor grad, Tensor y, Tensor affine, Tensor dz",
    "",
    "(Tensor, Tensor)",
    _completed,
)
