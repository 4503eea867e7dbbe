"""Load and save weights: the layouts found in the wild, converted to the published names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emo_kernels.models.checkpoint_file import CheckpointError, read_tensors, write_tensors

__all__ = ["CheckpointError", "LoadResult", "load_checkpoint", "save_checkpoint"]

_SHOWN = 3
_WRAPPER = re.compile(r"^(?:module|_orig_mod|model|net|ema|backbone)\.")
_CLASSIFIER_ONLY = ("norm.", "head.")


class LoadResult(NamedTuple):
    """What :func:`load_checkpoint` did.

    Attributes:
        loaded: how many tensors were loaded.
        missing: names in the model that the file lacks (only without ``strict``).
        unexpected: names in the file that the model lacks (only without ``strict``).
        left_out: names that belong to parts around the model: a detector's neck and heads, or the
            classifier's norm and head for a backbone.
    """

    loaded: int
    missing: list[str]
    unexpected: list[str]
    left_out: list[str]


def load_checkpoint(
    model: nn.Module, path: str | PathLike[str], *, strict: bool = True
) -> LoadResult:
    """Load weights into ``model`` in place, all of them or, if anything is wrong, none.

    Known are state dicts in ``.pth`` (also inside a training program's dictionary; averaged
    weights are preferred) and ``.safetensors`` files, with the published names, behind the prefixes
    of wrappers (``module.``, ``model.``, ``backbone.`` ...), and with timm's names of stages,
    stem and head. A ``.pth`` is read with ``weights_only=True``; pickled code is never run.

    Args:
        model: EMO, EMOv2, a backbone, or anything that has their state dict.
        path: the file.
        strict: every tensor of the model must be in the file and the other way round, and all
            must be finite. Otherwise what is missing keeps its value and what is unexpected is
            left out, and non-finite weights are warned of. Shapes must agree in any case.

    Returns:
        What was loaded and what was not.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a ValueError; the file is no checkpoint or does not fit. The message names
            the first missing, unexpected and mis-shaped tensors.
    """
    own = model.state_dict()
    targets = {_strip(name): tensor for name, tensor in own.items()}
    if any(tensor.is_meta for tensor in targets.values()):
        raise CheckpointError(
            "load_checkpoint: the model is on the meta device and has no memory for weights; call "
            "model.to_empty(device='cpu') first"
        )
    sources, left_out = _convert(read_tensors(Path(path)), targets)
    missing = [
        name for name in targets if name not in sources and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in sources if name not in targets]
    misfits = [
        f"{name} must be {_describe(targets[name])}, got {_describe(tensor)}"
        for name, tensor in sources.items()
        if name in targets and not _fits(tensor, targets[name])
    ]
    if misfits or (strict and (missing or unexpected)):
        raise _mismatch(path, missing, unexpected, misfits, targets, sources)
    loaded = {name: tensor for name, tensor in sources.items() if name in targets}
    _check_finite(path, loaded, strict)
    model.load_state_dict(
        {name: loaded[_strip(name)] for name in own if _strip(name) in loaded}, strict=False
    )
    return LoadResult(len(loaded), missing, unexpected, left_out)


def save_checkpoint(model: nn.Module, path: str | PathLike[str]) -> Path:
    """Write the model's state dict, atomically: a crash leaves the old file or the new one.

    Args:
        model: any module; prefixes of wrappers are left out of the names.
        path: ``.safetensors``, or any other suffix for what torch.load reads.

    Returns:
        The path.

    Raises:
        FileNotFoundError: no such directory.
    """
    path = Path(path)
    write_tensors({_strip(name): tensor for name, tensor in model.state_dict().items()}, path)
    return path


def _strip(name: str) -> str:
    """The name without the prefixes of wrappers."""
    while _WRAPPER.match(name):
        name = _WRAPPER.sub("", name, count=1)
    return name


def _convert(
    tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors by published name, names left out)."""
    left_out: list[str] = []
    in_detector = any("backbone." in name for name in tensors)
    has_classifier = any(name.startswith(_CLASSIFIER_ONLY) for name in targets)
    stem = any(_strip(name).startswith("stem.") for name in tensors)
    first_stage = 1 if stem or not any(_is_timm_stage(name, 4) for name in tensors) else 0
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if in_detector and "backbone." not in name:
            left_out.append(name)
            continue
        published = _publish(_strip(name), first_stage, targets)
        if published.startswith(_CLASSIFIER_ONLY) and not has_classifier:
            left_out.append(name)
            continue
        if published in converted:
            raise CheckpointError(f"load_checkpoint: two tensors are both {published} by name")
        if published.endswith("ls.gamma"):
            tensor = tensor.flatten()
        converted[published] = tensor
    return converted, left_out


def _is_timm_stage(name: str, index: int) -> bool:
    return re.match(rf"stages[._]{index}\.", _strip(name)) is not None


def _publish(name: str, first_stage: int, targets: Mapping[str, Tensor]) -> str:
    """The published name of a tensor that may have timm's."""
    name = re.sub(r"^stem\.", "stage0.", name)
    name = re.sub(
        r"^stages[._](\d+)\.(?:blocks\.)?", lambda m: f"stage{int(m[1]) + first_stage}.", name
    )
    name = re.sub(r"^head\.norm\.", "norm.", name)
    name = re.sub(r"^(?:head\.fc|classifier|fc)\.", "head.", name)
    name = re.sub(r"\.(?:ls\d?\.|layer_scale\d?\.)?gamma$", ".ls.gamma", name)
    if name in targets:
        return name
    # A layer norm over channels is a module around one in the published names, not in timm's.
    nested = re.sub(r"(^|\.)norm\.(weight|bias)$", r"\1norm.norm.\2", name)
    return nested if nested in targets else name


def _fits(tensor: Tensor, target: Tensor) -> bool:
    """Equal in shape, and both floating or both not."""
    return tensor.shape == target.shape and tensor.is_floating_point() == target.is_floating_point()


def _describe(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _mismatch(
    path: str | PathLike[str],
    missing: list[str],
    unexpected: list[str],
    misfits: list[str],
    targets: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
) -> CheckpointError:
    """The error that names the first of each kind."""
    parts = []
    for what, names, tensors in (
        ("missing", missing, targets),
        ("unexpected", unexpected, sources),
    ):
        if names:
            listed = ", ".join(f"{name} {_describe(tensors[name])}" for name in names[:_SHOWN])
            parts.append(f"{len(names)} {what}: {listed}{_more(names)}")
    if misfits:
        parts.append(f"{len(misfits)} mis-shaped: {', '.join(misfits[:_SHOWN])}{_more(misfits)}")
    way_out = "check that the model's name and options are those of the file"
    if any(misfit.startswith("head.") for misfit in misfits) and len(misfits) <= 2:
        way_out = "create the model with the file's num_classes, then call reset_classifier"
    elif not misfits:
        way_out += ", or pass strict=False to load what fits"
    return CheckpointError(
        f"load_checkpoint: {path} does not fit the model; {'; '.join(parts)}; nothing was loaded; "
        f"{way_out}"
    )


def _more(names: list[str]) -> str:
    return ", ..." if len(names) > _SHOWN else ""


def _check_finite(path: str | PathLike[str], tensors: Mapping[str, Tensor], strict: bool) -> None:
    """No NaN and no infinity among the weights."""
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if not bad:
        return
    text = (
        f"load_checkpoint: {path} has NaN or infinite values in {len(bad)} tensors: "
        f"{', '.join(bad[:_SHOWN])}{_more(bad)}"
    )
    if strict:
        raise CheckpointError(f"{text}; nothing was loaded; pass strict=False to load them anyway")
    warnings.warn(text, stacklevel=3)
