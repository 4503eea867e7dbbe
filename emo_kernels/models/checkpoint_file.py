"""Checkpoint files: a mapping of names to tensors, read without executing anything in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save
except ImportError:  # optional: only files of that kind need it
    load_file = save = None  # type: ignore[assignment]  # each use asks first

# Where training programs put the weights. Averaged weights come first: the published accuracies
# are theirs wherever a file has both.
_NESTS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "params",
    "module",
)
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one that does not fit the model."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a ``.pth`` or ``.safetensors`` file, by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, truncated, of another kind, or holds pickled objects.
    """
    if not path.exists():
        raise FileNotFoundError(f"load_checkpoint: no such file: {path}")
    if not path.is_file():
        raise CheckpointError(f"load_checkpoint: {path} is a directory, not a file")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError(f"load_checkpoint: {path} is empty; copy or download it again")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((_ZIP, _PICKLE)):
        return _find_tensors(path, _read_pth(path))
    raise CheckpointError(
        f"load_checkpoint: {path} is neither a .pth nor a .safetensors file, it begins with "
        f"{head!r}; pass a state dict written by torch.save or safetensors"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if load_file is None:
        raise CheckpointError(
            f"load_checkpoint: reading {path} needs safetensors; pip install safetensors"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"load_checkpoint: {path} is truncated or damaged ({error}); copy or download it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"load_checkpoint: {path} holds no tensors")
    return tensors


def _read_pth(path: Path) -> Any:
    """What torch.save wrote. A file that needs more than tensors is refused, never retried."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "global" in text.lower() or "unsupported" in text.lower():
            raise CheckpointError(
                f"load_checkpoint: {path} holds pickled objects other than tensors, which could "
                f"run code and are never loaded ({_first_line(text)}); write its state dict alone "
                "with torch.save(model.state_dict(), ...) or as .safetensors"
            ) from error
        raise _damaged(path, error) from error
    except Exception as error:
        # Depending on where a file was cut, torch raises a dozen kinds of errors.
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"load_checkpoint: {path} is truncated or damaged ({_first_line(str(error))}); copy or "
        "download it again"
    )


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "global" in line]
    return (named or lines or ["no reason given"])[0][:200]


def _find_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    """The state dict in what a training program saved."""
    found = _search(content)
    if not found:
        what = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"load_checkpoint: {path} holds no state dict, only {what}; pass a mapping of names "
            f"to tensors, or one with such a mapping under {', '.join(_NESTS)}"
        )
    return found


def _search(content: Any, depth: int = 3) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or depth == 0:
        return {}
    for name in _NESTS:
        found = _search(content.get(name), depth - 1)
        if found:
            return found
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write ``.safetensors`` or, with any other suffix, what torch.load reads.

    The file appears under its name only when it is complete and on the disk.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_checkpoint: no such directory: {path.parent}")
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    if path.suffix == ".safetensors" and save is None:
        raise CheckpointError(
            f"save_checkpoint: writing {path} needs safetensors; pip install safetensors, or "
            "choose the suffix .pth"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            if path.suffix == ".safetensors":
                file.write(save(copies))
            else:
                torch.save(copies, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Put the new name on the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
