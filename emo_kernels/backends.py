"""The table of backends: which exist, why one is not usable here, which one runs a call.

A backend is a namespace (``emo_kernels.reference``, ``.cpu``, ``.triton``, ``.cuda``) whose
functions carry the operators' names. ``<operator>`` runs it, ``<operator>_unsupported`` (same
arguments) says why a call is outside its limits, ``<operator>_backward`` is its gradient kernel,
``<operator>_bind`` settles a call that eager inference will repeat, for as long as the conditions
hold; what a namespace lacks, it does not support. A whole block may be composed in ``ops`` of a
namespace's other kernels, which declares that by ``irmb_unsupported`` and
``irmb_training_unsupported`` alone; the kernels that such a block still lacks are those of the
backend that the table names beside it. A backend is chosen once, at the top of a call, and travels
down as a string; one asked for by name is obeyed or raises, only ``None`` may choose.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels.spec import constant_under_compile

ENVIRONMENT_VARIABLE = "EMO_KERNELS_BACKEND"


def _compiled_module_missing() -> str | None:
    try:
        importlib.import_module("emo_kernels._C")
    except ImportError as error:
        return (
            f"the compiled module emo_kernels._C does not import ({error}); reinstall emo_kernels"
        )
    return None


def _no_cuda_device() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if _interpreting():
        return None
    return _no_cuda_device() or _too_old_for_triton(torch.cuda.get_device_capability())


def _too_old_for_triton(capability: tuple[int, int]) -> str | None:
    if capability >= (8, 0):
        return None
    return "its kernels need a GPU of sm_80 or later, this one is sm_{}{}".format(*capability)


def _no_cuda_kernels() -> str | None:
    reason = _compiled_module_missing()
    if reason is not None:
        return reason
    proof = importlib.import_module("emo_kernels.cuda.proof")
    reason = proof.missing() or _no_cuda_device()
    return reason or proof.not_compiled_for(torch.cuda.get_device_capability())


def _cuda_kernels_unproven() -> str | None:
    proof = importlib.import_module("emo_kernels.cuda.proof")
    return proof.unproven(torch.cuda.get_device_capability())


class _Backend(NamedTuple):
    """One row: the devices whose tensors it takes, and what it needs on this machine."""

    devices: tuple[str, ...]  # empty: any
    unmet_need: Callable[[], str | None]
    interpreted: bool = False  # in its interpreter it takes CPU tensors, where asked for by name
    unproven: Callable[[], str | None] = lambda: None  # why it works, but only if asked for by name
    completed_by: str | None = None  # whose kernels a composed block takes where it has none


# In order of preference: the first that supports a call runs it.
_TABLE: dict[str, _Backend] = {
    "cuda": _Backend(
        ("cuda",), _no_cuda_kernels, unproven=_cuda_kernels_unproven, completed_by="triton"
    ),
    "triton": _Backend(("cuda",), _no_triton, interpreted=True),
    "cpu": _Backend(("cpu",), _compiled_module_missing),
    "reference": _Backend((), lambda: None),
}
NAMES = tuple(_TABLE)

_namespaces: dict[str, ModuleType] = {}  # filled at first use
_used: str | None = None  # set by use_backend, for the whole process


def release_memory() -> None:
    """Give the system back what the cpu kernels keep for the next call.

    That is the memory of maps that nobody holds any more, at most as much as a step or forward pass
    took at its peak, and the calling thread's scratch. The next call asks for it anew.
    """
    if _compiled_module_missing() is None:
        importlib.import_module("emo_kernels._C").release_scratch()


@constant_under_compile
def unavailable(name: str) -> str | None:
    """Why backend ``name`` runs nothing here, or ``None`` if it works, if only interpreted."""
    return _unavailable(name)


@cache
def _unavailable(name: str) -> str | None:
    if importlib.util.find_spec(f"emo_kernels.{name}") is None:
        return f"this version of emo_kernels has no {name} kernels"
    return _TABLE[name].unmet_need()


def available_backends() -> dict[str, str | None]:
    """Every backend by name: ``None`` if it is usable here, else the reason why not.

    Kernels that no run on such a GPU has proven yet are not: they run only if asked for by name.

    Example:
        >>> available_backends()["reference"] is None
        True
    """
    return {name: unavailable(name) or _unproven(name) for name in NAMES}


@constant_under_compile
def has(name: str, operator: str) -> bool:
    """Whether the namespace of backend ``name`` has ``operator``. Loads the namespace."""
    return _has(name, operator)


@cache
def _has(name: str, operator: str) -> bool:
    if name not in _namespaces:
        _namespaces[name] = importlib.import_module(f"emo_kernels.{name}")
    namespace = _namespaces[name]
    return _is_function(namespace, operator) or hasattr(namespace, f"{operator}_unsupported")


def _is_function(namespace: ModuleType, operator: str) -> bool:
    return callable(getattr(namespace, operator, None))  # a submodule may carry the name too


@constant_under_compile
def composes(name: str, operator: str) -> bool:
    """Whether backend ``name`` runs ``operator`` by its other kernels, composed in ``ops``."""
    return has(name, operator) and not _is_function(_namespaces[name], operator)


@constant_under_compile
def provides(name: str, operator: str) -> bool:
    """Whether a block composed of backend ``name`` has ``operator``, be it another's."""
    other = _TABLE[name].completed_by
    return has(name, operator) or (other is not None and has(other, operator))


def function(name: str, operator: str) -> Callable[..., Any]:
    """``operator`` of backend ``name``; both exist and work here, or the reason is raised.

    What a block composed of its kernels lacks comes from the backend that completes it.
    """
    reason = unavailable(check_name(name))
    if reason is None and has(name, operator):
        return getattr(_namespaces[name], operator)
    other = _TABLE[name].completed_by
    if reason is None and other is not None:
        return function(other, operator)
    reason = reason or f"{name} has no {operator} kernel"
    raise NotImplementedError(f"{operator}: backend {name!r} cannot run it: {reason}")


def check_name(name: str, source: str = "backend") -> str:
    """``name``, if it is a backend's; else a ValueError that names the close matches."""
    if name not in _TABLE:
        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}{hint}")
    return name


def check_usable(name: str, source: str = "backend") -> str:
    """``name``, if that backend works on this machine; else ValueError or NotImplementedError."""
    reason = unavailable(check_name(name, source))
    if reason is not None:
        raise NotImplementedError(f"{source} {name!r} is not usable here: {reason}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on backend ``name``, or raise.

    Process-wide, as the environment variable ``EMO_KERNELS_BACKEND``, which it overrides; a
    ``backend=`` argument overrides both.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: the backend is not usable here; the message says why.

    Example:
        >>> with use_backend("reference"):
        ...     pass
    """
    global _used
    previous, _used = _used, check_usable(name, "use_backend:")
    try:
        yield
    finally:
        _used = previous


def requested(backend: str | None) -> str | None:
    """The backend asked for: by argument, else by :func:`use_backend`, else by environment."""
    return backend or _used or os.environ.get(ENVIRONMENT_VARIABLE) or None


def places_of_request() -> list[tuple[dict[Any, Any], Any]]:
    """Where :func:`requested` looks, beside its argument."""
    variables: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]  # has no public name
    return [(globals(), "_used"), (variables, os.environ.encodekey(ENVIRONMENT_VARIABLE))]


def why_not(name: str, operator: str, device: str, *args: Any, **options: Any) -> str | None:
    """Why backend ``name`` cannot run this call of ``operator``, or ``None`` if it can."""
    reason = unavailable(name)
    if reason is not None:
        return reason
    devices = ("cpu",) if _interpreted(name) else _TABLE[name].devices
    if devices and device not in devices:
        return f"runs on {' or '.join(devices)} tensors, got {device}"
    if not has(name, operator):
        return f"{name} has no {operator} kernel"
    other = _TABLE[name].completed_by
    if other is not None and composes(name, operator):
        reason = why_not(other, operator, device, *args, **options)
        if reason is not None:
            return f"{name} takes {other} for the rest of a block: {reason}"
    if not has(name, f"{operator}_unsupported"):
        return None
    return function(name, f"{operator}_unsupported")(*args, **options)


@constant_under_compile
def only_by_name(name: str) -> str | None:
    """Why backend ``name``, usable or not, is never chosen here unasked; ``None`` if it may be."""
    if _interpreted(name):
        return "TRITON_INTERPRET=1 interprets its kernels: slow, and only if asked for by name"
    return _unproven(name)


def _interpreted(name: str) -> bool:
    return _TABLE[name].interpreted and _interpreting()


@cache
def _unproven(name: str) -> str | None:
    return _TABLE[name].unproven() if _unavailable(name) is None else None


@constant_under_compile
def candidates(operator: str, device: str) -> tuple[str, ...]:
    """Backends that work here and have a kernel of ``operator`` for ``device``, best first."""
    return _candidates(operator, device)


@cache
def _candidates(operator: str, device: str) -> tuple[str, ...]:
    return tuple(
        name
        for name in NAMES
        if unavailable(name) is None
        and not only_by_name(name)
        and has(name, operator)
        and device in (_TABLE[name].devices or (device,))
    )


def resolve(operator: str, backend: str | None, x: Tensor, *args: Any, **options: Any) -> str:
    """The backend that runs this call of ``operator``: the one asked for, else the best that can.

    Raises:
        ValueError: no backend has the name asked for.
        NotImplementedError: the backend asked for cannot run this call; every reason is given.
    """
    device = x.device.type
    name = requested(backend)
    if name is None:
        for candidate in candidates(operator, device):
            if candidate == "reference":
                return candidate
            if not has(candidate, f"{operator}_unsupported") or (
                function(candidate, f"{operator}_unsupported")(x, *args, **options) is None
            ):
                return candidate
        raise AssertionError("the reference runs everything")
    source = "backend" if backend else "use_backend" if _used else ENVIRONMENT_VARIABLE
    reason = why_not(
        check_name(name, f"{operator}: {source}"), operator, device, x, *args, **options
    )
    if reason is not None:
        others = [n for n in NAMES if why_not(n, operator, device, x, *args, **options) is None]
        raise NotImplementedError(
            f"{operator}: {source} {name!r} cannot run this call: {reason}; "
            f"backends that can: {', '.join(others)}, or backend=None to choose"
        )
    return name
