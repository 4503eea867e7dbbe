"""For the suites of `make bench`: the tests' shape table, all cores, the limits of the machine."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from emo_kernels.measure.limits import machine_limits

_BEGINS_BY = pytest.StashKey[float]()
sys.path.append(str(Path(__file__).parents[1] / "tests"))
pytest.register_assert_rewrite("numerics", "tolerance", "memory")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="skip what has not begun by then")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test has a moment by which it must have begun: all have an equal share of the time.

    What the tests before it left is there for it; what comes too late is skipped, not in silence.
    """
    minutes, start = config.getoption("--minutes"), time.monotonic()
    if minutes is not None:
        for place, item in enumerate(items, 1):
            item.stash[_BEGINS_BY] = start + 60 * minutes * place / len(items)


def pytest_runtest_setup(item: pytest.Item) -> None:
    begins_by = item.stash.get(_BEGINS_BY, None)
    if begins_by is not None and time.monotonic() > begins_by:
        pytest.skip("its share of --minutes was used up by those before it")


@pytest.fixture(autouse=True, scope="session")
def all_cores() -> Iterator[None]:
    """Every core, as a user's program has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def limits(all_cores: None) -> dict[str, Any]:
    """Measured once in a session."""
    return machine_limits()


@pytest.fixture
def rates(benchmark: Any, limits: dict[str, Any]) -> Any:
    """Adds what a median means to ``extra_info``: GFLOP/s, GB/s, shares of the limits."""

    def add(*, flops: int, moved: int = 0, error: float, dtype: str = "fp32") -> None:
        benchmark.extra_info |= {"flops": flops, "bytes": moved, "max_error": error}
        if benchmark.stats is None:  # --benchmark-disable
            return
        compute, stream = limits["matmul_gflops"][dtype], limits["stream_gigabytes"]["triad"]
        benchmark.extra_info |= {"matmul_gflops": compute, "triad_gigabytes": stream}
        median = benchmark.stats.stats.median
        gflops, gigabytes = 1e-9 * flops / median, 1e-9 * moved / median
        benchmark.extra_info |= {
            "gflops": round(gflops, 2),
            "percent_of_matmul": round(100 * gflops / compute, 1),
            "gigabytes_per_second": round(gigabytes, 2),
            "percent_of_triad": round(100 * gigabytes / stream, 1),
        }

    return add
