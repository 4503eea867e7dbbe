"""``python -m emo_kernels tune``: what it writes, how it goes on, and what the launches read."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import fake_kernels
from fake_kernels import Parameters, key_of, rule

import emo_kernels.triton as kernels
from emo_kernels import reference
from emo_kernels.__main__ import main
from emo_kernels.cli import tune as command
from emo_kernels.triton import launch, tune
from emo_kernels.triton import record as recording


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("the search would run: there is a GPU")
    assert main(["tune", "emo_1m"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("emo-kernels: tune needs a GPU: ") and message.count("\n") == 1


def test_the_launches_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps: in the second, blocks sum their output for the next one."""
    for name in reference.__all__:  # stands in for the kernels, which would take minutes here
        if hasattr(kernels, name):
            monkeypatch.setattr(kernels, name, getattr(reference, name))
    tiny = {"depths": (1, 2, 1, 1), "dims": (8, 12, 20, 21), "dim_heads": (8, 12, 20, 21)}
    with recording.record(kernels) as calls:
        command.run_model(
            "emo_1m", tiny, (2, 3, 64, 64), torch.float32, torch.device("cpu"), "train"
        )
    names = [call.function for call in calls]
    assert names.count("batch_norm_sums") == 3  # in front of stages 1 and 2, in the first step
    assert names.count("shrink_statistics") == 3
    assert names.count("expand_backward") == 2 * 5


def options(path: Path, **changed: Any) -> argparse.Namespace:
    usual = {"out": path, "kernels": ["*"], "again": False, "minutes": 0.0}
    return argparse.Namespace(**usual | changed)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more functions in the namespace."""
    fake_kernels.install(monkeypatch)


@pytest.fixture
def calls(fakes: None) -> Iterator[list[recording.Call]]:
    """Calls of two sizes."""
    with recording.record(kernels) as made:
        for side in (8, 16):
            kernels.quadrupled(torch.ones(1, 1, side, side))
    yield made


def timer(run: Callable[[], object]) -> float:
    """Larger blocks are faster, up to 256."""
    blocks: list[int] = []
    outer = launch._listener
    assert outer is not None

    def listen(kernel: str, sizes: Parameters, usual: Parameters) -> Parameters:
        found = outer(kernel, sizes, usual)
        blocks.append(found["BLOCK_P"])
        return found

    with launch.listening(listen):
        run()
    return 10.0 - sum(min(block.bit_length(), 9) for block in blocks) / 10


def test_every_launch_is_searched_and_written(calls: list[recording.Call], tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuned.json"
    results = command.search_launches(calls, timer, options(path, kernels=["quadrupled_fwd"]))
    assert results["entries"] == 2 and results["left"] == 0
    table = json.loads(path.read_text())
    assert table.keys() == {key_of("quadrupled_fwd", 64), key_of("quadrupled_fwd", 256)}
    assert all(row == {"BLOCK_P": 256, "num_warps": 4} for row in table.values())
    searched = [row["launch"] for row in results["launches"]]
    assert searched == [key_of("quadrupled_fwd", 256), key_of("quadrupled_fwd", 64)]  # large first
    assert launch.read_table(path) == table
    again = command.search_launches(calls, timer, options(path, kernels=["quadrupled_fwd"]))
    assert again["launches"] == [] and again["done_before"] == 2
    forced = command.search_launches(
        calls, timer, options(path, kernels=["quadrupled_fwd"], again=True)
    )
    assert len(forced["launches"]) == 2
    with pytest.raises(ValueError, match="no launch that --kernels names"):
        command.search_launches(calls, timer, options(path, kernels=["banana*"]))
    assert "quadrupled_fwd" in command._table(results["launches"])


def test_a_dead_gpu_is_not_met_twice(calls: list[recording.Call], tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    for _ in range(2):  # num_warps = 2 is an illegal access in both sizes
        with pytest.raises(tune.DeadGpuError):
            command.search_launches(calls, timer, options(path, kernels=["doubled_fwd"]))
    results = command.search_launches(calls, timer, options(path, kernels=["doubled_fwd"]))
    assert results["done_before"] == 2 and results["launches"] == []


def test_a_limit_of_time_leaves_the_rest(calls: list[recording.Call], tmp_path: Path) -> None:
    results = command.search_launches(
        calls, timer, options(tmp_path / "t.json", kernels=["quad*"], minutes=1e-9)
    )
    assert results["left"] == 2
    assert "2 left: run it again" in command._left(results)


SCRIPT = """
import argparse, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import fake_kernels, test_tune_command
import emo_kernels.triton as kernels
from emo_kernels.triton import record as recording
for function in (fake_kernels.doubled, fake_kernels.quadrupled):
    setattr(kernels, function.__name__, function)
import torch
with recording.record(kernels) as calls:
    for side in (4, 8, 16, 32):
        kernels.quadrupled(torch.ones(1, 1, side, side))
def slow(run):
    time.sleep({sleep})
    return test_tune_command.timer(run)
found = test_tune_command.command.search_launches(
    calls, slow, test_tune_command.options(Path({path!r}), kernels=["quad*"])
)
print("done before", found["done_before"], "entries", found["entries"])
"""


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"

    def start(sleep: float) -> subprocess.Popen[str]:
        tests = str(Path(__file__).parent)
        script = SCRIPT.format(tests=tests, sleep=sleep, path=str(path))
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    first = start(0.1)
    end = time.monotonic() + 120
    while not path.is_file() and time.monotonic() < end and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert first.returncode == -9, "it ended before it was killed"
    written = len(json.loads(path.read_text()))
    assert 1 <= written < 4
    output, errors = start(0.0).communicate(timeout=120)
    assert f"done before {written} entries 4" in output, errors
    assert len(launch.read_table(path)) == 4
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["tuned.json"]


# ------------------------------------------------------------------- what the launches then read


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of tuned parameters, as on a GPU of sm_90."""
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(launch.TUNED_VARIABLE, str(path))
    monkeypatch.setattr(launch, "architecture", lambda: 90)
    launch.forget_tuned()
    yield path
    launch.forget_tuned()


def test_tuned_parameters_come_before_the_rule(table: Path) -> None:
    table.write_text(json.dumps({"doubled_fwd/sm_90/p=128": {"BLOCK_P": 256}}))
    assert launch.tiles("doubled_fwd", rule, p=100) == {"BLOCK_P": 256, "num_warps": 4}
    assert launch.tiles("doubled_fwd", rule, p=200) == {"BLOCK_P": 64, "num_warps": 4}
    table.write_text("{}")
    launch.forget_tuned()
    assert launch.tiles("doubled_fwd", rule, p=100) == {"BLOCK_P": 64, "num_warps": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not"),
        ("[]", "does not"),
        ('{"k/sm_90/p=128": 3}', "does not"),
        ('{"k/sm_90/p=128": {"BLOCK_P": 48}}', "BLOCK_P must be a power of two, got 48"),
        ('{"k/sm_90/p=128": {"BLOCK_P": "64"}}', "must be an integer"),
        ('{"k/sm_90/p=128": {"BLOCK_P": true}}', "must be an integer"),
        ('{"k/sm_90/p=128": {"BLOCK_P": -64}}', "must be an integer"),
        ('{"k/sm_90/p=128": {"num_warps": 3}}', "num_warps must be a power of two up to 32, got 3"),
        ('{"k/sm_90/p=128": {"num_warps": 64}}', "num_warps must be a power of two up to 32"),
        ('{"k/sm_90/p=128": {"num_stages": 9}}', "num_stages must be 1 to 8, got 9"),
        ('{"k/sm_90/p=128": {"BLOCK_Q": 64}}', "BLOCK_Q, which k does not take"),
    ],
)
def test_a_damaged_table_is_refused(table: Path, text: str, message: str) -> None:
    table.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        launch.tiles("k", rule, p=100)
    assert str(table) in str(caught.value)
