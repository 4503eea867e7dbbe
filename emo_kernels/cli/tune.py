"""Search launch parameters for this GPU: the Triton kernels of one model, one launch at a time.

Records the launches that a training step and a forward of MODEL make, then halves and doubles the
parameters of each as long as that makes it faster and leaves its results alone. Every finished
launch is written to the file that the kernels read at their first use (EMO_KERNELS_TUNED names it;
`--out` another one), so a killed search goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from emo_kernels.backends import unavailable
from emo_kernels.cli.options import add_json, add_settings, add_size, input_shape, print_json
from emo_kernels.cli.options import settings as model_settings
from emo_kernels.explain import format_table
from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.measure.files import write_json
from emo_kernels.measure.machine import one_line
from emo_kernels.measure.pairs import channels_last
from emo_kernels.measure.progress import Progress
from emo_kernels.models import create_model

if TYPE_CHECKING:
    from emo_kernels.triton.record import Call
    from emo_kernels.triton.tune import Found

Timer = Callable[[Callable[[], object]], float]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``tune``."""
    parser.add_argument("model", nargs="?", default="emo_5m", metavar="MODEL")
    add_settings(parser)
    add_size(parser)
    parser.add_argument("--batch", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--mode", choices=("train", "infer", "both"), default="both")
    parser.add_argument(
        "--kernels", nargs="+", default=["*"], metavar="NAME", help="only these, as in 'expand_*'"
    )
    parser.add_argument("--minutes", type=float, default=0.0, help="stop after (default: never)")
    parser.add_argument("--again", action="store_true", help="search also what the file has")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Record, search, write; prints what changed."""
    shape = input_shape(args.size, args.batch)
    reason = unavailable("triton")
    if reason is None and not torch.cuda.is_available():
        reason = "Triton's interpreter has no times to compare"
    if reason is not None:
        raise ValueError(f"tune needs a GPU: {reason}")
    tune = importlib.import_module("emo_kernels.triton.tune")
    record = importlib.import_module("emo_kernels.triton.record").record
    device = torch.device("cuda")
    with record(importlib.import_module("emo_kernels.triton")) as calls:
        for mode in ("train", "infer") if args.mode == "both" else (args.mode,):
            run_model(args.model, model_settings(args), shape, DTYPES[args.dtype], device, mode)
    results = search_launches(calls, tune.milliseconds, args)
    if args.json:
        print_json(results)
    else:
        print(one_line())
        print(_table(results["launches"]))
        print(f"{results['path']}: {results['entries']} launches; {_left(results)}")
    return 0


def run_model(
    name: str,
    fields: dict[str, Any],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    mode: str,
) -> None:
    """Two training steps, or one forward, of the accelerated model, under autocast to ``dtype``.

    From the second step on blocks know which block follows.
    """
    torch.manual_seed(0)
    model = create_model(name, **{"in_chans": shape[1], **fields}).to(device)
    accelerate_quietly(channels_last(model).train(mode == "train"), "triton")
    x = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    if mode == "infer":
        with torch.inference_mode(), cast:
            model(x)
        return
    labels = torch.zeros(len(x), dtype=torch.long, device=device)
    for _ in range(2):
        with cast:
            logits = model(x).float()
        F.cross_entropy(logits, labels).backward()


def search_launches(calls: list[Call], timer: Timer, args: argparse.Namespace) -> dict[str, Any]:
    """Search every launch of the calls that the file does not have yet; write after each one."""
    tune = importlib.import_module("emo_kernels.triton.tune")
    launch = importlib.import_module("emo_kernels.triton.launch")
    kernels = importlib.import_module("emo_kernels.triton")
    path: Path = args.out or launch.tuned_path()
    table = _read(path)
    launches = importlib.import_module("emo_kernels.triton.record").launches(calls)
    chosen = {key: call for key, call in launches.items() if _matches(key, args.kernels)}
    if not chosen:
        raise ValueError("tune: the model makes no launch that --kernels names")
    left = {k: c for k, c in chosen.items() if args.again or k not in table}
    left = dict(sorted(left.items(), key=lambda item: -item[1].count * item[1].bytes))
    end = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    rows: list[dict[str, Any]] = []
    done = len(chosen) - len(left)
    with _untuned(), Progress("tune", len(chosen), unit="launch", initial=done) as progress:
        for key, call in left.items():
            if time.monotonic() > end:
                break
            trial = tune.Trial(getattr(kernels, call.function), call, key, timer)
            try:
                found = tune.search(trial.start, trial.measure)
            except tune.DeadGpuError:  # the next run goes on behind this launch
                write_json(path, dict(sorted({**table, key: trial.start}.items())))
                raise
            if found.milliseconds is not None:
                table[key] = found.parameters
                write_json(path, dict(sorted(table.items())))
            rows.append(_row(key, trial.start, found))
            progress.advance(rows[-1]["note"])
    launch.forget_tuned()
    return {
        "path": str(path),
        "entries": len(table),
        "launches": rows,
        "done_before": done,
        "left": len(left) - len(rows),
    }


def _read(path: Path) -> dict[str, dict[str, int]]:
    if not path.is_file():
        return {}
    launch = importlib.import_module("emo_kernels.triton.launch")
    return dict(launch.read_table(path))


def _matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(key.split("/")[0], pattern) for pattern in patterns)


@contextlib.contextmanager
def _untuned() -> Iterator[None]:
    """Launch by the rules alone, whatever has been tuned before."""
    launch = importlib.import_module("emo_kernels.triton.launch")
    before = os.environ.get(launch.TUNED_VARIABLE)
    os.environ[launch.TUNED_VARIABLE] = os.devnull
    launch.forget_tuned()
    try:
        yield
    finally:
        if before is None:
            del os.environ[launch.TUNED_VARIABLE]
        else:
            os.environ[launch.TUNED_VARIABLE] = before
        launch.forget_tuned()


def _row(key: str, start: dict[str, int], found: Found) -> dict[str, Any]:
    if found.milliseconds is None or found.rule_milliseconds is None:
        note = "does not run"
    else:
        note = f"{found.rule_milliseconds:.4f} -> {found.milliseconds:.4f} ms"
    changed = {n: v for n, v in found.parameters.items() if start.get(n) != v}
    return {
        "launch": key,
        "milliseconds": found.milliseconds,
        "rule_milliseconds": found.rule_milliseconds,
        "parameters": found.parameters,
        "changed": changed,
        "tried": found.tried,
        "note": note,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    headers = ("launch", "call, ms by the rule", "tuned", "changed", "tried")
    return format_table(
        headers,
        [
            (
                row["launch"],
                *(
                    "does not run" if row[name] is None else f"{row[name]:.4f}"
                    for name in ("rule_milliseconds", "milliseconds")
                ),
                json.dumps(row["changed"]) if row["changed"] else "",
                str(row["tried"]),
            )
            for row in rows
        ],
    )


def _left(results: dict[str, Any]) -> str:
    before = f"{results['done_before']} were there before"
    return before + (f", {results['left']} left: run it again" if results["left"] else "")
