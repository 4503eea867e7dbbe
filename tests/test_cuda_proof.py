"""When the CUDA kernels are chosen: compiled for the GPU, and proven on its architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from emo_kernels import _C, backends
from emo_kernels.cuda import proof


def test_unproven_kernels_are_run_by_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "proof.json"
    monkeypatch.setenv(proof.PROOF_VARIABLE, str(file))
    reason = proof.unproven((9, 0))
    assert reason is not None
    assert reason.startswith("compiled, not yet proven on this architecture (sm_90)")
    row = {"sources": _C.cuda_sources(), "gpu": "NVIDIA H200"}
    file.write_text(json.dumps({"sm_90": row}))
    assert proof.unproven((9, 0)) is None
    assert proof.unproven((8, 0)) is not None
    file.write_text(json.dumps({"sm_90": {**row, "sources": "of before"}}))
    assert proof.unproven((9, 0)) == reason
    file.write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object of proofs"):
        proof.unproven((9, 0))


def test_backends_offer_what_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of backends, as on a GPU whose kernels nobody has run."""
    reasons: list[str | None] = ["compiled, not yet proven on this architecture (sm_90)"]
    row = backends._TABLE["cuda"]._replace(unmet_need=lambda: None, unproven=lambda: reasons[0])
    monkeypatch.setitem(backends._TABLE, "cuda", row)
    caches = (backends._unavailable, backends._unproven, backends._candidates)
    try:
        for cached in caches:
            cached.cache_clear()
        assert backends.available_backends()["cuda"] == backends.only_by_name("cuda") == reasons[0]
        assert "cuda" not in backends.candidates("depthwise_conv2d", "cuda")
        x, weight = torch.empty(1, 4, 5, 5), torch.empty(4, 1, 3, 3)
        options = {"stride": 1, "padding": 1, "dilation": 1}
        assert backends.why_not("cuda", "depthwise_conv2d", "cuda", x, weight, **options) is None
        reasons[0] = None
        for cached in caches:
            cached.cache_clear()
        assert backends.available_backends()["cuda"] is None
        assert backends.candidates("depthwise_conv2d", "cuda")[0] == "cuda"
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "80-real,90a-real,80-virtual", True),
        ((8, 9), "80-real,90a-real", True),
        ((9, 0), "90a-real", True),
        ((10, 0), "90a-real", False),
        ((10, 0), "90a-real,80-virtual", True),
        ((7, 5), "80,90a", False),
        ((12, 0), "100-real", False),
        ((12, 0), "100", True),
        ((9, 0), "", False),
    ],
)
def test_which_gpus_run_what_was_compiled(
    capability: tuple[int, int], architectures: str, runs: bool
) -> None:
    assert proof.runs_on(capability, architectures) == runs


def test_the_reason_is_the_build_the_driver_or_the_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = {"cuda": False, "cuda_reason": "built with EMO_CUDA=OFF", "cuda_architectures": ""}
    monkeypatch.setattr(_C, "build_info", lambda: build)
    assert proof.missing() == "the kernels are not compiled: built with EMO_CUDA=OFF"
    build |= {"cuda": True, "cuda_architectures": "80-real"}
    monkeypatch.setattr(_C, "cuda_report", lambda: {"error": "driver version is insufficient"})
    assert proof.missing() == "the CUDA runtime reports: driver version is insufficient"
    monkeypatch.setattr(_C, "cuda_report", lambda: {"error": None})
    assert proof.missing() is None and proof.not_compiled_for((8, 6)) is None
    assert proof.not_compiled_for((9, 0)) == (
        "the kernels are compiled for 80-real, not for sm_90; build with EMO_CUDA_ARCHITECTURES=90"
    )
