"""Write the README's measured table from bench/results/cpu_*.json; nothing in it is typed.

    python bench/readme.py            # rewrites README.md between its two marks
    python bench/readme.py --check    # exit status 1 where they disagree

A run becomes the README's: python bench/bench_cpu.py --json bench/results/cpu_zen4_2cpu.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def _machine(data: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    machine = data["machine"]
    commits = sorted({row["commit"] for row in rows})
    torch = ", ".join(sorted({row["torch"] for row in rows}))
    plural = "s" if len(commits) > 1 else ""
    where = f"{machine['cores']} vCPUs of {machine['cpu']}, torch {torch}"
    return f"{where}, commit{plural} {', '.join(commits)}"


def rewritten(readme: str, sections: list[str]) -> str:
    """The README with these sections between its marks."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"readme: README.md must have the marks {BEGIN} and {END} once each")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return "".join([before, BEGIN, "\n\n", "\n\n".join(sections), "\n\n", END, after])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(arguments)
    path = ROOT / "README.md"
    old = path.read_text()
    new = rewritten(old, [section(p) for p in sorted(RESULTS.glob("cpu_*.json"))])
    if args.check:
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
