"""Memory in which mistakes show: poison, sentinel borders, odd strides, guard pages.

A kernel that leaves a result unwritten, reads past a tensor, assumes dense strides or writes
outside its output is often right by luck on fresh contiguous tensors. The tools here take the
luck away.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

POISONS = ("nan", "huge")
_M_PERTURB, _M_MMAP_MAX = -6, -4


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's ``mallopt``, or None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "mallopt", None)


@contextmanager
def poisoned_memory(poison: str | None = "nan") -> Iterator[None]:
    """Fill memory that nobody has written yet.

    ``nan`` makes torch fill every tensor that it allocates uninitialised (``torch.empty`` and its
    kin, from Python and from C++, on every device) with NaN. ``huge`` makes glibc's ``malloc``
    fill blocks of 1 KB and more with 0xFE bytes (-1.7e38 in fp32 and bf16): it also reaches
    buffers that a kernel takes without torch. Results under the two must agree to the last bit.
    """
    if poison is None:
        yield
    elif poison == "nan":
        with _nan_filled_tensors():
            yield
    elif poison == "huge":
        with _perturbed_malloc(0x01):  # malloc writes the complement
            yield
    else:
        raise ValueError(f"poison must be one of {POISONS} or None, got {poison!r}")


@contextmanager
def _nan_filled_tensors() -> Iterator[None]:
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_filling
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warn_only)


@contextmanager
def _perturbed_malloc(byte: int) -> Iterator[None]:
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_MAX, 0)  # fresh mappings are zero and would escape the perturbation
    mallopt(_M_PERTURB, byte)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)
        mallopt(_M_MMAP_MAX, 65536)


def _nan_buffer(numel: int, like: Tensor) -> Tensor:
    fill = float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max
    return torch.full((numel,), fill, dtype=like.dtype, device=like.device)


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _channels_last(t: Tensor) -> Tensor:
    if t.dim() != 4:
        return t.contiguous()
    return torch.empty_like(t, memory_format=torch.channels_last).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """Last two dimensions exchanged in memory (columns first)."""
    return t if t.dim() < 2 else t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _sliced(t: Tensor) -> Tensor:
    """The middle of a NaN-filled tensor that is larger in every dimension: offset and gaps."""
    if t.dim() == 0:
        return t
    larger = [size + 2 + axis % 2 for axis, size in enumerate(t.shape)]
    buffer = _nan_buffer(torch.Size(larger).numel(), t).view(larger)
    view = buffer[tuple(slice(1, 1 + size) for size in t.shape)]
    return view.copy_(t)


def _sliced_channels_last(t: Tensor) -> Tensor:
    """As ``sliced``, of a channels_last tensor: unit stride along C, gaps between pixels."""
    if t.dim() != 4:
        return _sliced(t)
    return _sliced(t.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


def _strided(t: Tensor) -> Tensor:
    """Every second element of every dimension of a NaN-filled tensor."""
    if t.dim() == 0:
        return t
    buffer = _nan_buffer(torch.Size([2 * s for s in t.shape]).numel(), t)
    view = buffer.view([2 * s for s in t.shape])[tuple(slice(0, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _offset(t: Tensor) -> Tensor:
    """Contiguous, but starting at element 1 of its storage and followed by NaN."""
    buffer = _nan_buffer(t.numel() + 17, t)
    return buffer[1 : 1 + t.numel()].view(t.shape).copy_(t)


def _expanded(t: Tensor) -> Tensor:
    """Stride 0 in every dimension, as the gradient of ``sum()``: all elements become the first."""
    if t.numel() == 0:
        return t
    return t.reshape(-1)[0].clone().expand(t.shape)


def _cat(t: Tensor) -> Tensor:
    """A part of a tensor that was concatenated along the channels, as ``cat`` hands it back."""
    axis = 1 if t.dim() > 1 else 0
    nan = torch.full_like(t, float("nan"))
    joined = torch.cat([nan, t, nan], axis)
    return joined.narrow(axis, t.shape[axis], t.shape[axis])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "sliced": _sliced,
    "sliced_channels_last": _sliced_channels_last,
    "strided": _strided,
    "offset": _offset,
    "expanded": _expanded,
    "cat": _cat,
}
VALUE_LAYOUTS = tuple(name for name in LAYOUTS if name != "expanded")


def with_layout(t: Tensor, layout: str) -> Tensor:
    """The same values (for ``expanded``: the first value everywhere) in another arrangement."""
    return LAYOUTS[layout](t.detach())


class Bordered:
    """A tensor inside a larger one whose border must never change.

    >>> inside = Bordered((2, 3), torch.float32)
    >>> inside.view.shape
    torch.Size([2, 3])
    >>> inside.assert_border_intact("result")
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, border: int = 64, fill: float = -1234.5
    ) -> None:
        numel = torch.Size(shape).numel()
        self.fill = torch.tensor(fill, dtype=dtype)
        self.buffer = self.fill.repeat(numel + 2 * border)
        self.inside = slice(border, border + numel)
        self.view = self.buffer[self.inside].view(shape)
        self.view.fill_(float("nan") if dtype.is_floating_point else 0)

    def assert_border_intact(self, name: str) -> None:
        """Raise if anything but ``view`` was written."""
        mask = self.buffer != self.fill
        mask[self.inside] = False
        assert not mask.any(), (
            f"{name}: wrote outside its tensor at elements "
            f"{(mask.nonzero().flatten() - self.inside.start)[:4].tolist()}"
        )

    def assert_fully_written(self, name: str) -> None:
        """Raise if some element of ``view`` still holds NaN."""
        left = int(self.view.isnan().sum())
        assert not left, f"{name}: {left} of {self.view.numel()} elements were not written"


def guarded(t: Tensor, side: str) -> Tensor:
    """A copy whose memory ends (``right``) or begins (``left``) at an inaccessible page.

    Reading or writing one byte past that end kills the process: call this in a subprocess.
    Dense layouts (contiguous, channels_last, transposed) keep their strides.
    """
    page = mmap.PAGESIZE
    storage_bytes = max(t.numel() * t.element_size(), 1)
    pages = -(-storage_bytes // page)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.munmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    length = (pages + 2) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), "mmap failed"
    for guard in (base, base + (pages + 1) * page):
        assert libc.mprotect(guard, page, 0) == 0, "mprotect failed"
    start = base + page + (pages * page - storage_bytes if side == "right" else 0)
    memory = (ctypes.c_char * storage_bytes).from_address(start)
    weakref.finalize(memory, libc.munmap, base, length)
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel()) if t.numel() else t.flatten()
    return torch.as_strided(flat, t.shape, torch.empty_like(t).stride()).copy_(t.detach())
