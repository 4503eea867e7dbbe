"""The CPU's training kernels: every instruction set, and the same bits on repeat."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from numerics import Case, check_operator, grad_output_like, round_all, run
from shapes import Row
from test_irmb_training import kernels, plain, statistics_of, training_case

from emo_kernels import backends, reference

_C = pytest.importorskip("emo_kernels._C", reason="the compiled module is not built")
pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason="the cpu backend is not compiled"
)
ROWS = shapes.rows("both_windows", "attention_and_excite", "dilated", "ragged_c21", "batch_5")
FP32 = torch.float32


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_instruction_set(row: Row, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    batch = statistics_of(row, "batch")
    check_operator(kernels("cpu", batch), plain(batch), training_case(row), FP32, name=isa)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_kernels_are_templates_of_one_code_in_fp64(row: Row) -> None:
    batch = statistics_of(row, "batch")
    case = training_case(row)
    check_operator(kernels("cpu", batch), plain(batch), case, torch.float64, name="fp64")


def gradients(case: Case, batch: tuple[bool, bool]) -> dict[str, torch.Tensor]:
    inputs = round_all(case.tensors, FP32)
    kernel = kernels("cpu", batch)
    out = run(kernel, inputs, case.options)["out"]
    return run(kernel, inputs, case.options, case.differentiable(), grad_output_like(out).float())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_thread_count_gives_the_same_bits_every_time(row: Row, threads: int) -> None:
    case, batch = training_case(row), statistics_of(row, "batch")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = gradients(case, batch), gradients(case, batch)
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("kept", [True, False])
def test_the_local_gradient_may_be_kept_or_recomputed(
    kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways of :mod:`emo_kernels.ops.irmb_step`, whichever the backend prefers."""
    has = backends.has

    def prefers(name: str, operator: str) -> Any:
        return kept if operator == "keeps_local_gradient" else has(name, operator)

    monkeypatch.setattr(backends, "has", prefers)
    row = shapes.rows("ragged_c21")[0]
    batch = statistics_of(row, "batch")
    for name, dtype in (("cpu", FP32), ("cpu", torch.float64), ("reference", torch.float64)):
        check_operator(kernels(name, batch), plain(batch), training_case(row), dtype, name=name)


EMPTY = torch.empty(0, 6, 5, 4)


def test_no_images() -> None:
    """Empty maps, and zeros for what is summed over them."""
    from emo_kernels import cpu

    weight, wide = torch.randn(8, 6, 1, 1), torch.empty(0, 8, 5, 4)
    found = cpu.expand_backward(wide, EMPTY, weight, needed=[True, True, False, False, False])
    want = reference.expand_backward(wide, EMPTY, weight, needed=[True, True, False, False, False])
    for got, expected in zip(found, want, strict=True):
        assert torch.equal(got, expected)
    sums = cpu.batch_norm_sums(EMPTY, None)
    assert torch.equal(sums, torch.zeros(2, 6, dtype=torch.float64))
    options = {"stride": 1, "padding": 1, "dilation": 1}
    filters = torch.randn(6, 1, 3, 3)
    dx, dw = cpu.depthwise_conv2d_backward(EMPTY, EMPTY, filters, needed=[True, True], **options)
    assert dx.shape == EMPTY.shape and torch.equal(dw, torch.zeros_like(filters))
