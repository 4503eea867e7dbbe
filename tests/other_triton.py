"""Other versions of Triton than the one installed, each in a folder of its own.

``EMO_KERNELS_TRITONS`` names a folder with a ``triton-<version>`` inside for each version; without
it pip installs the version asked for below the cache directory, once. No network: a skip that
says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest

VARIABLE = "EMO_KERNELS_TRITONS"


def home() -> Path:
    """The folder of the versions."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(VARIABLE) or Path(cache) / "emo_kernels" / "tritons")


def path_of(version: str) -> Path | None:
    """What to put on PYTHONPATH for that version (None: nothing, it is installed), or a skip."""
    if version == installed("triton"):
        return None
    place = home() / f"triton-{version}"
    if not (place / "triton").is_dir():
        _install(version, place)
    return place


def _install(version: str, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    half = place.with_name(f"{place.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", half]
    child = subprocess.run(
        [*map(str, command), f"triton=={version}"], check=False, capture_output=True, text=True
    )
    if child.returncode:
        shutil.rmtree(half, ignore_errors=True)
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"triton {version} is not in {place}, and pip cannot install it: {last}")
    half.rename(place)


def environment(version: str | None = None, *, interpret: bool) -> dict[str, str]:
    """The environment of a child process that uses that version, interpreted or compiled."""
    child = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    if interpret:
        child["TRITON_INTERPRET"] = "1"
    place = path_of(version) if version else None
    if place is not None:
        child["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), child.get("PYTHONPATH")]))
    return child
