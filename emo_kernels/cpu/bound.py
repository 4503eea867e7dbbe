"""A kernel's call that eager inference repeats, with its checks in C++: 3 us a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from emo_kernels import _C
from emo_kernels.cpu import layout
from emo_kernels.spec import BoundCall, Conditions

_PLAIN = (Tensor, torch.nn.Parameter)

# Who else wants to see the call, or records it, asks for the operator: (function, argument, the
# answer for nobody).
_NOBODY: list[tuple[str, Any, Any]] = [
    ("torch.is_grad_enabled", None, False),
    ("torch.is_autocast_enabled", "cpu", False),
    ("torch._C._is_tracing", None, False),
    ("torch._C._len_torch_function_stack", None, 0),
    ("torch._C._len_torch_dispatch_stack", None, 0),
    ("torch._C._autograd._profiler_enabled", None, False),
]


def _resolve(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


def _torch_interface() -> tuple[Any, list[tuple[Any, Any, Any]]] | None:
    """(capsule, flags), where this torch has them all."""
    try:
        flags = [(_resolve(path), argument, answer) for path, argument, answer in _NOBODY]
    except AttributeError:
        return None
    known = layout.DLPACK is not None and hasattr(forward_ad, "_current_level")
    return (layout.DLPACK, flags) if known else None


_INTERFACE = _torch_interface()


def bind(
    kernel: _C.Prepared,
    x: Tensor,
    strides: Sequence[int],
    out_shape: tuple[int, ...],
    conditions: Conditions,
    *,
    memory_format: torch.memory_format | None = None,
    is_dense: Callable[[Tensor], bool] = Tensor.is_contiguous,
) -> BoundCall | None:
    """``kernel`` as a function of the map, ``None`` where it cannot be bound.

    The function returns ``None``, and has done nothing, where the map is of another kind than x,
    where a condition no longer holds or a weight lies elsewhere, and where the operator is wanted.

    Args:
        kernel: for maps of x's shape and dtype.
        strides: of those maps.
        out_shape: of the result, a map whose pixels are dense or a matrix.
        is_dense: whether the kernel reads a weight where it lies.
        memory_format: what brings other maps into these strides; ``None``: they are not taken.
    """
    tensors = [place.get(key) for place, key in conditions.weights]
    dense = all(t is not None and type(t) in _PLAIN and is_dense(t) for t in tensors)
    if _INTERFACE is None or type(x) is not Tensor or x.numel() == 0 or not dense:
        return None
    api, flags = _INTERFACE
    return _C.bind_call(
        kernel=kernel,
        api=api,
        x=x,
        map_strides=strides,
        layout=memory_format,
        shape=out_shape,
        strides=layout.strides(*out_shape[1:]) if len(out_shape) == 4 else (out_shape[1], 1),
        places=[*conditions.places, (forward_ad.__dict__, "_current_level")],
        sized=conditions.sized,
        weights=conditions.weights,
        flags=flags,
        tools=(Tensor.is_neg, torch.get_num_threads, Tensor.contiguous),
    )
