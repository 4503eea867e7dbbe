"""Threads and the cpu kernels: torch's count, callers at once, forks, the GIL, nested regions."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import shapes
import torch
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels import cpu
from emo_kernels.nn import iRMB
from emo_kernels.spec import IRMBSpec, IRMBWeights

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc of Linux")
HERE = Path(__file__).parent


def small_model() -> nn.Module:
    """A convolutional, a strided and an attention block, accelerated."""
    torch.manual_seed(3)
    model = nn.Sequential(
        iRMB(24, 24, exp_ratio=2.0, attn_s=False, act_layer="silu"),
        iRMB(24, 40, exp_ratio=2.0, attn_s=False, stride=2, has_skip=False),
        iRMB(40, 40, exp_ratio=2.0, dim_head=20, norm_layer="ln_2d", attn_pre=True),
    )
    return ek.accelerate(model.eval(), backend="cpu", strict=True)


def block(row_name: str, n: int) -> tuple[Tensor, IRMBWeights, IRMBSpec]:
    row = shapes.rows(row_name)[0]
    x = shapes.feature_map(row).float()[:1].expand(n, -1, -1, -1).contiguous()
    w = IRMBWeights(*[None if t is None else t.float() for t in shapes.weights(row)])
    return x, w, row.spec()


def in_subprocess(function: str, **environment: str) -> str:
    """Run one of this file's functions in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_cpu_threads as t; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code}t.{function}()"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ------------------------------------------------------------------------------- torch's count


def clock_ticks() -> dict[int, int]:
    """CPU time of every thread of this process, in ticks of 10 ms."""
    ticks = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        ticks[int(task.name)] = int(fields[11]) + int(fields[12])
    return ticks


def busy_threads(threads: int, call: tuple[Tensor, IRMBWeights, IRMBSpec]) -> int:
    """Threads that did a tenth or more of the busiest one's work over a second of calls."""
    torch.set_num_threads(threads)
    cpu.irmb(*call)
    before, end = clock_ticks(), time.monotonic() + 1.0
    while time.monotonic() < end or max(clock_ticks().values()) - max(before.values()) < 20:
        cpu.irmb(*call)
    spent = [t - before.get(task, 0) for task, t in clock_ticks().items()]
    return sum(t >= 0.1 * max(spent) for t in spent)


def follow_the_count() -> None:
    call = block("5m_stage1_small", 16)
    for threads in (1, 3, 2, 1):
        found = busy_threads(threads, call)
        assert found == threads, f"{found} threads worked, torch's count is {threads}"


def test_the_count_of_torch_is_obeyed_at_every_call() -> None:
    in_subprocess("follow_the_count")


# ------------------------------------------------------------------------------ callers at once


@pytest.mark.parametrize("threads", [1, 2])
def test_callers_of_one_model_at_once(threads: int) -> None:
    """Inputs of two shapes in turn, so that the block's bound call changes hands as well."""
    torch.set_num_threads(threads)
    model = small_model()
    inputs = [torch.randn(n, 24, h, 20) for n, h in ((1, 16), (3, 9))]
    with torch.no_grad():
        want = [model(x) for x in inputs]
    wrong: list[int] = []

    def work(first: int) -> None:
        torch.set_num_threads(threads)
        for i in range(100):
            k = (first + i // 3) % 2
            with torch.no_grad():
                if not torch.equal(model(inputs[k]), want[k]):
                    wrong.append(k)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_training_callers_at_once() -> None:
    """Two threads, each training a copy: the gradients of one alone."""

    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        for p in model.parameters():
            p.grad = None
        model(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    models = [small_model().train() for _ in range(2)]
    x = torch.randn(2, 24, 16, 20)
    state = {k: t.clone() for k, t in models[0].state_dict().items()}
    want = gradients(models[0], x)
    models[0].load_state_dict(state)
    wrong: list[int] = []

    def work(k: int) -> None:
        for _ in range(20):
            models[k].load_state_dict(state)
            got = gradients(models[k], x)
            if not all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
                wrong.append(k)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_the_gil_is_released_during_a_kernel() -> None:
    """A thread that wakes every millisecond goes on while the main one is inside a call."""
    torch.set_num_threads(1)
    call = block("5m_stage1_small", 16)
    start = time.monotonic()
    cpu.irmb(*call)
    repeats = max(1, int(0.5 / (time.monotonic() - start)))
    x = call[0].repeat(repeats, 1, 1, 1)
    woken, stop = [0], threading.Event()

    def wake() -> None:
        while not stop.wait(0.001):
            woken[0] += 1

    sleeper = threading.Thread(target=wake)
    sleeper.start()
    before = woken[0]
    cpu.irmb(x, *call[1:])
    after = woken[0]
    stop.set()
    sleeper.join()
    assert after - before >= 10


# --------------------------------------------------------------------------------------- forks


class Features(torch.utils.data.Dataset):
    """What a model that the parent has used gives for an input, computed in the worker."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.model(self.x)[0]


def use_in_workers() -> None:
    torch.set_num_threads(2)
    model, x = small_model(), torch.randn(1, 24, 32, 32)
    with torch.no_grad():
        want = model(x)[0]
    loader = torch.utils.data.DataLoader(
        Features(model, x), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    for _ in range(2):
        assert all(torch.equal(got, want) for got in loader)
    with torch.no_grad():
        assert torch.equal(model(x)[0], want)


def test_a_worker_of_a_data_loader_runs_the_model() -> None:
    in_subprocess("use_in_workers")


def _train_in_child(model: nn.Module, x: Tensor, queue: object) -> None:
    model(x).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    queue.put([g.numpy() for g in grads])


def train_in_a_fork() -> None:
    """A step in the child of a parent whose team has worked; of one thread from there on."""
    torch.set_num_threads(2)
    model, x = small_model(), torch.randn(1, 24, 16, 16)
    with torch.no_grad():
        model(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    torch.set_num_threads(1)  # torch's own operators hang in a child with more
    child = context.Process(target=_train_in_child, args=(model.train(), x, queue))
    child.start()
    got = queue.get(timeout=120)
    child.join()
    assert child.exitcode == 0
    model.load_state_dict(small_model().state_dict())
    model(x).square().sum().backward()
    want = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(got, want, strict=True))


def test_a_forked_child_trains() -> None:
    in_subprocess("train_in_a_fork")


# ----------------------------------------------------------------------------- nested in OpenMP


def call_inside_a_region() -> None:
    maps = Path("/proc/self/maps").read_text().split()
    runtimes = {part for part in maps if "libgomp" in part or "libomp" in part}
    assert len(runtimes) == 1, f"more than one OpenMP runtime: {runtimes}"
    openmp = ctypes.CDLL(runtimes.pop())
    call = block("5m_stage1_small", 64)
    torch.set_num_threads(2)
    want = cpu.irmb(*call)
    found: list[Tensor] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: object) -> None:
        torch.set_num_threads(2)
        for _ in range(4):
            found.append(cpu.irmb(*call))

    most, stop = [0], threading.Event()

    def watch() -> None:  # threads of a nested team end with it
        while not stop.wait(0.001):
            most[0] = max(most[0], len(list(Path("/proc/self/task").iterdir())))

    watcher = threading.Thread(target=watch)
    watcher.start()
    before = len(list(Path("/proc/self/task").iterdir()))
    openmp.GOMP_parallel(body, None, 2, 0)
    stop.set()
    watcher.join()
    assert len(found) == 8 and all(torch.equal(y, want) for y in found)
    assert 0 < most[0] <= before, f"{most[0] - before} threads more"


def test_a_call_inside_a_parallel_region_starts_no_team() -> None:
    in_subprocess("call_inside_a_region", OMP_MAX_ACTIVE_LEVELS="2")
