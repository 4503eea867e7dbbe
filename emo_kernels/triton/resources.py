"""What each launch costs on GPUs that are not here: registers, spills, shared memory, tensor cores.

``recorded(arch)`` runs launchers on meta tensors and keeps their launches instead of making them;
``measure(launches, arch)`` compiles each for that architecture with Triton's own compiler, whose
wheel carries ptxas, cuobjdump and nvdisasm, and reads the result. Neither needs a GPU; both need a
process without TRITON_INTERPRET. Results are kept in the cache directory under a hash of sources,
types, launch parameters and Triton's version.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from emo_kernels.triton import launch

ARCHITECTURES = (80, 90, 100)
_MATRIX_OPS = ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QMMA", "QGMMA", "UTCQMMA", "DMMA")
_VERSION = 1  # of the rows in the cache


class SM(NamedTuple):
    """Limits of one multiprocessor (CUDA programming guide, compute capabilities)."""

    warps: int
    blocks: int
    registers: int
    shared: int  # bytes
    block_shared: int  # bytes one block may opt in to


_KB = 1024
MULTIPROCESSORS = {
    80: SM(64, 32, 65536, 164 * _KB, 163 * _KB),
    86: SM(48, 16, 65536, 100 * _KB, 99 * _KB),
    89: SM(48, 24, 65536, 100 * _KB, 99 * _KB),
    90: SM(64, 32, 65536, 228 * _KB, 227 * _KB),
    100: SM(64, 32, 65536, 228 * _KB, 227 * _KB),
    120: SM(48, 24, 65536, 100 * _KB, 99 * _KB),
}


class Launch(NamedTuple):
    """One launch as a launcher wrote it."""

    kernel: Any  # a JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments, num_warps, num_stages
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the operation: ``expand_fwd`` of ``_expand_fwd_kernel``."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def bytes(self) -> int:
        """Size of the tensors it was given: what it moves at least, if it uses all of them."""
        tensors = [a for a in (*self.args, *self.options.values()) if isinstance(a, torch.Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


class Resources(NamedTuple):
    """What one compiled kernel takes of a multiprocessor."""

    kernel: str
    arch: int
    warps: int = 0
    stages: int = 0
    registers: int = 0  # a thread
    spills: int = 0  # instructions to and from local memory
    shared: int = 0  # bytes a block
    blocks: int = 0  # on a multiprocessor at a time; 0: it cannot run
    occupancy: float = 0.0  # share of the multiprocessor's warps
    limit: str = ""  # what occupancy is limited by
    dots: int = 0  # tl.dot that belong on tensor cores: 16-bit operands, or TF32
    matrix_ops: dict[str, int] = {}  # tensor-core instructions by name
    instructions: int = 0
    error: str | None = None  # why it does not compile

    @property
    def faults(self) -> list[str]:
        """Why the kernel must not ship so."""
        if self.error is not None:
            return [self.error]
        found = [] if not self.spills else [f"{self.spills} spill instructions"]
        if self.registers > 255:
            found.append(f"{self.registers} registers")
        if not self.blocks:
            found.append(f"{self.shared} bytes of shared memory")
        if self.dots and not self.matrix_ops:
            found.append("tl.dot without a tensor-core instruction")
        return found


# ---------------------------------------------------------------------------------- recording


class _Launchers(TorchDispatchMode):
    """Operators of emo_kernels on meta tensors run the launchers of this package, not fakes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        package = importlib.import_module("emo_kernels.triton")
        launcher = getattr(package, func._opname, None) if func.namespace == "emo_kernels" else None
        if launcher is None:
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        count = launcher.__code__.co_argcount  # the others are keywords
        return launcher(*args[:count], **dict(zip(names[count:-1], args[count:-1])))


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Keep launches, made as for a GPU of that architecture, instead of making them."""
    if launch.interpreting():
        raise ValueError("TRITON_INTERPRET must be unset to compile kernels, got 1")
    launches: list[Launch] = []

    def keep(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        named = {**dict(zip(kernel.arg_names, args)), **options}
        launches.append(Launch(kernel, args, options, grid(named) if callable(grid) else grid))

    run = JITFunction.run
    JITFunction.run = keep
    try:
        with launch.assumed_architecture(arch), _Launchers():
            yield launches
    finally:
        JITFunction.run = run


# ---------------------------------------------------------------------------------- compiling


class _AbsentGPU:
    """Enough of a Triton driver to compile with; it cannot launch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:  # Triton keeps compiled kernels by device
        return self.target.arch

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def measure(launches: Sequence[Launch], arch: int, processes: int = 1) -> list[Resources]:
    """Resources of every launch on that architecture, from the cache or compiled now.

    A kernel that does not compile has the reason among its faults.
    """
    keys = [_key(one, arch) for one in launches]
    found = {key: row for key in keys if (row := _from_cache(key)) is not None}
    absent = {key: one for key, one in zip(keys, launches, strict=True) if key not in found}
    results = _compile_all(list(absent.items()), arch, processes)
    found |= zip(absent, results, strict=True)
    return [found[key]._replace(kernel=one.name) for key, one in zip(keys, launches, strict=True)]


def _compile_all(tasks: list[tuple[str, Launch]], arch: int, processes: int) -> list[Resources]:
    if processes < 2 or len(tasks) < 2:
        return [_compile(*task, arch) for task in tasks]
    global _tasks
    _tasks = tasks  # reaches the children by fork: kernels do not pickle
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(partial(_compile_numbered, arch=arch), range(len(tasks))))


_tasks: list[tuple[str, Launch]] = []


def _compile_numbered(number: int, arch: int) -> Resources:
    return _compile(*_tasks[number], arch)


def _compile(key: str, one: Launch, arch: int) -> Resources:
    present = driver._active  # None until something is launched
    driver.set_active(_AbsentGPU(arch))
    try:
        compiled = one.kernel.warmup(*one.args, grid=(1,), **one.options)
        result = _read(compiled, arch)
    except Exception as error:  # of many classes; one kernel must not hide the others
        return Resources("", arch, error=_why(error))
    finally:
        driver.set_active(present)
    _cached(key).parent.mkdir(parents=True, exist_ok=True)
    half = _cached(key).with_suffix(f".{os.getpid()}")
    half.write_text(json.dumps(result._asdict()))
    half.rename(_cached(key))
    return result


def _why(error: BaseException) -> str:
    """In one line, the innermost cause and the last line of text that is not a pointer."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1].strip()[:200] if lines else ''}"


def _from_cache(key: str) -> Resources | None:
    path = _cached(key)
    return Resources(**json.loads(path.read_text())) if path.is_file() else None


def _cached(key: str) -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "emo_kernels" / "resources" / f"{key}.json"


def _key(one: Launch, arch: int) -> str:
    """All that a kernel's code depends on; integers as Triton specialises them."""

    def kind(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {value.data_ptr() % 16 == 0}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"int {value == 1} {value % 16 == 0} {-(2**31) <= value < 2**31}"
        return type(value).__name__ if isinstance(value, float) else repr(value)

    arguments = [kind(a) for a in one.args]
    options = sorted((name, repr(value)) for name, value in one.options.items())
    versions = (_VERSION, triton.__version__, arch)
    text = repr((versions, _source(one.kernel), arguments, options))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _source(kernel: Any) -> str:
    """Triton's hash of the kernel and all that it calls."""
    try:
        return kernel.cache_key
    except RuntimeError:  # it calls what Triton cannot compile; compiling will say so
        return kernel.__name__


# ------------------------------------------------------------------------------ reading the code


def _read(compiled: Any, arch: int) -> Resources:
    usage, code = _disassemble(compiled.asm["cubin"])
    registers = int(re.findall(r"\bREG:(\d+)", usage)[0])
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    blocks, limit = _blocks(arch, registers, shared, warps, columns)
    operations = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.M)
    return Resources(
        kernel="",  # the launch says
        arch=arch,
        warps=warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spills=sum(name in ("LDL", "STL") for name in operations),
        shared=shared,
        blocks=blocks,
        occupancy=blocks * warps / MULTIPROCESSORS[arch].warps,
        limit=limit,
        dots=_dots(compiled.asm["ttir"]),
        matrix_ops={n: operations.count(n) for n in _MATRIX_OPS if n in operations},
        instructions=len(operations),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS)."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = [tools / "cuobjdump", "--dump-resource-usage", path]
        run = partial(subprocess.run, check=True, capture_output=True, text=True)
        return run(usage).stdout, run([tools / "nvdisasm", "-c", path]).stdout


def _dots(ttir: str) -> int:
    """Products in Triton's own code that a tensor core can do."""
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot\b", line)]
    return sum(bool(re.search(r"\btf32\b|x(bf16|f16)>\s*\*", line)) for line in dots)


def _blocks(arch: int, registers: int, shared: int, warps: int, columns: int) -> tuple[int, str]:
    """Blocks that fit on a multiprocessor at a time, and what keeps more away."""
    sm = MULTIPROCESSORS[arch]
    if shared > sm.block_shared:
        return 0, "shared"
    a_warp = math.ceil(max(registers, 1) * 32 / 256) * 256
    fits: dict[str, Callable[[], int]] = {
        "blocks": lambda: sm.blocks,
        "warps": lambda: sm.warps // warps,
        "registers": lambda: sm.registers // a_warp // 4 * 4 // warps,  # given to four warps
        "shared": lambda: sm.shared // (math.ceil(shared / 128) * 128 + _KB),  # 1 KB is reserved
    }
    if columns:
        fits["tensor memory"] = lambda: 512 // columns
    counts = {name: count() for name, count in fits.items()}
    limit = min(counts, key=lambda name: counts[name])
    return counts[limit], limit
