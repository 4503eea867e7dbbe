"""The shim over Triton's interpreter is needed, and with it bf16 is what torch computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import interpreter
import numpy as np
import other_triton
import pytest
import torch
from other_triton import path_of

pytest.importorskip("triton", reason="triton is not installed")

EXACT = {
    *(f"{name}{kind}" for name in ("add", "sub", "mul", "chain", "negate", "less", "loop")
      for kind in ("", " of any bits")),
    "abs", "abs of any bits", "fma", "integer", "fp32 to bf16", "ties to even", "fp16 to bf16",
    "bf16 to fp32", "bf16 to fp16", "sum", "max", "dot",
}  # fmt: skip
WRONG_WITHOUT = ("add", "mul", "fp32 to bf16", "ties to even", "sum", "dot")


def outcome(mode: str, version: str | None = None) -> dict[str, str]:
    script = Path(interpreter.__file__).with_name("interpreter_kernels.py")
    environment = other_triton.environment(version, interpret=True)
    child = subprocess.run(
        [sys.executable, str(script), mode],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    first, *lines = child.stdout.splitlines()
    assert version is None or first == f"triton {version}"
    return dict(line.split(": ", 1) for line in lines)


def test_bf16_with_the_shim_is_what_torch_computes() -> None:
    results = outcome("shim")
    assert set(results) == EXACT
    assert {name: text for name, text in results.items() if text != "same"} == {}


def test_bf16_without_the_shim_is_wrong() -> None:
    """When this fails Triton has learnt bf16, and the shim can go."""
    results = outcome("plain")
    for name in WRONG_WITHOUT:
        assert "differs" in results[name], name


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0"])
def test_other_versions_of_triton(version: str) -> None:
    path_of(version)
    assert all(text == "same" for text in outcome("shim", version).values())


def test_patterns_round_as_torch_does() -> None:
    """Every bf16 there is, every tie between two, and both neighbours of each tie."""
    every = np.arange(2**16, dtype=np.uint16)
    values = interpreter.decode(every)
    assert np.array_equal(values, torch.from_numpy(every).view(torch.bfloat16).float(), True)
    number = ~np.isnan(values)
    assert np.array_equal(interpreter.encode(values)[number], every[number])
    assert (interpreter.encode(values)[~number] == 0x7FC0).all()
    for tail in (0x7FFF, 0x8000, 0x8001):
        bits = (every.astype(np.uint32) << 16) + np.uint32(tail)
        want = torch.from_numpy(bits.view(np.float32)).bfloat16().view(torch.uint16).numpy()
        numbers = ~np.isnan(bits.view(np.float32))
        assert np.array_equal(interpreter.encode(bits.view(np.float32))[numbers], want[numbers])


def test_it_must_be_switched_on_before_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(interpreter.VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "triton", sys)
    with pytest.raises(AssertionError, match="before anything imports triton"):
        interpreter.switch_on()
