"""Every CUDA kernel, compiled for GPUs that are not here, keeps to its registers and memory.

What nvcc's assembler reports of each instantiation: nothing spilled, and for the streaming kernels
registers for two blocks on a multiprocessor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
# 65536 of a multiprocessor over two blocks: of 256 threads, and of 192 (backward, K = 5).
REGISTERS, MORE_REGISTERS = 128, 168
# (element types) x (K, S) of the kernels in pairs, and the general ones.
FORWARD = {
    f"Forward<{t},{k},{s}" for t in ("float", "Half", "BFloat16") for k in (3, 5) for s in (1, 2)
}
WANTED = {
    "depthwise_conv2d.cu": FORWARD,
    "depthwise_conv2d_backward.cu": {n.replace("Forward", "Backward") for n in FORWARD},
    "irmb.cu": {
        f"{name.replace('Forward', 'Block')},{pairs}"
        for name in (*FORWARD, "Forward<float,0,0", "Forward<Half,0,0", "Forward<BFloat16,0,0")
        for pairs in (3, 5)
    },
    "irmb_attention.cu": {f"Attention<{t}" for t in ("float", "Half", "BFloat16")},
    "irmb_image.cu": {
        f"Image<{t},{k},{warps}"
        for t in ("float", "Half", "BFloat16")
        for k in (3, 5)
        for warps in (8, 16)
    },
    "irmb_excite.cu": {
        f"{name.replace('Forward', 'Block')},0"
        for name in (*FORWARD, "Forward<float,0,0", "Forward<Half,0,0", "Forward<BFloat16,0,0")
    },
    "expand_depthwise.cu": {n.replace("Forward", "ExpandDepthwise") for n in FORWARD},
}

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")


class Kernel(NamedTuple):
    """One entry of the report."""

    name: str
    registers: int
    spills: int
    stack: int


def parsed(report: str) -> list[Kernel]:
    """The kernels of ``ptxas -v``'s report."""
    kernels = []
    for block in re.split(r"Compiling entry function ", report)[1:]:
        mangled = re.match(r"'(\w+)'", block)
        spilled = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        used = re.search(r"Used (\d+) registers", block)
        assert mangled and spilled and used, block
        stack, stores, loads = (int(n) for n in spilled.groups())
        kernels.append(Kernel(mangled[1], int(used[1]), stores + loads, stack))
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(k.name for k in kernels),
        capture_output=True,
        text=True,
        check=True,
    )
    plain = [re.sub(r"emo_kernels::cuda::|\s", "", name) for name in names.stdout.splitlines()]
    return [kernel._replace(name=name) for kernel, name in zip(kernels, plain, strict=True)]


@cache
def compiled(source: str, arch: str, directory: Path) -> list[Kernel]:
    """Compile one file as the build does; what the assembler says of its kernels."""
    assert NVCC is not None
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", f"-arch={arch}", "-cubin", "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc"), str(ROOT / "csrc" / "cuda" / source)]
    command += ["-o", str(directory / f"{source}.{arch}.cubin")]
    child = subprocess.run(command, check=False, capture_output=True, text=True, timeout=1800)
    assert child.returncode == 0, child.stderr[-3000:]
    return parsed(child.stderr)


def test_the_report_is_read() -> None:
    report = """
ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'
ptxas info    : Function properties for _Z1kPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 130 registers, used 1 barriers, 352 bytes cmem[0]
"""
    assert parsed(report) == [Kernel("k(float*)", 130, 16, 8)]


def limit(kernel: Kernel) -> int:
    """Registers that two blocks of this kernel may have; one, where it has 16 warps."""
    return MORE_REGISTERS if re.search(r"Backward<\w+,5,", kernel.name) else REGISTERS


ALL = [
    (source, arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100") for source in WANTED
]
BY_DEFAULT = ("depthwise_conv2d.cu", "sm_90a")  # 8 s of the compiler; a backward one takes 35


@pytest.mark.parametrize(
    ("source", "arch"),
    [pytest.param(*case, marks=[] if case == BY_DEFAULT else [pytest.mark.slow]) for case in ALL],
)
def test_no_kernel_spills(source: str, arch: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernels = compiled(source, arch, tmp_path_factory.getbasetemp())
    for part in WANTED[source]:
        assert any(re.search(rf"<{part}[,>]", kernel.name) for kernel in kernels), part
    others = {
        "irmb.cu": "irmb_sum_kernel",
        "irmb_attention.cu": "irmb_attention_kernel",
        "irmb_excite.cu": "irmb_excite_kernel",
        "irmb_image.cu": "irmb_image_kernel",
    }
    other = others.get(source, "sum_partials_kernel")
    assert any(other in kernel.name for kernel in kernels)
    faults = [k for k in kernels if k.spills or k.stack or k.registers > limit(k)]
    assert not faults, "\n".join(map(str, faults))
