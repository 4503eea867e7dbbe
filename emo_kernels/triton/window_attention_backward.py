"""Window attention, backward: which kernels run, in which order.

Computes: gradients of reference/window_attention.py from g = d out. The attention itself gives
    gradients at q, k and the values (window_attention_small_backward.py, for windows of more than
    128 tokens window_attention_large_backward.py); those of expanded values go through the expand
    kernels; projection, norm and parameters are in window_attention_gradients.py.
Tiling: see those files.
Traffic: 5 C elements a pixel for the attention, 7 C for dx, 3 C for dWqk; LN statistics C more.
    Expanded values and large windows also write n = norm(x), and large ones q and k.
Numerics: rounding points are n, q, k, A, dS, and dq, dk, dV (and dn of expanded values) as stored.
Limits: as the forward. Same bits on repeat: no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from emo_kernels.triton import layout
from emo_kernels.triton.expand import expand
from emo_kernels.triton.expand_backward import expand_backward
from emo_kernels.triton.normalize import layer_norm_statistics
from emo_kernels.triton.window_attention_gradients import (
    Norm,
    add_padding_gradient,
    input_gradient,
    weight_gradients,
)
from emo_kernels.triton.window_attention_large import project
from emo_kernels.triton.window_attention_large_backward import large_backward
from emo_kernels.triton.window_attention_small_backward import small_backward
from emo_kernels.triton.window_tiles import GRIDS, Windows, one_tile, vector


def window_attention_backward(
    grad: Tensor,
    x: Tensor,
    qk_weight: Tensor | None = None,
    qk_bias: Tensor | None = None,
    v_weight: Tensor | None = None,
    v_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    affine: Tensor | None = None,
    residual: Tensor | None = None,
    _qk: Tensor | None = None,
    *,
    needed: Sequence[bool],
    **options: Any,
) -> list[Tensor]:
    """As :func:`emo_kernels.reference.window_attention_backward`; q and k are computed again."""
    tensors = (x, qk_weight, qk_bias, v_weight, v_bias, norm_weight, norm_bias)
    if x.numel() == 0:
        return _nothing(tensors, affine, needed)
    with layout.on_device(x):
        return _Backward(grad, tensors, affine, residual, needed, **options).run()


def _nothing(
    tensors: Sequence[Tensor | None], affine: Tensor | None, needed: Sequence[bool]
) -> list[Tensor]:
    """Gradients over no images."""
    grads = [torch.zeros_like(t) for t, wanted in zip(tensors, needed) if wanted and t is not None]
    if affine is None:
        return grads
    sums = torch.zeros((2, affine.shape[1]), dtype=torch.float64, device=affine.device)
    return grads[: sum(needed[:5])] + [sums] * bool(needed[5])


class _Backward:
    """One call of :func:`window_attention_backward`, kernel after kernel."""

    def __init__(
        self,
        grad: Tensor,
        tensors: Sequence[Tensor | None],
        affine: Tensor | None,
        residual: Tensor | None,
        needed: Sequence[bool],
        *,
        head_dim: int,
        window_size: int = 7,
        window_mode: str = "grid",
        norm: str = "none",
        eps: float = 1e-6,
        v_act: str = "none",
        v_groups: int = 1,
    ) -> None:
        x, self.qk_weight, self.qk_bias, self.v_weight, self.v_bias, weight, bias = tensors
        assert x is not None
        self.x, self.grad, self.needed = layout.pixels(x), layout.pixels(grad), needed
        self.residual = None if residual is None else layout.pixels(residual)
        self.head_dim, self.eps, self.v_act, self.v_groups = head_dim, eps, v_act, v_groups
        self.windows, self.grids = Windows.of(x, window_size), GRIDS[window_mode]
        values_per_head = grad.shape[1] * head_dim // x.shape[1]
        self.large = not one_tile(x, self.windows, head_dim, values_per_head)
        self.qk_matrix = None if self.qk_weight is None else layout.operand(self.qk_weight, x)
        statistics = layer_norm_statistics(self.x, eps) if norm == "layer" else None
        self.norm = Norm(norm, vector(weight), vector(bias), statistics)
        self.affine = affine
        self.n, self.attention_norm = self.x, self.norm
        if self.large or self.v_weight is not None:
            self.n, self.qk = project(
                self.x,
                self.qk_matrix if self.large else None,
                vector(self.qk_bias) if self.large else None,
                self.norm.weight,
                self.norm.bias,
                head_dim=head_dim,
                norm=norm,
                eps=eps,
            )
            self.attention_norm = Norm("none")

    def run(self) -> list[Tensor]:
        """The gradients that are needed, in the order of the arguments."""
        dqk, dv, paddings = self.attention()
        needed = self.needed
        dn: Tensor | None = dv
        of_values: list[Tensor] = []
        if self.v_weight is not None:
            dn, of_values = self.value_gradients(dqk, dv, paddings)
        of_qk = []
        if needed[1] or needed[2]:
            assert dqk is not None and self.qk_weight is not None
            of_qk = weight_gradients(
                self.n,
                dqk,
                self.qk_weight,
                self.qk_bias,
                self.attention_norm,
                needed=(needed[1], needed[2]),
            )
        of_x, of_norm = self.input_gradients(dn, None if self.qk_weight is None else dqk)
        return [*of_x, *of_qk, *of_values, *of_norm]

    def attention(self) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Gradients at q and k and at the values, and of the latter, sums over the padding."""
        images, c, h, w = self.x.shape
        values, v_bias = None, None
        if self.v_weight is not None:
            values = expand(
                self.n,
                self.v_weight,
                self.v_bias,
                norm="none",
                eps=self.eps,
                act=self.v_act,
                groups=self.v_groups,
            )
            v_bias = vector(self.v_bias) if self.windows.pads(self.x) else None
        dqk = None
        if self.qk_weight is not None or values is not None:
            dqk = layout.new_map(self.x, images, c if self.qk_weight is None else 2 * c, h, w)
        dv = layout.new_map(self.x, *self.grad.shape)
        paddings = []
        for second, grid in enumerate(self.grids):
            partition = {"head_dim": self.head_dim, "grid": grid, "v_act": self.v_act}
            padding = self.partition(values, v_bias, dqk, dv, accumulate=second > 0, **partition)
            paddings += [] if padding is None else [padding]
        return dqk, dv, paddings

    def partition(
        self,
        values: Tensor | None,
        v_bias: Tensor | None,
        dqk: Tensor | None,
        dv: Tensor,
        **options: Any,
    ) -> Tensor | None:
        """The attention kernels of one partition."""
        if self.large:
            return large_backward(
                self.qk,
                vector(self.qk_bias),
                self.n if values is None else values,
                v_bias,
                self.grad,
                dv if dqk is None else dqk,
                dv,
                self.windows,
                channels=self.x.shape[1],
                **options,
            )
        parameters = {
            "qk_weight_ptr": self.qk_matrix,
            "qk_bias_ptr": vector(self.qk_bias),
            "v_bias_ptr": v_bias,
        }
        return small_backward(
            self.n,
            values,
            self.grad,
            dqk,
            dv,
            self.attention_norm,
            parameters,
            self.windows,
            **options,
        )

    def value_gradients(
        self, dqk: Tensor | None, dv: Tensor, paddings: list[Tensor]
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Through the expansion of the values: the gradient at n, and of v_weight and v_bias."""
        needed = self.needed
        at_n = any(needed[i] for i in (0, 5, 6))
        assert self.v_weight is not None
        grads = expand_backward(
            dv,
            self.n,
            self.v_weight,
            self.v_bias,
            None,
            None,
            None,
            None,
            None,
            None,
            dqk if self.qk_weight is None else None,
            needed=[at_n, needed[3], needed[4], False, False],
            norm="none",
            eps=self.eps,
            act=self.v_act,
            groups=self.v_groups,
        )
        if needed[4] and paddings:
            assert self.v_bias is not None
            sums = paddings[0] if len(paddings) == 1 else torch.cat(paddings)
            add_padding_gradient(grads[-1], self.v_bias.contiguous(), sums, self.v_act)
        return (grads[0], grads[1:]) if at_n else (None, grads)

    def input_gradients(
        self, dn: Tensor | None, dqk: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of x, and of the norm's parameters."""
        needed = (self.needed[0], self.needed[5], self.needed[6])
        norm, residual = self.norm, self.residual
        if self.affine is not None:
            needed = (needed[0], needed[1], False)
            norm, residual = Norm("batch", statistics=self.affine[2:].contiguous()), None
        if not any(needed) or dn is None:
            return [], []
        grads = input_gradient(self.x, dn, dqk, self.qk_matrix, norm, residual, needed=needed)
        return grads[: needed[0]], grads[needed[0] :]
