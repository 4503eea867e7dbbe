"""What thousands of calls leave behind: no memory, no scratch, no references."""

from __future__ import annotations

import gc
import random
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_cpu_threads import small_model
from torch import Tensor

import emo_kernels as ek
from emo_kernels import _C
from emo_kernels.cpu import layout

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc of Linux")
MEGABYTE = 2**20


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def assert_nothing_stays(call: Callable[[], object], calls: int) -> None:
    """Resident memory after a tenth of the calls and after all; 100 bytes a call would show."""
    for _ in range(calls // 10):
        call()
    before, scratch = resident_bytes(), _C.scratch_bytes()
    for _ in range(calls):
        call()
    assert _C.scratch_bytes() == scratch
    grown = resident_bytes() - before
    assert grown <= max(100 * calls, MEGABYTE), f"{grown / calls:.0f} bytes a call stay"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_ten_thousand_calls_leak_nothing(threads: int) -> None:
    torch.set_num_threads(threads)
    model, x = small_model(), torch.randn(1, 24, 8, 8)

    def call() -> None:
        with torch.no_grad():
            model(x)

    assert_nothing_stays(call, 10_000)


@pytest.mark.slow
def test_calls_of_changing_shapes_leak_nothing() -> None:
    model = small_model()
    inputs = [torch.randn(n, 24, h, 9) for n in (1, 2) for h in (4, 5, 8)]

    def call() -> None:
        with torch.no_grad():
            for x in inputs:
                model(x)

    assert_nothing_stays(call, 1_000)


@pytest.mark.slow
def test_two_thousand_steps_leak_nothing() -> None:
    model = small_model().train()
    x = torch.randn(2, 24, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        model(x.requires_grad_()).sum().backward()
        optimizer.step()

    assert_nothing_stays(step, 2_000)


def counts(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    gc.collect()
    return [(sys.getrefcount(t), t._use_count()) for t in tensors]


@pytest.mark.parametrize("training", [False, True])
def test_references_of_inputs_and_weights_are_given_back(training: bool) -> None:
    model, x = small_model().train(training), torch.randn(2, 24, 8, 8)
    tensors = [x, *model.parameters(), *model.buffers()]

    def call() -> None:
        with torch.set_grad_enabled(training):
            y = model(x)
        if training:
            y.sum().backward()

    call()  # what it keeps for the next call is kept once
    before = counts(tensors)
    for _ in range(5):
        call()
    assert counts(tensors) == before


def test_scratch_follows_the_largest_call_and_is_released() -> None:
    torch.set_num_threads(1)
    model = small_model()
    small, large = torch.randn(1, 24, 8, 8), torch.randn(1, 24, 64, 64)
    with torch.no_grad():
        model(large)
        most = _C.scratch_bytes()
        for _ in range(3):
            model(small)
            model(large)
    assert _C.scratch_bytes() == most
    _C.release_scratch()
    assert _C.scratch_bytes() < most


def test_scratch_of_a_finished_thread_is_freed() -> None:
    model, x = small_model(), torch.randn(1, 24, 32, 32)
    with torch.no_grad():
        model(x)
    before = _C.scratch_bytes()

    def work() -> None:
        with torch.no_grad():
            model(x)

    for _ in range(3):
        caller = threading.Thread(target=work)
        caller.start()
        caller.join()
    deadline = time.monotonic() + 10  # Python's join may return before the thread has ended
    while _C.scratch_bytes() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _C.scratch_bytes() == before


NEW_MAPS = pytest.mark.skipif(
    layout.DLPACK is None, reason="this torch does not take memory from C: maps are malloc's"
)


def map_of(megabytes: float) -> Tensor:
    return layout.new_map(torch.empty(0), 1, 1, 1, int(megabytes * 2**18))


@NEW_MAPS
@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages"
)
def test_a_large_map_asks_for_large_pages() -> None:
    large = map_of(16)
    assert "hg" in flags_of_page(large.data_ptr() + large.nbytes // 2)


@NEW_MAPS
def test_a_map_lies_where_dead_maps_lay() -> None:
    first, second, third = map_of(512), map_of(256), map_of(512)  # longer than other tests' gaps
    at = first.data_ptr()
    assert second.data_ptr() == at + first.nbytes
    del first, second
    both = map_of(768)  # what the two left is one gap
    assert both.data_ptr() == at
    assert third.data_ptr() == at + both.nbytes


@NEW_MAPS
def test_maps_never_overlap() -> None:
    """Threads make, fill and drop maps; each holds what was written to it until it is dropped."""

    def work(seed: int) -> bool:
        draw = random.Random(seed)
        alive: list[tuple[float, Tensor]] = []
        for turn in range(200):
            value = float(1000 * seed + turn)
            alive.append((value, map_of(draw.uniform(0.3, 3)).fill_(value)))
            if len(alive) > 6:
                wanted, map_ = alive.pop(draw.randrange(len(alive)))
                if not bool((map_ == wanted).all()):
                    return False
        return all(bool((map_ == wanted).all()) for wanted, map_ in alive)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


@NEW_MAPS
def test_release_memory_gives_dead_maps_back() -> None:
    map_of(64).zero_()
    held = resident_bytes()
    ek.release_memory()
    assert held - resident_bytes() > 60 * MEGABYTE
    assert float(map_of(64).sum()) == 0.0  # fresh pages; a map that lives keeps its own


@NEW_MAPS
def test_a_step_after_another_needs_no_new_pages() -> None:
    model = ek.accelerate(ek.create_model("emo_1m").train())
    x = torch.randn(4, 3, 96, 96)

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        model.zero_grad()
        model(x).sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    counts = [new_pages() for _ in range(6)]
    assert min(counts) * 4 < counts[0]


def flags_of_page(address: int) -> list[str]:
    """What Linux knows of the mapping that holds ``address``."""
    holds = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            holds = begin <= address < end
        elif holds and first == "VmFlags:":
            return rest.split()
    raise AssertionError(f"no mapping holds {address:#x}")
