"""Train a model with the published recipe on scikit-learn's digits or a folder of images.

AdamW, weight decay on matrices only, linear warm-up and cosine, label smoothing 0.1, gradients
clipped to norm 5. Writes OUT/last.pt after every epoch (atomically; --resume continues from it, bit
for bit), OUT/log.json and, at the end, OUT/model.pth in the official layout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from emo_kernels.cli.digits import Digits
from emo_kernels.cli.images import ImageFolder
from emo_kernels.cli.options import (
    add_json,
    add_runtime,
    add_settings,
    print_json,
    settings,
    use_runtime,
)
from emo_kernels.cli.training import Dataset, Recipe, Trainer, read_training_state
from emo_kernels.explain import format_table
from emo_kernels.measure.backend_use import accelerate_quietly
from emo_kernels.measure.files import write_json
from emo_kernels.measure.progress import Progress
from emo_kernels.models import create_model, save_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``train``."""
    parser.add_argument("data", metavar="DATA", help="digits, or a folder of class folders")
    parser.add_argument("--model", default="emo_1m", help="default: emo_1m")
    add_settings(parser)
    parser.add_argument("--side", type=int, help="pixels (default: 32 for digits, 224 for images)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, help="peak rate (default: 1.5e-3 * batch / 512)")
    parser.add_argument("--warmup-epochs", type=float, help="default: a fifteenth of the epochs")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"), default="adamw")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights: 0.9998")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="train without emo_kernels.accelerate")
    parser.add_argument("--out", type=Path, default=Path("out/train"), help="default: out/train")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    add_runtime(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train, or continue to."""
    device = use_runtime(args)
    recipe = _recipe(args)
    last = args.out / "last.pt"
    if last.exists() and not args.resume:
        raise ValueError(f"train: {last} exists; --resume continues it, or choose another --out")
    state = read_training_state(last) if args.resume else None
    data = _data(args)
    fields = settings(args)
    identity = {"name": args.model, "settings": repr(fields), "plain": args.plain}
    torch.manual_seed(recipe.seed)
    model = create_model(
        args.model, num_classes=len(data.classes), in_chans=data.channels, **fields
    ).to(device)
    if not args.plain:
        accelerate_quietly(model, args.backend)
    trainer = Trainer(model, data, recipe, device)
    history: list[dict[str, Any]] = []
    if state is not None:
        _check_identity(state, identity)
        trainer.load(state)
        history = state["history"]
    _epochs(trainer, history, args.out, {"model_built": identity, "classes": data.classes})
    save_checkpoint(trainer.averaged_model, args.out / "model.pth")
    if args.json:
        print_json(history)
    else:
        print(_table(history))
        print(f"weights: {args.out / 'model.pth'}   log: {args.out / 'log.json'}")
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    for name in ("epochs", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"train: --{name} must be at least 1, got {getattr(args, name)}")
    warmup = args.epochs / 15 if args.warmup_epochs is None else args.warmup_epochs
    return Recipe(
        epochs=args.epochs,
        batch=args.batch,
        lr=args.lr if args.lr is not None else 1.5e-3 * args.batch / 512,
        warmup_epochs=warmup,
        weight_decay=args.weight_decay,
        ema=args.ema,
        optimizer=args.optimizer,
        seed=args.seed,
    )


def _data(args: argparse.Namespace) -> Dataset:
    if args.data == "digits":
        return Digits(args.side or 32)
    return ImageFolder(Path(args.data), args.side or 224)


def _check_identity(state: dict[str, Any], identity: dict[str, Any]) -> None:
    before = state.get("model_built", {})
    for name, value in identity.items():
        if before.get(name) != value:
            raise ValueError(
                f"train: --resume needs the model of the first run: {name} was "
                f"{before.get(name)!r}, got {value!r}"
            )


def _epochs(
    trainer: Trainer, history: list[dict[str, Any]], out: Path, extra: dict[str, Any]
) -> None:
    """Train to the end, writing a checkpoint and the log after every epoch."""
    steps, batch = trainer.steps_per_epoch, trainer.recipe.batch
    label = f"train {trainer.data.name}"
    with Progress(label, trainer.total_steps, initial=trainer.step_index) as progress:
        while trainer.step_index < trainer.total_steps:
            start = time.perf_counter()
            for _ in range(steps):
                loss = trainer.step()
                progress.advance(f"loss {loss:.4f}")
            seconds = time.perf_counter() - start
            record = {
                "epoch": trainer.epoch,
                "loss": statistics.fmean(trainer.losses[-steps:]),
                "accuracy": trainer.accuracy(),
                "images_per_second": steps * batch / seconds,
            }
            history.append(record)
            progress.say(
                f"epoch {record['epoch']}/{trainer.recipe.epochs}: loss {record['loss']:.4f}, "
                f"held-out accuracy {record['accuracy']:.2%}"
            )
            trainer.save(out / "last.pt", history=history, **extra)
            write_json(out / "log.json", {"epochs": history, "losses": trainer.losses})


def _table(history: list[dict[str, Any]]) -> str:
    rows = [
        (r["epoch"], f"{r['loss']:.4f}", f"{r['accuracy']:.2%}", f"{r['images_per_second']:.0f}")
        for r in history
    ]
    return format_table(("epoch", "loss", "held-out accuracy", "images/s"), rows)
