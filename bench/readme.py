"""Write what the README says was measured from bench/results; nothing in it is typed.

    python bench/readme.py            # rewrites README.md between its two marks
    python bench/readme.py --check    # exit status 1 where they disagree

The table is that of cpu_*.json, a picture and a line those of growth_*.json. A run becomes the
README's by its place:

    python bench/bench_cpu.py --json bench/results/cpu_zen4_2cpu.json
    python -m emo_kernels bench emo_1m --grow --json bench/results/growth_zen4_2cpu.json
    python -m emo_kernels bench plot bench/results/growth_zen4_2cpu.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_kernels.measure.growth import STEP, steps
from emo_kernels.measure.results import read
from emo_kernels.measure.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- measured: python bench/readme.py -->", "<!-- end of measured -->"


def section(path: Path) -> str:
    """What the README says of one results file."""
    data = read(path)
    rows, where = data["rows"], path.relative_to(ROOT)
    lines = [
        f"{_machine(data, rows)}; [`{where}`]({where}). Milliseconds as median (p10), of a "
        "training step forward and backward; the ratio to the fastest peer with its 95 % interval "
        "over rounds; useful arithmetic as a share of `torch.mm`'s rate in the same run; whether "
        "our result matches an fp64 oracle, and the largest relative error of output or gradient.",
        markdown(rows),
    ]
    noisy = sum(bool(row.get("noisy")) for row in rows)
    if noisy:
        lines.append(f"{noisy} of {len(rows)} rows are noisy: the file says why.")
    pictures = sorted(RESULTS.glob(f"{path.stem}_*.svg"))
    lines += [f"![{p.stem}]({p.relative_to(ROOT)})" for p in pictures]
    return "\n\n".join(lines)


def growth_section(path: Path) -> str:
    """What the README says of how cost grows: the picture, and where there is a step."""
    data = read(path)
    where, picture = path.relative_to(ROOT), path.with_name(f"{path.stem}_growth.svg")
    said = "; ".join(steps(data["rows"])) or (
        f"from one point to the next the cost of an image or a pixel rises by no more than {STEP}"
    )
    lines = [f"How cost grows: {_machine(data, data['rows'])}; [`{where}`]({where}); {said}."]
    if picture.is_file():
        lines.append(
            f"![time and memory against batch, size, threads]({picture.relative_to(ROOT)})"
        )
    return "\n\n".join(lines)


def sections() -> list[str]:
    """Of every committed file."""
    tables = [section(path) for path in sorted(RESULTS.glob("cpu_*.json"))]
    return tables + [growth_section(path) for path in sorted(RESULTS.glob("growth_*.json"))]


def _machine(data: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    machine = data["machine"]
    commits = sorted({row["commit"] for row in rows})
    torch = ", ".join(sorted({row["torch"] for row in rows}))
    plural = "s" if len(commits) > 1 else ""
    where = f"{machine['cores']} vCPUs of {machine['cpu']}, torch {torch}"
    return f"{where}, commit{plural} {', '.join(commits)}"


def rewritten(readme: str, written: list[str]) -> str:
    """The README with these sections between its marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"readme: README.md must have the marks {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return "".join([before, BEGIN, "\n\n", "\n\n".join(written), "\n\n", END, after])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    path = ROOT / "README.md"
    old = path.read_text()
    new = rewritten(old, sections())
    if args.check:
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
