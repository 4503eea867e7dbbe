"""One row in a process of its own: its threads, its instruction set, its crash, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from emo_kernels.measure.case import Case
from emo_kernels.measure.engines import is_out_of_memory, short
from emo_kernels.measure.files import write_json
from emo_kernels.measure.row import Row, measure

_PR_SET_PDEATHSIG = 1  # of prctl.h
# Ctrl-C may come while torch is being imported, too.
_CHILD = f"""
import sys
try:
    from {__name__} import main
    main(sys.argv[1:])
except KeyboardInterrupt:
    sys.exit(130)
"""


def measure_in_child(
    case: Case,
    *,
    peers: Sequence[str],
    seconds: float,
    backend: str | None = None,
    until: float | None = None,
    limit: float = 600.0,
) -> Row:
    """:func:`measure` in a child process; a crash or more than ``limit`` seconds is a row too.

    Such a row is ``failed``, with its ``error``, whether it was ``out_of_memory``, and ``late``
    where it took more than ``limit``. After Ctrl-C,
    which the child gets as well, the row has the rounds there were, and ``interrupted``.
    """
    request = {"case": asdict(case), "peers": list(peers), "seconds": seconds, "backend": backend}
    request["until"] = until
    row: Row = {"name": case.name, "case": asdict(case), "status": "failed", "interrupted": False}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(asked, request)
        threads = {"OMP_NUM_THREADS": str(case.threads)}
        environment = {**os.environ, **threads, **_isa_environment(case.isa)}
        command = [sys.executable, "-W", "ignore", "-c", _CHILD, str(asked), str(answer)]
        child = subprocess.Popen(command, env=environment)
        try:
            child.wait(limit)
        except subprocess.TimeoutExpired:
            row |= {"late": True, "error": f"took more than {limit:.0f} s"}
        except KeyboardInterrupt:
            row |= {"interrupted": True, "error": "interrupted before anything was timed"}
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                child.wait(30.0)
        finally:
            child.kill()
            status = child.wait()
        if answer.is_file():
            for gone in ("error", "late"):
                row.pop(gone, None)
            row |= json.loads(answer.read_text())
        elif "error" not in row:
            row |= _death(status)
    return row


def _isa_environment(isa: str) -> dict[str, str]:
    """Environment variables that keep engines to an instruction set, read when a process starts.

    ``EMO_KERNELS_ISA`` is ours; torch's own kernels and the compiler behind ``torch.compile`` read
    ``ATEN_CPU_CAPABILITY``; oneDNN, inside torch and OpenVINO, ``ONEDNN_MAX_CPU_ISA``; MKL
    ``MKL_ENABLE_INSTRUCTIONS``. ONNX Runtime has no such switch.
    """
    if not isa:
        return {}
    return {
        "EMO_KERNELS_ISA": isa,
        "ATEN_CPU_CAPABILITY": isa,
        "ONEDNN_MAX_CPU_ISA": isa.upper(),
        "MKL_ENABLE_INSTRUCTIONS": isa.upper(),
    }


def _death(status: int) -> Row:
    """What a child that left no answer died of; Linux kills who takes more memory than there is."""
    if status == -signal.SIGKILL:
        return {"error": "killed by the system, out of memory most likely", "out_of_memory": True}
    if status < 0:
        return {"error": f"its process died of {signal.Signals(-status).name}"}
    return {"error": f"its process ended with status {status}"}


def _die_with_parent() -> None:
    """A run that is killed leaves nothing behind that would disturb the next; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(arguments: Sequence[str]) -> None:
    """The child: measure what the one file asks for, write the row or the error to the other."""
    _die_with_parent()
    asked = json.loads(Path(arguments[0]).read_text())
    try:
        row = measure(
            Case.of(asked["case"]),
            peers=asked["peers"],
            seconds=asked["seconds"],
            backend=asked["backend"],
            until=asked["until"],
        )
    except Exception as error:  # the row says what went wrong
        row = {"status": "failed", "error": short(error), "out_of_memory": is_out_of_memory(error)}
        if not isinstance(error, ValueError | NotImplementedError) and not row["out_of_memory"]:
            traceback.print_exc()
    write_json(Path(arguments[1]), row)
