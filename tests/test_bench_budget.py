"""A run that must end ends: how time is shared out, what is left out, how a run goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_cpu
import pytest
from bench_rows import TINY, Clock, made_up

from emo_kernels.__main__ import main
from emo_kernels.cli import bench
from emo_kernels.measure import budget, cache, engines, memory, results, row
from emo_kernels.measure.budget import Budget
from emo_kernels.measure.case import Case, Work
from emo_kernels.measure.engine import OURS

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(results, "commit", lambda: "1234567")


def test_what_a_row_leaves_is_for_the_others() -> None:
    clock = Clock()
    time_left = Budget(100.0, 4, clock)
    assert time_left.share() == 25.0
    clock.now = 10.0
    time_left.done()
    assert time_left.share() == 10.0 + 90.0 / 3
    assert time_left.limit(1800.0) == 90.0
    clock.now = 100.0
    assert time_left.is_over()
    unlimited = Budget(None, 4, clock)
    assert unlimited.share() is None
    assert not unlimited.is_over()
    assert unlimited.limit(1800.0) == 1800.0


def test_turns_get_two_thirds_of_what_is_left() -> None:
    assert budget.seconds_within(10.0, None) == 10.0
    assert budget.seconds_within(10.0, time.monotonic() + 60.0) == 10.0
    assert budget.seconds_within(10.0, time.monotonic() + 3.0) == pytest.approx(2.0, abs=0.1)
    assert 0 < budget.seconds_within(10.0, time.monotonic() - 60.0) < 1.0


def measuring(
    monkeypatch: pytest.MonkeyPatch, wall: float, clock: Clock
) -> list[tuple[str, dict[str, Any]]]:
    """Rows that take ``wall`` seconds of a clock, or are ended by force before."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def measure(case: Case, **options: Any) -> row.Row:
        asked.append((case.name, options))
        clock.now += min(wall, options["limit"])
        late = wall > options["limit"]
        return {"status": "failed", "late": True} if late else made_up(case)

    monkeypatch.setattr(bench, "measure_in_child", measure)
    monkeypatch.setattr(bench, "Budget", lambda seconds, rows: Budget(seconds, rows, clock))
    return asked


def test_quick_and_grow_end_in_time_on_any_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, most in ((["--quick"], 90.0), (["emo_1m", "--grow", "--json", "g.json"], 720.0)):
        for wall in (1.0, 50.0, 1e4):
            clock = Clock()
            measuring(monkeypatch, wall, clock)
            assert main(["bench", *options]) == 0
            assert clock.now < most
            assert ("not measured from" in capsys.readouterr().err) == (wall > 1.0)


def test_a_growth_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    argv = ["bench", "emo_1m", "--grow", "--threads", "1", "--json", "g.json"]
    first = measuring(monkeypatch, 100.0, clock)
    assert main(argv) == 0
    names = [name for name, _ in first]
    kept = [one["name"] for one in results.read(Path("g.json"))["rows"]]
    assert 0 < len(kept) < 13
    assert kept == names[: len(kept)]
    second = measuring(monkeypatch, 1.0, clock)
    assert main([*argv, "--resume"]) == 0
    assert not {name for name, _ in second} & set(kept)
    assert len(results.read(Path("g.json"))["rows"]) == len(kept) + len(second)
    third = measuring(monkeypatch, 1.0, clock)
    assert main([*argv, "--resume"]) == 0
    assert third == []
    monkeypatch.setattr(results, "commit", lambda: "7654321")
    assert main([*argv, "--resume"]) == 0
    assert len(third) == len(kept) + len(second)


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--resume"], "needs --json FILE"), (["--minutes", "0"], "--minutes must be more than 0")],
)
def test_bad_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "emo_1m", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_gates_end_in_time() -> None:
    clock, shares = Clock(), []

    def measure(case: Case, *, until: float, limit: float, **options: Any) -> row.Row:
        shares.append(until - clock.now)
        clock.now += min(40.0, limit)
        return {"status": "failed", "late": True} if limit < 40.0 else made_up(case)

    rows = [bench_cpu.Gate(case) for case in (Case("emo_1m", batch=b) for b in range(1, 11))]
    found = bench_cpu.run(
        rows,
        results.Results(None),
        peers=[],
        seconds=1.0,
        minutes=5.0,
        measure=measure,
        clock=clock,
    )
    assert clock.now == 300.0
    assert len(found) == 7
    assert shares[0] == 30.0
    assert shares[1] == pytest.approx(260.0 / 9)


def test_what_is_not_compiled_yet_is_left_out_in_a_hurry() -> None:
    def compiled(work: Work) -> engines.Engine:
        return engines._eager(work)

    work = Work(TINY)
    absent = engines.build_engines(work, ["compile", "eager"], in_a_hurry=True).absent
    assert absent == {"compile": absent["compile"]}
    assert "not compiled yet, which takes minutes: bench_cpu.py --warm" in absent["compile"]
    mark = cache.compiled_mark(TINY)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(engines._BUILDERS, "compile", compiled)
        assert "compile" in engines.build_engines(work, ["compile"], in_a_hurry=True).run


def test_a_late_row_tells_less(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = made_up(TINY)["limits"]
    monkeypatch.setattr(row, "machine_limits", lambda device: limits)
    found = row.measure(TINY, peers=["eager"], seconds=9.0, until=time.monotonic())
    assert found["status"] == "ok"
    assert found["wall_seconds"] < 30.0
    assert len(found["engines"][OURS]["samples"]) >= 3
    assert all("megabytes" not in entry for entry in found["engines"].values())


def test_what_an_engine_keeps_counts() -> None:
    """Eight megabytes of code and weights, four more in a call that leave again."""
    held = []

    def build() -> Any:
        held.append(bytearray(b"1") * (8 * 2**20))
        return lambda: sum(bytearray(b"1") * (4 * 2**20))

    found = memory.kept_megabytes(build)
    assert found is None or found == pytest.approx(12.0, abs=3.0)


@pytest.mark.slow  # starts pytest
def test_suites_skip_what_comes_too_late() -> None:
    command = [sys.executable, "-m", "pytest", str(BENCH / "bench_models.py"), "-q", "-rs"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--minutes", "0.0001"]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert "12 skipped" in done.stdout, done.stdout[-2000:]
    assert "its share of --minutes was used up" in done.stdout
