"""A child process that runs an operator where a wrong address kills: ``python guards.py ...``.

``python guards.py pages OPERATOR BACKEND ROW...``: every tensor ends, then begins, at an
inaccessible page. ``python guards.py far OPERATOR BACKEND ROW...``: the images of the map lie
2^30 elements apart, so that offsets pass 2^31. Results must equal those of ordinary memory; the
last line printed names the call that died.
"""

from __future__ import annotations

import itertools
import mmap
import sys
from dataclasses import replace

import interpreter
import memory
import shapes
import torch
from cases import CASES, function
from grid import DTYPES, INTERPRETED, refusal, slow_motion
from numerics import MAPS, Case, round_all, run
from torch import Tensor

from emo_kernels import backends, ops

IMAGE_STRIDE = 2**30 + 8
# Gradients that torch itself leaves uninitialised on the CPU, for taps that never meet the map: of
# convolutions in 16 bits and channels_last. A stem of one pixel got -1.6e28 for 0 (torch 2.13.0).
TORCH_LEAVES = {"conv_norm_act": "weight", "depthwise_conv2d": "weight", "irmb": "dw_weight"}
NORESERVE = 0x4000  # Linux's; the mmap module names it from Python 3.13 on


def far_apart(x: Tensor) -> Tensor:
    """The map with its images 2^30 elements apart in address space that is mostly never touched."""
    n, _c, h, w = x.shape
    elements = (n - 1) * IMAGE_STRIDE + x[0].numel()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    space = mmap.mmap(-1, elements * x.element_size(), flags=flags)
    flat = torch.frombuffer(space, dtype=x.dtype, count=elements)
    return torch.as_strided(flat, x.shape, (IMAGE_STRIDE, h * w, w, 1)).copy_(x)


def calls(operator: str, backend: str, case: Case) -> dict[str, Tensor]:
    """Output, and gradients where they are the backend's own."""
    wanted = case.differentiable() if backends.has(backend, f"{operator}_backward") else []
    kernel = function(operator, getattr(ops, operator), backend=backend)
    out = run(kernel, case.tensors, case.options)["out"]
    return run(kernel, case.tensors, case.options, wanted, torch.ones_like(out))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], backend: str) -> None:
    """Equal bits; to rounding from torch itself, which picks its path by alignment and strides."""
    for name, value in got.items():
        if backend != "reference":
            assert torch.equal(value, want[name]), name
        error = float((value - want[name]).double().norm())
        assert error <= 1e-2 * float(want[name].double().norm()), name


def _guarded(name: str, tensor: Tensor | None, layout: str, side: str) -> Tensor | None:
    if tensor is None:
        return None
    return memory.guarded(memory.with_layout(tensor, layout) if name in MAPS else tensor, side)


def pages(operator: str, backend: str, case: Case, label: str) -> None:
    """Each side, each dense layout; in the interpreter each of both once."""
    want = calls(operator, backend, case)
    pairs = itertools.product(("right", "left"), ("contiguous", "channels_last"))
    if slow_motion(backend):
        pairs = (("right", "channels_last"), ("left", "contiguous"))
    for side, layout in pairs:
        print(label, side, layout, flush=True)
        tensors = {n: _guarded(n, t, layout, side) for n, t in case.tensors.items()}
        got = calls(operator, backend, replace(case, tensors=tensors))
        of_16_bits = got["out"].element_size() == 2
        if backend == "reference" and of_16_bits and layout == "channels_last":
            got.pop(TORCH_LEAVES.get(operator, ""), None)
        assert_same(got, want, backend)


def far(operator: str, backend: str, case: Case, label: str) -> None:
    """Every map of the call in turn."""
    want = calls(operator, backend, case)
    for name in MAPS:
        tensor = case.tensors.get(name)
        if tensor is not None:
            print(label, name, flush=True)
            tensors = {**case.tensors, name: far_apart(tensor)}
            got = calls(operator, backend, replace(case, tensors=tensors))
            assert_same(got, want, backend)


def _some(dtypes: tuple[str, ...], place: int) -> tuple[str, ...]:
    return (dtypes[place % min(len(dtypes), 3)],)  # fp64 is the fourth


def main(mode: str, operator: str, backend: str, *names: str) -> None:
    """Run every row in every dtype that the backend takes; the interpreter in one, in turn."""
    torch.set_num_threads(1)
    if INTERPRETED:
        interpreter.install()
    done = 0
    for place, row in enumerate(shapes.rows(*names)):
        dtypes = ("fp32", "bf16", "fp16", "fp64") if mode == "pages" else ("fp32",)
        for dtype in _some(dtypes, place) if slow_motion(backend) else dtypes:
            case = CASES[operator](replace(row, n=3))
            case.tensors = round_all(case.tensors, DTYPES[dtype])
            if refusal(operator, backend, case, DTYPES[dtype]) is None:
                check = {"pages": pages, "far": far}[mode]
                check(operator, backend, case, f"{row.name} {dtype}")
                done += 1
    print(f"survived {done} calls")
    assert done


if __name__ == "__main__":
    main(*sys.argv[1:])
