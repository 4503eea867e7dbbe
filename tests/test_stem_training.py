"""The stem of an accelerated model in training: the kernels' step in place of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from block_kinds import relative
from test_stem import STEMS, PastedPatches, network
from torch import Tensor, nn
from training_step import assert_as_near_as_autocast, assert_same_step, step

import emo_kernels as ek
from emo_kernels import backends

pytestmark = pytest.mark.filterwarnings("ignore:accelerate. .* blocks are not accelerated")


@pytest.fixture(name="calls")
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the stem's kernels that ran, in order."""
    calls: list[str] = []
    for name in ("conv_norm_act_statistics", "conv_norm_act", "conv_norm_act_backward"):
        kernel = backends.function("cpu", name)

        def counted(*args: Any, _name: str = name, _run: Any = kernel, **kwargs: Any) -> Any:
            calls.append(_name)
            return _run(*args, **kwargs)

        monkeypatch.setattr(backends._namespaces["cpu"], name, counted)
    yield calls


@pytest.fixture(name="x")
def image() -> Tensor:
    return torch.randn(2, 3, 33, 30, generator=torch.Generator().manual_seed(5))


STEP = ["conv_norm_act_statistics", "conv_norm_act_backward"]
KNOWN = ["conv_norm_act", "conv_norm_act_backward"]


def stems(make: Any) -> tuple[nn.Module, nn.Module]:
    """(plain, accelerated) stem in training mode."""
    plain = network(make()).train()
    return plain[0], ek.accelerate(copy.deepcopy(plain))[0]


def without_dead_bias(stem: nn.Module) -> nn.Module:
    """A stem whose convolution's bias is no leaf: the batch's mean takes it away again."""
    for module in stem.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.requires_grad_(False)
    return stem


def norm_of(stem: nn.Module) -> nn.BatchNorm2d:
    (norm,) = (m for m in stem.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return norm


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("make", STEMS.values(), ids=STEMS)
def test_a_step(make: Any, layout: str, x: Tensor, calls: list[str]) -> None:
    plain, fast = map(without_dead_bias, stems(make))
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(2, 3, 33, 61)[..., ::2]
    assert_same_step(plain, fast, x)
    assert calls == STEP


@pytest.mark.parametrize("make", STEMS.values(), ids=STEMS)
def test_known_statistics(make: Any, x: Tensor, calls: list[str]) -> None:
    """A frozen batch norm inside training, and gradients in inference."""
    plain, fast = stems(make)
    for stem in (plain, fast):
        norm_of(stem).eval()
    assert_same_step(plain, fast, x)
    for stem in (plain, fast):
        stem.eval()
    assert_same_step(plain, fast, x)
    assert calls == 2 * KNOWN


@pytest.mark.parametrize("momentum", [None, 0.0, 1.0])
def test_momentum(momentum: float | None, x: Tensor) -> None:
    twins = [without_dead_bias(stem) for stem in stems(STEMS["layers gelu"])]
    for stem in twins:
        norm_of(stem).momentum = momentum
    for _ in range(3):
        assert_same_step(*twins, x)
    assert int(norm_of(twins[1]).num_batches_tracked) == 3


def test_untracked_statistics(x: Tensor, calls: list[str]) -> None:
    model = network(PastedPatches(nn.SiLU)).train()
    model[0].convs[0][1] = nn.BatchNorm2d(24, track_running_stats=False)
    plain = without_dead_bias(model[0])
    fast = ek.accelerate(copy.deepcopy(model))[0]
    assert_same_step(plain, fast, x)
    plain.eval(), fast.eval()
    assert_same_step(plain, fast, x)
    assert calls == 2 * STEP


@pytest.mark.parametrize("frozen", ["image", "convs.0.0", "convs.0.1", "all"])
def test_what_needs_no_gradient_gets_none(frozen: str, x: Tensor, calls: list[str]) -> None:
    plain, fast = map(without_dead_bias, stems(STEMS["patches silu"]))
    for stem in (plain, fast):
        for name, p in stem.named_parameters():
            p.requires_grad_(frozen != "all" and not name.startswith(frozen))
    if frozen == "image":
        for stem in (plain, fast):
            stem(x).square().sum().backward()
        for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
            assert relative(q.grad, p.grad) < 1e-5
    else:
        assert_same_step(plain, fast, x)
    assert calls == STEP


def test_statistics_move_without_gradients(x: Tensor, calls: list[str]) -> None:
    plain, fast = stems(STEMS["patches"])
    with torch.no_grad():
        assert relative(fast(x), plain(x)) < 1e-6
    for (name, want), got in zip(plain.named_buffers(), fast.buffers(), strict=True):
        assert relative(got.double(), want.double()) < 1e-6, name
    assert calls == STEP[:1]


@pytest.mark.parametrize("make", STEMS.values(), ids=STEMS)
def test_autocast(make: Any, x: Tensor, calls: list[str]) -> None:
    draws = []
    for seed in range(3):
        plain, fast = map(without_dead_bias, stems(make))
        draws.append((plain, fast, torch.randn(2, 3, 33, 30) + seed))
    assert_as_near_as_autocast(draws, torch.bfloat16)
    assert calls == 3 * STEP


@pytest.mark.parametrize("make", STEMS.values(), ids=STEMS)
def test_autocast_in_inference(make: Any, x: Tensor, calls: list[str]) -> None:
    plain, fast = (stem.eval() for stem in stems(make))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fast(x), plain(x)
    exact = copy.deepcopy(plain).double()(x.double())
    assert got.dtype == want.dtype == torch.bfloat16
    assert relative(got.double(), exact) <= 1.25 * relative(want.double(), exact) + 2**-9
    assert calls == ["conv_norm_act"]


def test_a_compiled_step_is_the_same(x: Tensor) -> None:
    plain, fast = map(without_dead_bias, stems(STEMS["patches"]))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for stem, call in ((plain, plain), (fast, compiled)):
        call(x).square().sum().backward()
        del stem
    for (name, p), q in zip(plain.named_parameters(), fast.parameters(), strict=True):
        assert p.grad is None or relative(q.grad, p.grad) < 1e-5, name


def test_other_dtypes_run_the_stem_s_own_step(x: Tensor, calls: list[str]) -> None:
    plain, fast = (stem.half() for stem in stems(STEMS["patches"]))
    want, got = step(plain, x.half()), step(fast, x.half())
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert not calls


def test_restored_it_trains_as_before(x: Tensor, calls: list[str]) -> None:
    plain, fast = stems(STEMS["patches"])
    ek.restore(fast)
    want, got = step(plain, x), step(fast, x)
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert not calls


def test_explain_names_who_trains_it(x: Tensor) -> None:
    model = ek.accelerate(network(STEMS["patches"]()))
    assert ek.explain(model, x).rows[0].training == "cpu"
    row = ek.explain(model.half()).rows[0]
    assert row.training == "reference" and "float16" in row.training_reasons["cpu"]
    ek.restore(model)
    assert "not accelerated" in ek.explain(model).rows[0].training_reasons["cpu"]


@pytest.mark.parametrize("name", ["emo_1m", "emo2_1m"])
def test_a_step_of_a_model_in_fp64(name: str, calls: list[str]) -> None:
    """Every gradient and statistic of the plain model, the stem and all blocks on kernels."""
    torch.manual_seed(0)
    plain = ek.create_model(name, num_classes=5, drop_path_rate=0.0).double().train()
    without_dead_bias(plain.stage0[0])
    fast = ek.accelerate(copy.deepcopy(plain))
    calls.clear()  # of the probes
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same_step(plain, fast, x, limit=1e-8)
    assert calls == STEP


def test_a_sum_over_many_pixels_keeps_its_digits() -> None:
    """Of channels_last maps PyTorch's own batch norm adds 400,000 gradients up in fp32."""
    _, fast = stems(STEMS["patches"])
    x = torch.randn(1, 3, 1280, 1280).contiguous(memory_format=torch.channels_last)
    y = fast(x)
    grad = torch.randn(y.shape) + 0.1
    y.backward(grad.contiguous(memory_format=torch.channels_last))
    bias = norm_of(fast).bias.grad
    assert bias is not None and relative(bias.double(), grad.double().sum((0, 2, 3))) < 1e-7
