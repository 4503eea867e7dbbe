"""The kernels of processors that are not here: compiled, and run in QEMU's user mode.

``csrc/selftest.cpp`` holds every kernel to the tolerance rule under every instruction set. Here it
is cross-compiled for 64-bit Arm (NEON), and run on x86 processors older than this one, on which an
instruction too new is an illegal one.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER, QEMU_ARM, QEMU_X86 = "aarch64-linux-gnu-g++", "qemu-aarch64", "qemu-x86_64"
ON_X86 = platform.machine() == "x86_64"
# Also what is installed beside this interpreter, as cmake and ninja may be.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

pytestmark = pytest.mark.slow


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def run(*command: object, status: int = 0, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "EMO_KERNELS_ISA"}
    done = subprocess.run(
        [str(part) for part in command],
        env={**clean, **environment, "PATH": PATH},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == status, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def build(folder: Path, *options: str) -> Path:
    run("cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, "-DEMO_SELFTEST=ON", *options)
    run("cmake", "--build", folder)
    return folder / "selftest"


def test_neon(tmp_path: Path) -> None:
    needs(COMPILER, QEMU_ARM, "cmake", "ninja")
    program = build(
        tmp_path,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
    )
    libraries = Path(run(COMPILER, "-print-file-name=libgomp.so.1").strip()).resolve().parent.parent
    qemu = (QEMU_ARM, "-L", libraries, program)
    assert "ok   neon" in run(*qemu)
    assert run(*qemu, EMO_KERNELS_ISA="neon") == "neon\n"
    refusal = run(*qemu, status=2, EMO_KERNELS_ISA="avx2")
    assert "must be one of portable, neon on this machine, got 'avx2'" in refusal


@pytest.fixture(scope="module")
def on_x86(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ON_X86:
        pytest.skip("not an x86 processor")
    needs(QEMU_X86, "cmake", "ninja")
    return build(tmp_path_factory.mktemp("x86"))


# The newer sets are for the other tests, natively: QEMU knows no AVX-512, and version 7.2
# also reads what a masked AVX load leaves out, from null pointers too.
@pytest.mark.parametrize(
    ("processor", "isas"),
    [("Nehalem", ["portable"]), ("IvyBridge", ["portable"]), ("Haswell", ["portable", "avx2"])],
)
def test_older_processors(on_x86: Path, processor: str, isas: list[str]) -> None:
    """Run what they have, choose the best of it, and refuse the rest by name."""
    qemu = (QEMU_X86, "-cpu", processor, on_x86)
    if isas == ["portable"]:
        ran = {line.split()[1] for line in run(*qemu).splitlines()}
        assert ran == {"portable"}
    assert run(*qemu, EMO_KERNELS_ISA="") == f"{isas[-1]}\n"
    for isa in ("portable", "avx2", "avx512"):
        if isa in isas:
            assert run(*qemu, EMO_KERNELS_ISA=isa) == f"{isa}\n"
        else:
            refusal = run(*qemu, status=2, EMO_KERNELS_ISA=isa)
            assert f"must be one of {', '.join(isas)} on this machine, got '{isa}'" in refusal
