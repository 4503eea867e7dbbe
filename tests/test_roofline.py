"""The counts of bytes and FLOPs: by hand on small blocks, against DESIGN.md on the models."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import roofline
import torch
from gpus import GPUS, Gpu
from roofline_blocks import Block, blocks, useful_flops
from roofline_eager import eager, eager_block

BENCH = Path(__file__).parents[1] / "bench"

BF16, FP32 = torch.bfloat16, torch.float32

# 4 channels to 8 to 4 on 2x2 pixels; at batch 3 there are 12 pixels: maps of 96 and 192 bytes.
SMALL = Block("small", 4, 8, 4, 2, 2, 3, 1, "batch", "silu", skip=True)
C, M = 96, 192
# 8x8 pixels in windows of 7: four windows of 49 tokens, 256 pixels at batch 4.
ATTENDING = Block("att", 4, 8, 4, 8, 8, 5, 1, "layer", "gelu", skip=True, head_dim=2)


def moved(kernels: list[roofline.Kernel]) -> list[tuple[str, int, int]]:
    return [(k.name, k.read, k.written) for k in kernels]


def test_forward_by_hand() -> None:
    assert moved(roofline.forward(SMALL, 3, BF16, training=True)) == [
        ("batch_norm_sums", C, 0),
        ("batch_norm_finalize", 0, 0),
        ("expand", C, M),
        ("depthwise_conv2d_statistics", M, M),
        ("batch_norm_finalize", 0, 0),
        ("shrink", M + M + C, C),
    ]


def test_neighbours_by_hand() -> None:
    """A batch norm in front that was given its sums, and an output summed for the next one."""
    linked = {"training": True, "has_sums": True, "gives_sums": True}
    assert moved(roofline.forward(SMALL, 3, BF16, **linked)) == [
        ("batch_norm_finalize", 0, 0),
        ("expand", C, M),
        ("depthwise_conv2d_statistics", M, M),
        ("batch_norm_finalize", 0, 0),
        ("shrink_statistics", M + M + C, C),
    ]
    names = [k.name for k in roofline.training("emo_1m", 1)]
    assert "batch_norm_sums" not in names
    assert names.count("shrink_statistics") == 2 + 2  # in front of each block of stages 1 and 2


def split(block: Block) -> Block:
    """The same block with so many channels that expand_backward takes three kernels."""
    return replace(block, c=40 * block.c, m=40 * block.m, o=40 * block.o)


def test_backward_by_hand() -> None:
    c, m = 40 * C, 40 * M
    assert moved(roofline.backward(split(SMALL), 3, BF16)) == [
        ("shrink_backward", c + m + m, m),
        ("batch_norm_backward_finalize", 0, 0),
        ("depthwise_conv2d_backward/data", 2 * m, m),
        ("depthwise_conv2d_backward/weight", 3 * m, 0),
        ("expand_backward/da", m + c + c, m),
        ("expand_backward/dx", m + c, c),
        ("expand_backward/weight", m + c, 0),
        ("batch_norm_backward_finalize", 0, 0),
        ("batch_norm_backward", 3 * c, c),
    ]


@pytest.mark.parametrize(
    ("c", "m", "o", "skip", "dtype", "kernels"),
    [
        (48, 96, 48, True, BF16, 1),  # 64 * 128 = 8192
        (24, 96, 48, False, BF16, 1),
        (48, 288, 72, False, BF16, 3),
        (48, 96, 48, True, FP32, 3),
        (16, 128, 16, True, FP32, 1),  # 2048
    ],
)
def test_expand_backward_is_one_kernel_where_the_weight_is_small(
    c: int, m: int, o: int, skip: bool, dtype: torch.dtype, kernels: int
) -> None:
    block = replace(SMALL, c=c, m=m, o=o, skip=skip)
    found = [k for k in roofline.backward(block, 2, dtype) if k.function == "expand_backward"]
    assert len(found) == kernels


def test_shrink_backward_is_two_kernels_where_the_weight_is_large() -> None:
    block = replace(SMALL, o=160, c=160)  # in fp32 more than 128 channels
    o, y = 4 * 12 * 160, 4 * 12 * 8
    found = moved(roofline.backward(block, 3, FP32))
    assert found[:2] == [
        ("shrink_backward/input", o + y + y, y),
        ("shrink_backward/weight", o + y + y, 0),
    ]
    assert moved(roofline.backward(block, 3, BF16))[0][0] == "shrink_backward"


def test_the_fused_plan_by_hand() -> None:
    assert moved(roofline.backward(SMALL, 3, BF16, fused=True)) == [
        ("shrink_backward", C + M + M, M),
        ("batch_norm_backward_finalize", 0, 0),
        ("depthwise_conv2d_backward", 3 * M, M),
        ("expand_backward", M + C + C, C),
        ("batch_norm_backward_finalize", 0, 0),
        ("batch_norm_backward", 3 * C, C),
    ]


def test_flops_and_parameters_by_hand() -> None:
    found = {k.name: k for k in roofline.forward(SMALL, 3, BF16, training=True)}
    assert found["expand"].products == 2 * 12 * 4 * 8
    assert found["expand"].parameters == 4 * (8 * 4 + 8 + 2 * 4)  # weight, bias, the norm's affine
    assert found["depthwise_conv2d_statistics"].stencil == 2 * 12 * 8 * 9
    assert found["depthwise_conv2d_statistics"].parameters == 4 * 8 * 9
    assert found["shrink"].products == 2 * 12 * 8 * 4
    back = {k.name: k for k in roofline.backward(SMALL, 3, BF16)}
    assert back["shrink_backward"].products == 2 * found["shrink"].products
    assert back["expand_backward"].products == 4 * (2 * 12 * 4 * 8)  # a, dt of the skip, dx, dW
    assert back["expand_backward"].partials == 1 * (8 * 4) * 4 * 2
    many = {k.name: k for k in roofline.backward(SMALL, 4224, BF16)}  # 132 times 128 pixels
    assert many["expand_backward"].partials == 132 * (8 * 4) * 4 * 2
    wide = {k.name: k for k in roofline.backward(split(SMALL), 3, BF16)}
    assert wide["expand_backward/da"].products == 2 * (2 * 12 * 160 * 320)
    assert wide["expand_backward/dx"].products == 2 * 12 * 160 * 320
    assert wide["expand_backward/weight"].products == 2 * 12 * 160 * 320


def test_attention_by_hand() -> None:
    found = {k.name: k for k in roofline.forward(ATTENDING, 4, BF16, training=True)}
    pixels, scores = 4 * 64, 2 * 4 * 4 * 49**2 * 4
    attention = found["window_attention"]
    assert (attention.read, attention.written) == (2 * pixels * 4, 2 * pixels * 4)
    assert attention.products == 2 * pixels * 4 * 8 + 2 * scores
    assert "batch_norm_sums" not in found
    back = {k.name: k for k in roofline.backward(ATTENDING, 4, BF16)}
    name, c = "window_attention_backward", 2 * pixels * 4
    assert moved([k for n, k in back.items() if n.startswith(name)]) == [
        (f"{name}/statistics", c, 8 * pixels),
        (f"{name}/attention", 2 * c, 3 * c),  # ds, x; dq, dk, dn
        (f"{name}/weight", 3 * c, 0),
        (f"{name}/dx", 5 * c, c),  # dq, dk, dn, x, the residual
    ]
    products = sum(k.products for n, k in back.items() if n.startswith(name))
    assert products == 3 * 2 * pixels * 4 * 8 + 5 * scores
    fused = roofline.backward(ATTENDING, 4, BF16, fused=True)
    assert moved([k for k in fused if k.name == name]) == [(name, 3 * c, c)]
    wide = {k.name: k for k in roofline.backward(split(ATTENDING), 4, BF16)}
    assert wide["expand_backward/dx"].read == 40 * 2 * pixels * 8  # no norm, no residual here
    whole = replace(ATTENDING, window=0)
    assert whole.window_pixels == (1, 64)


def test_layer_norm_by_hand() -> None:
    """In front of an expansion: one pass for mean and 1 / std, forward and backward."""
    block = replace(SMALL, norm="layer", skip=False)
    assert moved(roofline.forward(block, 3, BF16, training=True))[:2] == [
        ("expand/statistics", C, 8 * 12),
        ("expand", C, M),
    ]
    back = [k for k in moved(roofline.backward(split(block), 3, BF16)) if k[0].startswith("expand")]
    wide_c, wide_m = 40 * C, 40 * M
    assert back == [
        ("expand_backward/statistics", wide_c, 8 * 12),
        ("expand_backward/da", wide_m + wide_c, wide_m),
        ("expand_backward/dx", wide_m + wide_c, wide_c),
        ("expand_backward/weight", wide_m + wide_c, 0),
    ]


def test_stride_and_gate_by_hand() -> None:
    down = replace(SMALL, stride=2, skip=False, h=5, w=4)  # to 3x2
    assert down.output_size == (3, 2)
    found = {k.name: k for k in roofline.forward(down, 1, FP32, training=False)}
    assert (found["depthwise_conv2d"].read, found["depthwise_conv2d"].written) == (640, 192)
    assert found["shrink"].read == 192  # neither skip
    gated = replace(SMALL, gated=True, norm="none", skip=False)
    names = [k.name for k in roofline.backward(gated, 1, BF16)]
    assert "squeeze_backward" in names
    assert not any(name.startswith("expand") for name in names)


def test_eager_by_hand() -> None:
    """Forward in training: BN 3C, conv C+M, SiLU 4M, conv 2M, BN 3M, SiLU 4M, add 3M, conv M+C,
    drop path 2C, residual 3C."""
    passes = eager_block(SMALL, 3, training=True)
    assert sum(op.bytes for op in passes if not op.backward) == 10 * C + 18 * M
    inference = eager_block(SMALL, 3, training=False)
    assert sum(op.bytes for op in inference) == 7 * C + 13 * M
    assert not any(op.backward for op in inference)


DESIGN_BLOCKS = {
    "stem.conv": 0.62,
    "stem": 2.16,
    "s1.0": 5.09,
    "s1.1": 2.86,
    "s2.0": 3.54,
    "s2.1": 1.46,
    "s3.0": 1.65,
    "s3.1": 1.10,
    "s4.0": 0.96,
    "s4.1": 0.58,
}


@pytest.mark.parametrize(("block", "gigabytes"), DESIGN_BLOCKS.items())
def test_the_design_plan_of_each_block(block: str, gigabytes: float) -> None:
    """DESIGN.md, section 1: column c1 of EMO-5M at batch 256."""
    kernels = [k for k in roofline.training("emo_5m", 256, plan="design") if k.block == block]
    assert roofline.total_bytes(kernels, parameters=False) / 1e9 == pytest.approx(
        gigabytes, abs=0.0051
    )


@pytest.mark.parametrize(
    ("model", "train", "infer", "design", "saved", "gflop"),
    [
        ("emo_1m", 61.4, 20.1, 17.6, 2.98, 392),
        ("emo_2m", 84.4, 28.1, 22.9, 3.72, 663),
        ("emo_5m", 115.3, 38.2, 32.7, 5.22, 1370),
        ("emo_6m", 120.8, 40.4, 33.2, 5.31, 1459),
    ],
)
def test_the_totals_of_the_design(
    model: str, train: float, infer: float, design: float, saved: float, gflop: float
) -> None:
    """DESIGN.md, section 1 and tools/roofline_5M.txt, batch 256, 224x224, 16 bits."""

    def eager_gigabytes(training: bool) -> float:
        return sum(op.bytes for op in eager(model, 256, training=training)) / 1e9

    assert eager_gigabytes(True) == pytest.approx(train, abs=0.051)
    assert eager_gigabytes(False) == pytest.approx(infer, abs=0.051)
    kernels = roofline.training(model, 256, plan="design")
    counted = roofline.total_bytes(kernels, parameters=False) / 1e9
    assert counted == pytest.approx(design, abs=0.051)
    assert roofline.saved(model, 256) / 1e9 == pytest.approx(saved, abs=0.0051)
    assert 3 * useful_flops(model, 256) / 1e9 == pytest.approx(gflop, abs=0.51)


def test_where_ours_differs_from_the_design() -> None:
    """The numbers of the module's docstring."""
    ours = roofline.by_function(roofline.training("emo_5m", 256))
    design = roofline.by_function(roofline.training("emo_5m", 256, plan="design"))
    ours["shrink"] += ours.pop("shrink_statistics")
    more = {
        name: (
            roofline.total_bytes(kernels, parameters=False)
            - roofline.total_bytes(design.get(name, []), parameters=False)
        )
        / 1e9
        for name, kernels in ours.items()
    }
    expected = {
        "expand_backward": 5.25,
        "depthwise_conv2d_backward": 3.1,
        "window_attention_backward": 1.6,
        "torch": 1.5,
        "squeeze_backward": 0.2,
        "expand": 0.05,
    }
    for name, difference in more.items():
        assert difference == pytest.approx(expected.get(name, 0.0), abs=0.051), name
    together = [k for kernels in ours.values() for k in kernels]
    assert roofline.total_bytes(together, parameters=False) / 1e9 == pytest.approx(44.3, abs=0.051)
    # T0: c1 and four passes over maps of y's size.
    y = sum(2 * 256 * b.m * b.output_size[0] * b.output_size[1] for b in blocks("emo_5m"))
    assert 32.65 + 4 * y / 1e9 == pytest.approx(38.9, abs=0.051)


def test_every_count_grows_with_the_batch_and_the_element() -> None:
    """Maps are proportional to both; parameters, partial sums and fp32 statistics are not."""

    def maps(batch: int, dtype: torch.dtype, plan: str = "ours") -> int:
        kernels = roofline.training("emo_2m", batch, dtype=dtype, size=(96, 160), plan=plan)
        maps = [k for k in kernels if k.name != "torch" and not k.name.endswith("/statistics")]
        return sum(k.read + k.written for k in maps)

    assert maps(6, BF16) == 6 * maps(1, BF16)
    assert maps(3, FP32, "design") == 2 * maps(3, BF16, "design")
    assert maps(3, FP32) > 2 * maps(3, BF16)  # fewer expand_backwards fit one kernel


def test_floors() -> None:
    gpu = Gpu(bandwidth=10.0, tensor=100.0, fp32=50.0)
    streaming = roofline.Kernel("b", "k", False, 30, 20)
    assert streaming.seconds(gpu) == 5.0
    matrix = roofline.Kernel("b", "k/w", False, 30, 20, products=1000, stencil=10)
    assert matrix.seconds(gpu) == 10.0
    assert matrix.seconds(gpu, FP32) == 20.0
    assert matrix.function == "k"
    assert roofline.Kernel("b", "k", False, 1, 1, stencil=500).seconds(gpu) == 10.0
    assert set(GPUS) >= {"H200", "H100", "A100"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: blocks("emo_9m"), "model must be one of"),
        (lambda: blocks("emo2_5m"), "attention comes before V, not emo2_5m"),
        (lambda: roofline.training("emo_5m", 1, plan="c2"), "plan must be ours or design"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        command = [sys.executable, str(BENCH / "roofline.py"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    totals = json.loads(run("emo_1m", "--batch", "2", "--size", "64", "96", "--json"))
    assert totals["ours"]["gigabytes"] > totals["design"]["gigabytes"] > 0
    assert totals["eager"]["gigabytes"] > totals["ours"]["gigabytes"]
    argv = ["roofline.py", "emo_1m", "--batch", "2", "--kernels", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", [*argv, "--gpu", "A100"])
    roofline.main()
    text = capsys.readouterr().out
    assert "expand_backward/da" in text and "saved_gigabytes" in text
