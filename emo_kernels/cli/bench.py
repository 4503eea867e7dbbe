"""Time whole models against plain PyTorch and other engines, taking turns in one process.

    emo-kernels bench emo_5m --mode infer train --batch 1 16 --size 224 320x320 --dtype fp32 bf16
    emo-kernels bench emo_5m --peers all --json out.json --compare last --fail-over 5%
    emo-kernels bench plot out.json

    emo-kernels bench --quick
    emo-kernels bench emo_1m --grow --json growth.json && emo-kernels bench plot growth.json
    emo-kernels bench emo_1m --grow --json growth.json --resume      # the rows that are missing
    emo-kernels bench compare first.json second.json --fail-over 5%

Every row runs in a process of its own, where every result is held against an fp64 oracle before it
is timed; the speed-up is over the fastest peer, with the interval that holds it in 95 % of the
runs. Rows are saved as they come, to out/bench.json too: the last one of every case. `--quick`
takes a minute and a half, `--grow` twelve: batch 1 to 64, images of 96 to 1280 pixels, and threads,
against the fastest peers; `--minutes` sets another time, which the rows share. `compare` tells how
far two files differ; `plot` draws one, as PNG, SVG and one HTML page. `--resources` times nothing:
it compiles the Triton kernels for GPUs that need not be here. Exit status 1: a result does not
match, a row failed, or a ratio fell.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emo_kernels.backends import check_usable
from emo_kernels.cli.options import (
    add_runtime,
    add_settings,
    image_size,
    print_json,
    settings,
    use_runtime,
)
from emo_kernels.measure import results, tables
from emo_kernels.measure.budget import Budget
from emo_kernels.measure.case import DTYPES, MODES, Case
from emo_kernels.measure.child import measure_in_child
from emo_kernels.measure.engines import check_peers
from emo_kernels.measure.files import write_atomically
from emo_kernels.measure.growth import growth_cases, steps
from emo_kernels.measure.machine import one_line
from emo_kernels.measure.progress import Progress
from emo_kernels.measure.results import Results
from emo_kernels.measure.row import Row
from emo_kernels.models import create_model

_LAST = Path("out") / "bench.json"
_PEERS, _GROWTH_PEERS = ("eager", "eager channels_last"), ("eager channels_last", "openvino")
_SECONDS, _QUICK_SECONDS = 10.0, 2.0
_MODEL = "emo_5m"
_VERBS = ("plot", "compare")
_QUICK_MODELS, _QUICK_MODES = ("emo_1m", "emo_5m"), (("infer", [1]), ("train", [4]))
_LONGEST = 1800.0  # seconds of a row: compilers take minutes
_QUICK_MINUTES, _GROWTH_MINUTES = 1.3, 11.5  # 90 seconds and 12 minutes, less starting and showing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench``."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="emo_1m, emo_5m, … (default: emo_5m); or: plot FILE; or: compare FILE FILE",
    )
    add_settings(parser)
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: infer")
    parser.add_argument("--batch", type=int, nargs="+", help="default: 1")
    parser.add_argument(
        "--size", nargs="+", default=["224"], metavar="SIDE|HxW", help="default: 224"
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="default: fp32; bf16 with --resources"
    )
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="or all (default: eager in both layouts)"
    )
    parser.add_argument("--seconds", type=float, help="of timing for one row (default: 10)")
    parser.add_argument(
        "--minutes",
        type=float,
        help="for all rows together, which share them (default: 1.3 for --quick, 11.5 for --grow)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep rows of --json FILE measured at this commit"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two seconds a row; without a model: emo_1m and emo_5m in inference and training",
    )
    parser.add_argument(
        "--grow", action="store_true", help="rows for every batch, size and number of threads"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="rows as JSON; without FILE, printed"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="rows with timm's column names")
    parser.add_argument(
        "--compare", metavar="FILE", help="earlier rows, or last: those of out/bench.json"
    )
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
    threshold = _fraction(args.fail_over)
    if args.models[:1] == ["plot"]:
        return _plot(args.models[1:])
    if args.models[:1] == ["compare"]:
        return _compare(args.models[1:], threshold)
    if args.resources:
        args.models = args.models or [_MODEL]
        return importlib.import_module("emo_kernels.cli.resources").run(args)  # needs triton
    if args.models and (near := difflib.get_close_matches(args.models[0], _VERBS, n=1)):
        raise ValueError(f"bench: there is no model {args.models[0]!r}; did you mean {near[0]!r}?")
    device = use_runtime(args)
    if args.backend is not None:
        check_usable(args.backend, "bench: --backend:")
    if args.resume and args.json in (None, "-"):
        raise ValueError("--resume goes on with a file: it needs --json FILE")
    if args.minutes is not None and args.minutes <= 0:
        raise ValueError(f"--minutes must be more than 0, got {args.minutes}")
    peers = check_peers(args.peers or (_GROWTH_PEERS if args.grow else _PEERS))
    cases = list(_cases(args, str(device)))
    _check_models({case.model for case in cases}, settings(args))
    last, earlier = Results(_LAST), _earlier(args.compare)
    found, interrupted = _measure_all(cases, peers, args, last)
    _show(found, args)
    behind = results.slower(found.rows, earlier, threshold)
    for line in behind:
        print(f"slower: {line}", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt
    good = all(row["status"] in ("ok", "absent") for row in found.rows) and not behind
    return 0 if good else 1


def _cases(args: argparse.Namespace, device: str) -> Iterator[Case]:
    fields, threads = tuple(settings(args).items()), torch.get_num_threads()
    batches = args.batch or [1]
    if min(batches) < 1:
        raise ValueError(f"--batch must each be at least 1, got {min(batches)}")
    sizes, dtypes = [image_size(size) for size in args.size], args.dtype or ["fp32"]
    modes = [(mode, batches) for mode in args.mode or ["infer"]]
    if args.quick and not args.models:
        modes = [(m, args.batch or b) for m, b in _QUICK_MODES if m in (args.mode or MODES)]
    models = args.models or (_QUICK_MODELS if args.quick else [_MODEL])
    for model, (mode, several), dtype, size in itertools.product(models, modes, dtypes, sizes):
        for batch in several:
            case = Case(model, mode, dtype, batch, size, threads, settings=fields)
            case = replace(case, device=device)
            yield from growth_cases(case) if args.grow else [case]


def _check_models(names: set[str], fields: dict[str, Any]) -> None:
    """Unknown names and fields are told before the first row, not after it."""
    with torch.device("meta"):
        for name in sorted(names):
            create_model(name, **fields)


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise ValueError(f"--fail-over must be a percentage such as 5%, got {text!r}")
    return value


def _earlier(name: str | None) -> list[Row]:
    """The rows to compare with; read before this run replaces the last ones."""
    if name == "last" and not _LAST.is_file():
        print(f"bench: nothing to compare with yet: this run writes {_LAST}", file=sys.stderr)
        return []
    path = _LAST if name == "last" else Path(name or "")
    return [] if name is None else list(results.read(path)["rows"])


def _measure_all(
    cases: list[Case], peers: tuple[str, ...], args: argparse.Namespace, last: Results
) -> tuple[Results, bool]:
    """The rows, saved after each, and whether Ctrl-C ended the run."""
    path = None if args.json in (None, "-") else Path(args.json)
    found = Results(path, fresh=not args.resume)
    budget = _budget(args, len(cases))
    with Progress("bench", len(cases), unit="row") as progress:
        for case in cases:
            if args.resume and found.is_done(case.name):
                budget.done()
                progress.advance(case.name)
                continue
            row = _measure(case, peers, budget, args, progress)
            budget.done()
            if row.get("late") and budget.is_over():
                progress.say(f"the time is over: not measured from {case.name} on")
                break
            interrupted = bool(row.get("interrupted"))
            if row.get("engines") or not interrupted:
                last.put(row)  # first: it knows how fast the machine was in other runs
                found.put(last.row(row["name"]))
            if interrupted:
                progress.say("interrupted: what was measured is kept")
                return found, True
            progress.advance(case.name)
    return found, False


def _budget(args: argparse.Namespace, rows: int) -> Budget:
    minutes = args.minutes
    if minutes is None and args.quick:
        minutes = _QUICK_MINUTES
    if minutes is None and args.grow:
        minutes = _GROWTH_MINUTES
    return Budget(None if minutes is None else 60 * minutes, rows)


def _measure(
    case: Case,
    peers: tuple[str, ...],
    budget: Budget,
    args: argparse.Namespace,
    progress: Progress,
) -> Row:
    """One row; where memory runs out, of half the batch. ``late`` without one in time."""
    if budget.is_over():
        return {"late": True}
    row = measure_in_child(
        case,
        peers=peers,
        seconds=args.seconds or (_QUICK_SECONDS if args.quick or args.grow else _SECONDS),
        backend=args.backend,
        until=budget.share(),
        limit=budget.limit(_LONGEST),
    )
    if row.get("out_of_memory") and case.batch > 1:
        half = replace(case, batch=case.batch // 2)
        progress.say(f"{case.name}: {row['error']}; trying batch {half.batch}")
        row = _measure(half, peers, budget, args, progress) | {"halved_from": case.batch}
    return row


def _show(found: Results, args: argparse.Namespace) -> None:
    if args.csv is not None:
        table = tables.as_csv(found.rows).encode()
        write_atomically(args.csv, lambda file: file.write(table))
    if args.json == "-":
        print_json(found.data())
    else:
        print(one_line())
        print(tables.text(found.rows))
        for step in steps(found.rows):
            print(f"step: {step}")


def _compare(files: list[str], threshold: float) -> int:
    """How far the rows of two files differ; 1 if a ratio to the best peer does by more."""
    if len(files) != 2:
        raise ValueError("bench: compare needs two files, as in: bench compare old.json new.json")
    old, new = (results.read(Path(file))["rows"] for file in files)
    changes = results.changes(old, new)
    if not changes:
        raise ValueError(f"bench: {files[0]} and {files[1]} have no timed row in common")
    print(tables.changes_text(changes))
    return int(any(abs(change.ratio) > threshold for change in changes))


def _plot(files: list[str]) -> int:
    """Draw each file beside it."""
    if not files:
        raise ValueError("bench: plot needs a results file, as in: bench plot out/bench.json")
    report = importlib.import_module("emo_kernels.measure.report")  # needs matplotlib
    for path in map(Path, files):
        for written in report.write(path):
            print(written)
    return 0
