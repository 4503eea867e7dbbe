"""A module's forward replaced on the instance, with the way back and the call it repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from emo_kernels import backends
from emo_kernels.spec import BoundCall
from emo_kernels.structure import Reading, UnreadableError, has_global_hooks

R = TypeVar("R", bound=Reading[Any])


class Replacement:
    """What stands in a module's ``__dict__`` for its forward, with what stood there before."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.previous = block.__dict__.get("forward")

    @property
    def __code__(self) -> Any:
        """Of the module's own forward, which ``torch.export`` asks for."""
        return getattr(self.previous or type(self.block).forward, "__code__", None)

    def take_off(self) -> None:
        """Put back what stood there before."""
        if self.previous is None:
            del self.block.__dict__["forward"]
        else:
            self.block.forward = self.previous


class SwappedForward(Replacement, Generic[R]):
    """The forward of an accelerated module. Copied and pickled with it; holds no weights.

    A subclass says how to read the module and who computes a call that is not the last one again.

    Attributes:
        bound: the last call, to be made again.
    """

    read: type[R]

    def __init__(self, block: nn.Module, backend: str | None) -> None:
        super().__init__(block)
        self.backend = backend
        self._reading: R | None = None
        self.bound: BoundCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None, "bound": None}

    def reading(self) -> R:
        """What the module is now."""
        if self._reading is None or not self._reading.is_current():
            self._reading = None
            self._reading = self.read(self.block)
        return self._reading

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The fused operator where it computes this call, else the module's own forward."""
        if not torch.compiler.is_compiling() and self.bound is not None and not (args or kwargs):
            out = self.bound(x)
            if out is not None:
                return out
        if args or kwargs or not isinstance(x, Tensor) or has_global_hooks():
            return own_forward(self.block, x, *args, **kwargs)
        eager = not torch.compiler.is_compiling()
        if torch.jit.is_tracing() if eager else torch.compiler.is_exporting():
            return own_forward(self.block, x)
        try:
            reading = self.reading()
        except UnreadableError:
            return own_forward(self.block, x)
        return self.decide(x, reading)

    def decide(self, x: Tensor, reading: R) -> Tensor:
        """A call that is not the one made before: by whom it is computed."""
        raise NotImplementedError


def choose(operator: str, backend: str | None, x: Tensor, *args: Any, **options: Any) -> str | None:
    """The backend that runs an operator beside the blocks; ``None``: the module's own forward does.

    A backend asked for need not have a kernel for it: it is not one of the blocks.
    """
    device, asked = x.device.type, backends.requested(backend)
    for name in backends.candidates(operator, device) if asked is None else (asked,):
        if name != "reference" and not backends.why_not(
            name, operator, device, x, *args, **options
        ):
            return name
    return None


def restore_module(module: nn.Module) -> None:
    """Give ``module`` its own forward back; nothing if it was not accelerated."""
    while isinstance(forward := module.__dict__.get("forward"), Replacement):
        forward.take_off()


def own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward that ``module`` has without acceleration."""
    forward = module.__dict__.get("forward")
    while isinstance(forward, Replacement):
        forward = forward.previous
    if forward is None:
        return type(module).forward(module, *args, **kwargs)
    return forward(*args, **kwargs)


def disagreement(
    module: nn.Module, x: Tensor, computes: Callable[[Tensor], Tensor], what: str
) -> str | None:
    """Why the module's own forward in inference is not ``computes``, judged by x; or ``None``.

    Args:
        what: ``computes`` is, for the reason.
    """
    with _in_inference(module):
        try:
            expected = own_forward(module, x)
        except Exception as error:
            return f"its forward fails on a probe input ({type(error).__name__}: {error})"
        found = computes(x)
    limit = max(1e-4, 8 * torch.finfo(x.dtype).eps)
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return f"its forward returns something else than {what}"
    if not (found - expected).norm() <= limit * max(expected.norm(), found.norm()):
        return f"its forward computes something else than {what}"
    return None


@contextmanager
def _in_inference(module: nn.Module) -> Iterator[None]:
    """Every module inside in inference mode, then as they were."""
    modes = [(inner, inner.training) for inner in module.modules()]
    try:
        for inner, _ in modes:
            inner.training = False
        with torch.no_grad():
            yield
    finally:
        for inner, training in modes:
            inner.training = training
