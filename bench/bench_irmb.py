"""Time the whole-block kernel against eager, torch.compile, ONNX Runtime and OpenVINO.

One block with trained-like statistics, the same weights and input everywhere, results compared
with an fp64 oracle first, engines taking turns in one process. The peers take the layout they like
best; ours takes channels_last. Prints medians and p10 in ms, the ratio to the best peer of the same
run, GFLOP/s and the share of what torch.mm reaches here.

    python bench/bench_irmb.py                      # stages 1 and 2 of EMO-5M, the gates
    python bench/bench_irmb.py --all --json bench/results/irmb.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import OURS, build_engines, largest_difference, matmul_limit, take_turns

import emo_kernels as ek
from emo_kernels import _C

GATES = {1: 1.2, 16: 1.6}  # batch -> times the best peer, stages 1 and 2, 2 threads


class Block(NamedTuple):
    """One convolutional block of EMO-5M."""

    name: str
    c: int
    o: int
    side: int
    ratio: float
    kernel: int
    stride: int
    norm: str
    act: str
    gated: bool = False

    def module(self) -> torch.nn.Module:
        torch.manual_seed(0)
        block = ek.nn.iRMB(
            self.c,
            self.o,
            exp_ratio=self.ratio,
            norm_layer=self.norm,
            act_layer=self.act,
            dw_ks=self.kernel,
            stride=self.stride,
            has_skip=self.stride == 1,
            attn_s=False,
            qkv_bias=True,
        )
        for name, buffer in block.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + (0.5 if name.endswith("var") else -0.5))
        return block.eval()

    def gflop(self, batch: int) -> float:
        m, out = int(self.c * self.ratio), self.side // self.stride
        expand = self.side**2 * self.c * m
        return 2e-9 * batch * (expand + out**2 * m * (self.o + self.kernel**2))


BLOCKS = [
    Block("stage 1", 48, 48, 56, 2, 3, 1, "bn_2d", "silu", gated=True),
    Block("stage 2", 72, 72, 28, 3, 3, 1, "bn_2d", "silu", gated=True),
    Block("stage 1 down", 24, 48, 112, 4, 3, 2, "bn_2d", "silu"),
    Block("stage 2 down", 48, 72, 56, 6, 3, 2, "bn_2d", "silu"),
    Block("stage 3 down", 72, 160, 28, 8, 5, 2, "ln_2d", "gelu"),
    Block("stage 4 down", 160, 288, 14, 8, 5, 2, "ln_2d", "gelu"),
    Block("stage 3, no attention", 160, 160, 14, 4, 5, 1, "ln_2d", "gelu"),
    Block("stage 4, no attention", 288, 288, 7, 4, 5, 1, "ln_2d", "gelu"),
]


def measure(block: Block, batch: int, threads: int, seconds: float, limit: float) -> dict[str, Any]:
    """One row: every engine's times, ours over the best peer, the accuracy of each."""
    module = block.module()
    x = torch.randn(batch, block.c, block.side, block.side)
    with torch.inference_mode():
        want = copy.deepcopy(module).double()(x.double())
    engines = build_engines(module, x, threads)
    errors = largest_difference(engines, want)
    wrong = {name: error for name, error in errors.items() if error > 1e-4}
    if wrong:
        raise SystemExit(f"{block.name}: results differ from the fp64 oracle: {wrong}")
    timings = take_turns(engines, threads, seconds=seconds)
    peers = {name: t.median for name, t in timings.items() if name != OURS}
    best = min(peers, key=lambda name: peers[name])
    ours = timings[OURS]
    rate = block.gflop(batch) / ours.median * 1e3
    return {
        "block": block.name,
        "batch": batch,
        "threads": threads,
        "ms": {name: {"median": t.median, "p10": t.p10} for name, t in timings.items()},
        "error": errors,
        "absent": engines.absent,
        "best_peer": best,
        "ratio": peers[best] / ours.median,
        "ratio_p10": min(t.p10 for n, t in timings.items() if n != OURS) / ours.p10,
        "gate": GATES.get(batch) if block.gated and threads == 2 else None,
        "gflops": rate,
        "of_matmul_limit": rate / limit,
    }


def line(row: dict[str, Any]) -> str:
    """One printed line of the table."""
    times = "  ".join(
        f"{name} {ms['median']:.3f} ({ms['p10']:.3f})" for name, ms in row["ms"].items()
    )
    gate = ""
    if row["gate"]:
        gate = f"  gate {row['gate']}: {'pass' if row['ratio'] >= row['gate'] else 'MISSED'}"
    return (
        f"{row['block']:<22} b{row['batch']:<3} {row['threads']} thr  "
        f"x{row['ratio']:.2f} over {row['best_peer']} (p10 x{row['ratio_p10']:.2f})  "
        f"{row['gflops']:.0f} GFLOP/s, {100 * row['of_matmul_limit']:.0f} % of torch.mm{gate}\n"
        f"    {times}"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every convolutional block")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing for one row")
    parser.add_argument("--max-load", type=float, default=1.0, help="wait for a quieter machine")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    return parser.parse_args()


def wait_for_quiet(max_load: float, patience: float = 120.0) -> float:
    """The load of the machine, after waiting for it to fall below ``max_load``."""
    end = time.monotonic() + patience
    while (load := os.getloadavg()[0]) > max_load and time.monotonic() < end:
        time.sleep(2.0)
    return load


def main() -> int:
    args = arguments()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, torch "
        f"{torch.__version__}, instruction set {_C.selected_isa()}; ms: median (p10)"
    )
    results = []
    for threads in args.threads:
        for batch in args.batch:
            for block in BLOCKS if args.all else [b for b in BLOCKS if b.gated]:
                load = wait_for_quiet(args.max_load)
                limit = matmul_limit(threads)
                row = measure(block, batch, threads, args.seconds, limit)
                row |= {"load": load, "matmul_gflops": limit}
                results.append(row)
                print(line(row), flush=True)
    for name, reason in results[0]["absent"].items():
        print(f"absent: {name}: {reason}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": results}, indent=1))
    missed = [r for r in results if r["gate"] and r["ratio"] < r["gate"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
