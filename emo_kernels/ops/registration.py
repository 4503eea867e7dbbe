"""How an operator becomes ``torch.ops.emo_kernels.<name>``: schema, fake, autograd, dispatch.

The torch op is opaque: it runs the function of the backend named by its last argument. Its gradient
is the torch op ``<name>_backward``, that backend's kernel, where there is one; else, and whenever
the gradient itself must be differentiable, it is recomputed through the reference composition by
PyTorch's own autograd.
Measured cost of one call: ``tests/test_overhead.py``. The kernels that a training step is made of
are called straight where nobody watches: of the 20 ms that one step of EMO-5M spends outside its
kernels (batch 2 at 32 x 32, 1 thread of 2 Zen 4 vCPUs, ``thread_time``), the torch ops took 4.
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
_PLAIN = (Tensor, torch.nn.Parameter)


def define_composite(schema: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A torch op that stands for ``run`` where a call is traced, and falls apart into its parts."""
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeImplicitAutograd")
    return getattr(torch.ops.emo_kernels, name).default


def define_kernel(
    name: str, tensors: str, options: str, returns: str, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """A torch op for one backend function, without a gradient of its own.

    Args:
        name: of the function in the backends' namespaces.
        tensors, options: schemas of its positional and of its keyword arguments.
        returns: schema of its result.
        fake: the result's shape and dtype, called as the function is.

    Returns:
        The torch op, as :func:`_unless_watched` calls it; its last argument is the backend's name.
    """
    count = len(_names(tensors))
    keywords = _names(options)

    def split(args: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        return args[:count], dict(zip(keywords, args[count:], strict=True))

    def run(*args: Any) -> Any:
        positional, keyword = split(args[:-1])
        return backends.function(args[-1], name)(*positional, **keyword)

    def run_fake(*args: Any) -> Any:
        positional, keyword = split(args[:-1])
        return fake(*positional, **keyword)

    arguments = ", ".join(part for part in (tensors, options, "str backend") if part)
    _LIBRARY.define(f"{name}({arguments}) -> {returns}")
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emo_kernels::{name}", run_fake, lib=_LIBRARY)
    return _unless_watched(getattr(torch.ops.emo_kernels, name).default, run)


def _unless_watched(op: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` without its gradient: what it runs, straight, where nobody wants to see the op."""

    def call(*args: Any) -> Any:
        return op(*args) if watched(args) else run(*args)

    return call


def watched(args: tuple[Any, ...]) -> bool:
    """Whether a trace, a mode, a transform, a profiler or a tensor of another class is around."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return True
    for arg in args:
        if isinstance(arg, Tensor) and type(arg) not in _PLAIN:
            return True
    return False


def _names(schema: str) -> tuple[str, ...]:
    return tuple(argument.split()[1] for argument in schema.split(", ") if argument)


def empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A fake result: (N, C, H, W), channels_last, or (N, O); dtype and device of ``like``."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _in_format(result: Tensor) -> Tensor:
    if result.dim() == 4:
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


def empty_gradients(
    tensors: Sequence[Tensor | None], needed: Sequence[bool], affine: Tensor | None, norm_at: int
) -> list[Tensor]:
    """Fake results of a backward kernel: like the needed tensors, the first of them a map.

    With a training batch norm, ``affine`` (4, C), one (2, C) of sums stands at place ``norm_at``
    for the gradients of the norm's two parameters.
    """
    grads = []
    for place, (tensor, is_needed) in enumerate(zip(tensors, needed, strict=True)):
        if tensor is None or not is_needed:
            continue
        if affine is not None and place in (norm_at, norm_at + 1):
            if place == norm_at:
                grads.append(affine.new_empty((2, affine.shape[1]), dtype=torch.float64))
        elif tensor.dim() == 4 and place == 0:
            grads.append(empty_map(tensor, tensor.shape))
        else:
            grads.append(torch.empty_like(tensor))
    return grads


def _no_kernel(*_: Any) -> list[Tensor]:
    raise AssertionError("an operator without extras has no backward kernel")


Tensors = Sequence[Tensor | None]
Options = dict[str, Any]


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
    """A torch op over the backend functions ``f(*tensors, **options)`` of one name.

    Args:
        name: the operator's stem.
        tensors: schema of the tensor arguments, in order.
        options: schema of the remaining arguments, in order.
        shape: the output's (N, C, H, W) or (N, O), called as the backends are.
        extras: schema of further tensors that its backward kernels take in a training step of the
            whole block; ``None``: it has no backward kernels.
        norm_at: place of the norm's weight among the tensors, where a training batch norm's
            ``affine`` may stand for the norm.
        identity_at: place of a tensor whose gradient is the output's.

    Maps come out channels_last, whatever the inputs are and whoever runs it.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: str,
        options: str,
        shape: Callable[..., tuple[int, ...]],
        extras: str | None = None,
        norm_at: int = -2,
        identity_at: int | None = None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.count = len(_names(tensors))
        self.options = _names(options)
        self.norm_at = norm_at
        self.identity_at = identity_at
        arguments = ", ".join(part for part in (tensors, options, "str backend") if part)
        _LIBRARY.define(f"{name}({arguments}) -> Tensor")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, self._differentiate, "Autograd")
        torch.library.register_fake(f"emo_kernels::{name}", self._fake, lib=_LIBRARY)
        self.op = getattr(torch.ops.emo_kernels, name).default
        self.forward = _unless_watched(self.op, self._run)
        self.backward_op: Callable[..., list[Tensor]] = _no_kernel
        if extras is not None:
            self.extras = _names(extras)
            self.backward_op = define_kernel(
                f"{name}_backward",
                ", ".join(part for part in ("Tensor grad", tensors, extras) if part),
                ", ".join(part for part in ("bool[] needed", options) if part),
                "Tensor[]",
                self._fake_backward,
            )

    def __call__(self, positional: Sequence[Any], keyword: Options, backend: str | None) -> Tensor:
        """Choose the backend, or obey, and run it; the reference as standard operators."""
        x = positional[0]
        if runs_standard_operators(x):
            name = "reference"
        else:
            name = backends.resolve(self.name, backend, *positional, **keyword)
        if name == "reference":
            return backends.function(name, self.name)(*positional, **keyword)
        return self.call((*self.to_schema(positional, keyword), name))

    def call(self, args: tuple[Any, ...]) -> Tensor:
        """Call the torch op; straight into its autograd kernel where nothing traces (3 us less)."""
        return self.op(*args) if torch.compiler.is_compiling() else self._differentiate(*args)

    def to_schema(self, positional: Sequence[Any], keyword: Options) -> tuple[Any, ...]:
        """A backend function's arguments as the torch op takes them, without the backend."""
        return (*positional, *keyword.values())

    def from_schema(self, args: Sequence[Any]) -> tuple[Sequence[Any], Options]:
        """The inverse of :meth:`to_schema`."""
        count = self.count
        return args[:count], dict(zip(self.options, args[count:], strict=True))

    def tensors(self, args: Sequence[Any]) -> Tensors:
        """The tensors among the torch op's arguments, flat."""
        return args[: self.count]

    def replace(self, args: Sequence[Any], tensors: Tensors) -> tuple[Any, ...]:
        """The torch op's arguments with other tensors."""
        return (*tensors, *args[self.count :])

    def _run(self, *args: Any) -> Tensor:
        run = backends.function(args[-1], self.name)
        positional, keyword = self.from_schema(args[:-1])
        return _in_format(run(*positional, **keyword))

    def _fake(self, *args: Any) -> Tensor:
        positional, keyword = self.from_schema(args[:-1])
        return empty_map(positional[0], self.shape(*positional, **keyword))

    def _fake_backward(self, grad: Tensor, *tensors: Any, needed: Any, **_: Any) -> list[Tensor]:
        extras = dict(zip(self.extras, tensors[self.count :], strict=True))
        inputs = tensors[: self.count]
        return empty_gradients(inputs, needed, extras.get("affine"), self.norm_at)

    def gradients(
        self, grad: Tensor, needed: Sequence[bool], args: Sequence[Any]
    ) -> list[Tensor | None]:
        """Gradients of the tensors among the torch op's arguments by the backend's kernel."""
        asked = [n and place != self.identity_at for place, n in enumerate(needed)]
        tensors, options = args[: self.count], args[self.count :]
        nothing = (None,) * len(self.extras)
        found = iter(self.backward_op(grad, *tensors, *nothing, asked, *options))
        grads = [next(found) if a else None for a in asked]
        if self.identity_at is not None and needed[self.identity_at]:
            grads[self.identity_at] = grad
        return grads

    def _differentiate(self, *args: Any) -> Tensor:
        if forward_ad._current_level >= 0:  # a torch op without a rule gives a zero tangent
            positional, keyword = self.from_schema(args[:-1])
            return _in_format(backends.function("reference", self.name)(*positional, **keyword))
        tensors = self.tensors(args)
        if needs_gradient(tensors):
            return _Gradient.apply(self, args, *tensors)
        with _below_autograd():
            return self.op(*args)


def needs_gradient(tensors: Tensors) -> bool:
    """Whether autograd would record a function of these tensors."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator would cost half a microsecond more
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _Gradient(torch.autograd.Function):
    """Forward: the torch op. Backward: the backend's kernel, or the reference recomputed."""

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, args: tuple[Any, ...], *tensors: Tensor | None
    ) -> Tensor:
        ctx.operator = operator
        ctx.args = operator.replace(args, (None,) * len(tensors))  # tensors are saved, not kept
        ctx.save_for_backward(*tensors)
        with _below_autograd():
            return operator.op(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operator, tensors, needed = ctx.operator, ctx.saved_tensors, ctx.needs_input_grad[2:]
        grads: Sequence[Tensor | None]
        kernel = backends.has(ctx.args[-1], f"{operator.name}_backward")
        if torch.is_grad_enabled() or not kernel:
            grads = reference_gradients(operator, grad, tensors, needed, ctx.args)
        else:
            grads = operator.gradients(grad, needed, operator.replace(ctx.args, tensors))
        return (None, None, *grads)


def match(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient in the dtype, shape and strides of what it belongs to."""
    if grad is None or like is None:
        return grad
    if grad.dtype is like.dtype and grad.shape == like.shape and grad.stride() == like.stride():
        return grad
    grad = grad.to(like.dtype).reshape(like.shape)
    if grad.stride() == like.stride():
        return grad
    strides = zip(grad.shape, grad.stride(), like.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in strides):
        return grad.as_strided(like.shape, like.stride())  # DistributedDataParallel compares all
    return grad


def reference_gradients(
    operator: Operator, grad: Tensor, tensors: Tensors, needed: Sequence[bool], args: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients of the reference composition, themselves differentiable if grad mode is on.

    16-bit tensors are computed with in fp32: torch's own 16-bit sums leave more in a gradient that
    is zero by structure than the tolerance rule allows.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [_alias(t, n, create_graph) for t, n in zip(tensors, needed, strict=True)]
        wide = [None if t is None else _widen(t) for t in inputs]
        positional, keyword = operator.from_schema(operator.replace(args, wide)[:-1])
        output = backends.function("reference", operator.name)(*positional, **keyword)
        sought = [t for t, n in zip(inputs, needed, strict=True) if t is not None and n]
        found = iter(
            torch.autograd.grad(
                output, sought, _widen(grad), create_graph=create_graph, materialize_grads=True
            )
        )
    return [next(found) if n else None for n in needed]


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _alias(tensor: Tensor | None, needed: bool, create_graph: bool) -> Tensor | None:
    """A stand-in that cuts what lies behind ``tensor``: one input of another counts once."""
    if tensor is None:
        return None
    if create_graph:
        return tensor.view_as(tensor)
    return tensor.detach().requires_grad_(needed)
