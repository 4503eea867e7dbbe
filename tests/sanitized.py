"""Run the cpu kernels' tests with a sanitized build: ``python sanitized.py BUILD [pytest ...]``.

``make sanitize`` builds it and preloads the sanitizers. First a tensor that is one element short
must kill a process, of every instruction set: a run that sees nothing proves nothing. pytest then
runs with that build in place of the installed ``emo_kernels._C``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# Every kernel on rows with tails, and what lays memory out; under the sanitizers in minutes.
SHARE = (
    "test_irmb_cpu.py::test_fp64_runs_the_same_code",
    "test_irmb_cpu.py::test_follows_the_rule",
    "test_irmb_cpu.py::test_layouts_change_nothing",
    "test_irmb_cpu.py::test_the_entry_point_checks_what_it_relies_on",
    "test_irmb_training_cpu.py",
    "test_norm_pool_linear.py::TestNormPoolLinear::test_forward",
    "test_norm_pool_linear.py::TestNormPoolLinear::test_layouts_of_maps_and_weights",
    "test_norm_pool_linear.py::TestNormPoolLinear::test_memory_nobody_wrote_is_not_read",
    "test_conv_norm_act.py::TestConvNormAct::test_forward",
    "test_conv_norm_act.py::TestConvNormAct::test_layouts_of_maps_and_weights",
    "test_conv_norm_act_training.py::test_a_step_on_kernels",
    "test_conv_norm_act_training.py::test_every_instruction_set",
    "test_conv_norm_act_training.py::test_random_stems",
    "test_expand_depthwise.py",
    "test_large_maps.py",
    "test_tapes.py",
    "test_window_attention_maps.py",
    "test_batch_statistics.py",
)
LARGE = ("5m_", "1m_stage1", "1m_stage2", "wide_", "v2_")  # rows whose small kin are in the share


def load(build: Path) -> None:
    """Make the module under ``build`` the ``emo_kernels._C`` of this process."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    path = next(path for s in suffixes for path in build.glob(f"_C{s}"))
    spec = importlib.util.spec_from_file_location("emo_kernels._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["emo_kernels._C"] = module


def read_past_the_end() -> None:
    """An expansion of 3 pixels of 21 channels, of which the last element does not exist."""
    import torch

    from emo_kernels import _C

    x, weight, out = torch.ones(3 * 21 - 1), torch.ones(31, 21), torch.empty(3, 31)
    pointers = (x.data_ptr(), weight.data_ptr(), 0, 0, 0, out.data_ptr())
    _C.expand(0, (1, 3, 21, 31, 0, 3), 1e-6)(pointers, 1)


def assert_sanitizers_work(build: Path) -> None:
    """A child that reads one element too far dies of it and says so."""
    from emo_kernels import _C

    for isa in _C.available_isas():
        child = subprocess.run(
            [sys.executable, __file__, str(build), "--read-past-the-end"],
            env={**os.environ, "EMO_KERNELS_ISA": isa},
            capture_output=True,
            text=True,
            timeout=300,
        )
        caught = child.returncode != 0 and "heap-buffer-overflow" in child.stderr
        assert caught, f"{isa}: a read past the end went unseen\n{child.stderr[-2000:]}"
        print(f"{isa}: a read past the end is caught", flush=True)


def main(build: Path, arguments: list[str]) -> int:
    """Check the sanitizers, then run the share, or what the arguments name."""
    sys.path.insert(0, str(HERE.parent))
    load(build)
    if arguments == ["--read-past-the-end"]:
        read_past_the_end()
        return 0
    assert_sanitizers_work(build)
    import pytest

    left_out = " or ".join((*LARGE, "reference"))  # which has no code of ours
    share = [*(str(HERE / name) for name in SHARE), "-m", "not slow", "-k", f"not ({left_out})"]
    return pytest.main([*(arguments or share), "-q", "-x", "-p", "no:cacheprovider"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
