"""The tensor-core primitives of ``csrc/cuda/mma.h`` on the host, lane by lane.

``csrc/mma.cpp`` holds every lane's part of every matrix to the tables of the PTX ISA, and products
to plain loops, to the bit.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-switch")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on PATH")
def test_every_lane_on_the_host(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "mma"
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        *WARNINGS,
    ]
    command += ["-I", str(ROOT / "csrc"), str(ROOT / "tests" / "csrc" / "mma.cpp")]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
