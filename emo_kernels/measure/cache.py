"""What is kept from run to run: exact results, and which programs are compiled already."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from emo_kernels.measure.case import Case

_PACKAGE = Path(__file__).parents[1]
_CODE = ("reference", "nn", "models", "spec.py", "measure/case.py", "measure/oracle.py")


def directory() -> Path:
    """Where exact results are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "emo_kernels" / "bench"


def code() -> str:
    """Of the sources that compute the exact result, and that torch.compile compiles."""
    digest = hashlib.sha256()
    for place in _CODE:
        path = _PACKAGE / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def compiled_mark(case: Case) -> Path:
    """A file that is there once torch.compile has compiled this case, beside what it made."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    words = hashlib.sha256(f"{torch.__version__} {code()} {case.name}".encode()).hexdigest()[:24]
    return Path(cache_dir()) / f"emo_kernels-{words}"
