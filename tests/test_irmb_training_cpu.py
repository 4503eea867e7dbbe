"""The CPU's training kernels: every instruction set, and the same bits on repeat."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from block_kinds import KINDS, randomise
from grid import DTYPES
from numerics import Case, check_operator, grad_output_like, round_all, run
from shapes import Row
from test_irmb_training import kernels, plain, statistics_of, training_case
from training_step import (  # noqa: F401  (the fixtures)
    WITHOUT_KERNELS,
    assert_as_near_as_autocast,
    counted_steps,
    twins,
)

import emo_kernels as ek
from emo_kernels import _C, backends, reference
from emo_kernels.nn import iRMB
from emo_kernels.ops.irmb_step import Step
from emo_kernels.spec import IRMBWeights

ROWS = shapes.rows("both_windows", "attention_and_excite", "dilated", "ragged_c21", "batch_5")
FP32 = torch.float32
# Half of the keys' bias; the bias in front of the batch's own mean.
WITHOUT_INFLUENCE = ("qk.conv.bias", "convs.0.0.bias")
COMPOSED = [k for k in KINDS if k not in (*WITHOUT_KERNELS, "attention_v_group")]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_instruction_set(
    row: Row, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    batch = statistics_of(row, "batch")
    check_operator(kernels("cpu", batch), plain(batch), training_case(row), DTYPES[dtype], name=isa)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_kernels_are_templates_of_one_code_in_fp64(row: Row) -> None:
    batch = statistics_of(row, "batch")
    case = training_case(row)
    check_operator(kernels("cpu", batch), plain(batch), case, torch.float64, name="fp64")


def gradients(case: Case, batch: tuple[bool, bool], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs = round_all(case.tensors, dtype)
    kernel = kernels("cpu", batch)
    out = run(kernel, inputs, case.options)["out"]
    grad = grad_output_like(out).to(dtype)
    return run(kernel, inputs, case.options, case.differentiable(), grad)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_thread_count_gives_the_same_bits_every_time(row: Row, threads: int, dtype: str) -> None:
    case, batch = training_case(row), statistics_of(row, "batch")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = (gradients(case, batch, DTYPES[dtype]) for _ in range(2))
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


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("row", shapes.rows("ragged_c21", "stride_2_13x9", "no_bias"), ids=str)
def test_the_slope_may_be_kept_or_recomputed(
    row: Row, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Step, "_keeps_slope", lambda step, _: kept and not step.recomputes_local)
    batch = statistics_of(row, "batch")
    for name, dtype in (("cpu", FP32), ("cpu", torch.float64), ("reference", torch.float64)):
        check_operator(kernels(name, batch), plain(batch), training_case(row), dtype, name=name)


@pytest.mark.parametrize(
    "channels, dtype, maps", [(72, FP32, 6), (48, FP32, 5), (96, torch.bfloat16, 5)]
)
def test_q_and_k_are_kept_and_the_slope_where_a_wide_product_makes_it(
    channels: int, dtype: torch.dtype, maps: int
) -> None:
    """Maps that autograd's graph holds: x, q and k, the attention's result, e and y, and of e's
    activation the slope or not.
    """
    block = ek.accelerate(
        iRMB(channels, channels, dim_head=24, attn_pre=True).to(dtype), backend="cpu"
    )
    x = torch.randn(2, channels, 7, 7, dtype=dtype)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        block(x)
    assert sum(t.dim() == 4 and t.shape[-1] == 7 for t in saved) == maps


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("kind", COMPOSED)
def test_autocast_of_every_kind(
    kind: str, isa: str, steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    # A smooth activation: whether rounding sends a sum across relu's edge is luck, ours or eager's.
    options = {"dim_head": 8, "window_size": 3, "act_layer": "silu", **KINDS[kind]}
    blocks = [randomise(iRMB(24, 24, **options)).float().train() for _ in range(3)]
    draws = [(*twins(block, "cpu"), torch.randn(3, 24, 7, 8)) for block in blocks]
    assert_as_near_as_autocast(draws, torch.bfloat16)
    assert steps == 3 * ["cpu"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_special_values_in_bf16(
    row: Row, isa: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go where the oracle sends them: no further by way of a sum's last, half empty pair."""
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    case = training_case(row)
    x = case.tensors["x"]
    assert x is not None
    x[-1, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = value
    known = (False, False)
    dtype = torch.bfloat16
    check_operator(kernels("cpu", known), plain(known), case, dtype, gradients=False, name=isa)


@pytest.mark.parametrize("masters", [True, False], ids=["autocast", "bf16"])
@pytest.mark.filterwarnings("ignore:accelerate. .* blocks are not accelerated")  # in inference
def test_a_small_model_learns_in_bf16(masters: bool, steps: list[str]) -> None:
    """Twelve steps of EMO-1M on four images, every block of it on the kernels."""
    torch.manual_seed(0)
    model = ek.create_model("emo_1m", num_classes=4, drop_path_rate=0.0).train()
    model = ek.accelerate(model if masters else model.bfloat16())
    dtype = torch.float32 if masters else torch.bfloat16
    images, labels = torch.randn(4, 3, 64, 64).to(dtype), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=masters):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0], losses
    assert steps == 12 * 16 * ["cpu"]
    for name, p in model.named_parameters():
        assert p.dtype == dtype and p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.any() or name.endswith(WITHOUT_INFLUENCE), name


def test_float16_is_refused_with_the_reason() -> None:
    row = shapes.rows("ragged_c21")[0]
    weights = IRMBWeights._make(w if w is None else w.half() for w in shapes.weights(row))
    x = shapes.feature_map(row).half()
    reason = backends.why_not("cpu", "irmb_training", "cpu", x, weights, row.spec())
    assert reason is not None
    assert "float32, bfloat16 and float64" in reason and "float16" in reason


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
