"""Measure one case: build the engines, hold each against the oracle, let them take turns.

``python -m emo_kernels.measure.row REQUEST ANSWER`` does so in a process of its own, whose
environment can then limit the instruction set.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from emo_kernels.cli.files import write_json
from emo_kernels.measure.case import Case, Work
from emo_kernels.measure.engines import (
    OURS,
    UNLIMITED,
    build_engines,
    isa_environment,
    short,
)
from emo_kernels.measure.limits import better, machine_limits
from emo_kernels.measure.memory import peak_megabytes
from emo_kernels.measure.noise import Noise, complaints
from emo_kernels.measure.oracle import judge
from emo_kernels.measure.timing import Timing, median_interval, take_turns

Row = dict[str, Any]
MEMORY = {"eager": "plain", "eager channels_last": "plain, channels_last", OURS: "accelerated"}


def measure(
    case: Case, *, peers: Sequence[str], seconds: float = 10.0, backend: str | None = None
) -> Row:
    """One row: what :class:`Case` asks for, of ours and of ``peers``.

    ``status`` is ``ok``, ``mismatch`` (ours disagrees with the oracle: nothing is timed then),
    ``absent`` (ours does not run it, for the reason in ``absent``) or ``warm`` (without
    ``seconds`` nothing is timed, but compilers have filled their caches). ``ratio`` is the best
    peer's median over ours, ``ratio_low`` to ``ratio_high`` hold it with 95 %, over rounds.
    """
    started = time.perf_counter()
    row: Row = {"name": case.name, "case": asdict(case), "started": time.time(), "engines": {}}
    work = Work(case)
    row |= {"gflop": work.gflop, "parameters": work.parameters}
    if case.block:
        row["bytes"] = work.least_bytes
    if case.mode == "memory":
        row |= _memory(work, peers, backend)
    else:
        row |= _times(work, peers, seconds, backend)
    return row | {"wall_seconds": round(time.perf_counter() - started, 1)}


def _times(work: Work, peers: Sequence[str], seconds: float, backend: str | None) -> Row:
    case = work.case
    engines = build_engines(work, peers, backend=backend)
    verdicts = judge(work, engines)
    for name, verdict in verdicts.items():
        if name != OURS and not verdict["match"]:
            engines.absent[name] = f"disagrees with the fp64 oracle: {verdict}"
            del engines.run[name]
    row: Row = {"absent": engines.absent, "status": "ok"}
    if OURS not in engines.run:
        row["status"] = "absent"
    elif not verdicts[OURS]["match"]:
        return row | {"status": "mismatch", "engines": {OURS: verdicts[OURS]}}
    if seconds <= 0:
        return row | {"status": "warm"}
    on_cpu = case.device == "cpu"
    limits = machine_limits() if on_cpu else None
    noise = Noise()
    calls = {name: engine.call for name, engine in engines.run.items()}
    taken = take_turns(calls, seconds=seconds, device=torch.device(case.device), label=case.name)
    row["noise"] = noise.report()
    if limits is not None:
        row["limits"] = better(limits, machine_limits())
    row["engines"] = {
        name: verdicts[name]
        | Timing.of(times)._asdict()
        | {"samples": [round(1e3 * t, 4) for t in times], "note": engines.run[name].note}
        for name, times in taken.items()
    }
    return row | _summary(row, case)


def _summary(row: Row, case: Case) -> Row:
    """Ours against the best peer, and whether to believe it."""
    engines: dict[str, Row] = row["engines"]
    if OURS not in engines:
        return {}
    ours, summary = engines[OURS], Row()
    left_out = UNLIMITED if case.isa else ()
    peers = {n: e for n, e in engines.items() if n != OURS and n not in left_out}
    if peers:
        best = min(peers, key=lambda name: peers[name]["median"])
        each = [p / o for p, o in zip(peers[best]["samples"], ours["samples"], strict=True)]
        low, high = median_interval(each)
        summary |= {"best_peer": best, "ratio": peers[best]["median"] / ours["median"]}
        summary |= {"ratio_low": low, "ratio_high": high}
        summary["ratio_p10"] = min(e["p10"] for e in peers.values()) / ours["p10"]
    deciding = [OURS, *([summary["best_peer"]] if peers else [])]
    spreads = {name: engines[name]["p90"] / engines[name]["median"] for name in deciding}
    return summary | {"noisy": complaints(row["noise"], spreads)}


def _memory(work: Work, peers: Sequence[str], backend: str | None) -> Row:
    """Peak megabytes of a training step of each engine, each in a process of its own."""
    case, row = work.case, Row(engines={}, absent={}, status="ok")
    torch.set_num_threads(case.threads)
    settings = dict(case.settings) | {"drop_path_rate": 0.0}
    for name in (OURS, *peers):
        if name not in MEMORY:
            row["absent"][name] = "memory is compared with eager"
            continue
        try:
            peaks, row["method"] = peak_megabytes(
                work.module,
                case.model,
                settings,
                [work.x],
                variant=MEMORY[name],
                backend=backend,
                training=True,
            )
            row["engines"][name] = {"megabytes": peaks[0]}
        except OSError as error:
            row["absent"][name] = short(error)
    measured = {name: engine["megabytes"] for name, engine in row["engines"].items()}
    if OURS not in measured:
        row["status"] = "absent"
    elif "eager" in measured:
        row["memory_share"] = measured[OURS] / measured["eager"]
    return row


# ------------------------------------------------------------------------- in a process of its own


def measure_in_child(
    case: Case,
    *,
    peers: Sequence[str],
    seconds: float,
    backend: str | None = None,
    limit: float = 600.0,
) -> Row:
    """:func:`measure` in a child process; a crash or more than ``limit`` seconds is a row too.

    After Ctrl-C, which the child gets as well, the row has the rounds there were, and
    ``interrupted``.
    """
    request = {"case": asdict(case), "peers": list(peers), "seconds": seconds, "backend": backend}
    row: Row = {"name": case.name, "case": asdict(case), "status": "failed", "interrupted": False}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(asked, request)
        threads = {"OMP_NUM_THREADS": str(case.threads)}
        environment = {**os.environ, **threads, **isa_environment(case.isa)}
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(asked), str(answer)]
        child = subprocess.Popen(command, env=environment)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            row["error"] = f"took more than {limit:.0f} s"
        except KeyboardInterrupt:
            row["interrupted"] = True
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                child.wait(30.0)
        finally:
            child.kill()
            child.wait()
        if answer.is_file():
            row |= json.loads(answer.read_text())
        elif "error" not in row:
            row["error"] = f"its process ended with status {child.returncode}"
    return row


def main(arguments: Sequence[str]) -> None:
    """The child: read the request, measure, write the answer or the error."""
    asked = json.loads(Path(arguments[0]).read_text())
    try:
        row = measure(
            Case.of(asked["case"]),
            peers=asked["peers"],
            seconds=asked["seconds"],
            backend=asked["backend"],
        )
    except Exception as error:  # the row says what went wrong
        traceback.print_exc()
        row = {"status": "failed", "error": short(error)}
    write_json(Path(arguments[1]), row)


if __name__ == "__main__":
    main(sys.argv[1:])
