"""scikit-learn's handwritten digits as a data set: 1,797 images, no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate


class Digits:
    """8x8 digits upsampled to ``side`` pixels and standardised; every fifth is held out."""

    name = "digits"
    channels = 1

    def __init__(self, side: int = 32) -> None:
        bunch = load_digits()
        small = torch.from_numpy(bunch.images).float()[:, None]
        images = interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
        images = (images - images.mean()) / images.std()
        labels = torch.from_numpy(bunch.target).long()
        kept = torch.arange(len(labels)) % 5 != 4
        self.side = side
        self.classes = [str(name) for name in bunch.target_names]
        self._train = images[kept], labels[kept]
        self._held_out = images[~kept], labels[~kept]

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._train[1])

    @property
    def held_out_size(self) -> int:
        """Number of held-out images."""
        return len(self._held_out[1])

    def train_batch(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Images (N, 1, side, side) and labels (N,); nothing is augmented, ``seed`` is not used."""
        picked = torch.as_tensor(indices)
        return self._train[0][picked], self._train[1][picked]

    def held_out(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out images and labels, ``batch`` at a time."""
        return zip(*(part.split(batch) for part in self._held_out), strict=True)
