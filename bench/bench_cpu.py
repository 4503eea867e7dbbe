"""The CPU's gates of speed and memory in one table, each row in a process of its own.

    python bench/bench_cpu.py                         # inference, training, memory on 2 threads
    python bench/bench_cpu.py --list --everything     # every row there is: 1 thread, AVX2, blocks
    python bench/bench_cpu.py --rows 'train emo_5m*' 'memory*' --minutes 5
    python bench/bench_cpu.py --everything --rows '*avx2'
    python bench/bench_cpu.py --warm                  # minutes of torch.compile, before the run

How far two runs of the same code differ, on a machine that does nothing else:

    python bench/bench_cpu.py --rows 'infer emo_?m fp32 b1 *' --json build/bench/first.json
    python bench/bench_cpu.py --rows 'infer emo_?m fp32 b1 *' --json build/bench/second.json
    python -m emo_kernels bench compare build/bench/first.json build/bench/second.json

Engines take turns in one process, after each agreed with an fp64 oracle; medians, p10 and the
interval of the ratio to the best peer; the limits of the machine measured around each row. Rows are
saved as they come: a second run goes on with those that are missing or were measured at another
commit (`--redo` measures again). Exit status 1 if a gate is missed or a result disagrees.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emo_kernels.measure.budget import Budget
from emo_kernels.measure.case import Case
from emo_kernels.measure.charts import draw_all
from emo_kernels.measure.child import measure_in_child
from emo_kernels.measure.engines import check_peers
from emo_kernels.measure.growth import growth_cases
from emo_kernels.measure.machine import one_line
from emo_kernels.measure.progress import Progress
from emo_kernels.measure.results import Results
from emo_kernels.measure.row import Row
from emo_kernels.measure.tables import text, verdict

OUT = Path(__file__).resolve().parents[1] / "build" / "bench" / "cpu.json"


class Gate(NamedTuple):
    """A row and what it must reach: a ratio to the best peer; of memory, a share of eager's."""

    case: Case
    gate: float | None = None
    target: float | None = None


BLOCKS = ("stage1.1", "stage2.1", "stage1.0", "stage2.0", "stage3.0", "stage4.0")
ATTENTION_BLOCKS = ("stage3.1", "stage4.1")


def gates(threads: int, isa: str = "") -> list[Gate]:
    """The table of one thread count and instruction set, in order of value."""
    where: dict[str, Any] = {"threads": threads, "isa": isa}
    rows = [Gate(Case("emo_5m", **where), 1.2, 1.4)]
    rows += [Gate(Case("emo_5m", batch=16, **where), 1.5, 1.9)]
    for model in ("emo_5m", "emo_1m"):
        rows += [Gate(Case(model, "train", batch=8, **where), 1.7, 2.5)]
    rows += [Gate(Case(m, **where), 1.2, 1.4) for m in ("emo_1m", "emo_2m", "emo_6m")]
    rows += [Gate(Case("emo_5m", dtype="bf16", batch=b, **where), 1.3, 1.8) for b in (1, 16)]
    for model in ("emo_1m", "emo_5m"):
        rows += [Gate(Case(model, "train", batch=32, **where), 1.7, 2.5)]
    for model in ("emo_5m", "emo_1m"):
        rows += [Gate(Case(model, "memory", batch=b, **where), 0.6, 0.4) for b in (8, 32)]
    gated = threads == 2 and not isa
    return rows if gated else [Gate(row.case) for row in rows if row.case.mode != "memory"]


def blocks() -> list[Gate]:
    """One block of each kind of EMO-5M, batch 1 and 16, 2 threads: points of the roofline."""
    paths = (*BLOCKS, *ATTENTION_BLOCKS)
    return [Gate(Case("emo_5m", block=p, batch=b, threads=2)) for b in (1, 16) for p in paths]


def growth() -> list[Gate]:
    """How cost grows with the batch and the resolution; what is in a table of gates is not here."""
    known = {row.case.name for row in (*gates(2), *gates(1))}
    cases = growth_cases(Case("emo_5m", threads=2))
    return [Gate(case) for case in cases if case.name not in known]


def everything() -> list[Gate]:
    """Every row there is."""
    return [*gates(2), *gates(1), *gates(2, "avx2"), *blocks(), *growth()]


def chosen(patterns: Sequence[str], rows: list[Gate]) -> list[Gate]:
    """The rows whose names match any pattern; all without patterns.

    Raises:
        ValueError: a pattern matches none.
    """
    names = [row.case.name for row in rows]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"bench_cpu: --rows {pattern!r} matches none of: {'; '.join(names)}")
    return [
        row
        for row, name in zip(rows, names, strict=True)
        if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


def run(
    rows: list[Gate],
    results: Results,
    *,
    peers: Sequence[str],
    seconds: float,
    minutes: float,
    redo: bool = False,
    measure: Callable[..., Row] = measure_in_child,
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Measure what is not done yet within ``minutes``, shared out; Ctrl-C keeps what is there."""
    budget = Budget(60 * minutes, len(rows), clock)
    with Progress("bench_cpu", len(rows), unit="row") as progress:
        for gate in rows:
            name = gate.case.name
            if not budget.is_over() and (redo or not results.is_done(name)):
                limits = {"until": budget.share(), "limit": budget.limit(math.inf)}
                row = measure(gate.case, peers=peers, seconds=seconds, **limits)
                if row.get("late"):
                    break
                row |= {"gate": gate.gate, "target": gate.target}
                results.put(row)
                progress.say(f"{name}: {_line(row)}")
                if row.get("interrupted"):
                    break
            budget.done()
            progress.advance(name)
    kept = {row["name"]: row for row in results.rows}
    names = [row.case.name for row in rows]
    for name in names:
        if name not in kept:
            print(f"not measured: {name}", file=sys.stderr)
    return [kept[name] for name in names if name in kept]


def warm(rows: list[Gate]) -> None:
    """Fill the caches of torch.compile and of the oracle, which take minutes, and time nothing."""
    with Progress("warm", len(rows), unit="row") as progress:
        for case in (row.case for row in rows if row.case.mode != "memory"):
            row = measure_in_child(case, peers=["compile"], seconds=0.0, limit=3600.0)
            reason = row.get("error") or row["absent"].get("compile", "")
            progress.say(f"{case.name}: {row['status']} {reason}")
            if row["interrupted"]:
                break
            progress.advance(case.name)


def _line(row: Row) -> str:
    ratio = f"{row['ratio']:.2f}x over {row['best_peer']} " if "ratio" in row else ""
    share = f"{row['memory_share']:.2f} of eager's memory " if "memory_share" in row else ""
    seconds = f"in {row['wall_seconds']:.0f} s" if "wall_seconds" in row else ""
    return f"{ratio}{share}{verdict(row)} {seconds}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", nargs="+", default=[], metavar="PATTERN", help="as 'train*b8*'")
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--isa", default="", help="such as avx2: limits the peers too")
    parser.add_argument("--everything", action="store_true", help="choose among all rows there are")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--warm", action="store_true", help="fill compilers' caches, time nothing")
    parser.add_argument("--peers", nargs="+", default=["all"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for one row")
    parser.add_argument("--minutes", type=float, default=60.0, help="that all rows share")
    parser.add_argument("--redo", action="store_true", help="measure again what is there")
    parser.add_argument("--json", type=Path, default=OUT, help=f"default: {OUT}")
    parser.add_argument("--no-charts", action="store_true")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(arguments)
    table = [gate for threads in args.threads for gate in gates(threads, args.isa)]
    try:
        rows = chosen(args.rows, everything() if args.everything else table)
        peers = check_peers(args.peers)
        results = Results(args.json)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print("\n".join(row.case.name for row in rows))
        return 0
    if args.warm:
        warm(rows)
        return 0
    torch.set_num_threads(args.threads[0])
    print(one_line())
    found = run(
        rows,
        results,
        peers=peers,
        seconds=args.seconds,
        minutes=args.minutes,
        redo=args.redo,
    )
    print(text(found))
    if not args.no_charts and found:
        for path in draw_all(found, args.json.with_suffix("")):
            print(path)
    bad = [row for row in found if row["status"] in ("mismatch", "failed")]
    return 1 if bad or any(verdict(row).startswith("MISSED") for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
