"""What one inverted residual mobile block is: its switches, its tensors, its shape rules.

The lowest layer of the package: modules, operators and every backend speak of a block in these
words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("none", "relu", "gelu", "silu")
NORMS = ("none", "batch", "layer")
WINDOW_MODES = ("grid", "block", "both")
OP_ORDERS = ("attn_conv", "conv_attn")


F = TypeVar("F", bound=Callable[..., Any])


def constant_under_compile(function: F) -> F:
    """What ``torch.compiler.assume_constant_result`` does, without importing dynamo (1 s)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # dynamo's
    return function


def activate(x: Tensor, act: str) -> Tensor:
    """act(x): ``none``, ``relu``, ``gelu`` (exact, by erf) or ``silu``."""
    if act == "none":
        return x
    if act == "relu":
        return functional.relu(x)
    if act == "gelu":
        return functional.gelu(x)
    if act == "silu":
        return functional.silu(x)
    raise ValueError(f"activate: act must be 'none', 'relu', 'gelu' or 'silu', got {act!r}")


def conv_padding(kernel_size: int, stride: int) -> int:
    """Zero padding of the published convolutions: ceil((k - s) / 2), dilation not considered."""
    return -((stride - kernel_size) // 2)


def conv_output_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels along one side after a convolution."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


class IRMBSpec(NamedTuple):
    """Switches of one block that are not tensors. Hashable; a constant to ``torch.compile``.

    Attributes:
        norm: normalisation in front: ``none``, ``batch`` (running statistics) or ``layer``.
        norm_eps: epsilon of that normalisation.
        act: activation after the expanding 1x1 convolution, and inside squeeze-excite.
        head_dim: channels of one attention head; 0 means the block has no attention.
        window_size: side of an attention window in pixels; <= 0 means the whole map.
        window_mode: ``grid`` (strided, as published), ``block`` (contiguous) or ``both`` (summed).
        attn_pre: attention on the unexpanded map (True) or over the expanded V (False).
        v_groups: groups of the expanding convolution (1, or the number of heads).
        stride, padding, dilation: of the depthwise convolution.
        bn_eps: epsilon of the batch norm behind the depthwise convolution.
        skip: the two skips: expanded map around the depthwise convolution, input around the block.
        op_order: ``attn_conv`` as published, or ``conv_attn``, the swapped ablation.
    """

    norm: str = "none"
    norm_eps: float = 1e-6
    act: str = "none"
    head_dim: int = 0
    window_size: int = 7
    window_mode: str = "grid"
    attn_pre: bool = False
    v_groups: int = 1
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    bn_eps: float = 1e-6
    skip: bool = True
    op_order: str = "attn_conv"


class IRMBWeights(NamedTuple):
    """Tensors of one block, in their state-dict shapes; ``None`` where the block has none.

    C input channels, M expanded channels, O output channels, K depthwise kernel size,
    R squeeze-excite width, G groups of the expanding convolution.
    """

    norm_weight: Tensor | None = None  # (C,)
    norm_bias: Tensor | None = None  # (C,)
    norm_mean: Tensor | None = None  # (C,)  batch norm only
    norm_var: Tensor | None = None  # (C,)  batch norm only
    qk_weight: Tensor | None = None  # (2C, C, 1, 1)  None with attention: Q = K = normed x
    qk_bias: Tensor | None = None  # (2C,)
    v_weight: Tensor | None = None  # (M, C / G, 1, 1)  None: no expansion, M = C
    v_bias: Tensor | None = None  # (M,)
    dw_weight: Tensor | None = None  # (M, 1, K, K)  None: no depthwise convolution (ablation)
    bn_weight: Tensor | None = None  # (M,)
    bn_bias: Tensor | None = None  # (M,)
    bn_mean: Tensor | None = None  # (M,)
    bn_var: Tensor | None = None  # (M,)
    se_reduce_weight: Tensor | None = None  # (R, M, 1, 1)
    se_reduce_bias: Tensor | None = None  # (R,)
    se_expand_weight: Tensor | None = None  # (M, R, 1, 1)
    se_expand_bias: Tensor | None = None  # (M,)
    proj_weight: Tensor | None = None  # (O, M, 1, 1)
    gamma: Tensor | None = None  # (O,)  LayerScale

    def present(self) -> Iterator[tuple[str, Tensor]]:
        """The (name, tensor) pairs that are not ``None``."""
        return ((n, t) for n, t in zip(self._fields, self, strict=True) if t is not None)


class Conditions(NamedTuple):
    """On what it depends that a call checked once may be made again unchecked.

    Attributes:
        places: (dict, key) pairs that must hold the objects they hold, or go on lacking the key.
        sized: dicts that must keep their number of entries.
        weights: (dict, key) of every tensor, which must stay where it lies in memory.
    """

    places: list[tuple[dict[Any, Any], Any]]
    sized: list[dict[Any, Any]]
    weights: list[tuple[dict[Any, Any], Any]]


class BoundCall(Protocol):
    """A call checked once: it gives ``None`` and does nothing where its conditions do not hold."""

    def __call__(self, x: Tensor, /) -> Tensor | None:
        """The operator's result for another map."""

    def followed_by(
        self,
        calls: tuple[BoundCall, ...],
        places: list[tuple[dict[Any, Any], Any]],
        sized: list[dict[Any, Any]],
        /,
    ) -> BoundCall | None:
        """This call and then those, each on the result of the one before; ``None``: cannot be.

        Args:
            places, sized: further conditions.
        """


class BatchNormMode(NamedTuple):
    """How one batch norm runs in a step.

    Attributes:
        batch_statistics: with the statistics of the batch, which move the running ones, or with
            the running ones.
        momentum: share of the batch in the running statistics that it moves.
        process_group: over which the batch extends (``torch.nn.SyncBatchNorm``); ``None``: none.
    """

    batch_statistics: bool = False
    momentum: float = 0.1
    process_group: Any = None


def composition_limits(weights: IRMBWeights, spec: IRMBSpec) -> str | None:
    """Why the operators' kernels, of whatever backend, do not make up this block, or ``None``."""
    if weights.dw_weight is None:
        return "no kernels for a block without a depthwise convolution"
    if spec.head_dim and spec.op_order == "conv_attn":
        return "no kernels for attention behind the convolution (op_order 'conv_attn')"
    if spec.norm != "none" and not spec.head_dim and weights.v_weight is None:
        return "no kernels for a norm in front of neither attention nor expansion"
    return None


def batch_norm_affine(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm with known statistics as ``scale * x + shift``, both (C,)."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
