"""What proves the CUDA kernels on the host: the walk finds faults, products are as stated.

``csrc/walk.cpp`` has programs with one fault each; ``csrc/mma.cpp`` holds each lane's part of
every matrix to the tables of the PTX ISA, and products to plain loops, to the bit.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
CUDA = TESTS.parent / "csrc" / "cuda"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
OPTIONS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-I", CUDA.parent]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-switch"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is on PATH")
@pytest.mark.parametrize(
    "sources", [["mma.cpp"], ["walk.cpp", CUDA / "walk.cpp"]], ids=["mma", "walk"]
)
def test_on_the_host(sources: list[str | Path], tmp_path: Path) -> None:
    program = tmp_path / "program"
    files = [TESTS / "csrc" / source for source in sources]
    command = [str(part) for part in (COMPILER, *OPTIONS, *WARNINGS, *files, "-o", program)]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([program], check=False, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
