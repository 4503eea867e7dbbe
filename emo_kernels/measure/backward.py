"""Which part of a model a backward pass is in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BackwardWalk:
    """Tells of the parts that a backward pass comes through, one after another.

    A part begins when the gradient at its output is there and ends when the next begins: what
    autograd does between them, such as adding a gradient to a parameter's, is in the one before.

    Args:
        first: the part behind all others, where the loss is.
        enter, leave: hear of each part.
    """

    def __init__(
        self, first: str, enter: Callable[[str], object], leave: Callable[[str], object]
    ) -> None:
        self.first, self.enter, self.leave = first, enter, leave
        self.within: str | None = None

    def backward(self, loss: Tensor) -> None:
        """The backward pass of ``loss``."""
        loss.register_hook(self._begin)
        loss.backward()

    @contextmanager
    def through(self, model: nn.Module, paths: Iterable[str]) -> Iterator[None]:
        """Follow backward passes of what these parts compute meanwhile."""
        handles = [
            model.get_submodule(path).register_forward_hook(self._watching(path)) for path in paths
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, grad: Tensor) -> None:
        self._reach(self.first)
        # In the thread of the backward pass: a range that a profiler opened there ends there.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _watching(self, path: str) -> Callable[[nn.Module, object, Tensor], None]:
        def watch(module: nn.Module, args: object, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: self._reach(path))

        return watch

    def _reach(self, path: str) -> None:
        self._end()
        self.within = path
        self.enter(path)

    def _end(self) -> None:
        if self.within is not None:
            self.leave(self.within)
        self.within = None
