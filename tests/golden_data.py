"""Read the golden vectors and rebuild the parameters and inputs they were made with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def entries(name: str) -> list[dict[str, Any]]:
    """The entries of ``<name>.json``."""
    return json.loads((GOLDEN / f"{name}.json").read_text())["entries"]


def load_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def arrays(name: str) -> Any:
    return np.load(GOLDEN / name)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())


def generator(name: str, seed: int) -> np.random.RandomState:
    """The generator of one named tensor."""
    return np.random.RandomState((zlib.crc32(name.encode()) + seed) & 0xFFFFFFFF)


def parameter(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """One tensor of the recipe, in float64."""
    rs = generator(name, seed)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if name.endswith("running_mean"):
        return 0.2 * rs.standard_normal(shape)
    if name.endswith("running_var"):
        return 0.5 + rs.random_sample(shape)
    if len(shape) == 1 and name.endswith("weight"):
        return 1.0 + 0.2 * rs.standard_normal(shape)
    if len(shape) == 1:
        return 0.1 * rs.standard_normal(shape)
    return rs.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))


def fill(model: nn.Module, seed: int) -> int:
    """Fill a model by the recipe; returns the checksum over its floating tensors."""
    state, crc = {}, 0
    for name, old in model.state_dict().items():
        value = parameter(name, tuple(old.shape), seed)
        if value.dtype == np.float64:
            value = np.ascontiguousarray(value, dtype=np.float32)
            crc = zlib.crc32(value.tobytes(), crc)
        state[name] = torch.from_numpy(np.asarray(value))
    model.load_state_dict(state)
    return crc


def gaussian(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def image(entry: dict[str, Any]) -> Tensor:
    """The input of an entry, checked against its checksum where there is one."""
    x = gaussian((entry["B"], 3, entry["H"], entry["W"]), entry["x_seed"])
    if "x_crc32" in entry:
        assert zlib.crc32(x.tobytes()) == entry["x_crc32"]
    return torch.from_numpy(x)


def summary(name: str, value: Tensor, seed: int) -> np.ndarray:
    """[sum, l2 norm, dot product with the probe of this name]."""
    probe = generator(name, seed + 1).standard_normal(tuple(value.shape))
    array = value.detach().double().numpy()
    return np.array([array.sum(), np.sqrt((array**2).sum()), (array * probe).sum()])


def assert_within(got: Tensor | np.ndarray, want: np.ndarray, atol: float, what: str) -> None:
    """Largest difference at most ``atol``, and no NaN."""
    got = got.detach().numpy() if isinstance(got, Tensor) else got
    assert got.shape == want.shape, f"{what}: shape {got.shape}, golden {want.shape}"
    error = float(np.abs(got.astype(np.float64) - want).max(initial=0.0))
    assert error <= atol, f"{what}: largest difference {error:.3g} > {atol:.3g}"


def assert_map(got: Tensor, golden: Any, prefix: str, atol: float) -> None:
    """A feature map against its stored statistics and corners."""
    flat = got.detach().contiguous().flatten()
    double = flat.double()
    stats = np.array([double.mean(), double.std(unbiased=False), double.abs().max()])
    assert_within(stats, golden[f"{prefix}/mean_std_absmax"], atol, f"{prefix} statistics")
    assert_within(got.mean((0, 2, 3)), golden[f"{prefix}/channel_mean"], atol, f"{prefix} means")
    assert_within(flat[:16], golden[f"{prefix}/first16"], atol, f"{prefix} first values")
    assert_within(flat[-16:], golden[f"{prefix}/last16"], atol, f"{prefix} last values")
