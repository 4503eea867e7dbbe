"""Whether the CUDA kernels run on a GPU, and whether a run on its architecture has passed.

A proof is a JSON object by architecture, ``{"sm_90": {"sources": ..., "gpu": ..., ...}}``, which
``bench/gpu_campaign.py`` writes where every check has passed. It holds for the very sources that it
names. The package's own is ``proven.json`` beside this file; the environment variable
``EMO_KERNELS_CUDA_PROOF`` names another.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from emo_kernels import _C

PROOF_VARIABLE = "EMO_KERNELS_CUDA_PROOF"


def name_of(capability: tuple[int, int]) -> str:
    """The architecture's name, ``sm_90``."""
    return "sm_{}{}".format(*capability)


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code compiled for these architectures (``"80-real,90a,80-virtual"``) runs there.

    Example:
        >>> runs_on((8, 6), "80-real"), runs_on((9, 0), "80-real"), runs_on((9, 0), "80")
        (True, False, True)
    """
    for entry in re.split(r"[,; ]+", architectures):
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        if found is None:
            continue
        compiled, exact = (int(found[1]), int(found[2])), bool(found[3])
        if capability == compiled or (
            not exact
            and capability >= compiled
            and (found[4] != "-real" or capability[0] == compiled[0])
        ):
            return True
    return False


def missing() -> str | None:
    """Why the kernels run on no GPU here, as far as the build and the driver go."""
    build = _C.build_info()
    if not build["cuda"]:
        return f"the kernels are not compiled: {build['cuda_reason']}"
    error = _C.cuda_report()["error"]
    return f"the CUDA runtime reports: {error}" if error else None


def not_compiled_for(capability: tuple[int, int]) -> str | None:
    """Why the kernels do not run on a GPU of this capability, or ``None``."""
    architectures = _C.build_info()["cuda_architectures"]
    if runs_on(capability, architectures):
        return None
    return (
        f"the kernels are compiled for {architectures}, not for {name_of(capability)}; "
        "build with EMO_CUDA_ARCHITECTURES={}{}".format(*capability)
    )


def unproven(capability: tuple[int, int]) -> str | None:
    """Why the kernels are not chosen unasked on a GPU of this capability, or ``None``."""
    row = read().get(name_of(capability))
    if row is not None and row.get("sources") == _C.cuda_sources():
        return None
    return (
        f"compiled, not yet proven on this architecture ({name_of(capability)}): used if asked for "
        "by name; bench/gpu_campaign.py --parts cuda proves it"
    )


def read() -> dict[str, dict[str, Any]]:
    """The proofs there are; none where the file is missing."""
    named = os.environ.get(PROOF_VARIABLE)
    path = Path(named) if named else Path(__file__).with_name("proven.json")
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
        return {str(arch): dict(row) for arch, row in found.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path} must hold a JSON object of proofs by architecture, and does not ({error}); "
            "delete it or run bench/gpu_campaign.py again"
        ) from error
