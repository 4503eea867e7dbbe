"""How cost grows: which rows are measured, the lines drawn through them, the steps in a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from bench_rows import made_up

from emo_kernels.measure import growth, results
from emo_kernels.measure.case import Case
from emo_kernels.measure.charts import draw_all
from emo_kernels.measure.engine import OURS
from emo_kernels.measure.row import Row

CASE = Case("emo_1m", threads=2)


def rows(cliff: float = 1.0) -> list[Row]:
    """Every case of a growth chart: 3 ms an image of 224, from 320 pixels on ``cliff`` times."""
    found = []
    for case in growth.growth_cases(CASE):
        share = case.batch * case.size[0] ** 2 / 224**2
        row = made_up(
            case, ours=3 * share * (cliff if case.size[0] >= 320 else 1.0), peer=9 * share
        )
        row["engines"][OURS]["megabytes"] = 2 * share
        found.append(row)
    return found


def test_the_cases_of_a_growth_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.os, "cpu_count", lambda: 6)
    cases = growth.growth_cases(CASE)
    assert len({case.name for case in cases}) == len(cases) == 7 + 6 + 2 + 2
    assert {case.batch for case in cases if case.threads == 2} == {1, 2, 4, 8, 16, 32, 64}
    assert {case.threads for case in cases if case.batch == 16} == {1, 2, 4}
    assert {case.size[0] for case in cases} == {96, 160, 224, 320, 512, 800, 1280}
    on_gpu = growth.growth_cases(replace(CASE, device="cuda"))
    assert len(on_gpu) == 7 + 6


def test_the_lines_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth.os, "cpu_count", lambda: 2)
    batch, side, threads = growth.series_of(rows())
    assert batch.time(OURS) == [(b, pytest.approx(3.0)) for b in growth.BATCHES]
    assert batch.memory(OURS) == [(b, pytest.approx(2.0)) for b in growth.BATCHES]
    assert batch.memory("openvino") == []
    a_megapixel = pytest.approx(3.0 / 0.224**2)
    assert side.time(OURS) == [(s, a_megapixel) for s in growth.SIDES]
    assert [place for place, _ in threads.time(OURS)] == [1, 2]
    assert batch.name == "infer emo_1m fp32 224 2thr"
    assert side.name == "infer emo_1m fp32 b1 2thr"
    assert growth.series_of(rows()[:2]) == []


def test_a_step_is_found() -> None:
    assert list(growth.steps(rows())) == []
    assert list(growth.steps(rows(cliff=1.2))) == []
    (found,) = growth.steps(rows(cliff=1.3))
    assert "from side of the image 224 to 320 the time for a megapixel rises 1.30 times" in found
    assert found.endswith("(1.00 times for eager, 1.00 times for openvino)")


def test_a_step_of_memory_is_found() -> None:
    measured = rows()
    for row in measured:
        if row["case"]["batch"] > 8:
            row["engines"][OURS]["megabytes"] *= 1.5
            row["engines"]["openvino"] |= {"megabytes": 7.0, "kept": True}
    found = [step for step in growth.steps(measured) if "memory" in step]
    assert len(found) == 1
    assert "from batch 8 to 16 the memory for an image rises 1.50 times" in found[0]
    batch = growth.series_of(measured)[0]
    assert (batch.keeps("openvino"), batch.keeps(OURS)) == (True, False)


def test_the_chart_has_a_column_for_each(tmp_path: Path) -> None:
    drawn = {path.name: path for path in draw_all(rows(), tmp_path / "a")}
    text = drawn["a_growth.svg"].read_text()
    for words in ("ms a megapixel", "peak MB an image", ">batch<", ">threads<", ">1280<"):
        assert words in text


def test_files_of_other_programs_are_no_suites(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[1]", "{}", '{"benchmarks": 3}', "not json"):
        path.write_text(text)
        assert results.suite(path) is None
    assert results.suite(tmp_path / "absent.json") is None
