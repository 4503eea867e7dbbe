"""Multiply-accumulates of a model, counted from the shapes it computes; nothing is computed."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass.

    Attributes:
        conv: of convolutions, squeeze-excite included.
        attention: of the two matrix products of attention.
        linear: of linear layers.
        norm: what the published counts add for norms: 2 an element for a batch norm, 5 for a layer
            norm.
    """

    conv: int
    attention: int
    linear: int
    norm: int

    @property
    def total(self) -> int:
        """Convolutions, attention and linear layers."""
        return self.conv + self.attention + self.linear

    @property
    def published(self) -> int:
        """The count that papers print as FLOPs (fvcore's)."""
        return self.total + self.norm


def count_macs(model: nn.Module, size: tuple[int, ...] = (1, 3, 224, 224)) -> Macs:
    """Count the multiply-accumulates of ``model`` in inference on an input of ``size``.

    Example:
        >>> from emo_kernels.models import create_model
        >>> count_macs(create_model("emo_5m")).published
        902583776
    """
    twin = deepcopy(model).to("meta").eval()
    norm = 0

    def add_norm(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal norm
        norm += out.numel() * (2 if isinstance(module, _BatchNorm) else 5)

    for module in twin.modules():
        if isinstance(module, (_BatchNorm, nn.LayerNorm)):
            module.register_forward_hook(add_norm)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        twin(torch.empty(size, device="meta"))
    flops = counter.get_flop_counts().get("Global", {})
    counts = {str(operator).split(".")[1]: int(count) // 2 for operator, count in flops.items()}
    return Macs(
        conv=counts.get("convolution", 0),
        attention=counts.get("bmm", 0),
        linear=counts.get("addmm", 0) + counts.get("mm", 0),
        norm=norm,
    )
