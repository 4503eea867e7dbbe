"""Photographs as tensors: reading them, cropping, normalising; a folder of them as a data set."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from emo_kernels.cli.training import derived_seed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")


def open_photo(path: Path | str) -> Image.Image:
    """The photograph at ``path``, upright and in RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image that PIL can read.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder, not a photo" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"photo {path} {kind}; give the path of a .jpg or .png file")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"photo {path} is not an image that can be read ({error}); give a .jpg or .png file"
        ) from error


def normalized(image: Image.Image) -> Tensor:
    """(3, H, W) fp32 with ImageNet's mean and deviation removed."""
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).copy()) / 255.0
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((pixels - mean) / std).permute(2, 0, 1).contiguous()


def centre_crop(image: Image.Image, side: int) -> Image.Image:
    """The published test crop: the shorter side to 256/224 of ``side``, then its centre."""
    scale = side * 256 / 224 / min(image.size)
    width, height = (max(side, round(s * scale)) for s in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop(box)


def random_crop(image: Image.Image, side: int, seed: int) -> Image.Image:
    """The published training crop: 8 to 100 % of the area, aspect 3/4 to 4/3, half flipped."""
    rng = random.Random(seed)
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = (3 / 4) * (16 / 9) ** rng.random()
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    box = (left, top, left + w, top + h)
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


class ImageFolder:
    """Images in class sub-directories, decoded when needed.

    Args:
        root: holds ``train/<class>/*.jpg`` and ``val/<class>/*.jpg``, or ``<class>/*.jpg``, of
            which every tenth image (in name order) is then held out.
        side: side of the square a model sees.
    """

    channels = 3

    def __init__(self, root: Path, side: int = 224) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f"data {root} is not a folder; give 'digits' or a folder")
        split = (root / "train").is_dir() and (root / "val").is_dir()
        top = root / "train" if split else root
        self.name, self.side = root.name, side
        self.classes = sorted(entry.name for entry in top.iterdir() if entry.is_dir())
        self._train = _images(top, self.classes)
        if split:
            self._held_out = _images(root / "val", self.classes)
        else:
            self._held_out = self._train[9::10]
            self._train = [item for i, item in enumerate(self._train) if i % 10 != 9]
        if len(self.classes) < 2 or not self._train or not self._held_out:
            raise ValueError(
                f"data {root} must hold at least two class folders with images "
                f"({', '.join(SUFFIXES)}), ten or more in all, got {len(self.classes)} folders "
                f"and {len(self._train) + len(self._held_out)} images"
            )
        self._pool = ThreadPoolExecutor(os.cpu_count())

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self._train)

    def train_batch(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Randomly cropped images (N, 3, side, side) and labels (N,), fixed by the seed."""

        def load(index: int) -> Tensor:
            photo = open_photo(self._train[index][0])
            return normalized(random_crop(photo, self.side, derived_seed(seed, index)))

        labels = torch.tensor([self._train[i][1] for i in indices])
        return torch.stack(list(self._pool.map(load, indices))), labels

    def held_out(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Centre-cropped held-out images and labels, ``batch`` at a time."""

        def load(path: Path) -> Tensor:
            return normalized(centre_crop(open_photo(path), self.side))

        for start in range(0, len(self._held_out), batch):
            paths, labels = zip(*self._held_out[start : start + batch], strict=True)
            yield torch.stack(list(self._pool.map(load, paths))), torch.tensor(labels)


def _images(top: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((top / name).glob("**/*"))
        if path.suffix.lower() in SUFFIXES
    ]
