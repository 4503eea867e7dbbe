"""Time whole models against plain PyTorch and other engines, taking turns in one process.

    emo-kernels bench emo_5m --mode infer train --batch 1 16 --size 224 320x320 --dtype fp32 bf16
    emo-kernels bench emo_5m --peers all --json out.json --compare last --fail-over 5%
    emo-kernels bench plot out.json

Every result is held against an fp64 oracle before it is timed; the speed-up is over the fastest
peer, with the interval that holds it in 95 % of the runs. `plot` draws a results file, as PNG, SVG
and one HTML page. `--resources` times nothing: it compiles the Triton kernels for GPUs that need
not be here.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from emo_kernels.cli.files import write_atomically
from emo_kernels.cli.info import machine, one_line
from emo_kernels.cli.options import (
    add_runtime,
    add_settings,
    image_size,
    print_json,
    settings,
    use_runtime,
)
from emo_kernels.cli.progress import Progress
from emo_kernels.measure import results, tables
from emo_kernels.measure.case import DTYPES, MODES, Case
from emo_kernels.measure.engines import OURS, check_peers
from emo_kernels.measure.row import Row, measure

_LAST = Path("out") / "bench.json"
_QUICK_SECONDS, _QUICK_PEERS = 2.0, ("eager", "eager channels_last")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="emo_1m, emo_5m, …; or: plot FILE.json"
    )
    add_settings(parser)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["infer"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument(
        "--size", nargs="+", default=["224"], metavar="SIDE|HxW", help="default: 224"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: fp32; bf16 with --resources"
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="or all (default: eager in both layouts)"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for one row")
    parser.add_argument("--quick", action="store_true", help="two seconds a row")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="rows as JSON; without FILE, printed"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="rows with timm's column names")
    parser.add_argument("--compare", metavar="FILE", help="earlier rows, or last")
    parser.add_argument(
        "--fail-over", default="5%", metavar="P%", help="status 1 if a ratio fell by more (5%%)"
    )
    add_runtime(parser)
    group = parser.add_argument_group("compiling for absent GPUs")
    group.add_argument("--resources", action="store_true", help="compile the kernels, time nothing")
    group.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], metavar="SM")
    group.add_argument(
        "--blocks", nargs="+", metavar="PATH", help="such as stage3.1 (default: all)"
    )
    group.add_argument("--frozen", action="store_true", help="batch norms do not see the batch")


def run(args: argparse.Namespace) -> int:
    """Print one row for each case; 1 if one does not match, fails or fell behind ``--compare``."""
    if args.models[0] == "plot":
        return _plot(args.models[1:])
    if args.resources:
        return importlib.import_module("emo_kernels.cli.resources").run(args)  # needs triton
    device, threshold = use_runtime(args), _fraction(args.fail_over)
    peers = check_peers(args.peers or _QUICK_PEERS)
    cases = list(_cases(args, str(device)))
    earlier = [] if args.compare is None else results.read(_earlier(args.compare))["rows"]
    rows = []
    seconds = _QUICK_SECONDS if args.quick else args.seconds
    with Progress("bench", len(cases), unit="row") as progress:
        try:
            for case in cases:
                rows.append(_measure(case, peers, seconds, args.backend, progress))
                progress.advance(case.name)
        except KeyboardInterrupt:
            progress.say("interrupted: these rows were measured")
    _write(rows, args)
    behind = results.slower(rows, earlier, threshold)
    for line in behind:
        print(f"slower: {line}", file=sys.stderr)
    good = all(row["status"] in ("ok", "absent") for row in rows) and not behind
    return 0 if good and len(rows) == len(cases) else 1


def _cases(args: argparse.Namespace, device: str) -> Iterator[Case]:
    fields, threads = tuple(settings(args).items()), torch.get_num_threads()
    if min(args.batch) < 1:
        raise ValueError(f"--batch must each be at least 1, got {min(args.batch)}")
    for model, mode, dtype, size, batch in itertools.product(
        args.models, args.mode, args.dtype or ["fp32"], map(image_size, args.size), args.batch
    ):
        case = Case(model, mode, dtype, batch, size, threads, settings=fields)
        yield replace(case, device=device)


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"--fail-over must be a percentage such as 5%, got {text!r}")
    return value


def _earlier(name: str) -> Path:
    return _LAST if name == "last" else Path(name)


def _measure(
    case: Case, peers: tuple[str, ...], seconds: float, backend: str | None, progress: Progress
) -> Row:
    """One row; where memory runs out, of half the batch."""
    row = measure(case, peers=peers, seconds=seconds, backend=backend)
    reason = row.get("absent", {}).get(OURS, "")
    if row["status"] == "absent" and "memory" in reason and case.batch > 1:
        progress.say(f"{case.name}: {reason}; trying half the batch")
        return _measure(replace(case, batch=case.batch // 2), peers, seconds, backend, progress)
    return {"commit": results.commit(), "torch": torch.__version__, **row}


def _write(rows: list[Row], args: argparse.Namespace) -> None:
    data = {"machine": machine(), "rows": rows}
    text = (json.dumps(data, indent=2) + "\n").encode()
    for path in {_LAST} | ({Path(args.json)} if args.json not in (None, "-") else set()):
        write_atomically(path, lambda file: file.write(text))
    if args.csv is not None:
        table = tables.as_csv(rows).encode()
        write_atomically(args.csv, lambda file: file.write(table))
    if args.json == "-":
        print_json(data)
    else:
        print(one_line())
        print(tables.text(rows))


def _plot(files: list[str]) -> int:
    """Draw each file beside it."""
    if not files:
        raise ValueError("bench: plot needs a results file, as in: bench plot out/bench.json")
    report = importlib.import_module("emo_kernels.measure.report")  # needs matplotlib
    for path in map(Path, files):
        for written in report.write(path):
            print(written)
    return 0
