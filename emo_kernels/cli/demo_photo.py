"""First half of the demo: a photograph through the plain and the accelerated model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from emo_kernels.cli.images import centre_crop, normalized, open_photo, random_crop
from emo_kernels.measure.memory import peak_megabytes
from emo_kernels.measure.pairs import VARIANTS, Pair, build_pair, compare_pair, variants
from emo_kernels.measure.progress import Progress
from emo_kernels.measure.timing import Timing, take_turns

MODEL = "emo_5m"
_LONGEST_SIDE = 1280  # a photo larger than this is scaled down: eager needs gigabytes beyond
_CALIBRATION_CROPS = 8


def load(photo: Path | None) -> tuple[str, Image.Image]:
    """Name and pixels of the photo; without one, the picture that scikit-learn ships."""
    if photo is not None:
        return photo.name, open_photo(photo)
    samples = load_sample_images()
    index = next(i for i, name in enumerate(samples.filenames) if name.endswith("china.jpg"))
    return "china.jpg", Image.fromarray(samples.images[index])


def own_size(image: Image.Image) -> Image.Image:
    """The whole photo, scaled down where its longer side is beyond the demo's limit."""
    longest = max(image.size)
    if longest <= _LONGEST_SIDE:
        return image
    width, height = (max(1, round(side * _LONGEST_SIDE / longest)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def build(device: torch.device, backend: str | None) -> Pair:
    """EMO-5M and its accelerated twin, batch norms calibrated on crops of scikit-learn's photos."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    crops = [
        normalized(random_crop(photos[i % len(photos)], 224, seed=i))
        for i in range(_CALIBRATION_CROPS)
    ]
    return build_pair(MODEL, {}, torch.stack(crops).to(device), backend=backend)


def compare(
    pair: Pair, image: Image.Image, *, backend: str | None, seconds: float, min_rounds: int
) -> dict[str, Any]:
    """Numbers, times and memory of both models on the centre crop and on the whole photo.

    Args:
        pair: from :func:`build`.
        image: the photo.
        backend: as :func:`accelerate` took it.
        seconds: of timing for each input, but at least ``min_rounds``.
    """
    device = next(pair.plain.parameters()).device
    pictures = (centre_crop(image, 224), own_size(image))
    inputs = [normalized(picture)[None].to(device) for picture in pictures]
    measure = partial(peak_megabytes, pair.plain, MODEL, {}, inputs, backend=backend)
    peaks = {}
    with (
        ThreadPoolExecutor() as pool,  # the children do not disturb each other: nothing is timed
        Progress("measure memory", len(VARIANTS), unit="process") as progress,
    ):
        found = pool.map(lambda variant: measure(variant=variant), VARIANTS)
        for variant, peak in zip(VARIANTS, found, strict=True):
            peaks[variant], method = peak
            progress.advance()
    rows = []
    for i, x in enumerate(inputs):
        row = _measure(pair, x, seconds, min_rounds)
        row["peak_megabytes"] = {variant: values[i] for variant, values in peaks.items()}
        rows.append(row)
    return {"memory_is": method, "inputs": rows}


def _measure(pair: Pair, x: Tensor, seconds: float, min_rounds: int) -> dict[str, Any]:
    height, width = x.shape[-2:]
    agreement = compare_pair(pair, x)
    with torch.inference_mode():
        calls = variants(pair, x)
        for call in calls.values():
            call()  # warm-up: packing, caches
        taken = take_turns(
            calls,
            seconds=seconds,
            device=x.device,
            label=f"time {width} x {height}",
            min_rounds=min_rounds,
        )
    timings = {name: Timing.of(turns.seconds) for name, turns in taken.items()}
    plain = min(t.median for name, t in timings.items() if name != "accelerated")
    return {
        "height": height,
        "width": width,
        "largest_relative_difference": agreement.difference,
        "agreement": agreement._asdict(),
        "milliseconds": {name: timing._asdict() for name, timing in timings.items()},
        "speed_up": plain / timings["accelerated"].median,
    }
