"""Expansion and depthwise convolution in one CUDA kernel: its walk on the host, and on a GPU.

As ``test_cuda_depthwise.py``: the walk runs the kernel's own code, every access checked, barriers
too; its numbers are held to the tolerance rule.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import shapes
import torch
from cases import CASES
from grid import walk_marks
from memory import with_layout
from numerics import round_all
from shapes import Row
from test_cuda_depthwise import DTYPES, close, moved, on_both, random
from torch import Tensor

from emo_kernels import _C, cuda, reference
from emo_kernels.ops import expand_depthwise as ops_expand_depthwise
from emo_kernels.reference.expand import normalize


def takes(row: Row) -> bool:
    """Whether the kernel takes a block that has these sizes."""
    known = row.kernel in (3, 5) and row.stride in (1, 2) and row.dilation == 1
    return known and row.expands and row.m % 2 == 0 and row.v_groups == 1


def distinct(rows: list[Row]) -> list[Row]:
    """One row of those that are one to the kernel: it sees no attention."""
    found: dict[Any, Row] = {}
    for row in rows:
        norm = "none" if row.head_dim else row.norm
        key = (*row.input_shape, row.m, row.kernel, row.stride, row.act, norm, row.bias)
        found.setdefault(key, row)
    return list(found.values())


ROWS = distinct([row for row in shapes.VIEWS["irmb"]() if takes(row) and not row.slow])
# Every kernel, with and without a norm, x in single elements, M = 588 and 700, a batch of none.
FEW = shapes.rows(
    "5m_stage1_down_small",
    "2m_stage4_10x10",
    "1m_stage4_20x20",
    "stride_2_13x9",
    "stride_2_8x15_k5",
    "5m_stage3_down_small",
    "ragged_c21",
    "no_norm",
    "pixel",
    "batch_0_conv",
)


def expansion(act: str, norm: str = "affine") -> dict[str, Any]:
    """Options of a call, but for the convolution's step."""
    return {"norm": norm, "eps": 1e-6, "act": act, "groups": 1, "dilation": 1}


class Call:
    """The row's call, rounded to a dtype: tensors in order and options."""

    def __init__(self, row: Row, dtype: torch.dtype, **data: Any) -> None:
        case = CASES["expand"](row, **data)
        weights = shapes.weights(row, **data)
        tensors: dict[str, Tensor | None] = {**case.tensors, "dw_weight": weights.dw_weight}
        norm = "none" if row.head_dim else case.options["norm"]
        if norm == "none":
            tensors |= {"norm_weight": None, "norm_bias": None}
        names = ("x", "weight", "bias", "norm_weight", "norm_bias", "dw_weight")
        rounded = round_all({name: tensors.get(name) for name in names}, dtype)
        self.tensors = [rounded[name] for name in names]
        self.options = expansion(row.act, norm) | {"stride": row.stride, "padding": row.padding}

    def run(self, device: str = "cpu") -> Tensor:
        return cuda.expand_depthwise(*moved(device, *self.tensors), **self.options)

    def want(self) -> Tensor:
        tensors = [None if t is None else t.double() for t in self.tensors]
        return oracle_of(tensors, **self.options)

    def eager(self) -> Tensor:
        return reference.expand_depthwise(*self.tensors, **self.options)


def oracle_of(tensors: list[Any], *, stride: int, padding: int, **options: Any) -> Tensor:
    options.pop("dilation")
    e = oracle.expand(*tensors[:5], **options)
    return oracle.depthwise_conv2d(e, tensors[5], stride=stride, padding=padding)


def hold(call: Call, got: Tensor, dtype: torch.dtype) -> None:
    close(got, call.want(), call.eager(), dtype, "y")


# ------------------------------------------------------------------------------------ the contract


# fp16 differs from bf16 in the conversions and the instruction of the tensor core alone.
@on_both
@pytest.mark.parametrize(
    ("row", "dtype"),
    [
        pytest.param(row, dtype, id=f"{row}-{dtype}", marks=walk_marks(row, dtype))
        for row in ROWS
        for dtype in DTYPES
        if dtype != "fp16" or row in FEW
    ],
)
def test_output(device: str, row: Row, dtype: str) -> None:
    call = Call(row, DTYPES[dtype])
    if unsupported(call) is not None:
        assert "do not fit" in str(unsupported(call)) and dtype == "fp32"
        return
    hold(call, call.run(device), DTYPES[dtype])


def unsupported(call: Call, **changed: Any) -> str | None:
    return cuda.expand_depthwise_unsupported(*call.tensors, **{**call.options, **changed})


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [r for r in FEW if r.n], ids=str)
@pytest.mark.parametrize("pivot", [False, True], ids=["no_pivot", "pivot"])
def test_statistics_are_of_the_stored_output(
    device: str, row: Row, dtype: str, pivot: bool
) -> None:
    call = Call(row, DTYPES[dtype])
    around = random((row.m,), torch.float32, 3) if pivot else None
    y, sums = cuda.expand_depthwise_statistics(
        *moved(device, *call.tensors, around), **call.options
    )
    assert torch.equal(y, call.run(device))
    mean = torch.zeros(row.m) if around is None else around
    deviation = (y.cpu().double() - mean.double().reshape(-1, 1, 1)).transpose(0, 1).flatten(1)
    exact = torch.stack([deviation.sum(1), deviation.square().sum(1)])
    # In fp32, a thread sums deviations from one value of the map, at most twice the largest.
    largest = 2 * deviation.abs().amax(1)
    scale = deviation.shape[1] * torch.stack([largest, largest.square()])
    assert sums.dtype == torch.float64 and sums.shape == (2, row.m)
    assert ((sums.cpu() - exact).abs() <= 1e-6 * scale).all()
    reference_sums = reference.expand_depthwise_statistics(*call.tensors, around, **call.options)[1]
    assert reference_sums.shape == sums.shape and reference_sums.dtype == sums.dtype


def whole(shape: tuple[int, ...], dtype: torch.dtype, seed: int, most: int) -> Tensor:
    """Whole numbers from -most to most."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(dtype)


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_whole_numbers_are_exact(device: str, dtype: str, k: int, stride: int) -> None:
    """Then no order of sums can show: every pixel, channel, tap and border is where it belongs."""
    kind = DTYPES[dtype]
    x, weight = whole((2, 24, 17, 30), kind, 1, 2), whole((74, 24, 1, 1), kind, 2, 1)
    bias, filters = whole((74,), kind, 3, 3), whole((74, 1, k, k), kind, 4, 3)
    scale, shift = whole((24,), kind, 5, 2), whole((24,), kind, 6, 1)
    tensors = (x, weight, bias, scale, shift, filters)
    options = expansion("relu") | {"stride": stride, "padding": k // 2}
    e = oracle.expand(*(t.double() for t in tensors[:5]), norm="affine", act="relu")
    assert float(e.max()) <= 256  # which every dtype holds
    want = oracle_of([t.double() for t in tensors], **options)
    y = cuda.expand_depthwise(*moved(device, *tensors), **options)
    assert torch.equal(y.cpu(), want.to(kind))


# ------------------------------------------------------------------------- what tiles must not show


@on_both
@pytest.mark.parametrize(
    ("shape", "m", "k", "stride"),
    [
        pytest.param((1, 16, 5, 700), 32, 3, 1, id="spans_of_columns"),
        pytest.param((1, 8, 6, 450), 126, 5, 2, id="spans_of_columns_k5"),
        pytest.param((1, 16, 90, 10), 32, 5, 1, id="segments_of_rows"),
        pytest.param((560, 8, 4, 3), 16, 3, 1, id="several_units_a_block"),
        pytest.param((300, 6, 3, 9), 20, 5, 2, id="several_units_in_single_elements"),
        pytest.param((140, 8, 1, 60), 64, 3, 1, id="other_columns_in_a_block"),
        pytest.param((2, 40, 9, 9), 2, 3, 1, id="two_channels"),
        pytest.param((1, 8, 4, 6), 700, 3, 1, id="many_chunks"),
    ],
)
def test_pieces_of_a_map(device: str, shape: tuple[int, ...], m: int, k: int, stride: int) -> None:
    c, kind = shape[1], torch.bfloat16
    parameters = [(m, c, 1, 1), (m,), (c,), (c,), (m, 1, k, k)]
    tensors = [random(shape, kind, 1)]
    tensors += [random(part, kind, i) * 0.3 for i, part in enumerate(parameters)]
    options = expansion("silu") | {"stride": stride, "padding": k // 2}
    y, sums = cuda.expand_depthwise_statistics(*moved(device, *tensors, None), **options)
    want = oracle_of([t.double() for t in tensors], **options)
    close(y, want, reference.expand_depthwise(*tensors, **options), kind, "y")
    exact = y.double().sum((0, 2, 3)).cpu()
    assert float((sums[0].cpu() - exact).abs().max()) <= 1e-6 * float(y.double().abs().sum())


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "affine"), [(21, True), (40, False), (72, True)])
def test_layer_norm_in_front(device: str, dtype: str, c: int, affine: bool) -> None:
    """Channels in and not in eights, a mean far from zero, no parameters."""
    kind = DTYPES[dtype]
    x = (random((2, c, 9, 11), torch.float64, 1) + 30.0).to(kind)
    norm = [random((c,), kind, i) for i in (2, 3)] if affine else [None, None]
    weight, filters = random((34, c, 1, 1), kind, 4) * 0.2, random((34, 1, 5, 5), kind, 5)
    tensors = [x, weight, None, *norm, filters]
    options = expansion("gelu", "layer") | {"stride": 2, "padding": 2}
    y = cuda.expand_depthwise(*moved(device, *tensors), **options)
    want = oracle_of([None if t is None else t.double() for t in tensors], **options)
    close(y, want, reference.expand_depthwise(*tensors, **options), kind, "y")


@on_both
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_any_padding(device: str, padding: int) -> None:
    """Also rows and columns of y that see nothing but the zeros around e."""
    call = Call(shapes.rows("stride_2_8x15_k5")[0], torch.bfloat16)
    call.options["padding"] = padding
    hold(call, call.run(device), torch.bfloat16)


@on_both
@pytest.mark.parametrize("row", shapes.rows("5m_stage1_down_small", "ragged_c21"), ids=str)
def test_repeats_and_batches_agree_to_the_bit(device: str, row: Row) -> None:
    call = Call(row, torch.bfloat16)
    x, *rest = call.tensors
    x = torch.cat([x, x.flip(0) * 0.5, x])
    x, *rest = moved(device, x, *rest)
    first, again = (
        cuda.expand_depthwise_statistics(x, *rest, None, **call.options) for _ in range(2)
    )
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    pieces = [cuda.expand_depthwise(part, *rest, **call.options) for part in (x[:1], x[1:])]
    assert torch.equal(torch.cat(pieces), first[0])


@on_both
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "offset"])
def test_maps_of_any_layout(device: str, layout: str) -> None:
    call = Call(shapes.rows("5m_stage1_down_small")[0], torch.bfloat16)
    want = call.run(device)
    x = with_layout(call.tensors[0].to(device), layout)
    got = cuda.expand_depthwise(x, *moved(device, *call.tensors[1:]), **call.options)
    assert torch.equal(got, want)


def test_a_map_at_an_odd_address() -> None:
    """Then x comes in single elements; the numbers are the same."""
    call = Call(shapes.rows("5m_stage1_down_small")[0], torch.bfloat16)
    n, c, h, w = call.tensors[0].shape
    storage = torch.empty(call.tensors[0].numel() + 1, dtype=torch.bfloat16)
    view = storage[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    want = call.run()
    call.tensors[0] = view.copy_(call.tensors[0])
    assert view.data_ptr() % 4 == 2
    assert torch.equal(call.run(), want)


def test_weights_and_norms_of_another_dtype_than_the_maps() -> None:
    """As under autocast: the weight is rounded to the dtype of the map, the others are not."""
    call = Call(shapes.rows("5m_stage1_down_small")[0], torch.bfloat16)
    tensors = call.tensors
    generator = torch.Generator().manual_seed(5)
    for i in range(2, 6):
        t = tensors[i]
        if t is not None:
            t = t.float()
            tensors[i] = t + 1e-3 * torch.rand(t.shape, generator=generator)
    wide = [tensors[0], tensors[1].double() * (1 + 1e-4), *tensors[2:]]
    got = cuda.expand_depthwise(*wide, **call.options)
    assert torch.equal(got, cuda.expand_depthwise(*tensors, **call.options))
    x, weight, bias, *norm, filters = [t.float() for t in tensors]
    n = normalize(x, *norm, norm="affine", eps=0.0).bfloat16().float()
    e = reference.expand(n, weight, bias, act=call.options["act"]).bfloat16().float()
    step = {name: call.options[name] for name in ("stride", "padding")}
    autocast = reference.depthwise_conv2d(e, filters, **step).bfloat16()
    close(got, call.want(), autocast, torch.bfloat16, "y")


def test_not_a_number_spreads_as_far_as_the_filter() -> None:
    """And no further: what lies outside the map is zero, not zero times something."""
    call = Call(shapes.rows("5m_stage1_down_small")[0], torch.float32)
    call.tensors[0][0, 3, 4, 5] = float("nan")
    got, want = call.run(), call.want()
    assert torch.equal(got.isnan(), want.isnan()) and bool(want.isnan().any())
    assert not bool(want[1].isnan().any())


@pytest.mark.parametrize("pivot", [False, True], ids=["no_pivot", "pivot"])
def test_the_torch_ops(pivot: bool) -> None:
    """Schema and fake, and the reference behind them."""
    call = Call(shapes.rows("stride_2_8x15_k5")[0], torch.float64)
    tensors = call.tensors
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    around = random(tensors[1].shape[:1], torch.float32, 3) if pivot else None
    order = ("norm", "eps", "act", "groups", "stride", "padding", "dilation")
    options = (*(call.options[name] for name in order), "reference")
    y = ops_expand_depthwise.forward(*tensors, *options)
    assert torch.equal(y, call.eager())
    with_sums = ops_expand_depthwise.statistics(*tensors, around, *options)
    want = reference.expand_depthwise_statistics(*tensors, around, **call.options)
    assert all(torch.equal(a, b) for a, b in zip(with_sums, want, strict=True))
    tests = ("test_schema", "test_faketensor")
    library = torch.ops.emo_kernels
    for op, arguments in (
        (library.expand_depthwise, (*tensors, *options)),
        (library.expand_depthwise_statistics, (*tensors, around, *options)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)


# ------------------------------------------------------------------------------------------ limits


def test_what_the_kernel_does_not_take() -> None:
    call = Call(shapes.rows("5m_stage1_down_small")[0], torch.float32)
    one = "expand and depthwise convolution in one kernel take"
    assert unsupported(call) is None
    assert unsupported(call, stride=3) == f"{one} a stride of 1 or 2, got 3"
    assert unsupported(call, dilation=2) == f"{one} no dilation, got 2"
    assert unsupported(call, groups=2) == f"{one} one group, got 2"
    assert unsupported(call, padding=2**24) == (
        "the CUDA kernels take sizes below 2**24, got 16777216"
    )
    x, weight, bias, *norm, filters = call.tensors
    odd = [x, weight[:31], bias, *norm, filters[:31]]
    reason = cuda.expand_depthwise_unsupported(*odd, **call.options)
    assert reason == f"{one} an even number of expanded channels, got 31"
    seven = [x, weight, bias, *norm, filters.new_empty(*filters.shape[:2], 7, 7)]
    reason = cuda.expand_depthwise_unsupported(*seven, **call.options)
    assert reason == f"{one} a convolution of 3 or 5 taps, got 7"
    double = [None if t is None else t.double() for t in call.tensors]
    reason = cuda.expand_depthwise_unsupported(*double, **call.options)
    assert reason == "the CUDA kernels take float32, float16 and bfloat16, got torch.float64"
    wide = [x.new_empty(1, 4096, 9, 9), weight.new_empty(8, 4096, 1, 1), None, None, None]
    reason = cuda.expand_depthwise_unsupported(*wide, filters[:8], **call.options)
    assert reason == "4096 channels of torch.float32 do not fit into shared memory"


def test_published_blocks_leave_shared_memory_for_two_blocks() -> None:
    """99 KB is what every GPU from sm_80 on has for one, and half of sm_90's for two."""
    for row in shapes.VIEWS["irmb"]():
        if takes(row) and row.n:
            step = (row.kernel, row.stride, row.padding, 0, 0, 0)
            sizes = (row.n, row.c, row.m, row.h, row.w, *step)
            assert 0 < _C.cuda_expand_depthwise_shared_bytes(2, sizes) <= 99 * 1024, row


def test_a_launch_without_a_gpu_names_its_kernel() -> None:
    """An error of the runtime, or of a build without it; never a crash."""
    if torch.cuda.is_available():
        pytest.skip("the launch would succeed: there is a GPU")
    x = torch.zeros(8, 8)
    absent, present = (0, 0), (x.data_ptr(), 0)
    at = (x.data_ptr(), absent, absent, present, absent, present, absent, x.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="expand_depthwise"):
        _C.cuda_expand_depthwise(0, at, (1, 1, 2, 1, 1, 3, 1, 1, 0, 0, 0), 0, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 2, 1, 1, 4, 1, 2, 0, 0, 0), "K 3 or 5, stride 1 or 2, M even"),
        ((1, 1, 2, 9, 9, 3, 3, 1, 0, 0, 0), "K 3 or 5, stride 1 or 2, M even"),
        ((1, 1, 3, 9, 9, 3, 1, 1, 0, 0, 0), "K 3 or 5, stride 1 or 2, M even"),
        ((1, 4096, 2, 9, 9, 3, 1, 1, 0, 0, 0), "too many channels for shared memory"),
        ((1, 1, 2, 1, 1, 5, 1, 1, 0, 0, 0), "nothing to compute"),
    ],
)
def test_calls_that_no_launcher_makes(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.cuda_expand_depthwise_scratch(0, (0, *[(0, 0)] * 6, 0, 0), sizes)
