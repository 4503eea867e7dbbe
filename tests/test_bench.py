"""What measures: intervals by hand, fake clocks, tiny models, resuming."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_cpu
import pytest
import torch
from bench_rows import TINY, Clock, made_up

from emo_kernels.measure import (
    engines,
    memory,
    oracle,
    results,
    row,
    tables,
)
from emo_kernels.measure.case import Case, Work
from emo_kernels.measure.child import measure_in_child
from emo_kernels.measure.engine import OURS, ROTATED_BYTES

BENCH = Path(__file__).parents[1] / "bench"

# -------------------------------------------------------------------------------- real rows, tiny


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Limits that take no time; the oracles in a directory of their own."""
    limits = made_up(TINY)["limits"]
    monkeypatch.setattr(row, "machine_limits", lambda device: limits)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def tiny_row(case: Case, *peers: str) -> row.Row:
    return row.measure(case, peers=peers, seconds=0.01)


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_row_compares_and_times(mode: str, quick: Path) -> None:
    found = tiny_row(replace(TINY, mode=mode), "eager", "eager channels_last")
    assert found["status"] == "ok", found
    assert set(found["engines"]) == {OURS, "eager", "eager channels_last"}
    assert all(engine["match"] for engine in found["engines"].values())
    # stem, blocks, and norm, mean and head, which train in PyTorch
    note = {"infer": "cpu runs 8 of 8", "train": "cpu runs 7 of 8, reference runs 1 of 8"}
    assert note[mode] in found["engines"][OURS]["note"]
    best, ours = (found["engines"][name]["samples"] for name in (found["best_peer"], OURS))
    each = [p / o for p, o in zip(best, ours, strict=True)]
    assert found["ratio"] == pytest.approx(statistics.median(each))
    assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    assert all(engine["megabytes"] >= 0 for engine in found["engines"].values())
    assert all(("saved_megabytes" in e) == (mode == "train") for e in found["engines"].values())
    assert 0 < results.share_of_limit(found) < 2
    assert len(list(quick.rglob("oracle-*.pt"))) == 1
    json.dumps(found)


@pytest.mark.usefixtures("quick")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:

    def wrong(work: Work, backend: str | None) -> engines.Engine:
        out = work.module(work.x) * 1.001
        return engines.Engine(lambda: out.detach(), work.module)

    monkeypatch.setattr(engines, "_ours", wrong)
    found = tiny_row(TINY, "eager")
    assert found["status"] == "mismatch"
    assert "ratio" not in found
    assert "median" not in found["engines"][OURS]


@pytest.mark.usefixtures("quick")
def test_a_wrong_gradient_is_found() -> None:
    work = Work(replace(TINY, mode="train"))
    built = engines.build_engines(work, ["eager"])
    ours, right = built.run[OURS], built.run[OURS].call
    assert oracle.judge(work, built)[OURS]["match"]

    def wrong() -> torch.Tensor:
        loss = right()
        assert ours.module is not None
        weight = next(p for n, p in ours.module.named_parameters() if "proj" in n)
        assert weight.grad is not None
        weight.grad.mul_(1.001)
        return loss

    ours.call = wrong
    verdict = oracle.judge(work, built)[OURS]
    assert not verdict["match"]
    assert "proj" in str(verdict["gradient"])


def test_engines_that_fail_are_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(work: Work) -> engines.Engine:
        raise RuntimeError("\nno such instruction\nmore")

    def missing(work: Work) -> engines.Engine:
        raise ModuleNotFoundError("No module named 'openvino'")

    monkeypatch.setitem(engines._BUILDERS, "eager", fails)
    monkeypatch.setitem(engines._BUILDERS, "openvino", missing)
    absent = engines.build_engines(Work(TINY), ["eager", "openvino"]).absent
    assert absent["eager"] == "RuntimeError: no such instruction"
    assert absent["openvino"].startswith("not installed: No module")
    training = engines.build_engines(Work(replace(TINY, mode="train")), ["openvino"])
    assert training.absent == {"openvino": "inference only"}
    with pytest.raises(ValueError, match="got 'openvin'; did you mean 'openvino'"):
        engines.check_peers(["openvin"])
    assert engines.check_peers(["all"]) == engines.peer_names()


@pytest.mark.usefixtures("quick")
def test_ours_that_does_not_run_is_absent_and_the_peers_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(work: Work, backend: str | None) -> engines.Engine:
        raise NotImplementedError("no kernel takes fp8")

    monkeypatch.setattr(engines, "_ours", none)
    found = tiny_row(TINY, "eager")
    assert (found["status"], set(found["engines"])) == ("absent", {"eager"})
    assert "no kernel takes fp8" in tables.text([found])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("calls_before", [1, 3])  # it fails when judged; in its turn
def test_a_peer_that_fails_later_is_absent(
    calls_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(work: Work) -> engines.Engine:
        right, count = engines._eager(work), itertools.count()

        def call() -> torch.Tensor:
            if next(count) >= calls_before:
                raise RuntimeError("no more")
            return right.call()

        return engines.Engine(call, right.module)

    monkeypatch.setitem(engines._BUILDERS, "compile", late)
    found = tiny_row(TINY, "compile", "eager")
    assert found["status"] == "ok"
    assert found["absent"] == {"compile": "RuntimeError: no more"}
    assert set(found["engines"]) == {OURS, "eager"}
    assert found["best_peer"] == "eager"


@pytest.mark.usefixtures("quick")
def test_a_peer_that_disagrees_is_absent_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: Work) -> engines.Engine:
        right = engines._eager(work)
        return engines.Engine(lambda: right.call() * 1.01, right.module)

    monkeypatch.setitem(engines._BUILDERS, "compile", wrong)
    found = tiny_row(TINY, "compile", "eager")
    assert found["absent"]["compile"].startswith("disagrees with the fp64 oracle: error 1.0e-02,")
    assert "absent: compile in infer" in tables.text([found])


def test_out_of_memory_is_known() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert engines.is_out_of_memory(error.value)
    assert engines.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not engines.is_out_of_memory(RuntimeError("no such instruction"))


def test_no_call_finds_its_input_in_the_caches() -> None:
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    inputs = list(itertools.islice(engines.rotation(x), 17))
    assert len({one.data_ptr() for one in inputs}) == 16
    assert inputs[0] is inputs[16] is x
    assert all(torch.equal(one, x) and one.stride() == x.stride() for one in inputs)
    large = torch.empty(ROTATED_BYTES)  # four times as many bytes
    assert next(engines.rotation(large)) is large


def test_one_block_is_measured_alone() -> None:
    work = Work(replace(TINY, block="stage3.1"))
    assert work.x.shape == (2, 40, 4, 4)
    convolutions = [m for m in work.module.modules() if isinstance(m, torch.nn.Conv2d)]
    macs = 2 * 16 * sum(m.weight.numel() for m in convolutions)
    assert macs < work.gflop / 2e-9 < 3 * macs  # attention in padded windows is the rest
    assert work.least_bytes == 4 * (2 * 2 * 40 * 16 + work.parameters)
    with pytest.raises(ValueError, match="no block 'stage9.1'"):
        Work(replace(TINY, block="stage9.1"))


def test_work_is_rounded_once() -> None:
    """Engines that take fp32 get the weights that a bf16 engine has."""
    work = Work(replace(TINY, dtype="bf16"))
    assert work.x.dtype == torch.bfloat16
    for p, q in zip(work.module.parameters(), work.copy(torch.float32).parameters(), strict=True):
        assert p.dtype == torch.bfloat16
        assert torch.equal(p.float(), q)


def test_a_case_survives_json() -> None:
    case = replace(TINY, isa="avx2", size=(64, 96), block="stage3.1")
    assert Case.of(json.loads(json.dumps(asdict(case)))) == case
    assert "emo_1m/stage3.1 fp32 b2 64x96 1thr" in case.name
    assert case.name.endswith("avx2")


@pytest.mark.slow  # starts Python twice
def test_a_row_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = measure_in_child(replace(TINY, isa="avx2"), peers=["eager"], seconds=0.01)
    assert found["status"] == "ok", found
    late = measure_in_child(TINY, peers=["eager"], seconds=0.01, limit=0.1)
    assert (late["status"], late["error"]) == ("failed", "took more than 0 s")
    bad = measure_in_child(replace(TINY, block="banana"), peers=[], seconds=0.01)
    assert bad["status"] == "failed"
    assert "no block 'banana'" in bad["error"]


def test_memory_of_a_training_step() -> None:
    """Ours keeps less than eager does."""
    case = replace(TINY, mode="memory", batch=16, size=(96, 96))
    found = row.measure(case, peers=["eager", "openvino"])
    assert found["status"] == "ok", found
    assert found["absent"] == {"openvino": "memory is compared with eager"}
    assert 0.05 < found["memory_share"] < 1.0
    for engine in found["engines"].values():
        image = 16 * 3 * 96 * 96 * 4 / 2**20  # kept for backward, but there before the call
        assert engine["saved_megabytes"] <= engine["megabytes"] + image
    assert tables.cells(found, [OURS], gate=False)[1].endswith(" MB")


def test_memory_is_what_a_call_takes() -> None:
    """Twelve megabytes that leave one at a time, of which backward keeps four, and a gradient."""
    weight = torch.nn.Parameter(torch.ones(2**20))
    module = torch.nn.ParameterList([weight])

    def call() -> None:
        module.zero_grad(set_to_none=True)
        y = weight * 2
        (y * y).sum().backward()  # y is kept, y * y is not

    found = memory.added_megabytes(call, module, torch.device("cpu"))
    assert found == pytest.approx(16, abs=5)  # the gradient of y * y is expanded, that of y not
    assert memory.saved_megabytes(call, module) == 4.0


# --------------------------------------------------------------------------------- files and tables


def test_results_resume_and_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "commit", lambda: "1234567")
    path = tmp_path / "out" / "cpu.json"
    measured = []

    def measure(case: Case, **options: Any) -> row.Row:
        measured.append(case.name)
        return made_up(case) | ({"interrupted": True} if len(measured) == 2 else {})

    rows = [bench_cpu.Gate(replace(TINY, batch=b), 1.2, 3.0) for b in (1, 2, 3)]
    options: dict[str, Any] = {"peers": [], "seconds": 1.0, "minutes": 1.0, "measure": measure}
    found = bench_cpu.run(rows, results.Results(path), **options)
    assert [r["case"]["batch"] for r in found] == [1, 2]  # Ctrl-C in the second
    found = bench_cpu.run(rows, results.Results(path), **options)
    assert [r["case"]["batch"] for r in found] == [1, 2, 3]
    names = [r.case.name for r in rows]
    assert measured == [names[0], names[1], names[1], names[2]]
    assert [r["name"] for r in results.read(path)["rows"]] == names
    bench_cpu.run(rows, results.Results(path), **options)
    assert len(measured) == 4
    bench_cpu.run(rows[:1], results.Results(path), redo=True, **options)
    monkeypatch.setattr(results, "commit", lambda: "7654321")
    bench_cpu.run(rows[:1], results.Results(path), **options)
    assert len(measured) == 6


def test_a_run_ends_in_time(tmp_path: Path) -> None:
    clock = Clock()

    def measure(case: Case, *, limit: float, **options: Any) -> row.Row:
        clock.now += 40.0
        return made_up(case)

    rows = [bench_cpu.Gate(replace(TINY, batch=b)) for b in (1, 2, 3)]
    found = bench_cpu.run(
        rows,
        results.Results(None),
        peers=[],
        seconds=1.0,
        minutes=1.0,
        measure=measure,
        clock=clock,
    )
    assert len(found) == 2


def test_rows_of_the_gates() -> None:
    names = [gate.case.name for gate in bench_cpu.everything()]
    assert len(set(names)) == len(names)
    table = bench_cpu.gates(2)
    assert sum(gate.gate == 1.7 for gate in table) == 4
    assert {g.case.model for g in table if g.gate == 1.2} == {
        "emo_1m",
        "emo_2m",
        "emo_5m",
        "emo_6m",
    }
    picked = bench_cpu.chosen(["train emo_5m*", "memory*b8*"], table)
    assert len(picked) == 4
    with pytest.raises(ValueError, match="'banana' matches none"):
        bench_cpu.chosen(["banana"], table)


def test_results_are_no_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first row saved in bench/results would make every earlier row another commit's."""
    monkeypatch.setattr(results, "_ROOT", tmp_path)
    saved, code = tmp_path / "bench" / "results" / "cpu.json", tmp_path / "code.py"
    saved.parent.mkdir(parents=True)
    for path in (saved, code):
        path.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    clean = results.commit()
    saved.write_text("2")
    assert results.commit() == clean != "unknown"
    code.write_text("2")
    assert results.commit() == f"{clean} and changes"


def test_files_that_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no rows"):
        results.read(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="other.json"):
        results.read(tmp_path / "nowhere.json")


# ------------------------------------------------------------------------- suites of `make bench`


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "chosen"),
    [
        ("bench_operators.py", "stage4 or conv_norm_act or norm_pool_linear"),
        ("bench_models.py", "emo_1m and b4"),
    ],
)
def test_suites_run(suite: str, chosen: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", str(BENCH / suite), "-q", "-k", chosen]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", f"--benchmark-json={saved}"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        command, cwd=BENCH.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:]
    for measured in json.loads(saved.read_text())["benchmarks"]:
        extra = measured["extra_info"]
        assert extra["flops"] > 0
        # The rate may be anything while neighbours work; what is made of it may not.
        gflops = 1e-9 * extra["flops"] / measured["stats"]["median"]
        share = 100 * gflops / extra["matmul_gflops"]
        assert extra["gflops"] == pytest.approx(gflops, abs=0.006)
        assert extra["percent_of_matmul"] == pytest.approx(share, abs=0.06)
        assert extra["max_error"] >= 0
        if "reference" not in measured["name"]:  # which is itself the yardstick
            assert extra["max_error"] < 1e-3
