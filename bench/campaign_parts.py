"""The parts of the campaign in order of value, and what each of them runs.

A part runs in a process of its own with a limit of its own, so that a slow compilation or a crash
costs that part alone. It saves what it knows after each step; what was saved counts even when the
part is stopped at its limit.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# What makes an earlier result stale when it changes.
_BASELINE = ("emo_kernels/nn", "emo_kernels/models", "bench/campaign_variants.py")
SOURCES = {
    "baseline": _BASELINE,
    "kernels": ("emo_kernels", "bench/campaign_variants.py", "bench/campaign_kernels.py"),
    "tests": ("emo_kernels", "tests"),
    "cuda": (
        "csrc/cuda",
        "emo_kernels/cuda",
        "bench/campaign_cuda.py",
        "bench/campaign_cuda_depthwise.py",
        "bench/campaign_cuda_expand.py",
        "bench/campaign_cuda_blocks.py",
    ),
}
Save = Callable[[dict[str, Any]], None]
State = dict[str, Any]

# Real layers of every kind, and odd ones; small enough for a minute on one GPU.
TESTS = (
    "tests/test_window_attention.py",
    "tests/test_expand.py",
    "tests/test_depthwise_conv2d.py",
    "tests/test_shrink.py",
    "tests/test_irmb.py",
)
SELECTION = "triton and (test_forward or test_backward) and (5m_stage or 1m_stage or odd) and {}"


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: as in the results; its first word is the kind.
        limit: seconds after which it is stopped.
        least: seconds below which it is not worth starting.
        sources: a key of SOURCES.
    """

    name: str
    limit: float
    least: float
    sources: str = "kernels"


def _compile(model: str, mode: str, limit: float) -> list[Part]:
    modes = ("default", "max-autotune", "reduce-overhead")
    return [Part(f"compile {model} {mode} {m}", limit, 45) for m in modes]


PARTS = [
    Part("environment", 40, 10, sources="baseline"),
    Part("eager emo_5m train", 75, 30, sources="baseline"),
    Part("ours emo_5m train", 150, 40),
    Part("check emo_5m train bf16 autocast", 90, 20),
    Part("kernels emo_5m train", 75, 25),
    Part("cuda kernels", 180, 40, sources="cuda"),
    *_compile("emo_5m", "train", 150),
    Part("infer emo_5m", 100, 30),
    Part("profile emo_5m train", 45, 20),
    Part("eager emo_1m train", 60, 25, sources="baseline"),
    Part("ours emo_1m train", 120, 40),
    Part("tests bf16", 120, 40, sources="tests"),
    Part("check emo_5m train fp32", 120, 40),
    *_compile("emo_5m", "infer", 120),
    Part("ours-compiled emo_5m train", 120, 45),
    Part("infer emo_1m", 100, 30),
    Part("check emo_5m train fp16 autocast", 120, 40),
    Part("tests fp32", 120, 40, sources="tests"),
    *_compile("emo_1m", "train", 120),
    Part("check emo_1m train bf16 autocast", 75, 20),
    Part("tests fp16", 120, 40, sources="tests"),
    *_compile("emo_1m", "infer", 100),
    Part("kernels emo_1m train", 60, 25),
    Part("kernels emo_5m infer", 60, 25),
    Part("cuda sanitizer", 240, 60, sources="cuda"),
]


@dataclass(frozen=True)
class Context:
    """What a part is given: earlier results, where to save, and its limits."""

    state: State
    save: Save
    place: Any
    out: Path
    stamp: str
    limit: float

    def warm(self, model: str, mode: str, *precisions: str) -> None:
        """Compile the kernels of a job before they are timed, as far as the time goes."""
        from campaign_variants import Job
        from campaign_warm import warm

        end = time.monotonic() + self.limit / 2
        for batch in (256, 1) if mode == "infer" else (256,):
            for precision in precisions:
                job, left = Job(model, mode, batch), end - time.monotonic()
                seconds = warm(job, precision, self.place, self.out, self.stamp, left)
                print(f"warm {job} {precision}: {seconds:.1f} s", flush=True)


def run_part(name: str, context: Context) -> dict[str, Any]:
    """Do one part in this process."""
    kind, *words = name.split()
    if kind == "tests":
        return _tests(words[0], context)
    if kind == "environment":
        return _environment(context.place)
    if kind == "cuda":
        import campaign_cuda

        if words == ["sanitizer"]:
            return campaign_cuda.sanitize(context.place, ROOT, context.limit)
        commit = str(context.state.get("commit", "unknown"))
        return campaign_cuda.prove(context.place, context.out, commit, context.save)
    if kind in ("check", "kernels", "profile"):
        return _kernel_part(kind, words, context)
    if kind == "infer" or words[1:2] == ["infer"]:
        return _inference_part(words, context)
    return _training_part(kind, words, context)


def _kernel_part(kind: str, words: list[str], context: Context) -> State:
    import campaign_kernels
    from campaign_variants import Job

    job = Job(words[0], words[1], 256)
    precision = " ".join(words[2:]) or "bf16 autocast"
    context.warm(job.model, job.mode, precision)
    if kind == "check":
        return campaign_kernels.check(job, precision, context.place, context.save)
    if kind == "profile":
        names = ["ours", best_eager(context.state, job.model, "train")]
        return campaign_kernels.profile(job, names, context.place, context.save)
    gpu = measured_gpu(context.state)
    return campaign_kernels.time_kernels(job, context.place, gpu, context.save)


def _inference_part(words: list[str], context: Context) -> State:
    """Both batch sizes; with a mode of torch.compile, or all that is not compiled."""
    from campaign_variants import Job, eager_names, measure

    from emo_kernels.cuda.proof import PROOF_VARIABLE

    # Where this campaign has proven the CUDA kernels, they are chosen.
    proof_file = context.out / "cuda_proven.json"
    if proof_file.is_file():
        os.environ.setdefault(PROOF_VARIABLE, str(proof_file))
    ours = ["ours", "ours graph", "ours bf16", "ours bf16 graph"]
    ours += ["ours bf16 cuda_graphs", "ours bf16 triton graph"]
    if len(words) > 1:
        names = ["eager bf16 channels_last", "eager bf16 graph", *ours[2:], f"compile {words[2]}"]
    else:
        names = [*eager_names("infer"), *ours]
    context.warm(words[0], "infer", *(["bf16"] if len(words) > 1 else ["bf16 autocast", "bf16"]))
    found: dict[str, Any] = {}
    for batch in (256, 1):
        job = Job(words[0], "infer", batch)

        def save(data: dict[str, Any], batch: int = batch) -> None:
            context.save({"batches": {**found, str(batch): data}})

        found[str(batch)] = measure(job, names, context.place, save, seconds=5)
    return {"batches": found}


def _training_part(kind: str, words: list[str], context: Context) -> State:
    from campaign_variants import Job, eager_names, measure

    model = words[0]
    best = best_eager(context.state, model, "train")
    names = {
        "eager": eager_names("train"),
        "ours": [best, "ours", "ours graph"],
        "compile": [best, "ours", f"compile {words[-1]}"],
        "ours-compiled": [best, "ours", "ours compile"],
    }[kind]
    if kind != "eager":
        context.warm(model, "train", "bf16 autocast")
    return measure(Job(model, "train", 256), names, context.place, context.save, seconds=8)


def best_eager(state: State, model: str, mode: str) -> str:
    """The fastest eager variant that has been measured; channels_last if none has been."""
    part = state.get("parts", {}).get(f"eager {model} {mode}", {})
    rows = part.get("data", {}).get("variants", {})
    timed = {name: row["ms"] for name, row in rows.items() if "ms" in row}
    return min(timed, key=lambda name: timed[name], default="eager channels_last")


def measured_gpu(state: State) -> Any:
    """The rates that this GPU was measured to have; else those of an H200."""
    from gpus import GPUS, Gpu

    data = state.get("parts", {}).get("environment", {}).get("data", {})
    if "copy_bandwidth" not in data:
        return GPUS["H200"]
    name = next((n for n in GPUS if n in str(data.get("gpu", ""))), "H200")
    return Gpu(data["copy_bandwidth"], data["matmul_rate"], GPUS[name].fp32)


def _environment(place: Any) -> dict[str, Any]:
    import campaign_kernels
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "depthwise_kernel": getattr(torch.backends.cudnn, "depthwise_kernel", "not in this torch"),
        "gpu": "none: a dry run" if place.dry else torch.cuda.get_device_name(),
        "copy_bandwidth": campaign_kernels.copy_bandwidth(place),
        "matmul_rate": campaign_kernels.matmul_rate(place),
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = str(error)
    if not place.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "multiprocessors": properties.multi_processor_count,
            "memory_gigabytes": properties.total_memory / 1e9,
        }
    return found


def _tests(dtype: str, context: Context) -> dict[str, Any]:
    """The project's own tests of the operators on Triton, those of one dtype."""
    selection = SELECTION.format(dtype)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", selection]
    if context.place.dry:
        command += ["--collect-only", "-q"]
    else:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            [*command, *TESTS],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = child.wait(max(context.limit - 8, 1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            status = None
        output.seek(0)
        text = output.read()
    data = {"selection": selection, "finished": status is not None, "status": status}
    return data | count_results(text)


def count_results(text: str) -> dict[str, Any]:
    """Passed and failed tests in pytest's verbose output; its last lines if there are none."""
    results = re.findall(r"\b(PASSED|FAILED|ERROR)\b\s+(tests/\S+)", text)
    results += [(r, n) for n, r in re.findall(r"(tests/\S+) (PASSED|FAILED|ERROR)", text)]
    outcome = dict((name, result) for result, name in results)
    failed = sorted(name for name, result in outcome.items() if result != "PASSED")
    errors = re.findall(r"^E   (.*)$", text, flags=re.MULTILINE)
    counted = {"passed": len(outcome) - len(failed), "failed": failed[:100], "errors": errors[:60]}
    return counted if outcome else counted | {"output": text[-2000:]}
