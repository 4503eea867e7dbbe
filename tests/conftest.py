"""Triton's interpreter, seeds, threads, and tests over backends, rows and dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import interpreter
import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels run in its interpreter; natively on a GPU
    interpreter.switch_on()

pytest.register_assert_rewrite("contract", "numerics", "tolerance", "memory")

import grid  # noqa: E402  (after its helpers are registered)

if grid.INTERPRETED:
    interpreter.install()

hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeds_and_threads() -> Iterator[None]:
    """The same random numbers for every test, and one thread."""
    torch.manual_seed(20230913)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` alone, or ``backend, row, dtype`` where the test has a grid."""
    operator = getattr(metafunc.cls, "operator", None) or getattr(metafunc.module, "OPERATOR", None)
    if operator is None or "backend" not in metafunc.fixturenames:
        return
    test_grid = getattr(metafunc.function, "grid", None)
    if test_grid is not None:
        lists = {name: getattr(metafunc.cls, name) for name in dir(metafunc.cls)}
        cases = grid.combinations(operator, test_grid, lists)
        metafunc.parametrize(("backend", "row", "dtype"), list(cases))
    else:
        slow = getattr(metafunc.function, "slow_with", ())
        names = grid.implementing(operator)
        metafunc.parametrize(
            "backend",
            [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names],
        )
