"""The GPU campaign without a GPU: every kind of part in a dry run, budget, resuming, reports."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import campaign_dry
import campaign_parts
import campaign_report
import campaign_variants
import gpu_campaign
import pytest
import torch
from campaign_variants import VARIANTS, Job, Place, measure

BENCH = Path(__file__).parents[1] / "bench"

DRY = Place("cpu", dry=True)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def run(out: Path, *words: str, minutes: float = 20.0) -> tuple[str, dict[str, Any]]:
    """A dry run in a process; what it printed, and its results."""
    command = [sys.executable, str(BENCH / "gpu_campaign.py"), "--dry-run", "--out", str(out)]
    command += ["--minutes", str(minutes), *words]
    child = subprocess.run(command, check=False, capture_output=True, text=True)
    log = (out / "log.txt").read_text() if (out / "log.txt").exists() else ""
    assert child.returncode == 0, child.stdout + child.stderr + log[-4000:]
    return child.stdout, json.loads((out / "results.json").read_text())


# ----------------------------------------------------------------------------------- the dry run


def test_a_dry_run_is_resumed(tmp_path: Path) -> None:
    """Also: what does not fit into the minutes is named, and the report is written."""
    text, results = run(tmp_path, "--parts", "environment")
    assert "environment: done," in text
    text, again = run(tmp_path, "--parts", "environment", "tests", minutes=0.2)
    assert "environment: done before" in text
    assert "tests bf16: skipped, 0 s of 0.2 min left" in text
    assert again["parts"] == results["parts"]
    report = (tmp_path / "results.md").read_text()
    assert "no number here means anything" in report and "copy_bandwidth" in report
    assert "tests bf16: skipped" in report
    _, none = run(tmp_path, "--parts", "environment", "--again", minutes=0.01)
    assert none["parts"] == {} and none["notes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "check emo_5m train bf16 autocast",
        "check emo_5m train fp32",
        "check emo_5m train fp16 autocast",
        "eager emo_5m train",
        "ours emo_5m train",
        "kernels emo_5m train",
        "kernels emo_5m infer",
        "compile emo_5m train default",
        "compile emo_5m infer max-autotune",
        "ours-compiled emo_5m train",
        "infer emo_5m",
        "profile emo_5m train",
        "tests fp32",
        "cuda kernels",
        "cuda sanitizer",
    ],
)
def test_every_kind_of_part(tmp_path: Path, kind: str) -> None:
    """The lines that will run on a GPU run here, and whatever fails says why."""
    text, results = run(tmp_path, "--parts", kind)
    part = results["parts"][kind]
    assert part["status"] == "done" and part["data"], text
    data = part["data"]
    for job in data.get("batches", {"": data}).values():
        for name, row in job.get("variants", {}).items():
            assert "ms" in row or "total_ms" in row or "absent" in row, (name, row)
            if name.startswith("eager"):
                assert "absent" not in row, row
            if name.startswith("ours") and HAS_TRITON:
                assert "absent" not in row and row.get("calls") != 0, (name, row)
    if kind.startswith(("check", "kernels")) and HAS_TRITON:
        assert data["rows"] and not any("absent" in row for row in data["rows"])
        assert data.get("failed", 0) == 0, [row for row in data["rows"] if not row["ok"]]
    if kind == "cuda kernels":
        assert data["failed"] == 0, [row for row in data["rows"] if not row["ok"]]
        assert all("cuda" in row["ms"] for row in data["timings"])
    assert kind in (tmp_path / "results.md").read_text()


def test_what_the_sanitizer_says_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in that finds a race and nothing else."""
    pytest.importorskip("triton")  # whose timer the part takes
    campaign_cuda = importlib.import_module("campaign_cuda")
    program = tmp_path / "compute-sanitizer"
    program.write_text('#!/bin/sh\necho "$@"\ntest "$2" != racecheck || exit 7\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    data = campaign_cuda.sanitize(Place("cuda"), campaign_parts.ROOT, 60.0)
    assert data["failed"] == 1 and data["tools"]["memcheck"]["ok"]
    assert "tests/test_cuda_expand_depthwise.py" in data["tools"]["racecheck"]["says"]
    lines = campaign_report._part(data)
    assert lines[0] == "- memcheck: right" and lines[1].startswith("- racecheck: --tool racecheck")


# ----------------------------------------------------------------------------------- the stand-ins


def test_the_stand_ins_take_what_torch_takes() -> None:
    """Same names, and every parameter of theirs is one of PyTorch's."""
    theirs = {
        name: getattr(torch.cuda, name)
        for name in ("synchronize", "empty_cache", "memory_allocated", "max_memory_allocated")
    }
    theirs |= {"graph": torch.cuda.graph.__init__, "Event": torch.cuda.Event.__new__}
    theirs["reset_peak_memory_stats"] = torch.cuda.reset_peak_memory_stats
    theirs["current_stream"] = torch.cuda.current_stream
    with campaign_dry.no_gpu_needed():
        for name, real in theirs.items():
            ours = inspect.signature(getattr(torch.cuda, name)).parameters
            assert set(ours) <= set(inspect.signature(real).parameters), name
        assert hasattr(torch.cuda.CUDAGraph(), "replay")
    assert torch.cuda.Event is not campaign_dry._Event


def test_a_graph_must_be_captured_before_it_is_replayed() -> None:
    with campaign_dry.no_gpu_needed():
        with pytest.raises(AssertionError, match="replay before capture"):
            torch.cuda.CUDAGraph().replay()
        runs: list[int] = []
        replay = campaign_variants._captured(lambda: runs.append(1))
        assert len(runs) == 4
        replay()


# ----------------------------------------------------------------------------------------- floors


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_each_call_of_a_model_has_its_count(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of a whole model are those that roofline.py counts, in the same order.

    The reference's functions stand in for the kernels, which would take minutes here.
    """
    import campaign_kernels

    import emo_kernels.triton as kernels
    from emo_kernels import reference

    for name in reference.__all__:
        if name != "irmb" and hasattr(kernels, name):
            monkeypatch.setattr(kernels, name, getattr(reference, name))
    monkeypatch.setattr(Place, "tiny", {})
    job = Job("emo_1m", mode, 2, size=32)
    with campaign_dry.no_gpu_needed():
        calls = campaign_kernels.calls_of_a_step(job, DRY, "fp32")
        counted, notes = campaign_kernels._counts(job, calls, Place("cpu"))
    assert notes == [] and len(counted) == len(calls) > 50
    for call in calls:
        group = counted[id(call)]
        maps = [a.shape for a in call.args if getattr(a, "shape", ()) and len(a.shape) == 4]
        block = {b.name: b for b in campaign_kernels.roofline.blocks("emo_1m", 32)}[group[0].block]
        if call.function in ("expand", "depthwise_conv2d", "depthwise_conv2d_statistics"):
            width = block.c if call.function == "expand" else block.m
            assert maps[0] == (2, width, block.h, block.w), (call.function, group)
        if call.function in ("shrink_backward", "expand_backward"):
            side = block.output_size if call.function == "shrink_backward" else (block.h, block.w)
            width = block.o if call.function == "shrink_backward" else block.m
            assert maps[0] == (2, width, *side), (call.function, group)


def test_floors_and_rates_of_a_call() -> None:
    if not HAS_TRITON:
        pytest.skip("triton is not installed")
    import campaign_kernels
    from gpus import Gpu

    gpu = Gpu(bandwidth=1e12, tensor=1e14, fp32=1e13)
    group = [campaign_kernels.roofline.Kernel("s1.0", "f/a", False, 3 * 10**8, 10**8)]
    row: dict[str, Any] = {"ms": 0.8, "argument_bytes": 1}
    campaign_kernels._add_floor(row, group, gpu)
    assert row["floor_ms"] == pytest.approx(0.4) and row["of_floor"] == pytest.approx(0.5)
    assert row["gigabytes_per_second"] == pytest.approx(500.0)
    alone: dict[str, Any] = {"ms": 0.8, "argument_bytes": 8 * 10**8}
    campaign_kernels._add_floor(alone, None, gpu)
    assert alone["gigabytes_per_second"] == pytest.approx(1000.0) and "of_floor" not in alone


# ---------------------------------------------------------------------------------------- variants


def test_a_variant_that_fails_is_absent_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = campaign_variants.build

    def failing(job: Job, variant: campaign_variants.Variant, place: Place) -> Any:
        if variant.graph:
            raise RuntimeError("no graph today\nand more")
        return build(job, variant, place)

    monkeypatch.setattr(campaign_variants, "build", failing)
    saved: list[Any] = []
    names = ["eager channels_last", "eager graph", "eager NCHW"]
    with campaign_dry.no_gpu_needed():
        data = measure(
            Job("emo_1m", "train", 256), names, DRY, lambda d: saved.append(str(d)), seconds=9
        )
    rows = data["variants"]
    assert rows["eager graph"]["absent"] == "RuntimeError: no graph today"
    assert rows["eager channels_last"]["rounds"] == 1 and "differs" not in rows["eager NCHW"]
    assert len(saved) == 4 and "absent" in saved[1]
    assert data["images"] == 2  # of a dry run


def test_what_is_compiled_beforehand_is_one_block_of_each_kind() -> None:
    import campaign_warm

    job = Job("emo_1m", "train", 256)
    kinds = campaign_warm.block_kinds(job, "bf16 autocast", DRY)
    assert [shape for _, shape in kinds] == [
        (2, 8, 16, 16),  # the stem
        (2, 8, 16, 16),
        (2, 16, 8, 8),
        (2, 24, 4, 4),
        (2, 40, 2, 2),
        (2, 40, 2, 2),
    ]
    out = campaign_warm.run_block(*kinds[4], "train", "bf16 autocast", DRY)
    assert out.shape == (2, 40, 2, 2) and out.dtype == torch.bfloat16
    assert all(p.grad is not None for p in kinds[4][0].parameters())
    plain = campaign_warm.block_kinds(job, "bf16", DRY)
    assert campaign_warm.run_block(*plain[1], "infer", "bf16", DRY).dtype == torch.bfloat16


def test_turns_are_taken_until_the_time_is_up() -> None:
    order: list[str] = []
    steps: dict[str, Any] = {n: lambda n=n: order.append(n) for n in "ab"}
    with campaign_dry.no_gpu_needed():
        times = campaign_variants.take_turns(steps, inner=2, seconds=0.0, least=3)
    assert order == list("aabb") * 3
    assert len(times["a"]) == len(times["b"]) == 3
    with campaign_dry.no_gpu_needed():
        assert campaign_variants.take_turns({}, inner=1, seconds=9.0, least=3) == {}
    assert campaign_variants.summary([3.0, 1.0, 2.0])["ms"] == 2.0


def test_other_results_and_other_kernels_are_flagged() -> None:
    rows: dict[str, dict[str, Any]] = {
        "eager": {"first": 2.0},
        "ours": {"first": 2.01, "calls": 12},
        "wrong": {"first": 2.5, "calls": 12},
        "nan": {"first": float("nan")},
        "idle": {"first": 2.0, "calls": 0},
        "graph": {"later": 1.0},
        "broken graph": {"later": float("nan")},
    }
    campaign_variants._flag_losses(rows)
    assert [name for name, row in rows.items() if "differs" in row] == [
        "wrong",
        "nan",
        "idle",
        "broken graph",
    ]


def test_every_part_is_of_a_known_kind_and_variant() -> None:
    kinds = {"environment", "tests", "check", "kernels", "profile", "infer", "cuda"}
    kinds |= {"eager", "ours", "compile", "ours-compiled"}
    names = [part.name for part in campaign_parts.PARTS]
    assert len(set(names)) == len(names)
    for part in campaign_parts.PARTS:
        kind, *words = part.name.split()
        assert kind in kinds and part.least <= part.limit
        assert part.sources in campaign_parts.SOURCES
        if kind == "compile":
            assert f"compile {words[2]}" in VARIANTS[words[1]]


def test_the_best_baseline_and_the_measured_rates() -> None:
    variants = {"a": {"ms": 3.0}, "b": {"ms": 2.0}, "c": {"absent": "why"}}
    state = {
        "parts": {
            "eager emo_5m train": {"data": {"variants": variants}},
            "environment": {
                "data": {"gpu": "NVIDIA A100", "copy_bandwidth": 1.7e12, "matmul_rate": 2.5e14}
            },
        }
    }
    assert campaign_parts.best_eager(state, "emo_5m", "train") == "b"
    assert campaign_parts.best_eager({}, "emo_5m", "train") == "eager channels_last"
    assert campaign_parts.measured_gpu(state)[:2] == (1.7e12, 2.5e14)
    assert campaign_parts.measured_gpu({}).bandwidth == 4.3e12


# ----------------------------------------------------------------------------- resuming, reporting


def campaign_in(out: Path) -> gpu_campaign.Campaign:
    return gpu_campaign.Campaign(out, out, dry=True)


def test_parts_of_other_sources_are_done_again_and_unlucky_ones_come_last(tmp_path: Path) -> None:
    first = campaign_in(tmp_path)
    parts = campaign_parts.PARTS[:4]
    rows = {p.name: {"status": "done", "fingerprint": first.prints[p.sources]} for p in parts}
    rows[parts[1].name]["status"] = "stopped after 90 s"
    rows[parts[3].name]["fingerprint"] = "another"
    full = {n: {**r, "commit": "x", "seconds": 1.0, "data": {}} for n, r in rows.items()}
    (tmp_path / "results.json").write_text(json.dumps({"parts": full}))
    again = campaign_in(tmp_path)
    assert [p.name for p in again.order(parts)] == [parts[3].name, parts[1].name]
    again.save()
    report = (tmp_path / "results.md").read_text()
    assert "done, of commit x" in report and "stopped after 90 s" in report


def test_a_change_of_the_kernels_leaves_baselines_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("emo_kernels/nn", "emo_kernels/triton", "bench"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.py").write_text("a = 1")
    monkeypatch.setattr(gpu_campaign, "ROOT", tmp_path)
    before = [gpu_campaign.fingerprint(s) for s in (("emo_kernels",), ("emo_kernels/nn",))]
    (tmp_path / "emo_kernels/triton/a.py").write_text("a = 2")
    after = [gpu_campaign.fingerprint(s) for s in (("emo_kernels",), ("emo_kernels/nn",))]
    assert before[0] != after[0] and before[1] == after[1]


def test_pytest_output_is_counted() -> None:
    text = """
tests/test_expand.py::TestExpand::test_forward[triton-odd-bf16]
[gw0] [ 33%] PASSED tests/test_expand.py::TestExpand::test_forward[triton-odd-bf16]
[gw1] [ 66%] FAILED tests/test_shrink.py::TestShrink::test_forward[triton-odd-bf16]
tests/test_irmb.py::test_backward[triton-odd-bf16] PASSED
E   AssertionError: out: relative L2 error 0.1
"""
    counted = campaign_parts.count_results(text)
    assert counted["passed"] == 2
    assert counted["failed"] == ["tests/test_shrink.py::TestShrink::test_forward[triton-odd-bf16]"]
    assert counted["errors"] == ["AssertionError: out: relative L2 error 0.1"]
    assert "no tests ran" in campaign_parts.count_results("no tests ran")["output"]


def test_the_report_of_invented_results() -> None:
    timing = {"ms": 10.0, "p10": 9.0, "p90": 11.0, "rounds": 12, "peak_megabytes": 100.0}
    variants = {
        "eager": {**timing, "ms": 20.0},
        "compile default": {"absent": "Timeout | of the compiler"},
        "ours": {**timing, "calls": 5, "differs": "first result 1 against 2"},
    }
    call = {"function": "expand", "dtype": "bf16", "shape": "2x3", "ok": False, "of_tolerance": 3.0}
    row = {"function": "expand", "shape": "2x3", "count": 2, "ms": 0.5, "bytes": 10**9}
    floor = {"floor_ms": 0.25, "of_floor": 0.5, "gigabytes_per_second": 2000.0, "block": "s1.0"}
    names = ["t", "b", "c", "k", "p", "pytest", "never"]
    job = {"job": "emo_5m train b256", "images": 256, "variants": variants}
    datas: list[dict[str, Any]] = [
        job,
        {"batches": {"256": job, "1": job}},
        {"rows": [call], "failed": 1},
        {"rows": [row | floor, {**row, "ms": 1.0}], "notes": ["a note"]},
        {"variants": {"ours": {"total_ms": 3.0, "rows": [{"kernel": "k", "count": 1, "ms": 3.0}]}}},
        {"passed": 3, "failed": ["x"], "finished": False, "errors": ["E"]},
    ]
    parts = {
        name: {"status": "done", "seconds": 1.0, "fingerprint": "f", "commit": "c", "data": data}
        for name, data in zip(names, datas)
    }
    state = {"commit": "c", "parts": parts, "notes": ["z: skipped"]}
    for text in (
        campaign_report.markdown(state, names, {"kernels": "f"}),
        campaign_report.short_report(state, names, {"kernels": "f"}),
    ):
        assert "| ours | 10.000 | 9.000-11.000 | 25600 | 2.00x | 100 |" in text
        assert "Timeout / of the compiler" in text and "first result 1 against 2" in text
        assert "expand bf16 2x3: 3 of the tolerance" in text
        assert "| expand | 4 | 3.000 | 0.500 |" in text
        assert "z: skipped" in text
    assert "| never | not run |" in campaign_report.markdown(state, names, {})


def test_the_verdict_is_against_the_strongest_rival() -> None:
    def part(**ms: float) -> dict[str, Any]:
        rows: dict[str, Any] = {n.replace("_", " "): {"ms": v} for n, v in ms.items()}
        rows["ours"]["peak_megabytes"], rows["eager"]["peak_megabytes"] = 40.0, 100.0
        rows["ours compile"] = {"ms": 0.1, "differs": "wrong results"}
        rows["compile max-autotune"] = {"absent": "too slow"}
        return {"data": {"variants": rows}}

    parts = {
        "ours emo_5m train": part(eager=20.0, ours=10.0, ours_graph=8.0),
        "compile emo_5m train default": part(eager=21.0, ours=10.0, compile_default=13.0),
        "compile emo_5m train reduce-overhead": part(eager=21.0, ours=10.0, compile_x=12.0),
        "compile emo_5m infer default": part(eager=1.0, ours=10.0, compile_x=1.0),
        "ours emo_1m train": part(eager=20.0, ours=10.0),
    }
    assert campaign_report.verdicts(parts) == [
        "- emo_5m train: x2.10 over the best eager (compile emo_5m train default), gate 1.9: pass",
        "- emo_5m train: x1.20 over the best compile (compile emo_5m train reduce-overhead), "
        "gate 1.25: MISSED",
        "- emo_5m train: peak memory 0.40 of eager's, gate 0.55: pass",
        "- emo_1m train: x2.00 over the best eager (ours emo_1m train)",
        "- emo_1m train: peak memory 0.40 of eager's",
    ]
    assert campaign_report.verdicts({}) == []
