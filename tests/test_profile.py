"""`profile`: blocks and operators, each counted and timed once, under their names in a trace."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import TINY

import emo_kernels as ek
from emo_kernels.__main__ import main
from emo_kernels.cli import profile
from emo_kernels.measure import breakdown, operators
from emo_kernels.measure.backward import BackwardWalk
from emo_kernels.measure.case import Work

LIMITS: dict[str, Any] = {
    "matmul_gflops": {"fp32": 100.0},
    "stream_gigabytes": {"triad": 20.0},
}
ARGV = ["profile", "emo_1m", "--size", "32", "--rounds", "1", "--set"]
ARGV += ["depths=(1,1,2,1)", "dims=(16,24,40,42)", "dim_heads=(8,8,20,21)", "stem_dim=8"]


def test_a_breakdown_counts_everything_once() -> None:
    work = Work(TINY)
    x, model = work.x, work.copy()
    parts = breakdown.count(model, work.module, x)
    assert 1e-9 * sum(part.flops for part in parts.values()) == pytest.approx(work.gflop)
    breakdown.measure(model, x, parts, 2)
    assert {len(part.seconds) for part in parts.values()} == {2}
    part = parts["stage3.1"]
    weights = sum(p.numel() for p in model.get_submodule("stage3.1").parameters())
    assert part.bytes == 4 * (2 * 2 * 40 * 16 + weights)
    limits = {"matmul_gflops": {"fp32": 10.0}, "stream_gigabytes": {"triad": 1e9}}
    assert part.floor(limits, "fp32") == pytest.approx(part.flops / 10e9)
    assert model.get_submodule("stage3.1")._forward_hooks == {}


@torch.inference_mode()
def test_operators_count_what_the_blocks_count() -> None:
    work = Work(TINY)
    x, plain = work.x.contiguous(memory_format=torch.channels_last), work.copy()
    fused = ek.accelerate(copy.deepcopy(plain), backend="cpu")
    for model in (plain, fused):
        parts = breakdown.count(model, plain, x)
        rounds = [operators.measure(model, x, parts, n, LIMITS) for n in (1, 3)]
        for found in rounds:
            assert 1e-9 * sum(one.flops for one in found) == pytest.approx(work.gflop)
            assert all(one.seconds for one in found)
        assert {len(one.seconds) for one in rounds[1]} == {3}
        seconds = [one.median for one in rounds[1]]
        assert seconds == sorted(seconds, reverse=True)
    irmb = next(one for one in found if one.name == "emo_kernels::irmb")
    blocks = [part for part in parts.values() if part.operator == "irmb"]
    assert (irmb.backend, len(irmb.floors)) == ("cpu", 6)
    assert irmb.flops == sum(part.flops for part in blocks if part.path != breakdown.REST)


def test_a_training_step_counts_what_its_products_are() -> None:
    """Three times the forward's, but for the gradient of the image, which nobody wants."""
    work = Work(replace(TINY, mode="train"))
    x, plain = work.x.contiguous(memory_format=torch.channels_last), work.copy()
    fused = ek.accelerate(copy.deepcopy(plain), backend="cpu")
    for model, backward in ((plain, "aten::convolution"), (fused, "emo_kernels::shrink")):
        parts = breakdown.count(model, plain, x, trains=True)
        found = operators.measure(model, x, parts, 2, LIMITS, work.loss)
        want = work.gflop - 1e-9 * parts["stage0.0"].flops
        if model is fused:  # which computes the gate again
            want += 1e-9 * parts["stage0.1"].layers["squeeze"]
        assert 1e-9 * sum(one.flops for one in found) == pytest.approx(want)
        names = {one.name: one for one in found}
        both = names[backward], names[f"{backward}_backward"]
        assert both[1].flops > both[0].flops > 0
        assert {len(one.seconds) for one in both} == {2}
    assert parts["stage3.1"].backend == "cpu"


def test_a_training_step_is_taken_apart_by_blocks() -> None:
    work = Work(replace(TINY, mode="train"))
    model = work.copy()
    parts = breakdown.count(model, work.module, work.x, trains=True)
    breakdown.measure(model, work.x, parts, 2, work.loss)
    assert {len(some) for part in parts.values() for some in (part.seconds, part.backward)} == {2}
    assert all(seconds > 0 for part in parts.values() for seconds in part.backward)
    assert 1e-9 * sum(part.useful for part in parts.values()) == pytest.approx(work.gflop)
    given, made = (work.x.new_empty(2, 40, 4, 4).numel(),) * 2
    weights = sum(p.numel() for p in model.get_submodule("stage3.1").parameters())
    assert parts["stage3.1"].bytes == 4 * (3 * (given + weights) + 2 * made)
    assert all(p.grad is not None for p in model.parameters())
    shown = breakdown.table(parts, LIMITS, "fp32")
    assert re.search(r"^stage3.1 +reference( +[\d.]+){7}$", shown, re.MULTILINE)


def test_a_backward_pass_is_followed_through_the_parts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    told: list[str] = []
    walk = BackwardWalk("loss", lambda p: told.append(f"+{p}"), lambda p: told.append(f"-{p}"))
    with walk.through(model, ["0", "2"]):
        walk.backward(model(torch.randn(3, 2)).sum())
    assert told == ["+loss", "-loss", "+2", "-2", "+0", "-0"]
    model(torch.randn(3, 2)).sum().backward()
    assert len(told) == 6  # nobody listens any more


def test_an_operators_floor_by_hand() -> None:
    """A view moves nothing; a product of 2 x 3 and 3 x 4 numbers moves 26 of them."""
    product = torch.nn.Linear(3, 4, bias=False)
    x = torch.randn(2, 3)
    with torch.inference_mode():
        found = {one.name: one for one in operators.measure(product, x, {}, 2, LIMITS)}
    assert (found["aten::mm"].flops, found["aten::mm"].bytes) == (2 * 2 * 3 * 4, 4 * 26)
    assert found["aten::mm"].floors == [4 * 26 / 20e9]
    assert found["aten::t"].bytes == 0
    shown = operators.table(list(found.values()), 1)
    assert "(1 others)" in shown


def test_profile_tells_operators_and_blocks_and_writes_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "machine_limits", lambda device: LIMITS)
    assert main([*ARGV, "--trace", str(tmp_path)]) == 0
    plain, accelerated = capsys.readouterr().out.split("accelerated, 1 forward passes")
    for words in ("aten::convolution", "stage3.1  reference", "(rest)", "% of floor"):
        assert words in plain
    assert re.search(r"^emo_kernels::irmb +cpu +6 ", accelerated, re.MULTILINE)
    assert re.search(r"^emo_kernels::norm_pool_linear +cpu +1 ", accelerated, re.MULTILINE)
    for words in ("stage3.1  cpu", "(rest)    cpu", "% of floor"):
        assert words in accelerated
    assert {path.name for path in tmp_path.iterdir()} == {"plain.json", "accelerated.json"}
    names = {name: ranges(tmp_path / f"{name}.json") for name in ("plain", "accelerated")}
    assert {"irmb stage3.1", "conv_norm_act stage0.0", "emo_kernels::irmb"} <= names["accelerated"]
    assert {"irmb stage3.1", "expand stage3.1.v", "shrink stage3.1.proj"} <= names["plain"]
    assert "emo_kernels::irmb" not in names["plain"]


def test_profile_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile, "machine_limits", lambda device: LIMITS)
    assert main([*ARGV, "--batch", "2", "--mode", "train", "--trace", str(tmp_path)]) == 0
    plain, accelerated = capsys.readouterr().out.split("accelerated, 1 training steps")
    for words in ("aten::convolution_backward", "forward  backward", "% of floor"):
        assert words in plain
    for words in ("emo_kernels::expand_depthwise_backward", "emo_kernels::shrink_backward"):
        assert re.search(rf"^{words} +cpu +\d", accelerated, re.MULTILINE)
    names = ranges(tmp_path / "accelerated.json")
    assert {"irmb stage3.1", "irmb stage3.1 backward", "conv_norm_act stage0.0 backward"} <= names


def ranges(path: Path) -> set[str]:
    return {event["name"] for event in json.loads(path.read_text())["traceEvents"]}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["profile", "emo_9m"], "did you mean 'emo_6m'"),
        ([*ARGV, "--nvtx"], "--nvtx needs --device cuda, got cpu"),
        (["profile", "emo_1m", "--rounds", "0"], "must be at least 1, got 0"),
    ],
)
def test_bad_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err
