"""Everything this project wants to know of a GPU, in one command of under ten minutes.

    python3 bench/gpu_campaign.py --out $OUT          # on a machine with a GPU
    python3 bench/gpu_campaign.py --dry-run           # here: the same code, tiny sizes, no GPU
    python3 bench/gpu_campaign.py --list

Parts run in order of value, each in a process of its own with a limit of its own, until
``--minutes`` are used up; what did not fit is named in the report. Results are saved after every
part in ``results.json`` and ``results.md`` under ``--out`` (default: bench/results/<gpu>, of a dry
run build/campaign-dry-run). A second run skips the parts that are done for the same sources (a
baseline: the same PyTorch and models) and goes on with the rest. It finds earlier results in
``--out``, else in the default directory: where the machine is another one each time, copy them
there in between.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from campaign_parts import (  # noqa: E402  (found by the path set above)
    PARTS,
    ROOT,
    SOURCES,
    Context,
    Part,
    State,
    run_part,
)
from campaign_report import markdown, short_report  # noqa: E402  (as above)

MARGIN = 12.0  # seconds kept for writing and for starting a process
DRY_LIMIT = 300.0


def fingerprint(sources: tuple[str, ...]) -> str:
    """A hash of the sources of these places, and of the versions they run on."""
    digest = hashlib.sha256()
    for package in ("torch", "triton"):
        try:
            digest.update(f"{package} {importlib.metadata.version(package)};".encode())
        except importlib.metadata.PackageNotFoundError:
            digest.update(f"no {package};".encode())
    for place in sources:
        path = ROOT / place
        found = [f for f in sorted(path.rglob("*.*")) if f.suffix in (".py", ".h", ".cu", ".cuh")]
        for file in found if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit checked out, and whether files differ from it; "unknown" without git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + (" and changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def gpu_name() -> str:
    """The GPU as the name of a directory."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_campaign: torch sees no GPU here; --dry-run needs none")
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


# --------------------------------------------------------------------------------------- the parent


class Campaign:
    """The results so far, and the directory they are kept in."""

    def __init__(self, out: Path, earlier: Path, *, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.started = time.monotonic()
        self.prints = {name: fingerprint(places) for name, places in SOURCES.items()}
        found = next((p for p in (out, earlier) if (p / "results.json").is_file()), None)
        self.state: State = {"parts": {}}
        if found is not None:
            self.state = json.loads((found / "results.json").read_text())
        self.state |= {"commit": commit(), "dry_run": dry}
        self.notes: list[str] = []

    def is_done(self, part: Part) -> bool:
        """Whether the part's result is there, of the same sources."""
        row = self.state["parts"].get(part.name, {})
        return row.get("status") == "done" and row.get("fingerprint") == self.prints[part.sources]

    def order(self, parts: list[Part]) -> list[Part]:
        """What is to be done: parts never tried, then those that once did not end well."""
        tried = {
            name
            for name, row in self.state["parts"].items()
            if row.get("fingerprint") in self.prints.values() and row.get("status") != "skipped"
        }
        return sorted((p for p in parts if not self.is_done(p)), key=lambda p: p.name in tried)

    def run(self, part: Part, seconds: float) -> None:
        """One part in its process; its result, or what it had when it was stopped."""
        saved = self.out / "part.json"
        saved.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "gpu_campaign.py"), "--out", str(self.out)]
        command += ["--part", part.name, "--limit", f"{seconds:.0f}"]
        command += ["--dry-run"] if self.dry else []
        started = time.monotonic()
        with open(self.out / "log.txt", "a") as log:
            log.write(f"\n===== {part.name}\n")
            log.flush()
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = child.wait(seconds)
                status = "done" if code == 0 else f"failed: exit status {code}, see log.txt"
            except subprocess.TimeoutExpired:
                status = f"stopped after {seconds:.0f} s"
            finally:
                _end(child)
        data = json.loads(saved.read_text()) if saved.is_file() else {}
        saved.unlink(missing_ok=True)
        self.state["parts"][part.name] = {
            "status": status,
            "seconds": round(time.monotonic() - started, 1),
            "fingerprint": self.prints[part.sources],
            "commit": self.state["commit"],
            "data": data,
        }
        self.save()

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        self.state["notes"] = self.notes
        names = [part.name for part in PARTS]
        _write(self.out / "results.json", json.dumps(self.state, indent=1))
        _write(self.out / "results.md", markdown(self.state, names, self.prints))


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process and what it started; it leads a session of its own."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def campaign(args: argparse.Namespace) -> int:
    """Run what is left and fits; the exit status is 1 if a part failed or numbers are wrong."""
    if args.dry_run:
        default = ROOT / "build" / "campaign-dry-run"
    else:
        default = ROOT / "bench" / "results" / gpu_name()
    out: Path = args.out or default
    out.mkdir(parents=True, exist_ok=True)
    run = Campaign(out, default, dry=args.dry_run)
    if args.again:
        run.state["parts"] = {}
    chosen = [p for p in PARTS if not args.parts or any(p.name.startswith(w) for w in args.parts)]
    for part in chosen:
        if run.is_done(part):
            print(f"{part.name}: done before", flush=True)
    for part in run.order(chosen):
        left = 60 * args.minutes - (time.monotonic() - run.started) - MARGIN
        least, limit = (1.0, DRY_LIMIT) if args.dry_run else (part.least, part.limit)
        if left < least:
            run.notes.append(
                f"{part.name}: skipped, {max(left, 0):.0f} s of {args.minutes} min left"
            )
            print(run.notes[-1], flush=True)
            run.save()
            continue
        run.run(part, min(limit, left))
        row = run.state["parts"][part.name]
        print(f"{part.name}: {row['status']}, {row['seconds']} s", flush=True)
    run.save()
    print(short_report(run.state, [part.name for part in PARTS], run.prints))
    failed = [p for p in chosen if "failed" in run.state["parts"].get(p.name, {}).get("status", "")]
    return 1 if failed else 0


# ---------------------------------------------------------------------------------------- the child


def child(args: argparse.Namespace) -> None:
    """One part, or a share of what has to be compiled before one, in this process."""
    if args.dry_run:
        from campaign_dry import interpret_triton, no_gpu_needed

        interpret_triton()
        with no_gpu_needed():
            _child(args)
    else:
        _child(args)


def _child(args: argparse.Namespace) -> None:
    from campaign_variants import Place

    place = Place("cpu", dry=True) if args.dry_run else Place("cuda")
    if args.warm:
        from campaign_warm import warm_share

        share, of = args.share
        warm_share(args.warm, share, of, place)
        return
    results = args.out / "results.json"
    state = json.loads(results.read_text()) if results.is_file() else {}

    def save(data: dict[str, Any]) -> None:
        _write(args.out / "part.json", json.dumps(data))

    stamp = fingerprint(SOURCES["kernels"])
    save(run_part(args.part, Context(state, save, place, args.out, stamp, args.limit)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="directory of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, tiny sizes")
    parser.add_argument("--parts", nargs="+", help="only those that begin with one of these")
    parser.add_argument("--again", action="store_true", help="forget earlier results")
    parser.add_argument("--list", action="store_true", help="print the parts and their limits")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{p.name}: up to {p.limit:.0f} s" for p in PARTS))
        return 0
    if args.part or args.warm:
        child(args)
        return 0
    return campaign(args)


if __name__ == "__main__":
    sys.exit(main())
