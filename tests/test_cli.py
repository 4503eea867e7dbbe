"""The command line: exit statuses, messages, JSON, files, and a training run that is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import emo_kernels
from emo_kernels import available_backends, create_backbone, create_model, save_checkpoint
from emo_kernels.__main__ import COMMANDS, main
from emo_kernels.backends import only_by_name
from emo_kernels.cli import check, check_cases, demo, images, options
from emo_kernels.measure.files import write_atomically, write_json
from emo_kernels.measure.pairs import compare

# A model small enough for a test, with both kinds of block.
TINY = ["depths=(1,1,2,1)", "dims=(16,24,40,42)", "dim_heads=(8,8,20,21)", "stem_dim=8"]


def run_json(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, object]:
    status = main([*argv, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (41, 67, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# ------------------------------------------------------------------------------------------------
# bad input: one line on standard error, status 2, nothing written


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "nowhere.jpg"], "nowhere.jpg does not exist"),
        (["demo", "."], "is a folder, not a photo"),
        (["demo", "text.txt"], "is not an image"),
        (["demo", "truncated.png"], "is not an image"),
        (["demo", "--device", "potato"], "--device must be cpu, cuda or cuda:N, got 'potato'"),
        (["demo", "--device", "cuda:99"], "asks for a GPU; torch sees"),
        (["explain", "emo_9m"], "emo_1m"),
        (["explain", "emo_1m", "--size", "1", "2", "3", "4"], "--size must be"),
        (["explain", "emo_1m", "--size", "0"], "--size must be"),
        (["explain", "emo_1m", "--size", "9000000"], "memory"),
        (["explain", "emo_1m", "--set", "depths"], "--set must be NAME=VALUE, got 'depths'"),
        (["explain", "emo_1m", "--set", "banana=1"], "banana"),
        (["explain", "emo_1m", "--backend", "banana"], "banana"),
        (["convert", "nowhere.pth", "x.safetensors"], "nowhere.pth"),
        (["convert", "text.txt", "x.safetensors"], "text.txt"),
        (["export", "emo_9m", "x.onnx"], "emo_1m"),
        (["train", "nowhere"], "nowhere is not a folder"),
        (["train", "empty"], "two class folders"),
        (["train", "digits", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["train", "digits", "--batch", "9999"], "between 1 and the"),
        (["train", "digits", "--resume"], "no checkpoint"),
        (["train", "digits", "--out", "damaged", "--resume"], "is not a checkpoint"),
        (["train", "digits", "--out", "damaged"], "exists; --resume continues it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str],
    message: str,
    photo: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photo.parent)
    Path("text.txt").write_text("this is no image and no checkpoint")
    Path("truncated.png").write_bytes(photo.read_bytes()[:200])
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/last.pt").write_bytes(b"PK\x03\x04 broken")
    before = sorted(Path().rglob("*"))
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("emo-kernels: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert sorted(Path().rglob("*")) == before


def test_traceback_option_shows_where_an_error_came_from() -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        main(["--traceback", "demo", "nowhere.jpg"])


@pytest.mark.parametrize("argv", [[], ["banana"], ["info", "--banana"], ["explain"]])
def test_usage_error_is_status_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage: emo-kernels" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: emo-kernels {command}" in capsys.readouterr().out


def test_missing_library_is_named_with_the_way_to_install_it() -> None:
    code = """
import sys
from emo_kernels.__main__ import main
for command, library in [line.split() for line in sys.argv[1:]]:
    sys.modules[library] = None  # as if it were not installed
    assert main([command, "--help"]) == 2
    del sys.modules[library]
"""
    missing = ["demo matplotlib", "demo sklearn", "train PIL", "export onnxscript"]
    done = subprocess.run(
        [sys.executable, "-c", code, *missing], capture_output=True, text=True, check=True
    )
    extra = "'emo_kernels[demo]'"
    assert done.stderr.splitlines() == [
        f"emo-kernels: demo needs matplotlib, which is not installed: pip install {extra}",
        f"emo-kernels: demo needs sklearn, which is not installed: pip install {extra}",
        f"emo-kernels: train needs PIL, which is not installed: pip install {extra}",
        "emo-kernels: export needs onnxscript, which is not installed: "
        "pip install onnx onnxscript onnxruntime",
    ]


def test_package_imports_no_optional_library() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch itself imports tqdm where it is installed
        "import emo_kernels\n"
        "optional = {'sklearn', 'matplotlib', 'PIL', 'tqdm', 'onnx', 'emo_kernels.cli'}\n"
        "print(sorted(optional & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------
# what the commands print


def test_info_tells_versions_machine_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_json(capsys, "info")
    assert status == 0
    assert isinstance(report, dict)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["backends"]["reference"] is None
    assert main(["info"]) == 0
    assert "reference" in capsys.readouterr().out


def test_explain_gives_a_row_for_every_block(capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_json(capsys, "explain", "emo_1m", "--size", "3", "64", "64")
    assert status == 0
    text = json.dumps(report)
    assert "stage1.0" in text
    assert "stage4.2" in text


@pytest.mark.parametrize(
    ("size", "shape"),
    [([64], (1, 3, 64, 64)), ([40, 50], (1, 3, 40, 50)), ([1, 40, 50], (1, 1, 40, 50))],
)
def test_size_option(size: list[int], shape: tuple[int, ...]) -> None:
    assert options.input_shape(size) == shape


# ------------------------------------------------------------------------------------------------
# the judge of numbers


def test_compare_passes_rounding_and_catches_an_error() -> None:
    generator = torch.Generator().manual_seed(0)
    oracle = torch.randn(4000, generator=generator, dtype=torch.float64)
    noise = 1 + 2e-7 * torch.randn(4000, generator=generator, dtype=torch.float64)
    plain = (oracle * noise).float()
    assert compare((oracle * noise.flip(0)).float(), plain, oracle).ok
    for wrong in (plain * (1 + 3e-6), plain.index_fill(0, torch.tensor(7), torch.nan)):
        assert not compare(wrong, plain, oracle).ok
    one_off = plain.clone()
    one_off[5] += 2e-5
    assert not compare(one_off, plain, oracle).ok


def test_demo_names_every_disagreement() -> None:
    agreement = {"ok": True, "error": 3e-7, "allowed": 5e-7}
    photo = {"inputs": [{"width": 224, "height": 224, "agreement": agreement}]}
    digits = {
        "largest_early_gap": 1e-7,
        "exact_steps": 5,
        "accuracy": {"plain": 0.98, "accelerated": 0.975},
    }
    assert demo._disagreements(photo, digits, quick=False) == []
    agreement["ok"] = False
    digits |= {"largest_early_gap": float("nan"), "accuracy": {"plain": 0.98, "accelerated": 0.9}}
    found = demo._disagreements(photo, digits, quick=False)
    assert len(found) == 3
    assert "224 x 224" in found[0]
    assert "loss curves" in found[1]
    assert "accelerated: held-out accuracy is 90.00%" in found[2]


# ------------------------------------------------------------------------------------------------
# files and images


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "numbers.json"
    write_json(path, {"a": 1})

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["numbers.json"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_photos_of_every_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    Image.new(mode, (5, 3)).save(path)
    photo = images.open_photo(path)
    assert images.normalized(photo).shape == (3, 3, 5)
    assert images.normalized(images.centre_crop(photo, 8)).shape == (3, 8, 8)


def test_normalized_removes_the_mean_of_imagenet() -> None:
    grey = Image.new("RGB", (1, 1), (124, 116, 104))
    assert images.normalized(grey).abs().max() < 0.01


def test_random_crop_depends_on_its_seed_alone(photo: Path) -> None:
    picture = images.open_photo(photo)
    first, again, other = (images.random_crop(picture, 16, seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()


# ------------------------------------------------------------------------------------------------
# checkpoints


def convert(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, object]:
    status, report = run_json(capsys, "convert", *map(str, argv))
    assert status == 0
    assert isinstance(report, dict)
    return report


def test_convert_finds_the_model_and_keeps_every_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("emo_1m", num_classes=7)
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    source, safe, back = (tmp_path / name for name in ("in.pth", "mid.safetensors", "out.pth"))
    torch.save({"epoch": 3, "state_dict": wrapped}, source)
    assert convert(capsys, source, safe)["model"] == "emo_1m"
    assert convert(capsys, safe, back, "--model", "EMO_1M")["left_out"] == []
    result = torch.load(back, weights_only=True)
    assert result.keys() == model.state_dict().keys()
    assert all(torch.equal(result[name], t) for name, t in model.state_dict().items())


def test_convert_a_backbone_with_special_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"depths": (1, 1, 1, 1), "dw_kss": 7}
    source, target = tmp_path / "in.pth", tmp_path / "out.safetensors"
    save_checkpoint(create_backbone("emo_5m", in_chans=4, **fields), source)
    special = [f"{name}={value}" for name, value in fields.items()]
    report = convert(capsys, source, target, "--set", *special)
    assert report["model"] == "emo_5m (backbone)"
    assert target.exists()


@pytest.mark.parametrize("more", [[], ["--model", "emo_1m"]], ids=["any", "named"])
def test_convert_refuses_what_fits_no_model(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save({"head.weight": torch.zeros(10, 168)}, source)
    assert main(["convert", str(source), str(target), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("missing" if more else "fits none of emo_1m") in error
    assert not target.exists()


# ------------------------------------------------------------------------------------------------
# the longer commands


def test_check_passes_on_every_operator_and_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_MODELS", ())
    status, report = run_json(capsys, "check")
    assert status == 0
    assert isinstance(report, dict)
    compared = {row["what"].split()[0] for row in report["rows"] if row["result"] == "ok"}
    assert compared == set(emo_kernels.ops.__all__)
    usable = {n for n, reason in available_backends().items() if not (reason or only_by_name(n))}
    assert {row["backend"] for row in report["rows"]} == usable


def test_check_catches_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = check._results

    def planted(case: check_cases.Case, backend: str, dtype: torch.dtype, device: str) -> object:
        results = honest(case, backend, dtype, device)
        return [r * (1 + 1e-5) for r in results] if dtype == torch.float32 else results

    monkeypatch.setattr(check, "_MODELS", ())
    monkeypatch.setattr(check, "CASES", check_cases.CASES[:1])
    monkeypatch.setattr(check, "_results", planted)
    status, report = run_json(capsys, "check")
    assert status == 1
    assert isinstance(report, dict)
    assert [row["result"] for row in report["rows"] if row["backend"] == "reference"] == ["FAILED"]
    assert main(["check"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.slow
def test_check_with_whole_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert "whole model" in capsys.readouterr().out


@pytest.mark.slow
def test_export_runs_in_onnx_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime judges the exported file")
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
    out = tmp_path / "model.onnx"
    argv = ["export", "emo_1m", str(out), "--set", *TINY, "--size", "64", "--check"]
    status, report = run_json(capsys, *argv)
    assert status == 0
    assert isinstance(report, dict)
    assert report["match"]
    assert report["operator_domains"] == ["ai.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_demo_quick(photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "emo_kernels", "demo", str(photo), "--quick", "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers == json.loads((tmp_path / "out" / "demo.json").read_text())
    assert numbers["disagreements"] == []
    sizes = [(row["height"], row["width"]) for row in numbers["photo"]["inputs"]]
    assert sizes == [(224, 224), (41, 67)]
    # the plain model must hold at least stage 1's first expanded map: 96 channels of 112 x 112
    assert numbers["photo"]["inputs"][0]["peak_megabytes"]["plain"] > 96 * 112 * 112 * 4 / 2**20
    assert all(min(r["peak_megabytes"].values()) > 0 for r in numbers["photo"]["inputs"])
    with Image.open(tmp_path / "out" / "demo.png") as chart:
        assert min(chart.size) > 400
