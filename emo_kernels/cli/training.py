"""One training loop for the ``train`` command and the demo: the published recipe, made resumable.

Everything random is drawn from (seed, step) or (seed, epoch), so a run continued from a checkpoint
is bit for bit the run that was never interrupted (same machine, same number of threads).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from emo_kernels.measure.files import write_atomically


class Dataset(Protocol):
    """What the loop needs of its data."""

    name: str
    side: int
    channels: int
    classes: list[str]

    @property
    def train_size(self) -> int:
        """Number of training images."""

    def train_batch(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) and labels (N,)."""

    def held_out(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images and labels in batches."""


@dataclass(frozen=True)
class Recipe:
    """The published classification recipe, its schedule scaled to the number of epochs.

    Attributes:
        epochs, batch: length of the run, images a step.
        lr, min_lr: peak of the schedule and its two ends; published: 1.5e-3 * batch / 512.
        warmup_epochs: linear rise to ``lr``; then a cosine on absolute time.
        weight_decay: on tensors of two dimensions and more only.
        label_smoothing, clip: of the loss; largest norm of the whole gradient.
        ema: decay of the averaged weights, 0 for none (published: 0.9998).
        optimizer: ``adamw`` as published, or ``sgd`` with momentum 0.9.
        seed: of the initial weights, the order of the data and everything random.
    """

    epochs: int
    batch: int
    lr: float
    warmup_epochs: float
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip: float = 5.0
    ema: float = 0.0
    optimizer: str = "adamw"
    seed: int = 0

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """Rate of one step: linear warm-up from ``min_lr``, then cosine to ``min_lr``."""
        total, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        if step < warmup:
            return self.min_lr + (self.lr - self.min_lr) * step / warmup
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * step / total)) / 2


def derived_seed(*words: object) -> int:
    """A seed for one purpose, from the run's seed and whatever names the purpose."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: tensors of two dimensions and more decay, the others do not."""
    names: set[str] = getattr(model, "no_weight_decay", set)()
    keywords: set[str] = getattr(model, "no_weight_decay_keywords", set)()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        exempt = name in names or any(keyword in name for keyword in keywords)
        groups[parameter.ndim > 1 and not exempt].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


class Trainer:
    """Steps, evaluation and checkpoints of one training run.

    Args:
        model: trained in place; returns logits (N, classes).
        data: see :class:`Dataset`.
        recipe: see :class:`Recipe`.
        device: where the model is; batches are moved there.
    """

    def __init__(
        self, model: nn.Module, data: Dataset, recipe: Recipe, device: torch.device
    ) -> None:
        if not 1 <= recipe.batch <= data.train_size:
            raise ValueError(
                f"train: batch must be between 1 and the {data.train_size} training images of "
                f"{data.name}, got {recipe.batch}"
            )
        self.model, self.data, self.recipe, self.device = model, data, recipe, device
        self.steps_per_epoch = data.train_size // recipe.batch
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.step_index = 0
        self.losses: list[float] = []
        groups = parameter_groups(model, recipe.weight_decay)
        self._optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
        elif recipe.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
        else:
            raise ValueError(f"train: optimizer must be adamw or sgd, got {recipe.optimizer!r}")
        self._average: AveragedModel | None = None
        if recipe.ema:
            decay = get_ema_multi_avg_fn(recipe.ema)
            self._average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self.step_index // self.steps_per_epoch

    @property
    def averaged_model(self) -> nn.Module:
        """The model whose weights a run delivers: the averaged one if there is one."""
        return self.model if self._average is None else self._average.module

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        recipe, step = self.recipe, self.step_index
        images, labels = self._batch(step)
        torch.manual_seed(derived_seed(recipe.seed, "step", step))
        if not self.model.training:
            self.model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step, self.steps_per_epoch)
        logits = self.model(images)
        loss = cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"train: the loss is {value} at step {step}; try a lower --lr")
        self.step_index += 1
        self.losses.append(value)
        return value

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Share of the held-out images that the delivered model gets right."""
        model, right, count = self.averaged_model.eval(), 0, 0
        for images, labels in self.data.held_out(max(self.recipe.batch, 32)):
            predicted = model(images.to(self.device)).argmax(1).cpu()
            right += int((predicted == labels).sum())
            count += len(labels)
        return right / count

    def save(self, path: Path, **extra: Any) -> None:
        """Write everything :meth:`load` needs, atomically; ``extra`` goes in unchanged."""
        state = {
            "recipe": asdict(self.recipe),
            "step": self.step_index,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            **extra,
        }
        write_atomically(path, lambda file: torch.save(state, file))

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`save` wrote (see :func:`read_training_state`)."""
        for name, value in asdict(self.recipe).items():
            if state["recipe"].get(name) != value:
                raise ValueError(
                    f"train: --resume needs the options of the first run: {name} was "
                    f"{state['recipe'].get(name)!r}, got {value!r}"
                )
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.step_index, self.losses = state["step"], list(state["losses"])

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(step, self.steps_per_epoch)
        seed, batch = self.recipe.seed, self.recipe.batch
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
            order = torch.randperm(self.data.train_size, generator=generator)
            self._order = (epoch, order.tolist())
        picked = self._order[1][index * batch : (index + 1) * batch]
        images, labels = self.data.train_batch(picked, derived_seed(seed, "batch", step))
        return images.to(self.device), labels.to(self.device)


def read_training_state(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``; never executes pickled code.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"train: no checkpoint {path} to resume; leave --resume out")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if not {"recipe", "step", "losses", "model", "optimizer"} <= state.keys():
            raise ValueError("it lacks the fields of a training checkpoint")
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(
            f"train: {path} is not a checkpoint of this command ({str(error).splitlines()[0]}); "
            "delete it or choose another --out"
        ) from error
    return state
