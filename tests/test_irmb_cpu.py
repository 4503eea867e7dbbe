"""The CPU block kernel beyond the contract: instruction sets, threads, staleness, memory.

``test_irmb.py`` holds the backend to the contract with the instruction set this machine chooses.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import integers, irmb_case
from memory import poisoned_memory, with_layout
from numerics import assert_bitwise_equal, assert_equal, assert_kernel_close, round_all
from shapes import TABLE, Row, feature_map, rows, weights
from torch import Tensor

from emo_kernels import _C, cpu, reference
from emo_kernels.spec import IRMBWeights

HERE = Path(__file__).parent
ISAS = _C.available_isas()
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def rounded(row: Row, dtype: torch.dtype, **data: str) -> tuple[Tensor, IRMBWeights]:
    """The row's input and weights in a dtype."""
    w = weights(row)
    return feature_map(row, **data).to(dtype), IRMBWeights(
        *[None if t is None else t.to(dtype) for t in w]
    )


def supported(row: Row) -> bool:
    x, w = rounded(replace(row, n=0), FP32)
    return cpu.irmb_unsupported(x, w, row.spec()) is None


EXTRA = [
    Row("dilated_skip", c=16, m=40, o=16, h=20, w=31, n=1, dilation=1, kernel=5, norm="layer"),
    Row("wide_700_k7", c=24, m=64, o=24, h=6, w=700, n=1, kernel=7),
    Row("wide_many_panels", c=40, m=700, o=40, h=5, w=260, n=1, kernel=5, norm="layer"),
    Row("even_kernel", c=16, m=24, o=20, h=9, w=10, kernel=4, stride=2, skip=False),
    Row("stride_beyond_kernel", c=16, m=24, o=20, h=9, w=10, kernel=2, stride=3, skip=False),
    Row("silu_everywhere", c=72, m=216, o=72, h=9, w=28, n=3, gamma=True),
]
ROWS = [row for row in [*TABLE, *EXTRA] if supported(row)]
FEW = [
    *rows("below_window", "block_windows", "post_expansion", "q_k_x", "whole_map", "window_8"),
    *rows("both_windows", "attention_and_excite", "ragged_c21", "1m_stage4"),
    *rows("odd_c21_m31", "excite_with_skip", "stride_2_13x9", "kernel_7", "batch_5", "dilated"),
    *EXTRA,
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("EMO_KERNELS_ISA", request.param)
    assert _C.selected_isa() == request.param
    yield request.param


def by_row(table: list[Row]) -> pytest.MarkDecorator:
    marked = [pytest.param(r, id=r.name, marks=[pytest.mark.slow] * r.slow) for r in table]
    return pytest.mark.parametrize("row", marked)


def doubles(w: IRMBWeights) -> IRMBWeights:
    return IRMBWeights(*[None if t is None else t.double() for t in w])


@by_row(ROWS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_follows_the_rule(isa: str, dtype: torch.dtype, row: Row) -> None:
    x, w = rounded(row, dtype)
    want = reference.irmb(x.double(), doubles(w), row.spec())
    with poisoned_memory("nan"):
        got = cpu.irmb(x, w, row.spec())
    eager = reference.irmb(x, w, row.spec())
    assert_kernel_close(got, want, eager, dtype, name=f"irmb {row.name} {isa}")


@by_row(ROWS)
def test_fp32_weights_with_a_bf16_map(isa: str, row: Row) -> None:
    """As under autocast, whose convolutions round their weights."""
    (x, _), (_, w) = rounded(row, BF16), rounded(row, FP32)
    want = reference.irmb(x.double(), doubles(w), row.spec())
    with poisoned_memory("nan"):
        got = cpu.irmb(x, w, row.spec())
    assert got.dtype == BF16
    with torch.autocast("cpu", BF16):
        eager = reference.irmb(x, w, row.spec())
    assert_kernel_close(got, want, eager, BF16, name=f"irmb {row.name} {isa}")


@by_row(FEW)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_special_values_in_bf16(isa: str, row: Row, value: float) -> None:
    """Only where the oracle has them: what fills up an odd channel's pair stays out of sums."""
    x, w = rounded(row, BF16)
    x[-1, row.c // 2, row.h // 2, row.w // 2] = value
    want = reference.irmb(x.double(), doubles(w), row.spec())
    with poisoned_memory("nan"):
        got = cpu.irmb(x, w, row.spec())
    eager = reference.irmb(x, w, row.spec())
    once_rounded = want.float  # where torch's own bf16 result is non-finite and the oracle is not
    name = f"irmb {row.name} {isa}"
    assert_kernel_close(got, want, eager, BF16, name=name, fallback=once_rounded)


@by_row(ROWS)
def test_fp64_runs_the_same_code(row: Row) -> None:
    x, w = rounded(row, FP64)
    want = reference.irmb(x, w, row.spec())
    with poisoned_memory("huge"):
        got = cpu.irmb(x, w, row.spec())
    assert_kernel_close(got, want, None, FP64, name=f"irmb {row.name}")


@by_row(FEW)
@pytest.mark.parametrize("data", ["offset1000", "large", "tiny", "constant_channels"])
def test_hard_data(isa: str, row: Row, data: str) -> None:
    x, w = rounded(row, FP32, data=data)
    w64 = IRMBWeights(*[None if t is None else t.double() for t in w])
    want = reference.irmb(x.double(), w64, row.spec())
    eager = reference.irmb(x, w, row.spec())
    got = cpu.irmb(x, w, row.spec())
    assert_kernel_close(got, want, eager, FP32, name=f"irmb {row.name} {data}")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["unexpanded", "one_to_three", "odd_c21_m31"])
def test_integers_are_exact(isa: str, name: str, dtype: torch.dtype) -> None:
    """SiLU is exact at zero alone: the stencil's weights and shifts are zero."""
    row = replace(rows(name)[0], norm="none", act="relu")
    case = integers(irmb_case(row), largest=1)
    tensors = round_all(case.tensors, dtype)
    x = tensors.pop("x")
    assert x is not None
    for key in ("dw_weight", "bn_bias", "bn_mean"):
        tensors[key] = torch.zeros_like(tensors[key])
    tensors["bn_var"] = torch.ones_like(tensors["bn_mean"])
    w = IRMBWeights(**{k: t for k, t in tensors.items() if k in IRMBWeights._fields})
    w64 = IRMBWeights(*[None if t is None else t.double() for t in w])
    want = reference.irmb(x.double(), w64, row.spec())
    assert_equal(cpu.irmb(x, w, row.spec()), want, name=f"irmb {name}")


@by_row(FEW)
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "sliced", "offset", "expanded"]
)
def test_layouts_change_nothing(row: Row, layout: str) -> None:
    x, w = rounded(row, FP32)
    x = with_layout(x, layout)
    dense = x.clone(memory_format=torch.contiguous_format)
    want = cpu.irmb(dense, w, row.spec())
    got = cpu.irmb(
        x, IRMBWeights(*[t if t is None else with_layout(t, "sliced") for t in w]), row.spec()
    )
    assert_bitwise_equal(got, want, name=f"irmb {row.name} {layout}")
    assert got.is_contiguous(memory_format=torch.channels_last)


@by_row([*FEW, *rows("5m_stage4_down", "5m_stage3_down_small", "1m_stage0_small")])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_threads_and_batch_change_no_bit(isa: str, dtype: torch.dtype, row: Row) -> None:
    x, w = rounded(replace(row, n=5), dtype)
    spec = row.spec()
    torch.set_num_threads(1)
    want = cpu.irmb(x, w, spec)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_bitwise_equal(cpu.irmb(x, w, spec), want, name=f"{row.name}, {threads} threads")
        one = torch.cat([cpu.irmb(image, w, spec) for image in x.split(1)])
        assert_bitwise_equal(one, want, name=f"{row.name}, {threads} threads, by image")


def test_changed_weights_are_always_seen() -> None:
    """In place, through .data, by optimizer, in a reused buffer, and running statistics."""
    row = rows("odd_c21_m31")[0]
    x, w = rounded(row, FP32)
    spec = row.spec()

    def check(what: str) -> None:
        got, want = cpu.irmb(x, w, spec), reference.irmb(x, w, spec)
        torch.testing.assert_close(got, want, msg=lambda m: f"after {what}: {m}")

    check("nothing")
    for name, tensor in w.present():
        tensor.data.view(-1)[-1] += 0.5  # one element, no version bump
        check(f".data edit of {name}")
        tensor.mul_(1.25)
        check(f"in-place change of {name}")
    assert w.v_weight is not None
    w.v_weight.data.copy_(torch.randn_like(w.v_weight))
    check("a reused buffer")


def test_two_python_threads_at_once() -> None:
    torch.set_num_threads(2)
    row = rows("5m_stage2_small")[0]
    x, w = rounded(row, FP32)
    other = replace(row, c=48, m=96, o=48, name="other")
    jobs = [(x, w, row.spec()), (*rounded(other, FP32), other.spec())]
    want = [cpu.irmb(*job) for job in jobs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(cpu.irmb(*jobs[index]), want[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORKED = """
import os, sys
sys.path.insert(0, {here!r})
import torch
from test_irmb_cpu import cpu, rounded, rows
torch.set_num_threads(2)
row = rows("5m_stage1_small")[0]
x, w = rounded(row, torch.float32)
want = cpu.irmb(x, w, row.spec())
child = os.fork()
if child == 0:
    same = torch.equal(cpu.irmb(x, w, row.spec()), want)
    os._exit(0 if same else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(cpu.irmb(x, w, row.spec()), want)
"""

GUARDED = """
import itertools, sys
sys.path.insert(0, {here!r})
import torch
from memory import guarded
from test_irmb_cpu import FEW, IRMBWeights, cpu, rounded
torch.set_num_threads(1)
for dtype, side in itertools.product((torch.float32, torch.bfloat16), ("left", "right")):
    for row in FEW:
        x, w = rounded(row, dtype)
        want = cpu.irmb(x, w, row.spec())
        x = guarded(x.contiguous(memory_format=torch.channels_last), side)
        w = IRMBWeights(*[t if t is None else guarded(t, side) for t in w])
        assert torch.equal(cpu.irmb(x, w, row.spec()), want), (row.name, dtype, side)
"""


def in_subprocess(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script.format(here=str(HERE))],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_a_forked_child_runs_serially() -> None:
    in_subprocess(FORKED)


@pytest.mark.slow
def test_reads_nothing_beyond_its_tensors(isa: str) -> None:
    in_subprocess(GUARDED)


def test_output_fills_its_tensor_and_nothing_else() -> None:
    """Sentinels around an output of the raw entry point."""
    row = rows("odd_c21_m31")[0]
    x, w = rounded(row, FP32)
    want = cpu.irmb(x, w, row.spec())
    border = 1024
    memory = torch.full((want.numel() + 2 * border,), -7.5)
    raw_call(x, w, row, out=memory.data_ptr() + 4 * border)
    got = memory[border:-border].reshape(row.n, row.h, row.w, row.o).permute(0, 3, 1, 2)
    assert_bitwise_equal(got, want, name="out")
    assert (memory[:border] == -7.5).all() and (memory[-border:] == -7.5).all()


NO_ATTENTION = (0, 7, 0, 1)


def raw_call(image: Tensor, w: IRMBWeights, row: Row, **changes: object) -> None:
    """The entry point of ``_C`` with correct arguments, but for ``changes``."""
    dense = image.contiguous(memory_format=torch.channels_last)
    tensors = list(w)
    arguments = {
        "dtype": 0,
        "weight_dtype": 0,
        "x": dense.data_ptr(),
        "out": 0,
        "weights": tuple(0 if t is None else t.data_ptr() for t in tensors),
        "counts": tuple(0 if t is None else t.numel() for t in tensors),
        "sizes": (row.n, row.c, row.h, row.w, row.m, row.o, row.kernel, 0),
        "switches": (1, 3, row.stride, row.padding, row.dilation, int(row.skip), *NO_ATTENTION),
        "norm_eps": 1e-6,
        "bn_eps": 1e-6,
        "threads": 1,
    }
    arguments |= changes
    call = [arguments.pop(name) for name in ("x", "out", "threads")]
    _C.prepare_irmb(**arguments)(*call)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 7}, "dtype must be"),
        ({"x": 0}, "must not be null"),
        ({"out": 0}, "must not be null"),
        ({"weights": (0,) * 19}, "is missing"),
        ({"weights": (0,) * 3}, "weights: expected 19 entries, got 3"),
        ({"counts": (1,) * 19}, "must have 21 elements, got 1"),
        ({"sizes": (2, 21, 13, 9, 31, 21, 65, 0)}, "K must lie in 1..64, got 65"),
        ({"sizes": (2, -21, 13, 9, 31, 21, 3, 0)}, "C must lie in"),
        ({"sizes": (2**39, 21, 2**20, 2**20, 31, 21, 3, 0)}, "more than 2\\^63 bytes"),
        ({"switches": (9, 3, 1, 1, 1, 1, *NO_ATTENTION)}, "unknown norm"),
        ({"switches": (1, 9, 1, 1, 1, 1, *NO_ATTENTION)}, "unknown activation"),
        ({"switches": (1, 3, 0, 1, 1, 1, *NO_ATTENTION)}, "stride must lie in"),
        ({"switches": (1, 3, 2, 1, 1, 1, *NO_ATTENTION)}, "a skip needs stride 1"),
        ({"switches": (1, 3, 1, 0, 9, 0, *NO_ATTENTION)}, "does not fit the map"),
        ({"switches": (1, 3, 1, 1, 1, 1, 4, 7, 0, 1)}, "head_dim must divide C"),
        ({"switches": (1, 3, 1, 1, 1, 1, 3, 7, 0, 0)}, "heads must divide M"),
        ({"switches": (1, 3, 1, 1, 1, 1, 3, 7, 5, 1)}, "unknown windows"),
        ({"switches": (1, 3, 1, 1, 1, 1, 3, 2000, 0, 1)}, "tokens of a window must lie in"),
        ({"threads": 0}, "threads must lie in"),
    ],
)
def test_the_entry_point_checks_what_it_relies_on(changes: dict[str, object], message: str) -> None:
    row = rows("odd_c21_m31")[0]
    x, w = rounded(row, FP32)
    out = torch.empty(row.n * row.o * row.h * row.w)
    with pytest.raises(ValueError, match=f"irmb: .*{message}"):
        raw_call(x, w, row, **{"out": out.data_ptr(), **changes})


MISSING = "avx2" if platform.machine() == "aarch64" else "neon"  # known, but not to this machine


@pytest.mark.parametrize("name", ["banana", MISSING, ISAS[-1].upper(), f"{ISAS[-1]} ", "x" * 9999])
def test_missing_instruction_sets_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows("odd_c21_m31")[0]
    x, w = rounded(row, FP32)
    monkeypatch.setenv("EMO_KERNELS_ISA", name)
    message = (
        rf"EMO_KERNELS_ISA must be one of {', '.join(ISAS)} on this machine, got '{name[:64]}'"
    )
    with pytest.raises(ValueError, match=message):
        cpu.irmb(x, w, row.spec())
    assert w.v_weight is not None
    with pytest.raises(ValueError, match=message):
        cpu.expand(x, w.v_weight)


def test_an_empty_choice_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", "")
    assert _C.selected_isa() == ISAS[-1]


def test_unsupported_blocks_are_named() -> None:
    x, w = rounded(rows("conv_then_attention")[0], FP32)
    reason = cpu.irmb_unsupported(x, w, rows("conv_then_attention")[0].spec())
    assert "attends before the convolution" in str(reason)
    x, w = rounded(rows("grouped_v")[0], FP32)
    assert "grouped" in str(cpu.irmb_unsupported(x, w, rows("grouped_v")[0].spec()))
    x, w = rounded(rows("odd_c21_m31")[0], FP32)
    spec = rows("odd_c21_m31")[0].spec()
    assert cpu.irmb_unsupported(x, w, spec) is None
    assert "maps, got torch.float16" in str(cpu.irmb_unsupported(x.half(), w, spec))
    assert cpu.irmb_unsupported(x.bfloat16(), w, spec) is None
    mixed = w._replace(bn_mean=w.bn_mean.bfloat16())
    assert "weights of the map" in str(cpu.irmb_unsupported(x.bfloat16(), mixed, spec))
    assert "dw_weight" in str(cpu.irmb_unsupported(x, w._replace(dw_weight=None), spec))


@by_row(rows("5m_stage1", "5m_stage2"))
def test_scratch_of_a_thread_stays_below_a_megabyte(row: Row) -> None:
    torch.set_num_threads(2)
    x, w = rounded(row, FP32)
    _C.release_scratch()
    before = _C.scratch_bytes()
    cpu.irmb(x, w, row.spec())
    assert _C.scratch_bytes() - before < 2 * 2**20
