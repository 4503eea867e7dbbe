"""Time whole models in inference against eager, torch.compile, ONNX Runtime and OpenVINO.

Same weights and input everywhere, every engine's logits compared with plain eager's first, engines
taking turns in one process (see peers.py). Prints medians and p10 in ms.

    python bench/bench_models.py                          # EMO-5M, batch 1 and 16
    python bench/bench_models.py emo_1m emo_2m --batch 1 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from peers import OURS, build_engines, take_turns

import emo_kernels as ek

AGREES = 1e-4  # largest difference of fp32 logits, relative to the largest logit


def model_with_statistics(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = ek.create_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def measure(name: str, batch: int, size: int, threads: int, seconds: float) -> dict[str, Any]:
    model, x = model_with_statistics(name), torch.randn(batch, 3, size, size)
    with torch.no_grad():
        expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engines = build_engines(model, x, threads)
    errors = {}
    for engine, run in engines.run.items():
        error = (torch.as_tensor(run()) - expected).abs().max() / expected.abs().max()
        errors[engine] = error.item()
        if not errors[engine] < AGREES:
            raise SystemExit(f"{name}: {engine} differs from eager by {errors[engine]:.1e}")
    timings = take_turns(engines, threads, seconds=seconds)
    times = {
        engine: {
            "median": statistics.median(timing.samples),
            "p10": statistics.quantiles(timing.samples, n=10)[0],
        }
        for engine, timing in timings.items()
    }
    peer = min((e for e in times if e != OURS), key=lambda e: times[e]["median"])
    return {
        "model": name,
        "batch": batch,
        "size": size,
        "threads": threads,
        "ms": times,
        "error": errors,
        "absent": engines.absent,
        "best_peer": peer,
        "ratio": times[peer]["median"] / times[OURS]["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["emo_5m"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing for each row")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for batch in args.batch:
            row = measure(name, batch, args.size, args.threads, args.seconds)
            rows.append(row)
            print(f"{name} b{batch} {args.threads} thr x{row['ratio']:.2f} over {row['best_peer']}")
            each = (f"{e} {t['median']:.1f} ({t['p10']:.1f})" for e, t in row["ms"].items())
            print("    " + "  ".join(each), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
