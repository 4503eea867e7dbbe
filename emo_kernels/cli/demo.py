"""The main job: plain PyTorch against emo_kernels on a real photograph, then in training.

First EMO-5M looks at a photo, at 224 x 224 and at the photo's own size; then a small EMO learns
scikit-learn's handwritten digits twice from one seed. Prints how far the numbers differ, the time,
the speed-up, the memory and which backend ran; writes demo.png and demo.json. Exit status 1 if the
numbers disagree.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from emo_kernels.cli import chart, demo_digits, demo_photo
from emo_kernels.cli.images import normalized
from emo_kernels.cli.options import add_json, add_runtime, print_json, use_runtime
from emo_kernels.explain import format_table
from emo_kernels.measure.backend_use import backend_use, describe
from emo_kernels.measure.files import write_json
from emo_kernels.measure.machine import machine, one_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``demo``."""
    parser.add_argument("photo", nargs="?", type=Path, help="default: one that ships in sklearn")
    parser.add_argument("--out", type=Path, default=Path("out"), help="default: out")
    parser.add_argument("--quick", action="store_true", help="few rounds and steps, for a test")
    add_runtime(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Both halves, the files, and the verdict."""
    start = time.perf_counter()
    device = use_runtime(args)
    name, image = demo_photo.load(args.photo)
    say = (lambda text: None) if args.json else print
    say(one_line())

    pair = demo_photo.build(device, args.backend)
    photo = {
        "name": name,
        "width": image.width,
        "height": image.height,
        "model": demo_photo.MODEL,
        "parameters": sum(p.numel() for p in pair.plain.parameters()),
        **demo_photo.compare(
            pair,
            image,
            backend=args.backend,
            seconds=0.5 if args.quick else 8,
            min_rounds=3 if args.quick else 11,
        ),
    }
    x = normalized(demo_photo.own_size(image))[None].to(device)
    photo["backends"] = backend_use(pair.accelerated, x)
    say(_photo_text(photo))

    recipe = demo_digits.recipe(quick=args.quick)
    training, trained = demo_digits.compare(device, backend=args.backend, recipe=recipe)
    training["backends"] = backend_use(trained, demo_digits.example(device))
    say(_training_text(training))

    numbers: dict[str, Any] = {"measured_on": one_line(), "machine": machine(), "photo": photo}
    numbers |= {"training": training, "disagreements": _disagreements(photo, training, args.quick)}
    numbers["seconds"] = time.perf_counter() - start
    chart.save(numbers, args.out / "demo.png")
    write_json(args.out / "demo.json", numbers)
    if args.json:
        print_json(numbers)
    say(_verdict(numbers, args.out))
    return 1 if numbers["disagreements"] else 0


def _photo_text(photo: dict[str, Any]) -> str:
    headers = ("input", "model", "ms", "10-90 %", "speed-up", "peak MB", "largest difference")
    rows = [
        (
            f"{row['width']} x {row['height']}",
            name,
            f"{time['median']:.1f}",
            f"{time['p10']:.1f}-{time['p90']:.1f}",
            f"{row['speed_up']:.2f}x" if name == "accelerated" else "",
            f"{row['peak_megabytes'][name]:.1f}",
            f"{row['largest_relative_difference']:.1e}" if name == "accelerated" else "",
        )
        for row in photo["inputs"]
        for name, time in row["milliseconds"].items()
    ]
    errors = "; ".join(
        f"{r['error']:.1e} against {r['plain_error']:.1e} plain, {r['allowed']:.1e} allowed"
        for r in (row["agreement"] for row in photo["inputs"])
    )
    rounds = min(t["rounds"] for row in photo["inputs"] for t in row["milliseconds"].values())
    return "\n".join(
        (
            f"\n1. EMO-5M ({photo['parameters']:,} parameters, random weights, calibrated batch "
            f"norms, fp32) looks at {photo['name']}, {photo['width']} x {photo['height']}",
            format_table(headers, rows),
            f"Time: median of at least {rounds} rounds in which the models take turns; speed-up "
            "over the faster plain format.",
            "Difference: of the logits, relative to the largest. "
            f"Distance from an fp64 oracle: {errors}.",
            f"Memory: {photo['memory_is']}.",
            describe(photo["backends"], "inference"),
        )
    )


def _training_text(training: dict[str, Any]) -> str:
    headers = ("blocks", "first loss", "last loss", "held-out accuracy", "images/s")
    rows = [
        (
            name,
            f"{losses[0]:.6f}",
            f"{losses[-1]:.6f}",
            f"{training['accuracy'][name]:.2%}",
            f"{training['images_per_second'][name]:.0f}",
        )
        for name, losses in training["losses"].items()
    ]
    return "\n".join(
        (
            f"\n2. A small EMO ({training['parameters']:,} parameters) learns "
            f"{training['data']}, {training['steps']} steps of {training['recipe']['batch']}",
            format_table(headers, rows),
            f"Loss curves: {training['largest_early_gap']:.1e} apart in the first "
            f"{training['exact_steps']} steps ({demo_digits.LOSS_TOLERANCE:.0e} allowed), "
            f"{training['largest_gap']:.1e} at most (relative; rounding grows with the steps).",
            describe(training["backends"], "training"),
        )
    )


def _disagreements(photo: dict[str, Any], training: dict[str, Any], quick: bool) -> list[str]:
    """What does not hold, in words; empty if all is well."""
    found = [
        f"logits at {row['width']} x {row['height']} are {row['agreement']['error']:.1e} from the "
        f"fp64 oracle, {row['agreement']['allowed']:.1e} allowed"
        for row in photo["inputs"]
        if not row["agreement"]["ok"]
    ]
    early = training["largest_early_gap"]
    if not early <= demo_digits.LOSS_TOLERANCE:
        found.append(
            f"loss curves are {early:.1e} apart in the first {training['exact_steps']} steps, "
            f"{demo_digits.LOSS_TOLERANCE:.0e} allowed"
        )
    wanted = demo_digits.ACCURACY_WANTED
    found += [
        f"{name}: held-out accuracy is {accuracy:.2%}, {wanted:.0%} wanted"
        for name, accuracy in training["accuracy"].items()
        if not (quick or accuracy >= wanted)
    ]
    return found


def _verdict(numbers: dict[str, Any], out: Path) -> str:
    problems = "\n".join(f"MISMATCH: {problem}" for problem in numbers["disagreements"])
    return "\n".join(
        (
            f"\n{problems or 'The numbers agree.'}",
            f"Chart: {out / 'demo.png'}   numbers: {out / 'demo.json'}   "
            f"({numbers['seconds']:.0f} s)",
        )
    )
