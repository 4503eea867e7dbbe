"""`bench`: what is asked for, what goes wrong on the way, and what is kept."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_rows import made_up

from emo_kernels.__main__ import main
from emo_kernels.cli import bench
from emo_kernels.measure import child, results, row
from emo_kernels.measure.case import Case

TINY = ["depths=(1,1,2,1)", "dims=(16,24,40,42)", "dim_heads=(8,8,20,21)", "stem_dim=8"]
SMALL = ["emo_1m", "--set", *TINY, "--size", "32", "--threads", "1"]
Measure = Callable[..., row.Row]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Rows are made up; the cases that were asked for."""
    asked: list[Case] = []

    def measure(case: Case, **options: Any) -> row.Row:
        asked.append(case)
        return made_up(case)

    monkeypatch.setattr(bench, "measure_in_child", measure)
    return asked


def replace_measure(monkeypatch: pytest.MonkeyPatch, answer: Measure) -> None:
    monkeypatch.setattr(bench, "measure_in_child", lambda case, **options: answer(case))


def csv_lines(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["emo_1m", "emo_9m"], "unknown model 'emo_9m'; did you mean 'emo_6m'"),
        (["emo_1m", "--set", "deepths=3"], "deepths"),
        (["emo_1m", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["emo_1m", "--batch", "0"], "each be at least 1"),
        (["emo_1m", "--size", "9y"], "--size must be like 224 or 800x1344, got '9y'"),
        (["emo_1m", "--peers", "eagre"], "did you mean 'eager'"),
        (["emo_1m", "--fail-over", "lots"], "a percentage such as 5%"),
        (["emo_1m", "--compare", "nowhere.json"], "no file nowhere.json"),
        (["emo_1m", "--compare", "erlier.json"], "did you mean earlier.json"),
        (["plto", "out.json"], "no model 'plto'; did you mean 'plot'"),
        (["emo_1m", "--backend", "cpuu"], "cpuu"),
        (["plot"], "needs a results file"),
        (["plot", "nowhere.json"], "no file nowhere.json"),
        (["compare", "earlier.json"], "needs two files"),
        (["compare", "earlier.json", "other.json"], "no timed row in common"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(
    argv: list[str], message: str, measured: list[Case], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, batch in (("earlier.json", 1), ("other.json", 2)):
        results.Results(Path(name)).put(made_up(Case("emo_1m", batch=batch)))
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err
    assert measured == []


# ----------------------------------------------------------------------------------- what is asked


def test_every_combination_is_a_row(measured: list[Case]) -> None:
    argv = ["emo_1m", "emo_5m", "--mode", "infer", "train", "--batch", "1", "2"]
    argv += ["--size", "96", "64x128", "--dtype", "fp32", "bf16"]
    assert main(["bench", *argv]) == 0
    assert len({case.name for case in measured}) == 32
    assert {case.size for case in measured} == {(96, 96), (64, 128)}


def test_quick_needs_no_model(measured: list[Case]) -> None:
    assert main(["bench", "--quick"]) == 0
    assert [(c.model, c.mode, c.batch) for c in measured] == [
        ("emo_1m", "infer", 1),
        ("emo_1m", "train", 4),
        ("emo_5m", "infer", 1),
        ("emo_5m", "train", 4),
    ]
    measured.clear()
    assert main(["bench"]) == 0
    assert [(c.model, c.mode) for c in measured] == [("emo_5m", "infer")]


def test_growth_is_a_row_for_every_point(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(case: Case, **options: Any) -> row.Row:
        asked.append((case, options["peers"], options["seconds"]))
        return made_up(case)

    monkeypatch.setattr(bench, "measure_in_child", measure)
    assert main(["bench", "emo_1m", "--grow", "--threads", "1"]) == 0
    assert {case.batch for case, *_ in asked} == {1, 2, 4, 8, 16, 32, 64}
    assert {case.size[0] for case, *_ in asked} == {96, 160, 224, 320, 512, 800, 1280}
    assert {tuple(rest) for _, *rest in asked} == {(("eager channels_last", "openvino"), 2.0)}
    asked.clear()
    assert main(["bench", "emo_1m", "--grow", "--seconds", "1", "--peers", "eager"]) == 0
    assert {tuple(rest) for _, *rest in asked} == {(("eager",), 1.0)}


# ------------------------------------------------------------------------------- what goes wrong


def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(case: Case) -> row.Row:
        if case.batch == 1:
            return made_up(case)
        if case.batch == 2:  # in the middle of its rounds
            return made_up(case) | {"interrupted": True}
        raise AssertionError("the run is over")

    replace_measure(monkeypatch, answer)
    argv = ["bench", "emo_1m", "--batch", "1", "2", "4", "--json", "out.json", "--csv", "out.csv"]
    assert main(argv) == 130
    shown = capsys.readouterr()
    assert "what was measured is kept" in shown.err
    assert "infer emo_1m fp32 b2" in shown.out
    assert [r["case"]["batch"] for r in results.read(Path("out.json"))["rows"]] == [1, 2]
    assert {line["infer_batch_size"] for line in csv_lines("out.csv")} >= {"1", "2"}


def test_ctrl_c_before_a_row_has_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"status": "failed", "error": "interrupted before anything was timed"}

    def answer(case: Case) -> row.Row:
        found = made_up(case)
        return found if case.batch == 1 else found | nothing | {"interrupted": True, "engines": {}}

    replace_measure(monkeypatch, answer)
    assert main(["bench", "emo_1m", "--batch", "1", "2", "--json", "out.json"]) == 130
    assert [r["case"]["batch"] for r in results.read(Path("out.json"))["rows"]] == [1]


def test_a_row_that_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(case: Case) -> row.Row:
        found = made_up(case)
        return (
            found
            if case.batch != 1
            else found | {"engines": {}} | child._death(-11) | {"status": "failed"}
        )

    replace_measure(monkeypatch, answer)
    assert main(["bench", "emo_1m", "--batch", "1", "2"]) == 1
    shown = capsys.readouterr().out
    assert "its process died of SIGSEGV" in shown
    assert "2.00× [2.00, 2.00]" in shown


def test_a_mismatch_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"status": "mismatch", "engines": {"emo_kernels": {"error": 0.5, "match": False}}}
    replace_measure(monkeypatch, lambda case: made_up(case) | wrong)
    assert main(["bench", "emo_1m"]) == 1
    assert "NO, 5e-01" in capsys.readouterr().out


@pytest.mark.parametrize(
    "failure",
    [
        {"error": "RuntimeError: not enough memory: you tried", "out_of_memory": True},
        child._death(-9),
    ],
)
def test_out_of_memory_halves_the_batch(
    failure: row.Row, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(case: Case) -> row.Row:
        found = made_up(case)
        return found if case.batch <= 2 else found | {"status": "failed", "engines": {}} | failure

    replace_measure(monkeypatch, answer)
    assert main(["bench", "emo_1m", "--batch", "9", "--json", "out.json"]) == 0
    (kept,) = results.read(Path("out.json"))["rows"]
    assert (kept["case"]["batch"], kept["halved_from"]) == (2, 9)
    shown = capsys.readouterr()
    assert "trying batch 4" in shown.err
    assert "trying batch 2" in shown.err
    assert "batch 9 ran out of memory" in shown.out


# -------------------------------------------------------------------------------- earlier results


def test_compare_fails_where_a_ratio_fell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["bench", "emo_1m", "--batch", "1", "2", "--compare", "last", "--fail-over", "5%"]
    replace_measure(monkeypatch, made_up)
    assert main(argv) == 0
    assert "nothing to compare with yet" in capsys.readouterr().err
    replace_measure(monkeypatch, lambda case: made_up(case, ours=10.4))
    assert main(argv) == 0
    replace_measure(monkeypatch, lambda case: made_up(case, ours=11.2 if case.batch == 2 else 10.0))
    assert main(argv) == 1
    slower = [x for x in capsys.readouterr().err.splitlines() if x.startswith("slower: ")]
    assert len(slower) == 1
    assert "fp32 b2 224" in slower[0]
    assert "1.79x over the best peer, was 1.92x" in slower[0]


def test_the_last_rows_of_every_case_are_kept(measured: list[Case]) -> None:
    for batch in ("1", "2", "1"):
        assert main(["bench", "emo_1m", "--batch", batch, "--json", "out.json"]) == 0
    assert [r["case"]["batch"] for r in results.read(Path("out/bench.json"))["rows"]] == [1, 2]
    assert [r["case"]["batch"] for r in results.read(Path("out.json"))["rows"]] == [1]


def test_compare_reports_the_spread(capsys: pytest.CaptureFixture[str]) -> None:
    for name, ours in (("a.json", 10.0), ("b.json", 10.4)):
        kept = results.Results(Path(name))
        kept.put(made_up(Case("emo_1m"), ours=ours))
        kept.put(made_up(Case("emo_5m"), noisy=["other processes used 1.00 cores"]))
    assert main(["bench", "compare", "a.json", "b.json"]) == 0
    shown = capsys.readouterr().out
    assert "over 2 rows: median 1.9 %, largest 3.8 %" in shown
    assert "of the 1 rows that are not noisy: largest 3.8 %" in shown
    assert main(["bench", "compare", "a.json", "b.json", "--fail-over", "3%"]) == 1
    assert main(["bench", "compare", "b.json", "a.json", "--fail-over", "3%"]) == 1


# ------------------------------------------------------------------------------------------- real


def test_bench_reports_times_and_a_match(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"matmul_gflops": {"fp32": 100.0}}
    monkeypatch.setattr(row, "machine_limits", lambda device: limits)
    monkeypatch.setattr(
        bench, "measure_in_child", lambda case, limit, **options: row.measure(case, **options)
    )
    argv = ["bench", *SMALL, "--batch", "1", "2", "--seconds", "0.1", "--csv", "out.csv", "--json"]
    assert main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert [found["case"]["batch"] for found in report["rows"]] == [1, 2]
    for found in report["rows"]:
        assert all(engine["match"] for engine in found["engines"].values())
        assert found["ratio_low"] <= found["ratio"] <= found["ratio_high"]
    lines = csv_lines("out.csv")
    assert [line["engine"] for line in lines] == ["emo_kernels", "eager", "eager channels_last"] * 2
    assert all(float(line["peak_megabytes"]) >= 0 for line in lines)


@pytest.mark.slow  # starts Python three times
def test_a_real_ctrl_c(elsewhere: Path) -> None:
    """The whole process group gets it, as from a terminal, in the middle of the second row."""
    command = [sys.executable, "-m", "emo_kernels", "bench", *SMALL, "--batch", "1", "2"]
    command += ["--seconds", "4", "--json", "out.json"]
    running = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not Path("out.json").is_file() and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1.0)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "what was measured is kept" in err
    assert "Traceback" not in err
    assert "infer emo_1m fp32 b1" in out
    assert results.read(Path("out.json"))["rows"][0]["status"] == "ok"


@pytest.mark.slow  # starts Python twice
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_killed_run_leaves_no_child() -> None:
    """One that went on would disturb the next benchmark."""
    command = [sys.executable, "-m", "emo_kernels", "bench", *SMALL, "--seconds", "60"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    found: list[str] = []
    assert running.stderr is not None
    for line in running.stderr:  # of the child, ten seconds after it began to measure
        found = children.read_text().split()
        if found and "infer emo_1m" in line:
            break
    running.kill()
    running.wait()
    running.stderr.close()
    (child_id,) = found
    end = time.monotonic() + 20
    while _lives(child_id) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _lives(child_id)


def _lives(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
