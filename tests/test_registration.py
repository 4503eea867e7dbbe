"""Dispatch and autograd around a kernel, shown with a backend made for the purpose."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emo_kernels import backends, ops, reference


class Recorder:
    """Kernels of one operator that note how they are called; 16-bit maps are beyond them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.needed: tuple[bool, ...] = ()

    def forward(self, x: Tensor, weight: Tensor, **options: int) -> Tensor:
        self.calls.append("forward")
        return reference.depthwise_conv2d(x, weight, **options).contiguous()

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        *extras: None,
        needed: tuple[bool, ...],
        **options: int,
    ) -> list[Tensor]:
        self.calls.append("backward")
        self.needed = tuple(needed)
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            out = reference.depthwise_conv2d(*leaves, **options)
            grads = torch.autograd.grad(out, leaves, grad)
        return [g * 2 for g, n in zip(grads, needed, strict=True) if n]

    @staticmethod
    def unsupported(x: Tensor, weight: Tensor, **options: Any) -> str | None:
        return f"no {x.dtype}" if x.element_size() < 4 else None


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """The cpu backend replaced; its gradients are twice the right ones, which gives them away."""
    kernels = Recorder()
    namespace = SimpleNamespace(
        depthwise_conv2d=kernels.forward,
        depthwise_conv2d_backward=kernels.backward,
        depthwise_conv2d_unsupported=kernels.unsupported,
    )
    monkeypatch.setitem(backends._namespaces, "cpu", namespace)
    usable = {"cpu": None, "reference": None}
    monkeypatch.setattr(backends, "_unavailable", lambda name: usable.get(name, "not here"))
    for cached in (backends._has, backends._candidates):
        cached.cache_clear()
    yield kernels
    for cached in (backends._has, backends._candidates):
        cached.cache_clear()


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 5, 4, dtype=dtype), torch.randn(3, 1, 3, 3, dtype=dtype)


def test_the_best_backend_that_can_is_chosen(recorder: Recorder) -> None:
    x, weight = inputs()
    out = ops.depthwise_conv2d(x, weight)
    assert recorder.calls == ["forward"]
    assert torch.equal(out, reference.depthwise_conv2d(x, weight, padding=1))
    assert out.is_contiguous(memory_format=torch.channels_last)
    ops.depthwise_conv2d(x.bfloat16(), weight.bfloat16())
    assert recorder.calls == ["forward"], "bf16 is beyond the kernel and goes to the reference"


def test_a_named_backend_is_obeyed_or_raises(recorder: Recorder) -> None:
    x, weight = inputs()
    ops.depthwise_conv2d(x, weight, backend="reference")
    assert not recorder.calls
    with pytest.raises(NotImplementedError, match=r"'cpu' cannot run.*no torch.bfloat16"):
        ops.depthwise_conv2d(x.bfloat16(), weight.bfloat16(), backend="cpu")
    with backends.use_backend("cpu"), pytest.raises(NotImplementedError, match="no torch.bfloat16"):
        ops.depthwise_conv2d(x.bfloat16(), weight.bfloat16())


def test_argument_before_context_before_environment(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = inputs()
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "reference")
    ops.depthwise_conv2d(x, weight)
    assert not recorder.calls
    with backends.use_backend("cpu"):
        ops.depthwise_conv2d(x, weight)
        assert recorder.calls == ["forward"]
        ops.depthwise_conv2d(x, weight, backend="reference")
        assert recorder.calls == ["forward"]
        with backends.use_backend("reference"):
            ops.depthwise_conv2d(x, weight)
        assert recorder.calls == ["forward"]
        ops.depthwise_conv2d(x, weight)
        assert recorder.calls == ["forward"] * 2
    ops.depthwise_conv2d(x, weight)
    assert recorder.calls == ["forward"] * 2


def test_a_context_that_fails_is_left_as_it_was(recorder: Recorder) -> None:
    x, weight = inputs()
    with pytest.raises(KeyError), backends.use_backend("reference"):
        raise KeyError
    ops.depthwise_conv2d(x, weight)
    assert recorder.calls == ["forward"]


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_the_kernel_gives_the_gradient(recorder: Recorder, wanted: tuple[bool, bool]) -> None:
    x, weight = (t.requires_grad_(w) for t, w in zip(inputs(), wanted, strict=True))
    want = [t for t, w in zip((x, weight), wanted, strict=True) if w]
    out = ops.depthwise_conv2d(x, weight)
    with backends.use_backend("reference"):  # chosen once, in the forward
        grads = torch.autograd.grad(out.square().sum(), want)
    assert recorder.calls == ["forward", "backward"] and recorder.needed == wanted
    plain = reference.depthwise_conv2d(x, weight, padding=1)
    for got, right in zip(grads, torch.autograd.grad(plain.square().sum(), want), strict=True):
        assert torch.allclose(got, 2 * right)


def test_a_gradient_to_be_differentiated_is_the_references(recorder: Recorder) -> None:
    x, weight = (t.requires_grad_() for t in inputs())
    grad = torch.randn(2, 3, 5, 4, dtype=torch.float64)

    def derivatives(out: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out, (x, weight), grad, create_graph=True)
        return (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight)))

    got = derivatives(ops.depthwise_conv2d(x, weight))
    assert recorder.calls == ["forward"]
    want = derivatives(reference.depthwise_conv2d(x, weight, padding=1))
    assert all(torch.allclose(g, w) for g, w in zip(got, want, strict=True))


def test_without_gradients_none_is_recorded(recorder: Recorder) -> None:
    x, weight = (t.requires_grad_() for t in inputs())
    with torch.no_grad():
        assert not ops.depthwise_conv2d(x, weight).requires_grad
    with torch.inference_mode():
        assert ops.depthwise_conv2d(x, weight).is_inference()
    assert ops.depthwise_conv2d(x.detach(), weight).requires_grad
    assert not ops.depthwise_conv2d(x.detach(), weight.detach()).requires_grad
    assert recorder.calls == ["forward"] * 4


def test_one_tensor_in_two_places_gets_both_gradients(recorder: Recorder) -> None:
    """The same leaf as map and residual of one call, through the reference's gradient."""
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 1, 1, dtype=torch.float64)
    call = torch.ops.emo_kernels.shrink
    out = call(y, weight, None, None, y, y, None, None, "reference")
    (got,) = torch.autograd.grad(out.square().sum(), y)
    plain = reference.shrink(y, weight, local=y, residual=y)
    assert torch.allclose(got, torch.autograd.grad(plain.square().sum(), y)[0])


def test_an_input_that_depends_on_another_counts_once(recorder: Recorder) -> None:
    """d/dy of shrink(y, local=2y): the recomputed graph must not run through 2y again."""
    y = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 1, 1, dtype=torch.float64)
    for create_graph in (False, True):
        out = torch.ops.emo_kernels.shrink(
            y, weight, None, None, y * 2, None, None, None, "reference"
        )
        (got,) = torch.autograd.grad(out.square().sum(), y, create_graph=create_graph)
        plain = reference.shrink(y, weight, local=y * 2)
        assert torch.allclose(got, torch.autograd.grad(plain.square().sum(), y)[0])


def test_under_checkpointing_the_numbers_are_the_same(recorder: Recorder) -> None:
    x, weight = (t.requires_grad_() for t in inputs())
    out = torch.utils.checkpoint.checkpoint(ops.depthwise_conv2d, x, weight, use_reentrant=False)
    grads = torch.autograd.grad(out.square().sum(), (x, weight))
    assert recorder.calls == ["forward", "forward", "backward"]
    want = torch.autograd.grad(ops.depthwise_conv2d(x, weight).square().sum(), (x, weight))
    assert all(torch.equal(g, w) for g, w in zip(grads, want, strict=True))


class _Seen(TorchDispatchMode):
    """Notes the torch ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Own(Tensor):
    """A tensor of another class."""


def kernel_call(x: Tensor, weight: Tensor) -> Any:
    """The gradient's kernel as a step of the whole block calls it."""
    operator = sys.modules["emo_kernels.ops.depthwise_conv2d"]
    return operator.backward(x, x, weight, None, None, None, [True, False], 1, 1, 1, "cpu")[0]


def test_a_step_calls_kernels_past_the_torch_op_only_where_nobody_watches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(3, 1, 3, 3)
    want = kernel_call(x, weight)
    with _Seen() as seen:
        assert torch.equal(kernel_call(x, weight), want)
    assert "emo_kernels.depthwise_conv2d_backward.default" in seen.names
    with torch.profiler.profile() as profile:
        assert torch.equal(kernel_call(x, weight), want)
    assert "emo_kernels::depthwise_conv2d_backward" in {e.key for e in profile.key_averages()}
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.func.vmap(kernel_call, (0, None))(x[:, None], weight)
    assert type(kernel_call(x, weight.as_subclass(_Own))) is _Own
    monkeypatch.setattr(torch.ops.emo_kernels.depthwise_conv2d_backward.default, "_op", None)
    assert torch.equal(kernel_call(x, weight), want)  # past it
    with _Seen(), pytest.raises(TypeError):
        kernel_call(x, weight)
