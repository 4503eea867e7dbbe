"""Checkpoints: layouts in the wild, safety, errors that name names, all or nothing."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from emo_kernels.models import (
    CheckpointError,
    create_backbone,
    create_model,
    load_checkpoint,
    save_checkpoint,
)

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A model all of whose tensors are random, and its state."""
    torch.manual_seed(1)
    return randomised(create_model("emo_1m", num_classes=10))


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.fill_(3)
    return model


def fresh() -> nn.Module:
    return create_model("emo_1m", num_classes=10)


def same(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def to_timm(name: str) -> str:
    name = re.sub(
        r"^stage([1-4])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", name
    )
    name = re.sub(r"^stage0\.", "stem.", name)
    name = name.replace("norm.norm.", "norm.")
    return re.sub(r"^head\.", "head.fc.", name)


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"epoch": 300, "state_dict": s},
    "net": lambda s: {"net": s, "optimizer": {"param_groups": [], "state": {0: torch.ones(1)}}},
    "model": lambda s: {"model": s, "args": None},
    "averaged": lambda s: {
        "state_dict": {k: v * 0 for k, v in s.items()},
        "state_dict_ema": s,
    },
    "nested twice": lambda s: {"checkpoint": 1, "model": {"state_dict": s}},
    "distributed": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled and distributed": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "with notes": lambda s: {"epoch": 3, "note": "best", **s},
    "timm": lambda s: {to_timm(k): v for k, v in s.items()},
    "timm stages in a list": lambda s: {
        re.sub(r"^stage(\d)\.", r"stages.\1.", k): v for k, v in s.items()
    },
    "old torch": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_pth(self, layout: str, source: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(LAYOUTS[layout](source.state_dict()), path)
        model = fresh()
        result = load_checkpoint(model, path)
        counters = 0 if layout == "old torch" else sum("tracked" in k for k in model.state_dict())
        assert result.loaded == sum("tracked" not in k for k in model.state_dict()) + counters
        assert (result.missing, result.unexpected, result.left_out) == ([], [], [])
        want = {k: v for k, v in source.state_dict().items() if counters or "tracked" not in k}
        assert same({k: model.state_dict()[k] for k in want}, want)

    def test_old_zip_free_format(self, source: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
        model = fresh()
        load_checkpoint(model, path)
        assert same(model.state_dict(), source.state_dict())

    @pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
    def test_safetensors_by_suffix_or_content(
        self, name: str, source: nn.Module, tmp_path: Path
    ) -> None:
        save_file(source.state_dict(), tmp_path / name)
        model = fresh()
        load_checkpoint(model, str(tmp_path / name))
        assert same(model.state_dict(), source.state_dict())

    def test_detector_into_backbone(self, source: nn.Module, tmp_path: Path) -> None:
        """Neck and heads of a detector are left out."""
        backbone = create_backbone("emo_1m")
        state = {f"backbone.{k}": v for k, v in source.state_dict().items()}
        state = {
            k: v for k, v in state.items() if not k.startswith(("backbone.norm", "backbone.head"))
        }
        state["neck.convs.0.weight"] = torch.ones(3)
        torch.save({"meta": {"epoch": 12}, "state_dict": state}, tmp_path / "d.pth")
        result = load_checkpoint(backbone, tmp_path / "d.pth")
        assert result.left_out == ["neck.convs.0.weight"]
        assert same(copied(backbone), {k: source.state_dict()[k] for k in backbone.state_dict()})

    def test_classifier_into_backbone(self, source: nn.Module, tmp_path: Path) -> None:
        save_checkpoint(source, tmp_path / "c.pth")
        backbone = create_backbone("emo_1m", checkpoint=tmp_path / "c.pth")
        result = load_checkpoint(backbone, tmp_path / "c.pth")
        assert result.left_out == ["norm.norm.weight", "norm.norm.bias", "head.weight", "head.bias"]
        assert same(copied(backbone), {k: source.state_dict()[k] for k in backbone.state_dict()})

    def test_backbone_into_classifier(self, source: nn.Module, tmp_path: Path) -> None:
        """Only on request, and norm and head keep their values."""
        backbone = create_backbone("emo_1m")
        load_checkpoint(backbone, save_checkpoint(source, tmp_path / "c.pth"))
        save_checkpoint(backbone, tmp_path / "b.safetensors")
        model = fresh()
        before = copied(model)
        with pytest.raises(ValueError, match=r"4 missing: norm.norm.weight \(168,\)"):
            load_checkpoint(model, tmp_path / "b.safetensors")
        assert same(copied(model), before)
        result = load_checkpoint(model, tmp_path / "b.safetensors", strict=False)
        assert result.missing == ["norm.norm.weight", "norm.norm.bias", "head.weight", "head.bias"]
        for name, tensor in model.state_dict().items():
            want = before if name in result.missing else source.state_dict()
            assert torch.equal(tensor, want[name]), name

    @pytest.mark.parametrize(
        "gamma", ["ls.gamma", "ls1.gamma", "layer_scale.gamma", "gamma"], ids=str
    )
    @pytest.mark.parametrize("shape", [(-1,), (-1, 1, 1), (1, -1, 1, 1)], ids=str)
    def test_emo2(self, gamma: str, shape: tuple[int, ...], tmp_path: Path) -> None:
        wanted = randomised(create_model("emo2_1m", num_classes=2))
        state = {
            k.replace("ls.gamma", gamma): v.reshape(shape) if k.endswith("ls.gamma") else v
            for k, v in wanted.state_dict().items()
        }
        torch.save({"net": state}, tmp_path / "e.pth")
        model = create_model("emo2_1m", num_classes=2, checkpoint=tmp_path / "e.pth")
        assert same(model.state_dict(), wanted.state_dict())

    def test_into_a_wrapped_model(self, source: nn.Module, tmp_path: Path) -> None:
        save_checkpoint(source, tmp_path / "c.pth")
        model = fresh()
        load_checkpoint(nn.DataParallel(model), tmp_path / "c.pth")
        assert same(model.state_dict(), source.state_dict())

    def test_half_precision_model_takes_fp32_weights(
        self, source: nn.Module, tmp_path: Path
    ) -> None:
        save_checkpoint(source, tmp_path / "c.pth")
        model = fresh().bfloat16()
        load_checkpoint(model, tmp_path / "c.pth")
        assert torch.equal(model.head.weight, source.state_dict()["head.weight"].bfloat16())


class TestSave:
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_round_trip(self, suffix: str, source: nn.Module, tmp_path: Path) -> None:
        path = save_checkpoint(source, str(tmp_path / f"w{suffix}"))
        assert path == tmp_path / f"w{suffix}" and os.listdir(tmp_path) == [path.name]
        model = fresh()
        load_checkpoint(model, path)
        assert same(model.state_dict(), source.state_dict())

    def test_channels_last_and_expanded_weights(self, tmp_path: Path) -> None:
        model = fresh().to(memory_format=torch.channels_last)
        save_checkpoint(model, tmp_path / "w.safetensors")
        other = fresh()
        load_checkpoint(other, tmp_path / "w.safetensors")
        assert same(other.state_dict(), model.state_dict())

    def test_wrapper_prefixes_are_left_out(self, source: nn.Module, tmp_path: Path) -> None:
        save_checkpoint(nn.DataParallel(source), tmp_path / "w.pth")
        assert (
            torch.load(tmp_path / "w.pth", weights_only=True).keys() == source.state_dict().keys()
        )

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_failed_write_keeps_the_old_file(
        self, suffix: str, source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save_checkpoint(source, tmp_path / f"w{suffix}")
        before = path.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            save_checkpoint(fresh(), path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == [path.name]

    def test_no_such_directory(self, source: nn.Module, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no such directory.*absent"):
            save_checkpoint(source, tmp_path / "absent" / "w.pth")


def spoil(state: State, spoiler: str) -> State:
    state = dict(state)
    if spoiler == "missing":
        del state["stage3.1.qk.conv.bias"]
    elif spoiler == "unexpected":
        state["stage9.weight"] = torch.ones(2, 3)
    elif spoiler == "renamed":
        state["stage3.1.kq.conv.bias"] = state.pop("stage3.1.qk.conv.bias")
    elif spoiler == "mis-shaped":
        state["stage3.1.v.conv.weight"] = torch.ones(7, 80, 1, 1)
    elif spoiler == "integers":
        state["stage0.1.proj.conv.weight"] = torch.ones(24, 24, 1, 1, dtype=torch.int64)
    elif spoiler == "nan":
        state["stage4.1.norm.norm.bias"] = torch.full((168,), float("nan"))
    elif spoiler == "inf":
        state["stage1.0.norm.running_var"] = torch.full((24,), float("inf"))
    return state


class TestMismatch:
    @pytest.mark.parametrize(
        ("spoiler", "match"),
        [
            ("missing", r"1 missing: stage3.1.qk.conv.bias \(160,\)"),
            ("unexpected", r"1 unexpected: stage9.weight \(2, 3\)"),
            ("renamed", r"missing: stage3.1.qk.*unexpected: stage3.1.kq.conv.bias \(160,\)"),
            (
                "mis-shaped",
                r"stage3.1.v.conv.weight must be \(240, 80, 1, 1\), got \(7, 80, 1, 1\)",
            ),
            ("integers", r"stage0.1.proj.conv.weight must be \(24, 24, 1, 1\), got .* int64"),
            ("nan", "NaN or infinite values in 1 tensors: stage4.1.norm.norm.bias"),
            ("inf", "NaN or infinite values in 1 tensors: stage1.0.norm.running_var"),
        ],
    )
    def test_leaves_the_model_as_it_was(
        self, spoiler: str, match: str, source: nn.Module, tmp_path: Path
    ) -> None:
        torch.save(spoil(source.state_dict(), spoiler), tmp_path / "w.pth")
        model = fresh()
        before = copied(model)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(model, tmp_path / "w.pth")
        assert "w.pth" in str(caught.value) and "nothing was loaded" in str(caught.value)
        assert same(copied(model), before)

    def test_without_strict(self, source: nn.Module, tmp_path: Path) -> None:
        torch.save(spoil(source.state_dict(), "renamed"), tmp_path / "w.pth")
        model = fresh()
        before = copied(model)
        result = load_checkpoint(model, tmp_path / "w.pth", strict=False)
        assert result.missing == ["stage3.1.qk.conv.bias"]
        assert result.unexpected == ["stage3.1.kq.conv.bias"]
        for name, tensor in model.state_dict().items():
            want = before if name in result.missing else source.state_dict()
            assert torch.equal(tensor, want[name]), name

    def test_shapes_must_agree_without_strict(self, source: nn.Module, tmp_path: Path) -> None:
        save_checkpoint(source, tmp_path / "w.pth")
        model = create_model("emo_1m", num_classes=3)
        before = copied(model)
        with pytest.raises(
            ValueError, match=r"head.weight must be \(3, 168\), got \(10, 168\).*reset"
        ):
            load_checkpoint(model, tmp_path / "w.pth", strict=False)
        assert same(copied(model), before)

    def test_non_finite_without_strict_warns(self, source: nn.Module, tmp_path: Path) -> None:
        torch.save(spoil(source.state_dict(), "nan"), tmp_path / "w.pth")
        model = fresh()
        with pytest.warns(UserWarning, match="stage4.1.norm.norm.bias"):
            load_checkpoint(model, tmp_path / "w.pth", strict=False)
        assert model.stage4[1].norm.norm.bias.isnan().all()

    def test_another_model(self, source: nn.Module, tmp_path: Path) -> None:
        save_checkpoint(source, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=r"missing: .*mis-shaped: .*, \.\.\.; nothing"):
            create_model("emo_5m", num_classes=10, checkpoint=tmp_path / "w.pth")

    def test_two_names_for_one_tensor(self, source: nn.Module, tmp_path: Path) -> None:
        state = source.state_dict()
        torch.save({**state, "module.head.bias": state["head.bias"]}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="both head.bias"):
            load_checkpoint(fresh(), tmp_path / "w.pth")

    def test_model_without_memory(self, source: nn.Module, tmp_path: Path) -> None:
        save_checkpoint(source, tmp_path / "w.pth")
        with torch.device("meta"):
            model = fresh()
        with pytest.raises(ValueError, match="meta device.*to_empty"):
            load_checkpoint(model, tmp_path / "w.pth")
        model.to_empty(device="cpu")
        load_checkpoint(model, tmp_path / "w.pth")
        assert same(model.state_dict(), source.state_dict())


class TestUnsafeAndDamagedFiles:
    def test_pickled_code_never_runs(self, source: nn.Module, tmp_path: Path) -> None:
        trace = tmp_path / "ran"
        path = tmp_path / "bomb.pth"
        torch.save({"state_dict": source.state_dict(), "extra": Bomb(trace)}, path)
        torch.load(path, weights_only=False)
        assert trace.exists(), "the bomb does not work, so the test below would prove nothing"
        trace.unlink()
        model = fresh()
        before = copied(model)
        with pytest.raises(CheckpointError, match="pickled objects.*never loaded.*safetensors"):
            load_checkpoint(model, path)
        assert not trace.exists()
        assert same(copied(model), before)

    def test_bare_pickled_code_never_runs(self, tmp_path: Path) -> None:
        trace = tmp_path / "ran"
        (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb(trace)))
        with pytest.raises(CheckpointError):
            load_checkpoint(fresh(), tmp_path / "bomb.pkl")
        assert not trace.exists()

    def test_whole_pickled_model_is_refused(self, source: nn.Module, tmp_path: Path) -> None:
        torch.save(source, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=r"pickled objects.*state_dict\(\)"):
            load_checkpoint(fresh(), tmp_path / "model.pth")

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    @pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 20, 3], ids=str)
    def test_truncated(self, suffix: str, kept: float, source: nn.Module, tmp_path: Path) -> None:
        path = save_checkpoint(source, tmp_path / f"w{suffix}")
        content = path.read_bytes()
        path.write_bytes(content[: int(kept) or int(len(content) * kept)])
        model = fresh()
        before = copied(model)
        with pytest.raises(CheckpointError, match="truncated|neither"):
            load_checkpoint(model, path)
        assert same(copied(model), before)

    def test_truncated_old_format(self, source: nn.Module, tmp_path: Path) -> None:
        path = tmp_path / "w.pth"
        torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
        content = path.read_bytes()
        for kept in (30, 1000, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:kept])
            with pytest.raises(CheckpointError):
                load_checkpoint(fresh(), path)

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            (b"", "is empty"),
            (b"not a checkpoint, only a text file\n", "neither a .pth nor a .safetensors file"),
            (b"<!DOCTYPE html><html>404</html>", "neither"),
            (b"\x00" * 100, "neither"),
            (b"PK\x03\x04" + b"\x07" * 50, "truncated or damaged"),
            (b"\xff" * 8 + b"{}", "truncated or damaged"),
        ],
        ids=["empty", "text", "html", "zeros", "zip", "huge header"],
    )
    def test_other_files(self, content: bytes, match: str, tmp_path: Path) -> None:
        path = tmp_path / "w.pth"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(fresh(), path)
        assert "w.pth" in str(caught.value)

    @pytest.mark.parametrize(
        "content", [torch.ones(3), [torch.ones(3)], {"epoch": 3}, {"state_dict": {}}, 5], ids=repr
    )
    def test_no_state_dict_inside(self, content: Any, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="no state dict"):
            load_checkpoint(fresh(), tmp_path / "w.pth")

    def test_missing_file_and_directory(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.pth"):
            create_model("emo_1m", checkpoint=tmp_path / "absent.pth")
        with pytest.raises(ValueError, match="is a directory"):
            load_checkpoint(fresh(), tmp_path)
