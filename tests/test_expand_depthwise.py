"""Expansion and depthwise convolution in one pass, and their gradient, where a backend has both.

``test_irmb_training*.py`` and ``test_cpu_fuzz.py`` run it in whole blocks; here are maps of many
bands, and what it may be asked for.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import shapes
import torch
from grid import DTYPES, implementing
from memory import guarded, poisoned_memory
from numerics import round_all
from shapes import Row
from test_cuda_depthwise import close
from torch import Tensor

from emo_kernels import backends, reference
from emo_kernels.ops import expand_depthwise as ops_expand_depthwise
from emo_kernels.spec import batch_norm_affine

FP32 = torch.float32
BACKENDS = [n for n in implementing("expand_depthwise_backward") if n != "reference"]
FORWARD = ("x", "weight", "bias", "norm_weight", "norm_bias", "dw_weight")
GRADIENTS = ("x", "weight", "bias", "norm_weight", "norm_bias", "dw_weight")
_WIDE = Row("bands", c=24, m=53, o=24, h=37, w=31, n=3)
# Bands within an image and over several, wider than long, of one row; every phase of a stride.
ROWS = [
    _WIDE,
    replace(_WIDE, name="bands_stride_2_k5", c=70, stride=2, kernel=5, norm="layer", act="gelu"),
    replace(_WIDE, name="bands_over_images", h=7, w=9, n=11, kernel=5, act="relu"),
    replace(_WIDE, name="bands_over_images_stride_2", h=5, w=8, n=9, stride=2),
    replace(_WIDE, name="bands_of_one_row", h=5, w=300, n=1, norm="none"),
    replace(_WIDE, name="bands_dilated", dilation=2, stride=2, norm="none", act="none"),
    replace(_WIDE, name="bands_stride_3_dilated", kernel=7, stride=3, dilation=2, bias=False),
    replace(_WIDE, name="bands_stride_beyond_kernel", kernel=2, stride=3),
    *shapes.rows("odd_c21_m31", "ragged_c21", "pixel", "column_9x1", "row_1x9", "kernel_7"),
    *shapes.rows("stride_2_8x15_k5", "no_bias", "batch_0_conv"),
]


class Call:
    """The row's gradient behind a batch norm, with all that may come beside it, in a dtype."""

    def __init__(self, row: Row, dtype: torch.dtype, local: bool = True) -> None:
        source = shapes.generator(row, "gradient")
        w, y_shape = shapes.weights(row), (row.n, row.m, *row.output_size)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, dtype=torch.float64)

        tensors = {
            "grad": random(*y_shape),
            "x": shapes.feature_map(row),
            "weight": w.v_weight,
            "bias": w.v_bias,
            "norm_weight": None,
            "norm_bias": None,
            "dw_weight": w.dw_weight,
            "y": random(*y_shape),
            "coefficients": random(4, row.m),
            "local_grad": random(row.n, row.m, row.h, row.w) if local else None,
            "e": None,
            "slope": None,
            "affine": None,
            "residual": random(*row.input_shape) if local else None,
        }
        if row.norm == "layer":
            tensors |= {"norm_weight": w.norm_weight, "norm_bias": w.norm_bias}
        if row.norm == "batch":
            assert w.norm_mean is not None and w.norm_var is not None
            parameters = (w.norm_weight, w.norm_bias, w.norm_mean, w.norm_var)
            scale, shift = batch_norm_affine(*parameters, 1e-6)
            invstd = (w.norm_var + 1e-6).rsqrt()
            tensors |= {"norm_weight": scale, "norm_bias": shift, "residual": None}
            tensors["affine"] = torch.stack([scale, shift, w.norm_mean, invstd])
        self.tensors = round_all(tensors, dtype)
        norm = "affine" if row.norm == "batch" else row.norm
        self.options: dict[str, Any] = {"norm": norm, "eps": 1e-6, "act": row.act, "groups": 1}
        self.options |= {"stride": row.stride, "padding": row.padding, "dilation": row.dilation}
        asked = {"norm_weight": norm != "none", "norm_bias": norm == "layer", "bias": row.bias}
        self.needed = [asked.get(name, True) for name in GRADIENTS]

    def keep(self, backend: str) -> None:
        """Give the kernel what its forward pass may have kept."""
        maps = self.forward(backend, None, True)
        self.tensors["e"], self.tensors["slope"] = maps["e"], maps["slope"]

    def forward(self, backend: str, pivot: Tensor | None, slope: bool) -> dict[str, Tensor]:
        """What one pass gives by name, memory filled with NaN before."""
        tensors = [*(self.tensors[name] for name in FORWARD), pivot]
        function = backends.function(backend, "expand_depthwise_with_maps")
        with poisoned_memory("nan"):
            found = function(*tensors, statistics=True, slope=slope, **self.options)
        return dict(zip(("y", "sums", "e", "slope")[: len(found)], found, strict=True))

    def run(self, backend: str, needed: list[bool] | None = None) -> list[Tensor]:
        function = backends.function(backend, "expand_depthwise_backward")
        with poisoned_memory("nan"):
            return function(*self.tensors.values(), needed=needed or self.needed, **self.options)

    def hold(self, got: list[Tensor], dtype: torch.dtype) -> None:
        exact = {n: None if t is None else t.double() for n, t in self.tensors.items()}
        arguments: dict[str, Any] = {"needed": self.needed, **self.options}
        want = reference.expand_depthwise_backward(*exact.values(), **arguments)
        eager = reference.expand_depthwise_backward(*self.tensors.values(), **arguments)
        names = [n for n, needed in zip(GRADIENTS, self.needed, strict=True) if needed]
        for name, actual, exactly, plain in zip(names, got, want, eager, strict=True):
            # Sums for a batch norm come in fp64.
            close(actual.to(dtype), exactly, plain.to(dtype), dtype, name)


def assert_sums_of(y: Tensor, pivot: Tensor, sums: Tensor) -> None:
    """In fp64; up to 8 terms are added in the type that maps are computed in."""
    deviation = (y.double() - pivot.double().reshape(-1, 1, 1)).transpose(0, 1).flatten(1)
    exact = torch.stack([deviation.sum(1), deviation.square().sum(1)])
    scale = torch.stack([deviation.abs().sum(1), deviation.square().sum(1)])
    assert sums.dtype == torch.float64 and sums.shape == exact.shape
    assert ((sums - exact).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("slope", [False, True], ids=["without_slope", "with_slope"])
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs(backend: str, row: Row, slope: bool, dtype: str) -> None:
    """All maps, the sums, and y alone, with them and without."""
    kind = DTYPES[dtype]
    call = Call(row, kind)
    pivot = torch.linspace(-1, 1, row.m).to(torch.float64 if dtype == "fp64" else torch.float32)
    got = call.forward(backend, pivot, slope)
    tensors = [call.tensors[name] for name in FORWARD]
    exact = [None if t is None else t.double() for t in tensors]
    kept: dict[str, Any] = {"statistics": True, "slope": True, **call.options}
    for name, want, eager in zip(
        ("y", "sums", "e", "slope"),
        reference.expand_depthwise_with_maps(*exact, pivot.double(), **kept),
        reference.expand_depthwise_with_maps(*tensors, pivot, **kept),
        strict=True,
    ):
        if name in got and name != "sums":
            close(got[name], want, eager, kind, name)
    assert_sums_of(got["y"], pivot, got["sums"])
    y, sums = backends.function(backend, "expand_depthwise_statistics")(
        *tensors, pivot, **call.options
    )
    alone = backends.function(backend, "expand_depthwise")(*tensors, **call.options)
    assert torch.equal(y, alone)
    assert_sums_of(y, pivot, sums)
    if not slope:
        assert torch.equal(y, got["y"]) and torch.equal(sums, got["sums"])


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_write_the_same_maps(backend: str, row: Row) -> None:
    """To the bit, wherever one thread's rows end: also y in which nothing but padding is seen."""
    call = Call(row, FP32)
    call.options["padding"] += 2
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(call.forward(backend, None, True))
    finally:
        torch.set_num_threads(before)
    tensors = [call.tensors[name] for name in FORWARD]
    want = reference.expand_depthwise(
        *(None if t is None else t.double() for t in tensors), **call.options
    )
    close(found[0]["y"], want, reference.expand_depthwise(*tensors, **call.options), FP32, "y")
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in ("y", "e", "slope"))
        assert torch.allclose(other["sums"], found[0]["sums"], rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(backend: str, row: Row, kept: bool, dtype: str) -> None:
    call = Call(row, DTYPES[dtype])
    if kept:
        call.keep(backend)
    call.hold(call.run(backend), DTYPES[dtype])


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("row", ROWS[:4], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_bands(backend: str, row: Row, threads: int) -> None:
    """Right, and the same bits every time."""
    call = Call(row, torch.float32, local=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, again = call.run(backend), call.run(backend)
    finally:
        torch.set_num_threads(before)
    call.hold(first, torch.float32)
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", shapes.rows("ragged_c21", "odd_c21_m31"), ids=str)
def test_what_is_asked_for_does_not_change_it(backend: str, row: Row) -> None:
    """One gradient alone has the bits that it has among all of them."""
    call = Call(row, FP32)
    places = [i for i, needed in enumerate(call.needed) if needed]
    for place, every in zip(places, call.run(backend), strict=True):
        needed = [i == place for i in range(len(GRADIENTS))]
        (alone,) = call.run(backend, needed)
        assert torch.equal(alone, every), GRADIENTS[place]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_whole_numbers_are_exact(backend: str, stride: int) -> None:
    """Then no order of sums can show: every pixel, channel, tap and border is where it belongs."""
    row = replace(_WIDE, name=f"whole_{stride}", stride=stride, norm="none", act="relu")
    call = Call(row, FP32)
    for name, t in call.tensors.items():
        if t is not None:
            call.tensors[name] = (2 * t).round().clamp(-2, 2)
    exact = [None if t is None else t.double() for t in call.tensors.values()]
    want = reference.expand_depthwise_backward(*exact, needed=call.needed, **call.options)
    for got, expected in zip(call.run(backend), want, strict=True):
        assert float(expected.abs().max()) < 2**24
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("kept", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("name", ["ragged_c21", "no_bias"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_torch_ops(backend: str, name: str, kept: bool) -> None:
    """Schema and fake, and the kernel behind them."""
    call = Call(shapes.rows(name)[0], FP32)
    if kept:
        call.keep(backend)
    maps = {n: t for n, t in call.tensors.items() if t is not None and t.dim() == 4}
    for n in ("x", "grad"):
        call.tensors[n] = maps[n].contiguous(memory_format=torch.channels_last)
    arguments = (*call.tensors.values(), call.needed, *call.options.values(), backend)
    got = ops_expand_depthwise.backward(*arguments)
    assert all(map(torch.equal, got, call.run(backend)))
    library = torch.ops.emo_kernels
    forward = [*(call.tensors[name] for name in FORWARD), None, True, kept]
    for op, given in (
        (library.expand_depthwise_backward, arguments),
        (library.expand_depthwise_with_maps, (*forward, *call.options.values(), backend)),
    ):
        torch.library.opcheck(op.default, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are Linux's mmap")
@pytest.mark.parametrize("side", ["right", "left"])
def test_addresses_stay_inside(side: str) -> None:
    """Not one byte outside a tensor is read or written: in a process to spare."""
    child = subprocess.run(
        [sys.executable, __file__, side], check=False, capture_output=True, text=True, timeout=300
    )
    report = f"exit {child.returncode}; {child.stdout[-200:]!r}; {child.stderr[-800:]}"
    assert child.returncode == 0 and "survived" in child.stdout, report


def _run_beside_guards(side: str) -> None:
    """Every row in both directions, each tensor given or made ending or beginning at a guard."""
    from emo_kernels.cpu import layout

    new_map, empty = layout.new_map, layout.empty
    layout.new_map = lambda *args: guarded(new_map(*args), side)
    layout.empty = lambda *args: guarded(empty(*args), side)
    for row in ROWS:
        for dtype in ("fp32", "bf16"):
            print(row.name, dtype, flush=True)
            if row.n == 0:
                continue
            call = Call(row, DTYPES[dtype])
            for name, tensor in call.tensors.items():
                if tensor is not None:
                    dense = tensor if tensor.dim() < 4 else layout.pixels(tensor)
                    call.tensors[name] = guarded(dense, side)
            for kept in (False, True):
                call.forward("cpu", None, kept)
                call.run("cpu")
                call.keep("cpu")
    print("survived")


if __name__ == "__main__":
    _run_beside_guards(sys.argv[1])
