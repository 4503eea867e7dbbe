"""Second half of the demo: a small EMO learns digits, once plain and once accelerated."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels.cli.digits import Digits
from emo_kernels.cli.training import Recipe, Trainer
from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.measure.progress import Progress
from emo_kernels.measure.timing import seconds_of
from emo_kernels.models import create_model

# Both kinds of block in every combination with stride, at a size that two slow cores train in a
# minute.
SMALL_EMO: dict[str, Any] = {
    "depths": (2, 2, 2, 2),
    "dims": (16, 24, 40, 42),
    "dim_heads": (8, 8, 20, 21),
    "stem_dim": 16,
    "drop_path_rate": 0.0,
}
EXACT_STEPS = 5  # rounding noise of two honest fp32 runs stays below the tolerance this long
LOSS_TOLERANCE = 1e-6
ACCURACY_WANTED = 0.97
SIDE = 32


def recipe(*, quick: bool) -> Recipe:
    """SGD, whose steps are proportional to the gradients, at full rate from the first step on:
    AdamW's are not, and a warm-up would hide a wrong gradient from the early steps.
    """
    epochs, batch = (1, 128) if quick else (5, 32)
    return Recipe(
        epochs=epochs, batch=batch, lr=0.05, warmup_epochs=0, weight_decay=5e-4, optimizer="sgd"
    )


def example(device: torch.device) -> Tensor:
    """An input of the small model, one batch."""
    return torch.zeros(32, Digits.channels, SIDE, SIDE, device=device)


def compare(
    device: torch.device, *, backend: str | None, recipe: Recipe
) -> tuple[dict[str, Any], nn.Module]:
    """Train both from the same weights on the same batches, taking turns step by step.

    Returns:
        The numbers, and the accelerated model.
    """
    data = Digits(SIDE)
    torch.manual_seed(recipe.seed)
    plain = create_model(
        "emo_1m", num_classes=len(data.classes), in_chans=data.channels, **SMALL_EMO
    ).to(device)
    accelerated = accelerate_quietly(copy.deepcopy(plain), backend)
    trainers = {
        "plain": Trainer(plain, data, recipe, device),
        "accelerated": Trainer(accelerated, data, recipe, device),
    }
    seconds = _take_turns(trainers, device)
    losses = {name: trainer.losses for name, trainer in trainers.items()}
    gaps = [abs(a - b) / abs(a) for a, b in zip(*losses.values(), strict=True)]
    batch = recipe.batch
    numbers = {
        "data": f"{data.train_size} handwritten digits at {SIDE}x{SIDE}, "
        f"{data.held_out_size} held out",
        "parameters": sum(p.numel() for p in plain.parameters()),
        "recipe": vars(recipe),
        "steps": len(gaps),
        "accuracy": {name: trainer.accuracy() for name, trainer in trainers.items()},
        "images_per_second": {
            name: batch / statistics.median(taken) for name, taken in seconds.items()
        },
        "exact_steps": EXACT_STEPS,
        "largest_early_gap": max(gaps[:EXACT_STEPS]),
        "largest_gap": max(gaps),
        "losses": losses,
    }
    return numbers, accelerated


def _take_turns(trainers: dict[str, Trainer], device: torch.device) -> dict[str, list[float]]:
    """Step the trainers in turn to the end; seconds of every step."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    total = next(iter(trainers.values())).total_steps
    with Progress("train plain and accelerated", total) as progress:
        for _ in range(total):
            for name, trainer in trainers.items():
                seconds[name].append(seconds_of(trainer.step, device))
            progress.advance(f"loss {trainer.losses[-1]:.4f}")
    return seconds
