"""How an operator becomes ``torch.ops.emo_kernels.<name>``: schema, fake, autograd, dispatch.

The torch op is opaque: it runs the function of the backend named by its last argument. Its gradient
is that backend's ``<name>_backward`` where it has one; else, and whenever the gradient itself must
be differentiable, it is recomputed through the reference composition by PyTorch's own autograd.
Measured cost of one call: ``tests/test_overhead.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from emo_kernels import backends

_LIBRARY = torch.library.Library("emo_kernels", "DEF")
_below_autograd = torch._C._AutoDispatchBelowAutograd

Tensors = Sequence[Tensor | None]
Options = dict[str, Any]
Bound = tuple[Sequence[Any], Options]


def runs_standard_operators(x: Tensor) -> bool:
    """Whether this call must be traced or transformed as standard PyTorch operators.

    True inside ``torch.export``, ``torch.jit.trace`` and ONNX export, under ``torch.func``
    transforms (vmap, grad, jvp) and forward-mode automatic differentiation.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return (
        torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


class Operator:
    """A torch op over the backend functions of one name.

    Args:
        name: the operator's stem.
        tensors: schema of the tensor arguments, in order; a last one ``Tensor?[]`` takes the rest.
        options: schema of the remaining arguments, in order.
        shape: the output's (N, C, H, W), called as the backends are.
        flatten: the positional and keyword arguments of the backends' functions to (tensors,
            options) as the schema has them; ``None`` where they are the same.
        bind: the inverse.

    Outputs are channels_last, whatever the inputs are and whoever runs it.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        options: str,
        shape: Callable[..., tuple[int, ...]],
        flatten: Callable[[Bound], tuple[Tensors, Options]] | None = None,
        bind: Callable[[Tensors, Options], Bound] = lambda tensors, options: (tensors, options),
    ) -> None:
        self.name = name
        self.shape = shape
        self.flatten = flatten
        self.bind = bind
        self.slots = tensors.count(",") + 1
        self.listed = "[]" in tensors
        self.options = tuple(option.split()[1] for option in options.split(", ") if option)
        arguments = ", ".join(part for part in (tensors, options, "str backend") if part)
        _LIBRARY.define(f"{name}({arguments}) -> Tensor")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._differentiate, "Autograd")
        torch.library.register_fake(f"emo_kernels::{name}", self._fake, lib=_LIBRARY)
        self.op = getattr(torch.ops.emo_kernels, name).default

    def __call__(self, positional: Sequence[Any], keyword: Options, backend: str | None) -> Tensor:
        """Choose the backend, or obey, and run it; the reference as standard operators."""
        x = positional[0]
        if runs_standard_operators(x):
            name = "reference"
        else:
            name = backends.resolve(self.name, backend, *positional, **keyword)
        if name == "reference":
            return backends.function(name, self.name)(*positional, **keyword)
        bound = (positional, keyword)
        tensors, options = self.flatten(bound) if self.flatten else bound
        args = self._join(tensors, options.values(), name)
        if torch.compiler.is_compiling() or needs_gradient(tensors):
            return self.op(*args)
        with _below_autograd():  # spares the call of _differentiate
            return self.op(*args)

    def run(self, backend: str, tensors: Tensors, options: Options) -> Tensor:
        """Call one backend's function."""
        positional, keyword = self.bind(tensors, options)
        return backends.function(backend, self.name)(*positional, **keyword)

    def _join(self, tensors: Tensors, options: Any, backend: str) -> tuple[Any, ...]:
        if self.listed:
            return (*tensors[: self.slots - 1], list(tensors[self.slots - 1 :]), *options, backend)
        return (*tensors, *options, backend)

    def _split(self, args: tuple[Any, ...]) -> tuple[Tensors, Options, str]:
        *options, backend = args[self.slots :]
        tensors = args[: self.slots]
        if self.listed:
            tensors = (*tensors[:-1], *tensors[-1])
        return tensors, dict(zip(self.options, options, strict=True)), backend

    def _run(self, *args: Any) -> Tensor:
        tensors, options, backend = self._split(args)
        output = self.run(backend, tensors, options)
        return output.contiguous(memory_format=torch.channels_last)

    def _fake(self, *args: Any) -> Tensor:
        tensors, options, _ = self._split(args)
        positional, keyword = self.bind(tensors, options)
        x = positional[0]
        return torch.empty(
            self.shape(*positional, **keyword),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )

    def _differentiate(self, *args: Any) -> Tensor:
        tensors, options, backend = self._split(args)
        if needs_gradient(tensors):
            return _Gradient.apply(self, options, backend, *tensors)
        with _below_autograd():
            return self.op(*args)


def needs_gradient(tensors: Tensors) -> bool:
    """Whether autograd would record a function of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Gradient(torch.autograd.Function):
    """Forward: the torch op. Backward: the backend's kernel, or the reference recomputed."""

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, options: Options, backend: str, *tensors: Tensor | None
    ) -> Tensor:
        ctx.operator, ctx.options, ctx.backend = operator, options, backend
        ctx.save_for_backward(*tensors)
        with _below_autograd():
            return operator.op(*operator._join(tensors, options.values(), backend))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operator, tensors, needed = ctx.operator, ctx.saved_tensors, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not backends.has(ctx.backend, f"{operator.name}_backward"):
            grads = reference_gradients(operator, grad, tensors, needed, ctx.options)
        else:
            positional, keyword = operator.bind(tensors, ctx.options)
            kernel = backends.function(ctx.backend, f"{operator.name}_backward")
            grads = kernel(grad, *positional, needed=needed, **keyword)
        return (None, None, None, *grads)


def reference_gradients(
    operator: Operator, grad: Tensor, tensors: Tensors, needed: Sequence[bool], options: Options
) -> list[Tensor | None]:
    """Gradients of the reference composition, themselves differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [_alias(t, n, create_graph) for t, n in zip(tensors, needed, strict=True)]
        output = operator.run("reference", inputs, options)
        sought = [t for t, n in zip(inputs, needed, strict=True) if t is not None and n]
        found = iter(
            torch.autograd.grad(
                output, sought, grad, create_graph=create_graph, materialize_grads=True
            )
        )
    return [next(found) if n else None for n in needed]


def _alias(tensor: Tensor | None, needed: bool, create_graph: bool) -> Tensor | None:
    """A stand-in that cuts what lies behind ``tensor``: one input of another counts once."""
    if tensor is None:
        return None
    if create_graph:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(needed)
