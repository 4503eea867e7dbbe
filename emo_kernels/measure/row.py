"""Measure one case: build the engines, hold each against the oracle, let them take turns."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch

from emo_kernels.measure.budget import is_late, seconds_within
from emo_kernels.measure.case import Case, Work
from emo_kernels.measure.engines import (
    OURS,
    UNLIMITED,
    Engine,
    Engines,
    build_engines,
    short,
)
from emo_kernels.measure.limits import better, machine_limits
from emo_kernels.measure.memory import added_megabytes, kept_megabytes, saved_megabytes
from emo_kernels.measure.noise import Noise, complaints
from emo_kernels.measure.oracle import in_words, judge
from emo_kernels.measure.pinning import pinned
from emo_kernels.measure.probe import Probe
from emo_kernels.measure.progress import Progress
from emo_kernels.measure.ratio import CALM, calm_seconds, contenders, ratios, usual
from emo_kernels.measure.timing import Timing, Turns, take_turns

Row = dict[str, Any]
_LIMITS_AGAIN = 5.0  # seconds of timing: limits are measured after a row that long, too
MEMORY_PEERS = ("eager", "eager channels_last")


def measure(
    case: Case,
    *,
    peers: Sequence[str],
    seconds: float = 10.0,
    backend: str | None = None,
    until: float | None = None,
) -> Row:
    """One row: what :class:`Case` asks for, of ours and of ``peers``.

    ``status`` is ``ok``, ``mismatch`` (ours disagrees with the oracle: nothing is timed then),
    ``absent`` (ours does not run it, for the reason in ``absent``) or ``warm`` (without
    ``seconds`` nothing is timed, but compilers have filled their caches). ``ratio`` is the best
    peer's time over ours, ``ratio_low`` to ``ratio_high`` hold it with 95 %, over rounds.

    ``until`` is the moment (of ``time.monotonic``) by which the row should be done: then it has
    fewer rounds, no peer that takes minutes to build, and the memory of fewer engines.
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
        row |= _times(work, peers, seconds, backend, until)
    return row | {"wall_seconds": round(time.perf_counter() - started, 1)}


def _times(
    work: Work, peers: Sequence[str], seconds: float, backend: str | None, until: float | None
) -> Row:
    case = work.case
    with Progress(f"{case.name}: building", 2 + len(peers), unit="engine") as progress:
        engines = build_engines(
            work, peers, backend=backend, on_build=progress.advance, in_a_hurry=until is not None
        )
        progress.advance("the fp64 oracle")
        verdicts = judge(work, engines)
    for name in [n for n in engines.run if n != OURS and not verdicts[n]["match"]]:
        engines.drop(name, f"disagrees with the fp64 oracle: {in_words(verdicts[name])}")
    row: Row = {"absent": engines.absent, "status": "ok"}
    if OURS not in engines.run:
        row["status"] = "absent"
    elif not verdicts[OURS]["match"]:
        return row | {"status": "mismatch", "engines": {OURS: verdicts[OURS]}}
    if seconds <= 0:
        return row | {"status": "warm"}
    row |= _timed(engines, case, seconds_within(seconds, until))
    for name, entry in row["engines"].items():
        entry |= verdicts[name]
        if not is_late(until):
            entry |= _memory_of(engines.run[name], work)
    return row | _summary(row, case)


def _timed(engines: Engines, case: Case, seconds: float) -> Row:
    """The engines' times, the machine's limits, what others used of it."""

    def drop(name: str, error: Exception) -> None:
        if name == OURS:
            raise error
        engines.drop(name, short(error))

    device = torch.device(case.device)
    with pinned(case.threads):
        limits = machine_limits(device)
        noise = Noise()
        taken = take_turns(
            {name: engine.call for name, engine in engines.run.items()},
            seconds=seconds,
            device=device,
            label=case.name,
            probe=Probe(device),
            goes_on=lambda taken: contenders(taken, OURS, _rivals(taken, case)),
            on_failure=drop,
        )
        row: Row = {"noise": noise.report()}
        if seconds >= _LIMITS_AGAIN:
            limits = better(limits, machine_limits(device))
    limit = CALM * usual(taken)
    entries = {
        name: Timing.of(calm_seconds(turns, limit))._asdict()
        | {"samples": [round(1e3 * t, 4) for t in turns.seconds]}
        | {"probes": [round(1e3 * t, 4) for t in turns.probes], "note": engines.run[name].note}
        for name, turns in taken.items()
    }
    return row | {"limits": limits, "engines": entries, "probe": round(1e3 * usual(taken), 4)}


def _rivals(engines: Collection[str], case: Case) -> list[str]:
    """Whom ours is compared with: not what an instruction set cannot be taken from."""
    left_out = (OURS, *(UNLIMITED if case.isa else ()))
    return [name for name in engines if name not in left_out]


def _memory_of(engine: Engine, work: Work) -> Row:
    """Peak megabytes of a call, and in training those that autograd keeps for backward.

    One that is no torch module keeps what it takes: that is told, less the bytes of the weights,
    as ``kept``. A CUDA graph keeps an arena of its own, which a call does not show.
    """
    if engine.again is not None:
        kept = kept_megabytes(engine.again)
        weights = work.parameters * work.x.element_size() / 2**20
        return {} if kept is None else {"megabytes": max(kept - weights, 0.0), "kept": True}
    if engine.module is None or not engine.peaks:
        return {}
    found: Row = {"megabytes": added_megabytes(engine.call, engine.module, work.x.device)}
    if work.case.trains and engine.saves:
        found["saved_megabytes"] = saved_megabytes(engine.call, engine.module)
    return found


def _summary(row: Row, case: Case) -> Row:
    """Ours against the best peer, and whether to believe it."""
    engines: dict[str, Row] = row["engines"]
    if OURS not in engines:
        return {}
    turns = {name: Turns(entry["samples"], entry["probes"]) for name, entry in engines.items()}
    found, summary = ratios(turns, OURS, _rivals(engines, case)), Row()
    name, best = next(iter(found.items()), (None, None))
    if best is not None:
        low, high = best.interval
        summary |= {"best_peer": name, "ratio": best.median, "ratio_low": low, "ratio_high": high}
        summary |= {"rounds": best.rounds, "calm_rounds": best.calm}
    deciding = [OURS] if name is None else [OURS, name]
    spreads = {one: engines[one]["p90"] / engines[one]["median"] for one in deciding}
    return summary | {"noisy": complaints(row["noise"], spreads, best, turns[OURS].probes)}


def _memory(work: Work, peers: Sequence[str], backend: str | None) -> Row:
    """Memory of a training step, nothing timed: ours against eager."""
    compared = [name for name in peers if name in MEMORY_PEERS]
    engines = build_engines(work, compared, backend=backend)
    absent = {n: "memory is compared with eager" for n in peers if n not in compared}
    row: Row = {"absent": absent | engines.absent, "status": "ok"}
    row["engines"] = {name: _memory_of(engine, work) for name, engine in engines.run.items()}
    peaks = {name: engine["megabytes"] for name, engine in row["engines"].items()}
    if peaks.get(OURS) is None:
        return row | {"status": "absent"}
    return row | ({"memory_share": peaks[OURS] / peaks["eager"]} if "eager" in peaks else {})
