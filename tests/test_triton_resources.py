"""Every Triton kernel, compiled for GPUs that are not here, keeps to their registers and memory.

The layers are those of the four models, in the training step that runs them. Compiling needs a
process without the interpreter; what was compiled is remembered below the cache directory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import other_triton
import pytest

pytest.importorskip("triton", reason="triton is not installed")
if not sys.platform.startswith("linux"):
    pytest.skip("Triton's compiler is built for Linux", allow_module_level=True)

from emo_kernels.__main__ import main
from emo_kernels.cli.resources import _table
from emo_kernels.triton import resources
from emo_kernels.triton.resources import Resources

MODELS = ("emo_1m", "emo_2m", "emo_5m", "emo_6m")
# Squeeze-excite; a batch norm in front; layer norm and attention.
SOME_BLOCKS = ("stage0.1", "stage1.1", "stage3.1")
MATRIX_OPS = {80: {"HMMA"}, 90: {"HMMA", "HGMMA"}, 100: {"HMMA", "UTCHMMA"}}


@cache
def rows(
    models: tuple[str, ...],
    arch: int,
    *options: str,
    blocks: tuple[str, ...] = (),
    version: str | None = None,
) -> list[dict[str, Any]]:
    """What ``bench --resources --json`` reports."""
    command = [sys.executable, "-m", "emo_kernels", "bench", *models, "--resources", "--json"]
    command += ["--arch", str(arch), "--batch", "128", *options]
    command += ["--blocks", *blocks] if blocks else []
    environment = other_triton.environment(version, interpret=False)
    child = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=3600, env=environment
    )
    assert child.returncode in (0, 1) and child.stdout, child.stderr[-2000:]
    return json.loads(child.stdout)["rows"]


def assert_no_faults(found: list[dict[str, Any]], arch: int, *, tensor_cores: bool) -> None:
    faults = [
        f"{row['kernel']} in {row['model']} {row['block']} on sm_{row['arch']}: {fault}"
        for row in found
        for fault in row["faults"]
    ]
    assert not faults, "\n".join(faults)
    products = [row for row in found if row["dots"]]
    assert bool(products) == tensor_cores
    for row in products:
        assert row["matrix_ops"].keys() <= MATRIX_OPS[arch], row


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_some_layers(arch: int) -> None:
    blocks = SOME_BLOCKS if arch == 90 else ("stage3.1",)
    found = rows(("emo_5m",), arch, blocks=blocks)
    assert_no_faults(found, arch, tensor_cores=True)
    for part in ("expand", "depthwise_conv2d", "shrink", "window_attention"):
        for direction in ("fwd", "bwd"):
            assert any(row["kernel"].startswith(f"{part}_{direction}") for row in found), part
    wide = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    assert any(wide in row["matrix_ops"] for row in found)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_every_layer(model: str, arch: int, dtype: str, frozen: bool) -> None:
    options = ("--dtype", dtype, *(["--frozen"] if frozen else []))
    found = rows((model,), arch, *options)
    assert_no_faults(found, arch, tensor_cores=dtype != "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("model", MODELS)
def test_every_layer_with_the_triton_of_torch_2_11(model: str, arch: int) -> None:
    assert_no_faults(rows((model,), arch, version="3.6.0"), arch, tensor_cores=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arch", "75"], "--arch must be of 80, 86, 89, 90, 100, 120, got 75"),
        (["--blocks", "stage9.9"], "--blocks of emo_1m must be of stage0.1, stage1.0, "),
    ],
)
def test_unknown_blocks_and_architectures_are_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["bench", "emo_1m", "--resources", *options]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------ the yardstick


GOOD = Resources(
    "k", 90, warps=8, registers=128, shared=1000, blocks=2, dots=1, matrix_ops={"HGMMA": 4}
)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spills": 3}, "3 spill instructions"),
        ({"registers": 256}, "256 registers"),
        ({"blocks": 0, "shared": 300_000}, "300000 bytes of shared memory"),
        ({"matrix_ops": {}}, "tl.dot without a tensor-core instruction"),
        ({"error": "ValueError: no"}, "ValueError: no"),
    ],
)
def test_each_fault_is_found(changes: dict[str, Any], fault: str) -> None:
    assert GOOD.faults == []
    assert GOOD._replace(**changes).faults == [fault]


def test_the_table_has_a_line_for_each_launch() -> None:
    row = {"model": "emo_5m", "block": "stage3.1", "grid": (130, 2), "bytes": 50_800_000}
    good = {**GOOD._asdict(), **row, "faults": []}
    bad = {**good, "kernel": "shrink_bwd", "spills": 3, "faults": ["3 spill instructions"]}
    header, _, *lines = _table([good, bad]).splitlines()
    assert header.split()[:4] == ["kernel", "arch", "model", "block"]
    assert lines[0].split()[-4:] == ["HGMMA", "4", "50.8", "-"]
    assert lines[1].startswith("shrink_bwd") and lines[1].endswith("3 spill instructions")


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "columns", "blocks", "limit"),
    [  # CUDA's occupancy calculator
        (80, 32, 0, 8, 0, 8, "warps"),
        (80, 128, 0, 8, 0, 2, "registers"),
        (80, 129, 0, 8, 0, 1, "registers"),
        (90, 255, 0, 8, 0, 1, "registers"),
        (80, 32, 84_000, 4, 0, 1, "shared"),
        (90, 32, 100_000, 4, 0, 2, "shared"),
        (80, 32, 163 * 1024, 4, 0, 1, "shared"),
        (80, 32, 163 * 1024 + 1, 4, 0, 0, "shared"),
        (90, 16, 0, 1, 0, 32, "blocks"),
        (100, 32, 0, 4, 256, 2, "tensor memory"),
    ],
)
def test_occupancy(
    arch: int, registers: int, shared: int, warps: int, columns: int, blocks: int, limit: str
) -> None:
    assert resources._blocks(arch, registers, shared, warps, columns) == (blocks, limit)


def test_products_for_tensor_cores_are_told_from_the_others() -> None:
    dot = "%3 = tt.dot %0, %1, %2{} : tensor<64x32x{}> * tensor<32x64x{}> -> tensor<64x64xf32>"
    assert resources._dots(dot.format("", "bf16", "bf16")) == 1
    assert resources._dots(dot.format(", inputPrecision = tf32", "f32", "f32")) == 1
    assert resources._dots(dot.format("", "f32", "f32")) == 0
    assert resources._dots("%1 = tt.splat %0 : f32 -> tensor<64x64xf32>") == 0


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET must be unset"), resources.recorded(90):
        pass
