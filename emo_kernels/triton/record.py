"""What a model asks of the Triton kernels: its calls as shapes, and the launches they make.

For whoever runs those calls again on numbers of its own: the search for launch parameters
(``tune.py``) and the benchmarks.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels.triton import launch


class TensorSpec(NamedTuple):
    """A tensor of a recorded call, without its numbers.

    Attributes:
        storage: the tensors of one call that share memory have one number.
        offset: of its first element from that of the first such tensor.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    storage: int
    offset: int

    def fill(self, generator: torch.Generator) -> Tensor:
        """A tensor of this kind with small random numbers."""
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if not self.dtype.is_floating_point:
            return made.zero_()
        if self.dtype == torch.float64:  # sums and counts, which variances come from
            return made.uniform_(1.0, 2.0, generator=generator)
        pointwise = len(self.shape) == 4 and self.shape[2:] == (1, 1)
        std = max(self.shape[1], 1) ** -0.5 if pointwise else 0.5
        return made.normal_(0.0, std, generator=generator)

    def view_of(self, other: Tensor, spec: TensorSpec) -> Tensor | None:
        """This tensor inside another one of the same memory, or ``None`` if it reaches beyond."""
        first = self.offset - spec.offset
        last = first + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        reach = sum((n - 1) * step for n, step in zip(spec.shape, spec.stride, strict=True))
        if self.dtype != spec.dtype or first < 0 or last > reach or 0 in self.shape:
            return None
        return other.as_strided(self.shape, self.stride, first)


@dataclass
class Call:
    """One call of a function of this namespace, and the launches it made, in order."""

    function: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    launches: list[str] = field(default_factory=list)
    inner: bool = False  # made by another recorded call
    count: int = 1

    @property
    def identity(self) -> str:
        """Equal for calls that do the same work."""
        return repr((self.function, self.args, sorted(self.options.items())))

    @property
    def bytes(self) -> int:
        """Of its tensor arguments."""
        return sum(math.prod(s.shape) * s.dtype.itemsize for s in _leaves(list(self.args)))

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Fresh arguments: the same numbers at each call, shared memory shared."""
        specs = list(_leaves([*self.args, *self.options.values()]))
        device = specs[0].device if specs else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        made: dict[TensorSpec, Tensor] = {}
        for spec in sorted(specs, key=lambda spec: -math.prod(spec.shape)):
            if spec not in made:
                inside = (
                    spec.view_of(tensor, other)
                    for other, tensor in made.items()
                    if other.storage == spec.storage
                )
                view = next((v for v in inside if v is not None), None)
                made[spec] = spec.fill(generator) if view is None else view
        args, options = (_replace(value, made) for value in (list(self.args), self.options))
        return tuple(args), options


def _leaves(value: Any) -> Iterator[TensorSpec]:
    if isinstance(value, TensorSpec):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _replace(value: Any, made: Mapping[TensorSpec, Tensor]) -> Any:
    if isinstance(value, TensorSpec):
        return made[value]
    if isinstance(value, list):
        return [_replace(item, made) for item in value]
    if isinstance(value, dict):
        return {name: _replace(item, made) for name, item in value.items()}
    return value


def _describe(value: Any, storages: dict[int, tuple[int, int]]) -> Any:
    """Tensors as specs; ``storages``: address -> (number, offset of its first tensor)."""
    if isinstance(value, Tensor):
        address, offset = value.untyped_storage().data_ptr(), int(value.storage_offset())
        number, first = storages.setdefault(address, (len(storages), offset))
        shape, device = tuple(value.shape), str(value.device)
        return TensorSpec(shape, value.stride(), value.dtype, device, number, offset - first)
    if isinstance(value, list | tuple):
        return [_describe(item, storages) for item in value]
    return value


def functions(namespace: ModuleType) -> dict[str, Callable[..., Any]]:
    """The functions of a namespace that do work: public, neither a limit nor a launch rule."""
    return {
        name: value
        for name, value in vars(namespace).items()
        if inspect.isfunction(value)
        and name[0] != "_"
        and not name.endswith(("_unsupported", "_rule"))
    }


@contextmanager
def record(namespace: ModuleType) -> Iterator[list[Call]]:
    """Collect every call of the namespace's functions, in order, with the launches it makes."""
    calls: list[Call] = []
    active: list[Call] = []

    def listen(kernel: str, sizes: dict[str, int], parameters: dict[str, int]) -> dict[str, int]:
        if active:
            active[-1].launches.append(launch.key(kernel, launch.architecture(), **sizes))
        return parameters

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            storages: dict[int, tuple[int, int]] = {}
            described = tuple(_describe(value, storages) for value in args)
            keywords = {k: _describe(value, storages) for k, value in options.items()}
            active.append(Call(name, described, keywords, inner=bool(active)))
            calls.append(active[-1])
            try:
                return function(*args, **options)
            finally:
                active.pop()

        return call

    replacements = {f: wrapped(name, f) for name, f in functions(namespace).items()}
    with _replaced(namespace.__name__, replacements), launch.listening(listen):
        yield calls


@contextmanager
def _replaced(package: str, replacements: Mapping[Any, Any]) -> Iterator[None]:
    """Other functions in their place, wherever a module of the package names them."""
    changed: list[tuple[ModuleType, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            for attribute, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in replacements:
                    changed.append((module, attribute, value))
                    setattr(module, attribute, replacements[value])
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def distinct(calls: list[Call]) -> list[Call]:
    """One call of each kind, with the number of times it was made."""
    found: dict[str, Call] = {}
    for call in calls:
        first = found.setdefault(call.identity, call)
        if first is not call:
            first.count += 1
    return list(found.values())


def launches(calls: list[Call]) -> dict[str, Call]:
    """Every launch by its key in the table, with the first call that makes it."""
    return {key: call for call in reversed(distinct(calls)) for key in reversed(call.launches)}
