"""Recording the launches of calls, and the search for their parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import fake_kernels
from fake_kernels import Parameters, doubled, key_of, rule

import emo_kernels.triton as kernels
from emo_kernels import ops
from emo_kernels.triton import launch, tune
from emo_kernels.triton import record as recording

# ------------------------------------------------------------------------------------ the search


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("BLOCK_P", 64, [32, 128]),
        ("BLOCK_P", 16, [32]),
        ("BLOCK", 2048, [1024]),
        ("BLOCK_O2", 0, []),  # off
        ("num_warps", 1, [2]),
        ("num_warps", 16, [8]),
        ("num_stages", 1, [2]),
        ("num_stages", 3, [2, 4]),
        ("num_stages", 6, [5]),
        ("HEADS", 5, [2, 10]),
        ("HEADS", 1, [2]),
        ("SHARES", 264, [132, 528]),
    ],
)
def test_neighbours(name: str, value: int, expected: list[int]) -> None:
    assert tune.neighbours(name, value) == expected


def bowl(best: Parameters) -> Callable[[Parameters], float]:
    """Milliseconds that grow with every step away from ``best``."""

    def cost(parameters: Parameters) -> float:
        steps = 0.0
        for name, value in parameters.items():
            if name == "num_stages":
                steps += abs(value - best[name])
            else:
                steps += abs(value.bit_length() - best[name].bit_length())
        return 1.0 + 0.25 * steps

    return cost


START = {"BLOCK_P": 64, "BLOCK_M": 64, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize(
    "best",
    [
        START,
        {"BLOCK_P": 512, "BLOCK_M": 16, "num_warps": 8, "num_stages": 4},
        {"BLOCK_P": 16, "BLOCK_M": 256, "num_warps": 1, "num_stages": 1},
    ],
    ids=["the rule is best", "far up and down", "far down and up"],
)
def test_search_finds_the_bottom_of_a_bowl(best: Parameters) -> None:
    cost = bowl(best)
    found = tune.search(START, cost)
    assert found.parameters == best
    assert found.milliseconds == 1.0
    assert found.rule_milliseconds == cost(START)
    assert found.tried <= 40


def test_search_goes_around_what_does_not_run_and_measures_nothing_twice() -> None:
    cost = bowl({"BLOCK_P": 256, "BLOCK_M": 128, "num_warps": 4, "num_stages": 2})
    seen: list[Parameters] = []

    def measure(parameters: Parameters) -> float | None:
        assert parameters not in seen
        seen.append(dict(parameters))
        return None if parameters["BLOCK_P"] * parameters["BLOCK_M"] > 16384 else cost(parameters)

    found = tune.search(START, measure)
    assert found.parameters["BLOCK_P"] * found.parameters["BLOCK_M"] <= 16384
    assert found.milliseconds is not None and found.milliseconds < cost(START)
    assert found.tried == len(seen)


def test_search_keeps_the_rule_when_differences_are_noise() -> None:
    times = iter([1.0] + [0.995] * 1000)
    assert tune.search(START, lambda _: next(times)).parameters == START


def test_search_ends() -> None:
    """Also where every step pays, and where the rule's own parameters do not run."""
    times = iter(0.9**i for i in range(10**6))
    assert tune.search(START, lambda _: next(times), limit=15).tried == 15
    found = tune.search(START, lambda _: None)
    assert found == tune.Found(START, None, None, 1)


# -------------------------------------------------------------------------------------- recording


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more functions in the namespace."""
    fake_kernels.install(monkeypatch)


def test_recording_names_calls_arguments_and_launches(fakes: None) -> None:
    x = torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before = dict(vars(kernels))
    with recording.record(kernels) as calls:
        kernels.doubled(x, None, keep=True)
        kernels.quadrupled(x)
        kernels.doubled(torch.zeros_like(x), None, keep=True)
    assert dict(vars(kernels)) == before
    assert [call.function for call in calls] == ["doubled", "quadrupled", "doubled", "doubled"]
    assert [call.inner for call in calls] == [False, False, True, False]
    first = calls[0]
    spec = recording.TensorSpec((2, 3, 4, 4), x.stride(), torch.float32, "cpu", 0, 0)
    assert first.args == (spec, None) and first.options == {"keep": True}
    assert first.launches == [key_of("doubled_fwd", 96)]
    kinds = recording.distinct(calls)
    assert [call.count for call in kinds] == [2, 1, 1]
    found = recording.launches(calls)
    assert list(found) == [key_of("doubled_fwd", 96), key_of("quadrupled_fwd", 96)]
    assert found[key_of("doubled_fwd", 96)] is first
    with recording.record(kernels) as nothing:
        pass
    doubled(x)
    assert nothing == []


def test_arguments_are_the_same_numbers_each_time(fakes: None) -> None:
    affine = torch.randn(4, 5)
    x = torch.randn(4, 2, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with recording.record(kernels) as calls:
        kernels.doubled(x, affine[1], keep=[affine, True, None, affine[3]])
    (found, row), options = calls[0].arguments()
    whole, true, none, last = options["keep"]
    assert found.stride() == x.stride() and found.dtype == torch.bfloat16
    assert (true, none) == (True, None)
    assert torch.equal(whole[1], row) and torch.equal(whole[3], last)  # views, as they were
    assert whole.data_ptr() + 4 * 5 == row.data_ptr()
    again = calls[0].arguments()
    assert torch.equal(found, again[0][0]) and torch.equal(whole, again[1]["keep"][0])
    assert not torch.equal(whole, affine)


def test_numbers_suit_what_they_are() -> None:
    def spec(*shape: int, dtype: torch.dtype = torch.float32) -> recording.TensorSpec:
        strides = torch.empty(shape).stride()
        return recording.TensorSpec(shape, strides, dtype, "cpu", 0, 0)

    generator = torch.Generator().manual_seed(0)
    assert float(spec(2, 9, dtype=torch.float64).fill(generator).min()) >= 1.0
    assert float(spec(64, 100, 1, 1).fill(generator).std()) == pytest.approx(0.1, abs=0.01)
    assert float(spec(64, 100).fill(generator).std()) == pytest.approx(0.5, abs=0.05)
    assert spec(3, dtype=torch.int64).fill(generator).tolist() == [0, 0, 0]


def test_a_candidate_must_run_and_give_the_same_results(fakes: None) -> None:
    x = torch.ones(1, 2, 32, 32)  # 2048 elements: BLOCK_P below 64 leaves some unwritten
    with recording.record(kernels) as calls:
        kernels.doubled(x)
    runs: list[object] = []
    trial = tune.Trial(
        kernels.doubled,
        calls[0],
        calls[0].launches[0],
        lambda run: float(len(runs.append(run()) or runs)),
    )
    assert trial.start == {"BLOCK_P": 64, "num_warps": 4}
    assert trial.measure({"BLOCK_P": 64, "num_warps": 4}) == 1.0
    assert trial.measure({"BLOCK_P": 128, "num_warps": 8}) == 2.0
    assert trial.measure({"BLOCK_P": 32, "num_warps": 4}) is None  # half of it is NaN
    assert trial.measure({"BLOCK_P": 64, "num_warps": 16}) is None  # out of resources
    with pytest.raises(tune.DeadGpuError, match="run the command again"):
        trial.measure({"BLOCK_P": 64, "num_warps": 2})
    assert not torch.are_deterministic_algorithms_enabled()
    assert launch._listener is None


def test_results_may_differ_by_rounding_only() -> None:
    x = torch.randn(1000)
    nan = x.clone()
    nan[3] = float("nan")
    assert tune._agree([x], [x * (1 + 1e-6)])
    assert tune._agree([nan], [nan])
    assert not tune._agree([x], [x + 0.1])
    assert not tune._agree([x], [nan])
    assert not tune._agree([x], [x, x])
    assert not tune._agree([x], [x.double()])
    assert not tune._agree([torch.tensor([1, 2])], [torch.tensor([1, 3])])


def test_the_kernels_of_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record a real operator and try other tiles of it (in the interpreter where no GPU is)."""
    device = "cpu" if launch.interpreting() else "cuda"
    x = torch.randn(1, 24, 6, 7, device=device)
    weight = torch.randn(40, 24, 1, 1, device=device)
    with recording.record(kernels) as calls:
        ops.expand(x, weight, act="silu", backend="triton")
    key = calls[0].launches[0]
    assert calls[0].function == "expand" and key.startswith("expand_fwd/")
    trial = tune.Trial(kernels.expand, calls[0], key, lambda run: (run(), 1.0)[1])
    other = {n: 32 if n.startswith("BLOCK") else v for n, v in trial.start.items()}
    assert trial.measure(other) == 1.0


def test_milliseconds_without_a_gpu() -> None:
    """The lines that time a graph, on stand-ins for torch.cuda."""
    from campaign_dry import no_gpu_needed

    runs: list[int] = []
    with no_gpu_needed():
        time_taken = tune.milliseconds(
            lambda: runs.append(1), device="cpu", budget=0.0, flush_bytes=8
        )
    assert time_taken >= 0.0 and len(runs) == 3


def test_the_namespace_is_searched_for_functions_that_work() -> None:
    module = ModuleType("m")
    module.run = doubled
    module.run_unsupported = doubled
    module.run_fwd_rule = rule
    module._hidden = doubled
    module.other = ModuleType("x")
    assert list(recording.functions(module)) == ["run"]
