"""explain and the table of backends: every choice is stated, with the reason against the others."""

import json
import os
import subprocess
import sys

import pytest
import torch
from grid import INTERPRETED

import emo_kernels as ek
from emo_kernels import backends

NAMES = {"reference", "cpu", "triton", "cuda"}


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture
def block():
    return ek.nn.iRMB(16, 16, exp_ratio=2, attn_s=False).eval()


def test_every_backend_is_listed_with_its_reason():
    found = ek.available_backends()
    assert set(found) == NAMES
    assert found["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in found.values())
    if not torch.cuda.is_available():
        assert found["cuda"]
        assert found["triton"] or INTERPRETED


def test_block_not_accelerated_says_so(block):
    (row,) = ek.explain(block).rows
    assert (row.inference, row.training) == ("reference", "reference")
    assert set(row.reasons) == NAMES - {"reference"}
    assert all("call emo_kernels.accelerate" in reason for reason in row.reasons.values())


def test_every_backend_is_chosen_or_has_a_reason(block):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), ek.accelerate(block))
    report = ek.explain(model, torch.randn(2, 3, 9, 8))
    (row,) = report.rows
    assert (row.path, row.operator, row.shape) == ("1", "irmb", (2, 16, 9, 8))
    for chosen, reasons in ((row.inference, row.reasons), (row.training, row.training_reasons)):
        assert set(reasons) | {chosen, "reference"} == NAMES
        assert chosen not in reasons
    text = str(report)
    assert "inference" in text and row.inference in text
    assert all(reason in text for reason in row.reasons.values())
    assert json.loads(report.to_json())[0]["reasons"] == row.reasons


def test_explains_what_runs(block):
    """The backend named is the one whose kernel a call reaches."""
    ek.accelerate(block)
    x = torch.randn(1, 16, 9, 8)
    for context, expected in ((None, ek.explain(block, x).rows[0].inference), ("reference",) * 2):
        with ek.use_backend(context) if context else torch.no_grad(), torch.no_grad():
            assert ek.explain(block, x).rows[0].inference == expected
            with torch.profiler.profile() as profile:
                block(x)
        kernels = [event.key for event in profile.key_averages()]
        assert ("emo_kernels::irmb" in kernels) == (expected != "reference")


def test_unsupported_dtype_is_the_reason(block):
    ek.accelerate(block)
    row = ek.explain(block.to(torch.float16)).rows[0]
    assert row.inference == "reference"
    assert "float16" in row.reasons["cpu"]


def test_model_is_left_as_it_was(block):
    block.train()
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    ek.explain(block, torch.randn(2, 16, 9, 8))
    assert block.training and block.norm.training
    assert not block._forward_pre_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


def test_choice_by_name_is_obeyed_or_raises():
    x, weight = torch.randn(1, 4, 5, 6), torch.randn(4, 1, 3, 3)
    options = {"stride": 1, "padding": 1, "dilation": 1}
    ek.ops.depthwise_conv2d(x, weight, backend="reference")
    for name in NAMES:
        if backends.why_not(name, "depthwise_conv2d", "cpu", x, weight, **options):
            with pytest.raises(NotImplementedError, match=f"depthwise_conv2d: backend '{name}'"):
                ek.ops.depthwise_conv2d(x, weight, backend=name)
    with pytest.raises(
        ValueError, match="must be one of .*got 'refrence'; did you mean 'reference'"
    ):
        ek.ops.depthwise_conv2d(x, weight, backend="refrence")


def test_environment_variable_chooses_or_raises():
    call = "import emo_kernels as ek, torch; ek.ops.depthwise_conv2d({}, torch.ones(2, 1, 3, 3))"
    code = call.format("torch.ones(1, 2, 4, 4)")
    assert run_python(code, EMO_KERNELS_BACKEND="reference").returncode == 0
    assert run_python(code, EMO_KERNELS_BACKEND="").returncode == 0
    unknown = run_python(code, EMO_KERNELS_BACKEND="cuad")
    assert "EMO_KERNELS_BACKEND must be one of" in unknown.stderr
    assert "did you mean 'cuda'" in unknown.stderr
    if not torch.cuda.is_available():
        unusable = run_python(code, EMO_KERNELS_BACKEND="triton", TRITON_INTERPRET="0")
        assert "EMO_KERNELS_BACKEND 'triton' cannot run this call" in unusable.stderr
        assert "backends that can: " in unusable.stderr


def test_import_is_light():
    """Needs only torch: no dynamo, no CUDA context, nothing compiled; < 0.5 s beyond torch."""
    code = """
import sys, time
import torch
for optional in ("safetensors", "sklearn", "matplotlib", "PIL", "tqdm", "timm", "triton"):
    sys.modules[optional] = None  # an import of it fails
before = set(sys.modules)
start = time.perf_counter()
import emo_kernels
seconds = time.perf_counter() - start
new = {name.split(".")[0] for name in set(sys.modules) - before if sys.modules[name]}
third_party = new - set(sys.stdlib_module_names) - {"emo_kernels", "torch"}
heavy = {"torch._dynamo", "torch._inductor"} & set(sys.modules) - before
print(seconds, sorted(third_party), sorted(heavy),
      torch.cuda.is_initialized(), "emo_kernels._C" in sys.modules)
"""
    runs = [run_python(code) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    seconds = min(float(run.stdout.split(" ", 1)[0]) for run in runs)
    assert seconds < 0.5
    rest = runs[0].stdout.split(" ", 1)[1].strip()
    assert rest == "[] [] False False", rest
