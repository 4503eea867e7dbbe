from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

def build_info() -> dict[str, Any]: ...
def cuda_report() -> dict[str, Any]: ...
def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def selected_isa() -> str: ...
def scratch_bytes() -> int: ...
def release_scratch() -> None:
    """Give scratch of this thread, and the pages of dead maps, back to the system."""

def new_map(api: Any, like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """An uninitialised (N, C, H, W) map with dense pixels, in memory that dead maps left.

    ``api`` is torch's DLPack interface, ``like`` a tensor of the dtype.
    """

class Prepared:
    """A kernel call that lacks its map, its result and the number of threads."""

    def __init__(self) -> None:
        """A kernel that does nothing: what is left is the cost of the call."""

    def __call__(self, x: int, out: int, threads: int) -> None: ...

def prepare_irmb(
    dtype: int,
    weight_dtype: int,
    weights: tuple[int, ...],
    counts: tuple[int, ...],
    sizes: tuple[int, ...],
    switches: tuple[int, ...],
    norm_eps: float,
    bn_eps: float,
) -> Prepared: ...
def prepare_conv_norm_act(
    dtype: int,
    weight_dtype: int,
    weights: tuple[int, ...],
    pointers: tuple[int, ...],
    sizes: tuple[int, ...],
    eps: float,
) -> Prepared: ...
def prepare_norm_pool_linear(
    dtype: int, pointers: tuple[int, ...], sizes: tuple[int, ...], eps: float
) -> Prepared: ...

class Watch:
    def __init__(
        self,
        *,
        api: Any,
        empty: list[dict[str, Any]],
        switches: list[dict[str, Any]],
        holders: list[dict[str, Any]],
        tensors: list[Tensor],
    ) -> None: ...
    def holds(self) -> bool: ...

class BoundCall:
    """A kernel's call made again for another map."""

    def __call__(self, x: Tensor, /) -> Tensor | None:
        """The result; ``None``, and nothing is done, where something is not as it was."""

    def followed_by(
        self,
        calls: tuple[Any, ...],
        places: list[tuple[dict[Any, Any], Any]],
        sized: list[dict[Any, Any]],
        /,
    ) -> BoundCall | None:
        """This call and then ``calls``, each on the result of the one before, as one call.

        ``None`` where one of them is no ``BoundCall`` or does not take that result as it lies.

        Args:
            places, sized: on which it depends besides, as of :func:`bind_call`.
        """

def bind_call(
    kernel: Prepared,
    api: object,
    x: Tensor,
    map_strides: Sequence[int],
    layout: torch.memory_format | None,
    shape: Sequence[int],
    strides: Sequence[int],
    places: list[tuple[dict[Any, Any], Any]],
    sized: list[dict[Any, Any]],
    weights: list[tuple[dict[Any, Any], Any]],
    flags: list[tuple[Callable[..., Any], Any, Any]],
    tools: tuple[Callable[..., Any], ...],
) -> BoundCall:
    """A call checked once, to be made again.

    Args:
        kernel: runs on maps of x's shape and dtype with ``map_strides``, on the weights' memory.
        api: torch's capsule ``__dlpack_c_exchange_api__``.
        x: a map; its type, dtype and shape are those of every call.
        map_strides: of the maps; those of sides of one pixel do not matter.
        layout: brings other maps into these strides; ``None``: they are another call's.
        shape, strides: of the result, which is dense and has x's dtype.
        places: (dict, key): each must hold the same object, or lack the key, as now.
        sized: dicts that must keep their number of entries.
        weights: (dict, key): each must hold the same tensor in the same memory.
        flags: (function, argument or ``None``, singleton that it must return).
        tools: ``Tensor.is_neg``, ``torch.get_num_threads``, ``Tensor.contiguous``.
    """

class Launch:
    """A kernel of a training step that lacks its tensors' addresses and the number of threads."""

    def __call__(self, addresses: tuple[int, ...], threads: int) -> None: ...

def pixels(dtype: int, op: int, act: int, sizes: tuple[int, ...]) -> Launch: ...
def batch_norm(dtype: int, channels: int, count: float, momentum: float, eps: float) -> Launch: ...
def convert(from_dtype: int, dtype: int, count: int) -> Launch: ...
def conv_norm_act_backward(dtype: int, sizes: tuple[int, ...]) -> Launch: ...
def depthwise_conv2d(dtype: int, sizes: tuple[int, ...]) -> Launch: ...
def depthwise_conv2d_backward(dtype: int, sizes: tuple[int, ...]) -> Launch: ...
def expand(dtype: int, sizes: tuple[int, ...], eps: float) -> Launch: ...
def expand_backward(dtype: int, sizes: tuple[int, ...], eps: float) -> Launch: ...
def expand_depthwise(dtype: int, sizes: tuple[int, ...], eps: float) -> Launch: ...
def expand_depthwise_backward(dtype: int, sizes: tuple[int, ...], eps: float) -> Launch: ...
def shrink(dtype: int, sizes: tuple[int, ...]) -> Launch: ...
def shrink_backward(dtype: int, sizes: tuple[int, ...]) -> Launch: ...
def window_attention(dtype: int, sizes: tuple[int, ...], eps: float) -> Launch: ...
def window_attention_backward(dtype: int, sizes: tuple[int, ...], eps: float) -> Launch: ...

class Tape:
    """The launches of a pass, made again for other tensors of the same layouts.

    A place is (slot, bytes from its start); slot -1 is a null pointer. Slots count the inputs, then
    the results, then the memory between.

    Args:
        api: torch's capsule ``__dlpack_c_exchange_api__``.
        inputs: tensors of the layouts, or ``None``, that every call must give.
        results: tensors of the layouts that every call makes, at most four dimensions each.
        between: bytes of what is written and read by launches only.
        outputs: which result each output is; -1: ``None``.
        launches: each with its places.
    """

    def __init__(
        self,
        *,
        api: object,
        inputs: tuple[Tensor | None, ...],
        results: tuple[Tensor, ...],
        between: list[int],
        outputs: list[int],
        launches: list[tuple[Launch, list[tuple[int, int]]]],
    ) -> None: ...
    def __call__(
        self, inputs: tuple[Tensor | None, ...], threads: int
    ) -> tuple[Tensor | None, ...] | None:
        """The outputs; ``None``, and nothing has run, where an input has another layout."""

def cuda_sources() -> str: ...

# Pointers of a call: an address, or (address, dtype) where any dtype is taken.
_Pointers = tuple[int | tuple[int, int], ...]

def cuda_depthwise_conv2d_scratch(
    dtype: int, pointers: _Pointers, sizes: tuple[int, ...]
) -> int: ...
def cuda_depthwise_conv2d(
    dtype: int,
    pointers: _Pointers,
    sizes: tuple[int, ...],
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_depthwise_conv2d_walk(
    dtype: int, pointers: _Pointers, sizes: tuple[int, ...], scratch: int
) -> None: ...
def cuda_depthwise_conv2d_backward_scratch(
    dtype: int, pointers: _Pointers, sizes: tuple[int, ...]
) -> int: ...
def cuda_depthwise_conv2d_backward(
    dtype: int,
    pointers: _Pointers,
    sizes: tuple[int, ...],
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_depthwise_conv2d_backward_walk(
    dtype: int, pointers: _Pointers, sizes: tuple[int, ...], scratch: int
) -> None: ...
def cuda_expand_depthwise_scratch(
    dtype: int, pointers: _Pointers, sizes: tuple[int, ...]
) -> int: ...
def cuda_expand_depthwise(
    dtype: int,
    pointers: _Pointers,
    sizes: tuple[int, ...],
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_expand_depthwise_walk(
    dtype: int, pointers: _Pointers, sizes: tuple[int, ...], scratch: int
) -> None: ...
def cuda_expand_depthwise_shared_bytes(dtype: int, sizes: tuple[int, ...]) -> int: ...
def cuda_irmb_scratch(dtype: int, pointers: _Pointers, sizes: tuple[float, ...]) -> int: ...
def cuda_irmb_report(dtype: int, sizes: tuple[float, ...]) -> dict[str, Any]: ...
def cuda_irmb(
    dtype: int,
    pointers: _Pointers,
    sizes: tuple[float, ...],
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_irmb_walk(
    dtype: int, pointers: _Pointers, sizes: tuple[float, ...], scratch: int
) -> None: ...
