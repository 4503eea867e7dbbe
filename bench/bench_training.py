"""Training steps of whole models on the CPU: eager in both layouts against the kernels.

    python bench/bench_training.py emo_5m emo_1m --batch 8 --rounds 8

Forward and backward in fp32 at 224, engines taking turns in one process. Losses are compared first.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels.explain import format_table


def engines(name: str, batch: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Model and input of every engine, with the same numbers."""
    torch.manual_seed(0)
    model = ek.create_model(name, drop_path_rate=0.0).train()
    x = torch.randn(batch, 3, 224, 224)
    nhwc = x.to(memory_format=torch.channels_last)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return {
        "eager": (model, x),
        "eager channels_last": (last, nhwc),
        "emo_kernels": (ek.accelerate(copy.deepcopy(last)), nhwc),
    }


def step(model: nn.Module, x: Tensor) -> float:
    """The loss of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(x).square().mean()
    loss.backward()
    return float(loss.detach())


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every engine by round, after a round to warm up and compare."""
    runs = engines(name, batch)
    losses = [step(model, x) for model, x in runs.values()]
    if max(losses) - min(losses) > 1e-4 * abs(losses[0]):
        raise SystemExit(f"{name}: losses differ: {losses}")
    times: dict[str, list[float]] = {engine: [] for engine in runs}
    for _ in range(rounds):
        for engine, (model, x) in runs.items():
            start = time.perf_counter()
            step(model, x)
            times[engine].append(1e3 * (time.perf_counter() - start))
    return {"model": name, "batch": batch, "threads": torch.get_num_threads(), "ms": times}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write the figures where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results = [measure(name, options.batch, options.rounds) for name in options.models]
    rows = []
    for result in results:
        medians = {engine: statistics.median(ms) for engine, ms in result["ms"].items()}
        ours = medians.pop("emo_kernels")
        best = min(medians.values())
        figures = [f"{value:.0f}" for value in (ours, *medians.values())]
        rows.append((result["model"], options.batch, *figures, f"{best / ours:.2f}x"))
    headers = ("model", "batch", "emo_kernels", "eager", "channels_last", "over the best")
    print(format_table(headers, rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
