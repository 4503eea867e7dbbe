"""What is made of measured rows: verdicts, tables, pictures, the page, the README."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import readme
import torch
from bench_rows import TINY, made_up

from emo_kernels.measure import charts, report, results, tables
from emo_kernels.measure.engine import OURS


def test_slower_rows_are_named() -> None:
    old = [made_up(TINY), made_up(replace(TINY, batch=3))]
    new = [made_up(TINY, ours=10.4), made_up(replace(TINY, batch=3), ours=11.0)]
    found = results.slower(new, old, 0.05)
    assert len(found) == 1
    assert "1.82x over the best peer, was 2.00x at 1234567 (-9 %)" in found[0]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"gate": 1.2, "target": 1.4}, "target"),
        ({"gate": 1.9, "target": 2.5}, "pass"),
        ({"gate": 2.1, "target": 2.5}, "MISSED (gate 2.1)"),
        ({"memory_share": 0.5, "gate": 0.6, "target": 0.4}, "pass"),
        ({"memory_share": 0.7, "gate": 0.6, "target": 0.4}, "MISSED (gate 0.6)"),
        ({"gate": None}, ""),
        ({"status": "failed", "error": "took more than 9 s"}, "took more than 9 s"),
        ({"status": "absent", "absent": {OURS: "no bf16 kernel"}}, "no bf16 kernel"),
    ],
)
def test_verdicts(more: dict[str, Any], says: str) -> None:
    assert tables.verdict(made_up(TINY, **more)) == says


def test_tables_say_the_same() -> None:
    rows = [made_up(TINY, gate=1.5, target=2.5), made_up(replace(TINY, mode="train"))]
    assert results.share_of_limit(rows[0]) == pytest.approx(2.0 / 10 * 1e3 / 400)
    shown = tables.text(rows)
    assert "2.00× [2.00, 2.00]" in shown
    assert "absent: ONNX Runtime in 2 rows: not installed" in shown
    written = tables.markdown(rows).splitlines()
    assert written[0].startswith("| case | emo_kernels | eager | OpenVINO | over the best |")
    assert all(line.count("|") == written[0].count("|") for line in written)
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(rows))))
    assert [line["engine"] for line in lines[:4]] == [OURS, "eager", "openvino", "onnxruntime"]
    assert float(lines[0]["infer_samples_per_sec"]) == 200.0
    assert float(lines[0]["infer_gmacs"]) == 0.5
    assert lines[0]["train_step_time"] == ""
    assert lines[3]["status"] == "absent: not installed"


def test_pictures(tmp_path: Path) -> None:
    rows = [made_up(replace(TINY, batch=b), ours=b) for b in (1, 2, 4)]
    rows += [made_up(replace(TINY, size=(s, s))) for s in (96, 128)]
    rows += [made_up(replace(TINY, block="stage3.1"))]
    shares = {name: {"megabytes": mb} for name, mb in ((OURS, 40.0), ("eager", 100.0))}
    memory = made_up(replace(TINY, mode="memory"))
    rows.append(memory | {"engines": shares, "memory_share": 0.4})
    rows.append(made_up(replace(TINY, dtype="bf16"), status="failed"))
    drawn = charts.draw_all(rows, tmp_path / "cpu")
    pictures = ("speed_up_1thr", "growth", "memory", "roofline")
    assert [p.name for p in drawn] == [f"cpu_{n}.{f}" for n in pictures for f in ("png", "svg")]
    assert all(path.stat().st_size > 4000 for path in drawn)
    assert "3.1 b2" in (tmp_path / "cpu_roofline.svg").read_text()
    assert charts.draw_all([], tmp_path / "none") == []


def test_the_page_holds_everything(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    kept = results.Results(path)
    kept.put(made_up(TINY, absent={"onnxruntime": "<none>"}))
    written = report.write(path)
    assert [p.name for p in written[:2]] == ["cpu_speed_up_1thr.png", "cpu_speed_up_1thr.svg"]
    page = written[-1].read_text()
    assert page.count("<svg") == 2  # and the roofline
    assert "onnxruntime is absent: &lt;none&gt;" in page
    assert str(torch.get_num_threads()) in page
    assert "a call that warms up and is not counted" in page
    assert 'src="' not in page
    assert "<link" not in page


def test_a_suite_becomes_a_roofline(tmp_path: Path) -> None:
    """Of pytest-benchmark's own file, where each operator of ours has its share of the roof."""
    found = []
    for backend, gflops in (("cpu", 100.0), ("reference", 20.0)):
        asked = {"stem": "expand", "layer": "5m_stage2", "backend": backend, "way": "backward"}
        extra = {"flops": 4e6, "bytes": 1e6, "gflops": gflops}  # 4 FLOPs a byte: the stream's side
        extra |= {"matmul_gflops": 400.0, "triad_gigabytes": 50.0}
        found.append({"params": asked, "extra_info": extra})
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"benchmarks": found}))
    written = report.write(path)
    assert [p.name for p in written] == ["suite_roofline.png", "suite_roofline.svg"]
    assert "expand 2 backward, 50 %" in written[1].read_text()
    path.write_text('{"benchmarks": []}')
    assert report.write(path) == []


# --------------------------------------------------------------------------------------- the README


def test_readme_and_results_agree() -> None:
    assert readme.main(["--check"]) == 0, "python bench/readme.py rewrites the README"


def test_a_readme_that_was_typed_would_be_found(tmp_path: Path) -> None:
    text = (readme.ROOT / "README.md").read_text()
    sections = readme.sections()
    assert readme.rewritten(text, sections) == text
    figure = sections[0].split("×")[0].split()[-1]
    assert readme.rewritten(text.replace(f"{figure}×", "9.99×"), sections) == text
    assert readme.rewritten(text, ["other"]) != text
    with pytest.raises(SystemExit, match="marks"):
        readme.rewritten("no marks", sections)


def test_growth_is_a_picture_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    path = tmp_path / "results" / "growth_here.json"
    kept = results.Results(path)
    for batch, ours in ((1, 1.0), (2, 2.0), (4, 6.0)):
        kept.put(made_up(replace(TINY, batch=batch), ours=ours))
    (found,) = readme.sections()
    assert "from batch 2 to 4 the time for an image rises 1.50 times" in found
    assert "![" not in found
    report.write(path)
    (found,) = readme.sections()
    assert found.endswith("(results/growth_here_growth.svg)")
    kept.put(made_up(replace(TINY, batch=4), ours=4.0))
    assert "rises by no more than 1.25" in readme.sections()[0]
