"""The published numbers: blocks, whole models, training steps and dense backbones in fp32.

All of them from plain PyTorch and from the kernels of the cpu backend; ``test_training.py`` has the
training of single blocks on every backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import golden_data as golden
import numpy as np
import pytest
import torch
from golden_data import assert_map, assert_within
from torch import nn

import emo_kernels as ek
from emo_kernels import backends
from emo_kernels.models import create_backbone, create_model
from emo_kernels.nn import iRMB

BLOCKS = golden.load_json("blocks_index.json")
EVAL = golden.entries("models_eval")
TRAIN = golden.entries("models_train")
DENSE = golden.entries("dense_backbones")


Prepare = Callable[[nn.Module], nn.Module]


def ids(key: str) -> Any:
    return lambda entry: entry[key]


def preparations() -> Iterator[Any]:
    """Plain, and the cpu's instruction sets; the best by default, which comes last."""
    yield pytest.param("plain")
    if backends.unavailable("cpu") is None:
        from emo_kernels import _C

        *others, best = _C.available_isas()
        yield pytest.param(best)
        yield from (pytest.param(isa, marks=pytest.mark.slow) for isa in others)


@pytest.fixture(params=list(preparations()))
def prepare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Leaves a model as it is, or gives it the cpu kernels of one instruction set."""
    if request.param == "plain":
        return lambda model: model
    monkeypatch.setenv("EMO_KERNELS_ISA", request.param)
    return lambda model: ek.accelerate(model, backend="cpu")  # a warning is an error here


def load_block(entry: dict[str, Any]) -> tuple[iRMB, Any]:
    data = golden.arrays(entry["file"])
    block = iRMB(**json.loads(str(data["meta"]))["kwargs"])
    state = {k[3:]: golden.tensor(data[k]) for k in data.files if k.startswith("sd/")}
    expected = {k for k in block.state_dict() if not k.endswith("num_batches_tracked")}
    assert set(state) == expected
    block.load_state_dict(state)
    return block, data


def scaled(array: np.ndarray, factor: float) -> float:
    """A bound relative to the largest value."""
    return factor * float(np.abs(array).max(initial=0.0))


@pytest.mark.parametrize("entry", BLOCKS, ids=ids("name"))
@pytest.mark.filterwarnings(  # the one block with a grouped expansion, which no cpu kernel has
    "ignore:accelerate. 1 of 1 blocks are not accelerated.*grouped"
)
def test_block_in_inference(entry: dict[str, Any], prepare: Prepare) -> None:
    block, data = load_block(entry)
    prepare(block.eval())
    with torch.no_grad():
        y = block(golden.tensor(data["x"]))
    assert list(y.shape) == entry["output"]
    assert_within(y, data["y_eval"], scaled(data["y_eval"], 2e-5), "output")


@pytest.mark.parametrize("entry", BLOCKS, ids=ids("name"))
def test_block_in_training(entry: dict[str, Any]) -> None:
    block, data = load_block(entry)
    x = golden.tensor(data["x"]).requires_grad_()
    y = block.train()(x)
    assert_within(y, data["y_train"], scaled(data["y_train"], 2e-5), "output")

    (y * golden.tensor(data["g"])).sum().backward()
    assert_within(x.grad, data["grad_x"], scaled(data["grad_x"], 1e-4), "input gradient")
    names = {k[5:] for k in data.files if k.startswith("grad/")}
    assert names == {name for name, _ in block.named_parameters()}
    for name, parameter in block.named_parameters():
        want = data[f"grad/{name}"]
        # Half of the qk bias has no influence; its stored gradient is noise around the other half.
        assert_within(parameter.grad, want, scaled(want, 1e-4), f"gradient of {name}")

    buffers = {k: v for k, v in block.named_buffers() if not k.endswith("num_batches_tracked")}
    assert {k[6:] for k in data.files if k.startswith("after/")} >= set(buffers)
    for name, buffer in buffers.items():
        want = data[f"after/{name}"]
        assert_within(buffer, want, scaled(want, 2e-5), f"buffer {name}")


@pytest.mark.parametrize("name", ["EMO_1M", "EMO_2M", "EMO_5M", "EMO_6M"])
def test_state_dict_names(name: str) -> None:
    published = golden.load_json("state_dict_keys.json")[name]
    ours = {k: list(v.shape) for k, v in create_model(name).state_dict().items()}
    assert list(ours.items()) == list(published.items())


@pytest.mark.parametrize("entry", EVAL, ids=ids("key"))
def test_model_in_inference(entry: dict[str, Any], prepare: Prepare) -> None:
    data, key = golden.arrays("models_eval.npz"), entry["key"]
    model = create_model(entry["model"]).eval()
    assert golden.fill(model, 20230) == entry["param_crc32"]
    prepare(model)
    x = golden.image(entry)
    if entry["x_stored"]:
        assert np.array_equal(x.numpy(), data[f"{key}/x"])

    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        logits = model(x)
    for index, feature_map in enumerate(maps):
        assert list(feature_map.shape) == entry["stage_shapes"][index]
        assert_map(feature_map, data, f"{key}/stage{index}", 5e-5)
    pooled = model.forward_head(features, pre_logits=True)
    assert_within(pooled, data[f"{key}/pooled"], 5e-5, "pooled")
    assert_within(logits, data[f"{key}/logits"], 5e-5, "logits")


@pytest.mark.parametrize("entry", TRAIN, ids=ids("key"))
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "grad_checkpointing"])
def test_training_step(entry: dict[str, Any], checkpointing: bool, prepare: Prepare) -> None:
    data, key = golden.arrays("models_train.npz"), entry["key"]
    model = create_model(entry["model"], drop_path_rate=0.0).train()
    assert golden.fill(model, 20230) == entry["param_crc32"]
    prepare(model)
    model.set_grad_checkpointing(checkpointing)
    x = golden.image(entry).requires_grad_()
    g = torch.from_numpy(golden.gaussian((entry["B"], 1000), entry["g_seed"]))
    logits = model(x)
    (logits * g).sum().backward()
    assert_within(logits, data[f"{key}/logits_train"], 3e-4, "logits")

    parameters = dict(model.named_parameters())
    assert list(parameters) == entry["param_names"]
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    # The bias in front of a batch norm has no influence: its true gradient is 0.
    dead = "stage0.0.convs.0.0.bias"
    assert grads.pop(dead).abs().max() < 1e-2
    rows = dict(zip(entry["param_names"], data[f"{key}/grad_stats"], strict=True))
    for name, grad in grads.items():
        got, want = golden.summary(name, grad, 20230), rows[name]
        assert_within(got, want, 2e-3 * want[1], f"gradient of {name}")
    want = data[f"{key}/grad_x_stats"]
    assert_within(golden.summary("x", x.grad, 20230), want, 2e-3 * want[1], "input gradient")
    first = data[f"{key}/grad_x_first64"]
    assert_within(x.grad.flatten()[:64], first, scaled(first, 2e-3), "input gradient")
    head = data[f"{key}/grad_head_bias"]
    assert_within(grads["head.bias"], head, scaled(head, 2e-3), "gradient of head.bias")

    buffers = dict(model.named_buffers())
    assert all(b == 1 for name, b in buffers.items() if name.endswith("num_batches_tracked"))
    for name, want in zip(entry["buffer_names"], data[f"{key}/buffers_after_stats"], strict=True):
        got = golden.summary(name, buffers[name], 20230)
        assert_within(got, want, 1e-4 * want[1], f"buffer {name}")


@pytest.mark.parametrize("entry", DENSE, ids=ids("key"))
@pytest.mark.parametrize("windows", ["default", "given"])
def test_dense_backbone(entry: dict[str, Any], windows: str, prepare: Prepare) -> None:
    data, key = golden.arrays("dense_backbones.npz"), entry["key"]
    detection = entry["backbone"] == "det"
    backbone = create_backbone(
        f"EMO_{entry['size']}",
        out_indices=entry["out_indices"],
        frozen_stages=1 if detection else -1,
        norm_eval=detection,
        window_sizes=entry["window"] if windows == "given" else None,
    )
    assert golden.fill(backbone, 20230) == entry["param_crc32"]

    assert backbone.train() is backbone
    parameters = list(backbone.parameters())
    assert len(parameters) == entry["n_params"]
    assert sum(p.requires_grad for p in parameters) == entry["trainable"]
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(m.training for m in norms) == entry["bn_training"]

    prepare(backbone.eval())
    with torch.no_grad():
        maps = backbone(golden.image(entry))
    assert isinstance(maps, list)
    assert [list(m.shape) for m in maps] == entry["shapes"]
    assert [m.shape[1] for m in maps] == backbone.out_channels
    assert backbone.strides == [2 ** (i + 1) for i in entry["out_indices"]]
    for index, feature_map in zip(entry["out_indices"], maps, strict=True):
        assert_map(feature_map, data, f"{key}/out{index}", 5e-5)
    full = data[f"{key}/out{entry['out_indices'][-1]}/full"]
    last = maps[-1] if maps[-1].shape == full.shape else maps[-1][0, :32]
    assert_within(last, full, 5e-5, "last map")
