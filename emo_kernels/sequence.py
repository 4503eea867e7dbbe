"""Accelerated modules that run one after the other, in inference as one call.

Between two blocks the interpreter has gone cold: what it does for each costs ten times what it does
in a loop that does nothing else. ``torch.nn.Sequential`` says what is called in which order, so
that C++ can call it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels.spec import BoundCall
from emo_kernels.structure import Reading, UnreadableError
from emo_kernels.swap import Replacement, SwappedForward, own_forward, restore_module


class SequenceReading(Reading[list[BoundCall]]):
    """Of one sequence: the calls that its modules repeat."""

    def _read(self, block: nn.Module) -> list[BoundCall]:
        calls = []
        for name in block._modules:
            module = self._child(block, name, name)
            forward = self._attribute(module, "forward")
            if self._attribute(module, "_compiled_call_impl", None) is not None:
                raise UnreadableError(f"{name} is compiled")
            if not isinstance(forward, SwappedForward) or forward.bound is None:
                raise UnreadableError(f"{name} repeats no call")
            calls.append(forward.bound)
        self._sized.append(block._modules)
        return calls


class AcceleratedSequence(Replacement):
    """The forward of a sequence of accelerated modules."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self._bound: BoundCall | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The call before made again, where it is the same; else module by module."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or args or kwargs:
            return own_forward(self.block, x, *args, **kwargs)
        out = None if self._bound is None else self._bound(x)
        if out is None:
            out = own_forward(self.block, x)
            self._bind()
        return out

    def _bind(self) -> None:
        """Keep the calls that the modules just made as one."""
        self._bound = None
        try:
            reading = SequenceReading(self.block)
        except UnreadableError:
            return
        first, *others = reading.spec
        conditions = reading.conditions()
        self._bound = first.followed_by(tuple(others), conditions.places, conditions.sized)


def accelerate_sequences(model: nn.Module) -> None:
    """Swap every ``torch.nn.Sequential`` whose modules were all swapped."""
    sequences: list[nn.Module] = [m for m in model.modules() if type(m) is nn.Sequential]
    for sequence in sequences:
        restore_module(sequence)
        forwards = [module.__dict__.get("forward") for module in sequence.children()]
        if len(forwards) > 1 and all(isinstance(forward, SwappedForward) for forward in forwards):
            sequence.forward = AcceleratedSequence(sequence)
