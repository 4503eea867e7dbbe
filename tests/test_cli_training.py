"""The ``train`` command: its recipe, and runs that are killed, resumed or refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emo_kernels.__main__ import main
from emo_kernels.cli import training

# A model small enough for a test, with both kinds of block.
TINY = ["depths=(1,1,2,1)", "dims=(16,24,40,42)", "dim_heads=(8,8,20,21)", "stem_dim=8"]


def train(out: Path, *more: str, data: str = "digits") -> list[str]:
    small = ["--set", *TINY, "--batch", "256", "--epochs", "3", "--lr", "0.003"]
    return ["train", data, *small, "--out", str(out), "--threads", "1", *more]


def test_learning_rate_follows_the_published_schedule() -> None:
    recipe = training.Recipe(epochs=300, batch=2048, lr=6e-3, warmup_epochs=20)
    rate = [recipe.learning_rate(step, 625) for step in (0, 6250, 12500, 187499)]
    # 5.934e-3 is the first rate after the warm-up in the published logs
    assert rate == pytest.approx([1e-6, (6e-3 + 1e-6) / 2, 5.934e-3, 1e-6], rel=1e-3)


def test_vectors_do_not_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, exempt = training.parameter_groups(model, 0.05)
    assert [p.ndim for p in decayed["params"]] == [2]
    assert [p.ndim for p in exempt["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)


# Runs ``train`` in a process that dies in its eighth step or half way through a checkpoint.
DIES = """
import io, os, signal, sys
import torch
from emo_kernels.__main__ import main
from emo_kernels.cli import training

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def step(self, honest=training.Trainer.step):
    return die() if self.step_index == 7 else honest(self)

def save(state, file, honest=torch.save):
    whole = io.BytesIO()
    honest(state, whole)
    half = len(whole.getvalue()) // 2 if state["step"] > 5 else None
    file.write(whole.getvalue()[:half])
    file.flush()
    half is None or die()

if sys.argv[1] == "step":
    training.Trainer.step = step
else:
    torch.save = save
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main(train(out, "--ema", "0.9")) == 0
    return out


@pytest.mark.parametrize("moment", ["step", "write"])
def test_killed_run_resumes_bit_for_bit(moment: str, whole_run: Path, tmp_path: Path) -> None:
    argv = train(tmp_path, "--ema", "0.9")
    child = subprocess.run([sys.executable, "-c", DIES, moment, *argv], check=False)
    assert child.returncode == -signal.SIGKILL
    assert training.read_training_state(tmp_path / "last.pt")["step"] == 5
    assert main([*argv, "--resume"]) == 0
    logs = [json.loads((run / "log.json").read_text()) for run in (whole_run, tmp_path)]
    assert logs[0]["losses"] == logs[1]["losses"]
    states = [training.read_training_state(run / "last.pt") for run in (whole_run, tmp_path)]
    for part in ("model", "average"):
        for name, tensor in states[0][part].items():
            assert torch.equal(tensor, states[1][part][name]), f"{part} {name}"


def test_resume_with_other_options_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "digits", "--set", *TINY, "--batch", "1400", "--epochs", "1"]
    argv += ["--out", str(tmp_path)]
    assert main(argv) == 0
    assert (tmp_path / "model.pth").exists()
    for change, message in ((["--lr", "0.1"], "lr was"), (["--plain"], "plain was False")):
        capsys.readouterr()
        assert main([*argv, *change, "--resume"]) == 2
        assert message in capsys.readouterr().err


def test_train_on_a_folder_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for i in range(20):
            noise = rng.integers(-30, 30, (24, 40, 3)) + level
            Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    argv = train(tmp_path / "out", "--side", "32", data=str(tmp_path / "data"))
    argv[argv.index("256")] = "12"
    assert main(argv) == 0
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert [record["epoch"] for record in log["epochs"]] == [1, 2, 3]
    assert len(log["losses"]) == 3 * (36 // 12)
    assert (tmp_path / "out" / "model.pth").exists()
