"""Launch parameters: a pure function of (kernel, sizes, architecture); nothing tunes in a forward.

Every kernel has a rule beside it, ``rule(arch, **sizes) -> {BLOCK_*: int, num_warps, num_stages}``.
What ``python -m emo_kernels tune`` found on this GPU comes before the rule: a JSON object
``{"<kernel>/sm_<arch>/<shape class>": {parameter: value}}`` in the file that the environment
variable ``EMO_KERNELS_TUNED`` names, else in the cache directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

Rule = Callable[..., dict[str, int]]
# (kernel, sizes, parameters) -> the parameters to launch with
Listener = Callable[[str, dict[str, int], dict[str, int]], dict[str, int]]

TUNED_VARIABLE = "EMO_KERNELS_TUNED"
INTERPRETER = 0  # the architecture of TRITON_INTERPRET=1
MAX_STAGES = 8

_listener: Listener | None = None  # set by listening, for the whole process


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture() -> int:
    """Compute capability of the current GPU, 90 for sm_90; ``INTERPRETER`` in the interpreter."""
    return _detected_architecture() if _assumed is None else _assumed


@cache
def _detected_architecture() -> int:
    if interpreting():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


_assumed: int | None = None  # set by assumed_architecture


@contextmanager
def assumed_architecture(arch: int) -> Iterator[None]:
    """Launch parameters as on a GPU of that architecture, to compile for one that is not here."""
    global _assumed
    previous, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = previous


def shape_class(**sizes: int) -> str:
    """Sizes that share their launch parameters: pixel counts in powers of two, the others exact."""
    rounded = {k: 1 << (v - 1).bit_length() if k == "p" and v > 0 else v for k, v in sizes.items()}
    return ",".join(f"{name}={size}" for name, size in rounded.items())


def key(kernel: str, arch: int, **sizes: int) -> str:
    """The name of a launch in the table of tuned parameters."""
    return f"{kernel}/sm_{arch}/{shape_class(**sizes)}"


def tuned_path() -> Path:
    """The file of tuned parameters."""
    named = os.environ.get(TUNED_VARIABLE)
    if named:
        return Path(named)
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "emo_kernels" / "tuned.json"


@cache
def tuned() -> dict[str, dict[str, int]]:
    """The table of tuned parameters, read once; empty where there is no file."""
    path = tuned_path()
    return read_table(path) if path.is_file() else {}


def read_table(path: Path) -> dict[str, dict[str, int]]:
    """A file of tuned parameters, checked."""
    try:
        table = json.loads(path.read_text())
        return {k: {p: _valid(p, v) for p, v in row.items()} for k, row in table.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} must hold a JSON object of tuned launch parameters, and does not ({error}); "
            "delete it or run `python -m emo_kernels tune` again"
        ) from error


def _valid(name: str, value: object) -> int:
    """``value``, if the launch parameter ``name`` can have it; else ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be an integer from 0, got {value!r}")
    if name == "num_stages":
        if not 1 <= value <= MAX_STAGES:
            raise ValueError(f"num_stages must be 1 to {MAX_STAGES}, got {value}")
    elif name == "num_warps" and value not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"num_warps must be a power of two up to 32, got {value}")
    elif name.startswith("BLOCK") and value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")
    return value


@cache
def _tiles(
    kernel: str, rule: Rule, sizes: tuple[tuple[str, int], ...], arch: int
) -> dict[str, int]:
    parameters = rule(arch, **dict(sizes))
    if arch == INTERPRETER:
        return parameters
    name = key(kernel, arch, **dict(sizes))
    found = tuned().get(name, {})
    if not found.keys() <= parameters.keys():  # of another version
        unknown = ", ".join(sorted(found.keys() - parameters.keys()))
        raise ValueError(
            f"{tuned_path()}: {name} has {unknown}, which {kernel} does not take; delete the file "
            "or run `python -m emo_kernels tune --again`"
        )
    return parameters | found


def tiles(kernel: str, rule: Rule, **sizes: int) -> dict[str, int]:
    """The launch parameters of ``kernel`` for these sizes on the current GPU."""
    found = _tiles(kernel, rule, tuple(sizes.items()), architecture())
    return found if _listener is None else _listener(kernel, sizes, found)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` see, and choose, the parameters of every launch in the ``with`` block."""
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def forget_tuned() -> None:
    """Read the file of tuned parameters again at the next launch."""
    tuned.cache_clear()
    _tiles.cache_clear()
