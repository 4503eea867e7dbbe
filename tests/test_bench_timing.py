"""Turns, intervals, pinned threads, noise and limits: fake clocks and results by hand."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
from bench_rows import Clock

from emo_kernels.measure import noise, timing
from emo_kernels.measure.engines import OURS
from emo_kernels.measure.limits import better, matmul_gflops, stream_gigabytes


def test_median_interval_by_hand() -> None:
    """Binomial(n, 1/2): 6 values are sure to 96.9 %; of 20 the 6th and the 15th hold 95.9 %."""
    assert timing.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert timing.median_interval([1.0] * 1) == (1.0, 1.0)
    assert timing.median_interval([float(i) for i in range(6)]) == (0.0, 5.0)
    assert timing.median_interval([float(i) for i in range(1, 21)]) == (6.0, 15.0)
    assert timing.median_interval([float(i) for i in range(1, 101)]) == (40.0, 61.0)


def test_turns_count_no_first_call_of_short_ones() -> None:
    clock = Clock()
    calls = {"short": clock.takes(0.1, 0.01, 0.02, 0.03, 0.02), "long": clock.takes(1.0)}
    taken = timing.take_turns(calls, seconds=2.5, pause=0.0, min_rounds=1, clock=clock)
    assert taken["long"] == pytest.approx([1.0, 1.0, 1.0])
    # 0.1 is not counted, then 0.01 and 0.02; 0.03 is not, then 0.02 twice
    assert taken["short"] == pytest.approx([0.015, 0.02, 0.02])


def test_turns_end_in_time_and_have_their_rounds() -> None:
    clock = Clock()
    taken = timing.take_turns({"a": clock.takes(1.0)}, seconds=0.1, pause=0.0, clock=clock)
    assert len(taken["a"]) == 3  # past twice the time three rounds are enough
    clock = Clock()
    taken = timing.take_turns({"a": clock.takes(1.0)}, seconds=3.5, pause=0.0, clock=clock)
    assert len(taken["a"]) == 5
    clock = Clock()
    taken = timing.take_turns(
        {"a": clock.takes(0.3)}, seconds=1e9, pause=0.0, max_rounds=7, clock=clock
    )
    assert len(taken["a"]) == 7


def test_ctrl_c_keeps_the_whole_rounds() -> None:
    clock, left = Clock(), [0, 0, 0]

    def interrupted() -> None:
        clock.now += 1.0
        if not left:
            raise KeyboardInterrupt
        left.pop()

    calls = {"a": clock.takes(1.0), "b": interrupted}
    taken = timing.take_turns(calls, seconds=1e9, pause=0.0, clock=clock)
    assert {name: len(times) for name, times in taken.items()} == {"a": 3, "b": 3}
    with pytest.raises(KeyboardInterrupt):
        timing.take_turns({"b": interrupted}, seconds=1.0, pause=0.0, clock=clock)


def test_the_order_rotates() -> None:
    order: list[str] = []
    clock = Clock()

    def call(name: str) -> Any:
        def run() -> None:
            clock.now += 1.0
            order.append(name)

        return run

    calls = {name: call(name) for name in "abc"}
    timing.take_turns(calls, seconds=9.0, pause=0.0, min_rounds=1, clock=clock)
    assert "".join(order) == "abcbcacab"


def test_an_engine_that_fails_takes_no_more_turns() -> None:
    clock, failed = Clock(), {}
    left = [0, 0]

    def fails() -> None:
        clock.now += 1.0
        if not left:
            raise RuntimeError("broke")
        left.pop()

    calls = {"a": clock.takes(1.0), "b": fails}
    taken = timing.take_turns(
        calls, seconds=8.0, pause=0.0, clock=clock, on_failure=failed.__setitem__
    )
    assert list(taken) == ["a"]
    assert len(taken["a"]) == 5
    assert str(failed["b"]) == "broke"
    with pytest.raises(RuntimeError, match="broke"):
        timing.take_turns({"b": fails}, seconds=1.0, pause=0.0, clock=clock)


def test_threads_are_pinned_and_set_free() -> None:
    before = os.sched_getaffinity(0)
    waiting = threading.Event()
    other = threading.Thread(target=waiting.wait)
    other.start()
    try:
        with timing.pinned(1):
            inside = [os.sched_getaffinity(one) for one in (0, other.native_id or 0)]
        after = [os.sched_getaffinity(one) for one in (0, other.native_id or 0)]
    finally:
        waiting.set()
        other.join()
    assert inside[0] == inside[1] == ({max(before)} if len(before) == 2 else inside[0])
    assert len(inside[0]) == 1
    assert after == [before, before]
    with timing.pinned(len(before) + 1):
        assert os.sched_getaffinity(0) == before


def test_noise_sees_this_process_and_complains_of_others() -> None:
    started = noise.Noise()
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    report = started.report()
    assert report["load"] >= 0
    calm = {"load": 0.0, "other_cores": 0.0, "stolen": 0.0}
    assert noise.complaints(calm, {OURS: 1.1}) == []
    assert len(noise.complaints({**calm, "other_cores": 0.5, "stolen": 0.1}, {OURS: 1.5})) == 3
    assert noise.complaints({**calm, "other_cores": None, "stolen": None}, {}) == []


def test_limits_are_rates() -> None:
    assert matmul_gflops(torch.float32, tries=1, side=64) > 0.01
    assert all(rate > 0.01 for rate in stream_gigabytes(tries=1, numbers=4096).values())
    assert better({"a": {"b": 1}, "c": 3}, {"a": {"b": 2}, "c": 1}) == {"a": {"b": 2}, "c": 3}
