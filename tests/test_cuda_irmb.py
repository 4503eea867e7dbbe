"""The whole-block CUDA kernels: their walk on the host, everywhere, and the kernels on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import memory
import oracle
import pytest
import shapes
import torch
from cases import CASES, function
from grid import walk_marks
from numerics import UNIT_ROUNDOFF, Case, check_operator, round_all, run
from shapes import Row
from test_cuda_training import walking
from torch import Tensor

import emo_kernels as ek
from emo_kernels import _C, cuda, reference
from emo_kernels.cuda import layout
from emo_kernels.spec import IRMBWeights

irmb_module = importlib.import_module("emo_kernels.cuda.irmb")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HAS_GPU = torch.cuda.is_available() and _C.build_info()["cuda"]
ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else []
on_both = pytest.mark.parametrize("device", [pytest.param("cpu", id="walk"), *ON_GPU])


def refusal(row: Row, dtype: torch.dtype = torch.float32) -> str | None:
    case = CASES["irmb"](row, data="empty")
    tensors = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
    x = tensors.pop("x")
    return cuda.irmb_unsupported(x, IRMBWeights(**tensors), case.options["spec"])


ROWS = [row for row in shapes.VIEWS["irmb"]() if not row.slow and refusal(row) is None]


# Attention with padded tokens and without; both strides, 3, 5, 7 and dilated filters; channels that
# go by 16 bytes, by 4 and one by one.
FEW = shapes.rows(
    "odd_c21_m31",
    "stride_2_8x15_k5",
    "dilated",
    "kernel_7",
    "ragged_c21",
    "below_window",
    "block_windows",
    "q_k_x",
    "v2_5m_stage1_small",
    "excite_with_skip",
    "attention_and_excite",
    "unexpanded",
)


def call(
    case: Case, dtype: torch.dtype, device: str = "cpu", attend: str | None = None, **changes: Any
) -> Tensor:
    """The kernels on a case's tensors rounded to a dtype, on a device."""
    tensors = {n: None if t is None else t.to(device) for n, t in case.tensors.items()}
    rounded = {**round_all(tensors, dtype), **changes}
    kernels = partial(cuda.irmb, attend=attend)
    return run(function("irmb", kernels), rounded, case.options)["out"].cpu()


def check(
    row: Row,
    dtype: str,
    device: str = "cpu",
    case: Case | None = None,
    attend: str | None = None,
) -> None:
    check_operator(
        function("irmb", partial(cuda.irmb, attend=attend)),
        function("irmb", reference.irmb),
        case or CASES["irmb"](row),
        DTYPES[dtype],
        oracle=oracle.irmb,
        gradients=False,
        device=device,
        name="irmb",
    )


# fp16 differs from bf16 in the conversions alone.
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
    check(row, dtype, device)


def report(row: Row, dtype: torch.dtype, n: int, attend: str | None = None) -> dict[str, Any]:
    """How the kernels would run the row on n images on an H200."""
    case = CASES["irmb"](replace(row, n=1), data="empty")
    tensors = {n: t for n, t in case.tensors.items() if n != "x"}
    x, weights, spec = case.tensors["x"], IRMBWeights(**tensors), case.options["spec"]
    assert x is not None
    limit = irmb_module._SHARED[9, 0]
    sizes = irmb_module._sizes(x, weights, spec, limit, attend)
    return _C.cuda_irmb_report(layout.DTYPES[dtype], (n, *sizes[1:]))


def other_way(row: Row, dtype: str) -> str | None:
    """Where else than test_output's kernels the attention can be, if anywhere."""
    found = report(row, DTYPES[dtype], row.n)
    if not found["image"]:
        return None
    return "apart" if found["inside"] else "inside"


OTHER_WAYS = [
    pytest.param(row, dtype, way, id=f"{row}-{dtype}-{way}", marks=walk_marks(row, dtype, 4))
    for row in ROWS
    for dtype in DTYPES
    if row.head_dim and row.n and (dtype != "fp16" or row in FEW)
    if (way := other_way(row, dtype)) is not None
]


@on_both
@pytest.mark.parametrize(("row", "dtype", "attend"), OTHER_WAYS)
def test_attention_in_the_other_kernel(device: str, row: Row, dtype: str, attend: str) -> None:
    image = "irmb_image_kernel" in report(row, DTYPES[dtype], row.n, attend)["kernels"][0]
    assert image == (attend == "inside")
    check(row, dtype, device, attend=attend)


@on_both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "side",
    [pytest.param(4, id="8_warps"), pytest.param(13, id="16_warps", marks=pytest.mark.slow)],
)
def test_one_kernel_has_the_bits_of_two(device: str, side: int, dtype: str) -> None:
    """Where neither shares out the expanded channels."""
    switches = {"norm": "layer", "act": "gelu", "head_dim": 4, "window": 5, "kernel": 5}
    row = Row("small", c=8, m=40, o=8, h=side, w=side, n=280, **switches)
    case = CASES["irmb"](row)
    found = [report(row, DTYPES[dtype], row.n, attend)["kernels"] for attend in ("inside", "apart")]
    assert [len(names) for names in found] == [1, 2], found
    inside = call(case, DTYPES[dtype], device, "inside")
    assert torch.equal(inside, call(case, DTYPES[dtype], device, "apart"))


def test_which_blocks_attend_inside() -> None:
    """Many images: where it fits twice or with 16 warps; one image: nowhere, each share attends."""
    bf16 = torch.bfloat16
    models = shapes.rows("5m_stage3", "5m_stage4", "1m_stage3", "1m_stage4", "2m_stage4")
    for row in models:
        many, one = report(row, bf16, 256), report(row, bf16, 1)
        assert many["inside"] and many["time_inside"] <= many["time_apart"], row
        assert not one["inside"] and one["time_apart"] < one["time_inside"], row
        assert len(many["kernels"]) == 1 and len(one["kernels"]) == 3, row
    (large,) = shapes.rows("5m_stage3_40x40")
    assert report(large, bf16, 256)["image"] == 0
    with pytest.raises(ValueError, match="does not fit into its block's kernel"):
        report(large, bf16, 256, "inside")


@on_both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocks_that_share_nothing_out(device: str, dtype: str) -> None:
    """So many images that a block of threads has all expanded channels, and all heads."""
    small = Row("conv_140", c=6, m=70, o=10, h=3, w=2, n=280, skip=False)
    check(small, dtype, device)
    attends = {"norm": "layer", "act": "gelu", "head_dim": 4, "window": 3}
    check(Row("attention_280", c=8, m=40, o=8, h=3, w=4, n=280, **attends), dtype, device)


BOTH_WAYS = [(row, None) for row in FEW] + [
    (row, way) for row in FEW if row.head_dim and (way := other_way(row, "bf16")) is not None
]


@on_both
@pytest.mark.parametrize(
    ("row", "attend"), [pytest.param(*way, id="{}-{}".format(*way)) for way in BOTH_WAYS]
)
def test_repeats_and_images_agree_to_the_bit(device: str, row: Row, attend: str | None) -> None:
    case = CASES["irmb"](replace(row, n=4))
    x = case.tensors["x"]
    assert x is not None
    out = call(case, torch.bfloat16, device, attend)
    assert torch.equal(call(case, torch.bfloat16, device, attend), out)
    order = torch.tensor([2, 0, 3, 1])
    moved = Case({**case.tensors, "x": x[order]}, case.options)
    assert torch.equal(call(moved, torch.bfloat16, device, attend), out[order])


@on_both
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batches_of_another_size_differ_by_rounding(device: str, dtype: str) -> None:
    """One image shares its expanded channels out among blocks, many need not."""
    row = Row("many", c=6, m=70, o=10, h=3, w=2, n=280, skip=False)
    case = CASES["irmb"](row)
    out, x = call(case, DTYPES[dtype], device)[:1], case.tensors["x"]
    assert x is not None
    one = call(Case({**case.tensors, "x": x[:1]}, case.options), DTYPES[dtype], device)
    error = float((one.double() - out.double()).norm() / out.double().norm())
    assert error <= 4 * UNIT_ROUNDOFF[DTYPES[dtype]]


@on_both
@pytest.mark.parametrize("layout_name", ["channels_last", "sliced", "offset"])
@pytest.mark.parametrize("row", shapes.rows("odd_c21_m31", "below_window"), ids=str)
def test_maps_of_any_layout(device: str, row: Row, layout_name: str) -> None:
    case = CASES["irmb"](row)
    x = round_all(case.tensors, torch.bfloat16)["x"]
    assert x is not None
    laid = memory.with_layout(x.to(device), layout_name)
    assert torch.equal(
        call(case, torch.bfloat16, device, x=laid), call(case, torch.bfloat16, device)
    )


def test_weights_at_odd_addresses() -> None:
    """Rows that cannot be copied 16 or 4 bytes at a time are brought one by one: the same bits."""
    case = CASES["irmb"](shapes.rows("below_window")[0])
    rounded = round_all(case.tensors, torch.bfloat16)
    shifted: dict[str, Any] = {}
    for name, tensor in rounded.items():
        assert tensor is not None
        storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        shifted[name] = storage[1:].view(tensor.shape).copy_(tensor)
        assert shifted[name].data_ptr() % 4 == 2
    assert torch.equal(call(case, torch.bfloat16, **shifted), call(case, torch.bfloat16))


@pytest.mark.parametrize("row", shapes.rows("v2_5m_stage1_small", "below_window"), ids=str)
def test_fp32_weights_with_a_16_bit_map(row: Row) -> None:
    """As under autocast: what is multiplied is rounded on the way, vectors and filters are not."""
    case = CASES["irmb"](row)
    rounded = round_all(case.tensors, torch.bfloat16)
    wide = {n: t if n == "x" or t is None else t.float() for n, t in rounded.items()}
    assert torch.equal(call(case, torch.bfloat16, **wide), call(case, torch.bfloat16))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("row", shapes.rows("stride_2_8x15_k5", "ragged_c21", "5m_stage4"), ids=str)
def test_in_the_least_shared_memory(row: Row, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller tiles give the same bits, where they fit; else the reason is given."""
    case = CASES["irmb"](replace(row, n=1))
    out = call(case, DTYPES[dtype])
    monkeypatch.setattr(irmb_module, "shared_limit", lambda x: irmb_module._LEAST_SHARED)
    reason = refusal(row, DTYPES[dtype])
    if row.name == "5m_stage4" and dtype == "fp32":
        assert reason is not None and "do not fit" in reason and "101376" in reason
        with pytest.raises(ValueError, match="do not fit into 101376 bytes"):
            call(case, DTYPES[dtype])
        return
    assert reason is None
    torch.testing.assert_close(call(case, DTYPES[dtype]), out, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("row", FEW, ids=str)
def test_special_values_go_where_the_oracle_sends_them(row: Row, value: float) -> None:
    case = CASES["irmb"](row)
    x = case.tensors["x"]
    assert x is not None
    x[-1, x.shape[1] // 2, x.shape[2] // 2, x.shape[3] // 2] = value
    check(row, "fp32", case=case)


@pytest.mark.slow
def test_every_block_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 0's squeeze-excite and all that follow: EMO-1M in inference, by the walk."""
    torch.manual_seed(0)
    model = ek.create_model("emo_1m").eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model(image)
        with walking(monkeypatch):
            ek.accelerate(model, backend="cuda")
            rows = [row for row in ek.explain(model, image).rows if row.operator == "irmb"]
            assert len(rows) == 16 and {row.inference for row in rows} == {"cuda"}
            torch.testing.assert_close(model(image), plain, rtol=1e-4, atol=1e-5)


_WIDE = Row("wide", c=8, m=8, o=8, h=4, w=4, skip=False)
_HUGE: dict[str, Any] = {"c": 8, "m": 12000, "o": 8, "h": 3, "w": 3}
REFUSALS: dict[str, tuple[str, Callable[[], Row]]] = {
    "large_excite": ("squeeze-excite of 12000 channels", lambda: Row("e", **_HUGE, se=4000)),
    "wide_excite": ("no tile of", lambda: replace(_WIDE, o=385, se=2)),
    "no_stencil": ("need the depthwise", lambda: shapes.rows("attention_only")[0]),
    "grouped": ("no grouped expansion", lambda: shapes.rows("grouped_v")[0]),
    "post": ("before the expansion only", lambda: shapes.rows("post_expansion")[0]),
    "conv_attn": ("before the convolution", lambda: shapes.rows("conv_then_attention")[0]),
    "both_windows": ("'grid' and 'block'", lambda: shapes.rows("both_windows")[0]),
    "large_window": ("at most 128 tokens", lambda: replace(shapes.rows("whole_map")[0], h=16)),
    "wide_output": ("no tile of", lambda: replace(_WIDE, o=641)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_kernels_do_not_take(name: str) -> None:
    reason, row = REFUSALS[name]
    assert reason in str(refusal(row()))


def test_fp64_is_refused() -> None:
    row = shapes.rows("odd_c21_m31")[0]
    assert "take float32, float16 and bfloat16" in str(refusal(row, torch.float64))


# N C H W, M O K R, stride padding dilation, attention, norm act expands skip attend, limit, eps.
SIZES = (1, 4, 3, 3, 8, 4, 3, 0, 1, 1, 1, 0, 7, 0, 0, 0, 1, 0, 0, 232448, 1e-6, 1e-6)
POINTERS: tuple[int | tuple[int, int], ...] = (0, 0, *[(0, 0)] * 19)


def sizes_with(**changes: int) -> tuple[float, ...]:
    """SIZES with others by place, ``_4=0``."""
    places = {int(name[1:]): value for name, value in changes.items()}
    return tuple(places.get(i, size) for i, size in enumerate(SIZES))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (sizes_with(_4=0), r"irmb: .*2\^24"),
        (sizes_with(_2=2**24), r"irmb: .*2\^24"),
        (sizes_with(_8=2, _17=1), "a skip needs maps of one size"),
        (sizes_with(_2=2**15, _3=2**15), r"irmb: a map must have fewer than 2\^30 pixels"),
        (sizes_with(_16=0), "without an expansion M must be C"),
        (sizes_with(_11=3), "heads must divide C"),
        (sizes_with(_11=2, _13=2), "one kind of windows"),
        (SIZES[:-1], "wrong number of sizes"),
    ],
)
def test_wrong_sizes_are_named_by_the_kernels(sizes: tuple[float, ...], message: str) -> None:
    """Behind the operator's own checks: a call that does not fit together."""
    assert _C.cuda_irmb_report(0, SIZES)["block"] > 0
    with pytest.raises(ValueError, match=message):
        _C.cuda_irmb_report(0, sizes)


def test_too_large_a_batch_is_named_by_the_kernels() -> None:
    with pytest.raises(ValueError, match="too many images for one launch: .* split the batch"):
        _C.cuda_irmb_scratch(0, POINTERS, sizes_with(_0=2**32))


@pytest.mark.parametrize("n", [1, 256])
def test_published_blocks_fit_into_every_gpu(n: int) -> None:
    """In 16 bits: an H200's shared memory, and the least there is."""
    for row in shapes.OFFICIAL:
        case = CASES["irmb"](replace(row, n=1), data="empty")
        x = case.tensors["x"]
        assert x is not None
        weights = IRMBWeights(**{n: t for n, t in case.tensors.items() if n != "x"})
        for limit in (232448, irmb_module._LEAST_SHARED):
            sizes = irmb_module._sizes(x, weights, case.options["spec"], limit)
            found = _C.cuda_irmb_report(layout.DTYPES[torch.bfloat16], (n, *sizes[1:]))
            assert 0 < found["block"] <= limit, (row, limit)
            assert bool(found["attention"]) == bool(row.head_dim), (row, limit)
            assert bool(found["excite"]) == bool(row.se), (row, limit)
            assert max(found[name] for name in ("attention", "excite", "image")) <= limit


def test_a_launch_without_a_gpu_names_its_kernel() -> None:
    if torch.cuda.is_available():
        pytest.skip("the launch would succeed: there is a GPU")
    with pytest.raises(RuntimeError, match="irmb"):
        _C.cuda_irmb(0, POINTERS, SIZES, 0, 0, 0)
