"""What squeeze-excite sees of a map, and what it sends back: the channel means of an image."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from emo_kernels.reference.expand import normalize
from emo_kernels.reference.gradients import channel_sums, gradients


def squeeze(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The mean over an image's pixels of silu(scale[m] y + shift[m]).

    Args:
        y: (N, M, H, W).
        scale, shift: (M,), the batch norm as an affine map.

    Returns:
        (N, M), in the dtype of ``scale``.

    Example:
        >>> import torch
        >>> squeeze(torch.full((1, 1, 2, 2), 20.0), torch.ones(1), torch.zeros(1)).item()
        20.0
    """
    z = normalize(y.to(scale.dtype), scale, shift, norm="affine", eps=0.0)
    return F.silu(z).mean((2, 3))


def squeeze_backward(grad: Tensor, y: Tensor, affine: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Add to dz, the gradient at z = scale[m] y + shift[m], what comes through the means.

    Args:
        grad: (N, M) at the means.
        y, dz: (N, M, H, W).
        affine: (4, M): scale, shift, mean, 1 / standard deviation.

    Returns:
        dz complete, (N, M, H, W), and its sums (2, M) in float64: of dz and of dz yhat.
    """
    z = normalize(y.to(affine.dtype), affine[0], affine[1], norm="affine", eps=0.0)
    (through,) = gradients(lambda z: F.silu(z).mean((2, 3)), (z,), grad, (True,))
    dz = (dz + through).to(dz.dtype)
    return dz, channel_sums(dz, y, affine)
