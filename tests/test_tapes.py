"""Passes launched again from a tape: the same bits as written out, and never a stale one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels import _C
from emo_kernels.cpu import launches, layout, tapes

pytestmark = pytest.mark.skipif(
    layout.DLPACK is None, reason="this torch has no C interface to its tensors' memory"
)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    tapes.forget()
    yield
    tapes.forget()


def pair(name: str = "emo_1m", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(with tapes, without): equal models in training mode."""
    torch.manual_seed(0)
    ours = ek.create_model(name, drop_path_rate=0.2).train().to(dtype)
    return ours, copy.deepcopy(ours)


def step(model: nn.Module, x: Tensor, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    return [out.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]


def compare(ours: nn.Module, other: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of each, the other's without a tape: the same bits."""
    found = step(ours, x)
    with monkeypatch.context() as patch:
        patch.setattr("emo_kernels.cpu.repeated", lambda run, options, t: run(*options, *t))
        wanted = step(other, x)
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert got.stride() == want.stride() and torch.equal(got, want)


def nhwc(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def count() -> int:
    return sum(not isinstance(known, str) for known in tapes._known.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = pair(dtype=dtype)
    for model in (ours, other):
        ek.accelerate(model, backend="cpu")
    for _ in range(4):
        compare(ours, other, torch.randn(2, 3, 32, 32).to(dtype), monkeypatch)
    assert count() >= 12


def test_what_changes_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = pair()
    for model in (ours, other):
        ek.accelerate(model, backend="cpu")
    x = torch.randn(2, 3, 32, 32)

    def freeze_a_weight(model: nn.Module) -> None:
        next(p for n, p in model.named_parameters() if "proj" in n).requires_grad_(False)

    def freeze_a_batch_norm(model: nn.Module) -> None:
        next(m for n, m in model.named_modules() if n.endswith("conv_local.norm")).eval()

    def another_momentum(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.3

    def average_of_all(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None

    def another_weight(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(module.weight.detach() * 1.1)

    def a_strided_weight(model: nn.Module) -> None:
        for n, module in model.named_modules():
            if n.endswith("proj.conv") and isinstance(module, nn.Conv2d):
                wide = torch.cat([module.weight.detach(), module.weight.detach()], 1)
                module.weight = nn.Parameter(wide[:, : wide.shape[1] // 2])

    def load(model: nn.Module) -> None:
        model.load_state_dict({n: t * 0.9 for n, t in model.state_dict().items()})

    changes = (
        freeze_a_weight,
        freeze_a_batch_norm,
        another_momentum,
        average_of_all,
        another_weight,
        a_strided_weight,
        load,
    )
    for change in (None, *changes):
        for model in (ours, other):
            if change is not None:
                change(model)
        for _ in range(3):
            compare(ours, other, x, monkeypatch)
    for images, side, threads in ((3, 32, 1), (2, 40, 2), (2, 32, 2)):
        torch.set_num_threads(threads)
        try:
            for _ in range(3):
                compare(ours, other, torch.randn(images, 3, side, side), monkeypatch)
        finally:
            torch.set_num_threads(1)


def test_maps_of_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours = ek.nn.iRMB(16, 16, dim_head=8, window_size=3, exp_ratio=2.0, attn_s=True).train()
    other = copy.deepcopy(ours)
    for block in (ours, other):
        ek.accelerate(block, backend="cpu")
    x = torch.randn(2, 16, 9, 9)
    layouts = (x, x.to(memory_format=torch.channels_last), x.flip(3).transpose(2, 3), x[:, :, ::1])
    for _ in range(3):
        for one in layouts:
            compare(ours, other, one, monkeypatch)


def test_what_autograd_must_see_is_seen() -> None:
    block = ek.accelerate(ek.nn.iRMB(16, 16, attn_s=False, exp_ratio=2.0).train(), backend="cpu")
    x = nhwc(torch.randn(2, 16, 9, 9)).requires_grad_()
    for _ in range(4):
        mean = block.conv_local.norm.running_mean
        version, before = mean._version, mean.clone()
        out = block(x)
        assert mean._version > version and not torch.equal(mean, before)
        with torch.no_grad():
            x.add_(0.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert count() == 1  # of forward passes


def test_two_threads_share_a_tape() -> None:
    torch.manual_seed(0)
    block = ek.nn.iRMB(16, 16, attn_s=False, exp_ratio=2.0).train()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # sums are taken around the running mean
    blocks = [ek.accelerate(copy.deepcopy(block), backend="cpu") for _ in range(2)]
    inputs = [nhwc(torch.randn(2, 16, 24, 24)) for _ in range(2)]
    wanted = [[step(b, x)[1] for _ in range(3)] for b, x in zip(blocks, inputs, strict=True)]
    assert count() == 2
    found: list[list[Tensor]] = [[], []]

    def work(i: int) -> None:
        for _ in range(20):
            x = inputs[i].clone().requires_grad_()
            blocks[i](x).float().square().mean().backward()
            assert x.grad is not None
            found[i].append(x.grad)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(found[i]) == 20 and all(torch.equal(g, wanted[i][0]) for g in found[i])


def test_results_are_the_callers_to_keep() -> None:
    torch.manual_seed(0)
    block = ek.nn.iRMB(16, 16, dim_head=8, attn_pre=True, exp_ratio=2.0).train()
    ek.accelerate(block, backend="cpu")
    kept = [step(block, nhwc(torch.randn(2, 16, 9, 9))) for _ in range(6)]
    assert count() == 2
    copies = [[t.clone() for t in tensors] for tensors in kept]
    step(block, nhwc(torch.randn(2, 16, 9, 9)))
    for tensors, same in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, same, strict=True))


# ------------------------------------------------------------------------------ what is recorded


def twice(x: Tensor) -> tuple[Tensor | None, ...]:
    """2 x by way of float64, on kernels that convert."""
    between, out = layout.doubles(x.numel()), layout.empty(tuple(x.shape), torch.float32)
    with launches.held_back():
        launches.launch(_C.convert(0, 1, x.numel()), x, between)
        launches.launch(_C.convert(1, 0, x.numel()), between, out)
    return out, None


def test_a_pass_is_recorded_the_second_time() -> None:
    for i in range(4):
        x = nhwc(torch.full((1, 3, 5, 2), float(i)))
        out, nothing = tapes.repeated(twice, (), (x,))
        assert nothing is None and out is not None and torch.equal(out, x)
        assert count() == (i > 0)
    with torch.profiler.profile() as profile:
        tapes.repeated(twice, (), (x,))
    assert not profile.key_averages()  # not even an empty tensor is torch's


def test_a_pass_that_does_more_is_not_recorded() -> None:
    def with_torch_before(x: Tensor) -> tuple[Tensor | None, ...]:
        return twice(x * 2)

    def with_torch_behind(x: Tensor) -> tuple[Tensor | None, ...]:
        (out, _) = twice(x)
        assert out is not None
        return (out * 2,)

    def at_once(x: Tensor) -> tuple[Tensor | None, ...]:
        out = layout.empty(tuple(x.shape), torch.float32)
        launches.launch(_C.convert(0, 0, x.numel()), x, out)
        return (out,)

    def with_a_copy(x: Tensor) -> tuple[Tensor | None, ...]:
        out = layout.empty(tuple(x.shape), torch.float32)
        with launches.held_back():
            launches.launch(_C.convert(0, 0, x.numel()), x, out)
            launches.launch(out.mul_, 2)
        return (out,)

    def of_one_tensor(x: Tensor) -> tuple[Tensor | None, ...]:
        both = layout.empty((2, *x.shape), torch.float32)
        with launches.held_back():
            launches.launch(_C.convert(0, 0, x.numel()), x, both[0])
            launches.launch(_C.convert(0, 0, x.numel()), x, both[1])
        return both[0], both[1]

    def its_input(x: Tensor) -> tuple[Tensor | None, ...]:
        return (x, *twice(x))

    for run in (
        with_torch_before,
        with_torch_behind,
        at_once,
        with_a_copy,
        of_one_tensor,
        its_input,
    ):
        for i in range(4):
            x = nhwc(torch.full((1, 3, 5, 2), float(i)))
            found = tapes.repeated(run, (), (x,))
            for got, want in zip(found, run(x), strict=True):
                assert (got is None and want is None) or torch.equal(got, want)
        assert count() == 0


def test_inputs_that_share_memory_are_not_recorded() -> None:
    def add_up(x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        out = layout.empty(tuple(x.shape), torch.float32)
        with launches.held_back():
            launches.launch(_C.convert(0, 0, x.numel()), y, out)
        return (out,)

    x = nhwc(torch.arange(30.0).reshape(1, 3, 5, 2))
    for _ in range(4):
        tapes.repeated(add_up, (), (x, x))
    assert count() == 0


def test_another_layout_is_recorded_anew() -> None:
    x = torch.ones(1, 1, 1, 1)

    def second(x: Tensor, y: Tensor) -> tuple[Tensor | None, ...]:
        return twice(y)

    for y in (torch.ones(2, 3), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float32)):
        for _ in range(3):
            out, _ = tapes.repeated(second, (), (x, y))
            assert out is not None and torch.equal(out, y)


def test_old_passes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes, "_MOST", 8)
    for size in range(1, 30):
        for _ in range(2):
            tapes.repeated(twice, (), (torch.ones(1, size, 1, 1),))
        assert len(tapes._known) <= 8
    assert count() == 8


# ------------------------------------------------------------------------------ what C++ refuses


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"expand: sizes: expected 6 entries, got 2"):
        _C.expand(0, (1, 2), 1e-6)
    kernel = _C.convert(0, 1, 4)
    with pytest.raises(ValueError, match="expected 2 addresses, got 1"):
        kernel((0,), 1)
    with pytest.raises(ValueError, match="convert: a null pointer"):
        kernel((0, 0), 1)
    x = torch.ones(4)
    options = {"api": layout.DLPACK, "inputs": (x,), "results": (x,), "between": [], "outputs": [0]}
    with pytest.raises(ValueError, match="takes 2 addresses, got 1"):
        _C.Tape(**options, launches=[(kernel, [(0, 0)])])
    with pytest.raises(ValueError, match="no such slot"):
        _C.Tape(**options, launches=[(kernel, [(0, 0), (2, 0)])])
    tape = _C.Tape(**options, launches=[(_C.convert(0, 0, 4), [(0, 0), (-1, 0)])])
    assert tape((torch.ones(5),), 1) is None and tape((None,), 1) is None and tape((), 1) is None
    with pytest.raises(ValueError, match="convert: a null pointer"):
        tape((x,), 1)


@pytest.mark.parametrize("to", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_conversions_round_as_torch(source: torch.dtype, to: torch.dtype) -> None:
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, 1e-300, 1e300]
    values = torch.cat([torch.tensor(special).to(source), torch.randn(1000, dtype=source)])
    out = torch.empty(len(values), dtype=to)
    kernel = _C.convert(layout.DTYPES[source], layout.DTYPES[to], len(values))
    kernel((values.data_ptr(), out.data_ptr()), 1)
    torch.testing.assert_close(out, values.to(to), rtol=0, atol=0, equal_nan=True)
    kernel((0, out.data_ptr()), 1)
    assert not out.any()
