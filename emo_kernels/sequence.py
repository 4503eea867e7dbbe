"""Accelerated modules that run one after the other, in inference as one call.

Between two blocks the interpreter has gone cold: what it does for each costs ten times what it does
in a loop that does nothing else, 5 % of EMO-5M at batch 1 and 10 % of EMO-1M on two Zen 4 cores.
``torch.nn.Sequential`` says what is called in which order, so that C++ can call it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels.spec import BoundCall
from emo_kernels.structure import Reading, UnreadableError
from emo_kernels.swap import Replacement, SwappedForward, own_forward, restore_module


class InTurn:
    """Makes calls one that were made in turn before: maps of changing sizes would not repeat it."""

    def __init__(self) -> None:
        self._seen: tuple[int, ...] = ()

    def bind(self, block: nn.Module, names: Iterable[str], *behind: BoundCall) -> BoundCall | None:
        """The calls that children of ``block`` repeat and then those behind, as one call.

        ``None`` where they are not those of the time before, where a child repeats none or has
        hooks, or does not take what the one before it gives.
        """
        seen, self._seen = self._seen, ()
        try:
            reading = _SequenceReading(block, names)
        except UnreadableError:
            return None
        first, *others = (*reading.spec, *behind)
        self._seen = tuple(map(id, (first, *others)))
        if seen != self._seen:
            return None
        conditions = reading.conditions()
        return first.followed_by(tuple(others), conditions.places, conditions.sized)


class _SequenceReading(Reading[list[BoundCall]]):
    """Of children called in turn: the calls that they repeat."""

    def __init__(self, block: nn.Module, names: Iterable[str]) -> None:
        self._names = names
        super().__init__(block)

    def _read(self, block: nn.Module) -> list[BoundCall]:
        self._sized.append(block._modules)
        return [self._call(block, name) for name in self._names]

    def _call(self, block: nn.Module, name: str) -> BoundCall:
        module = self._child(block, name, name)
        forward = self._attribute(module, "forward")
        compiled = self._attribute(module, "_compiled_call_impl", None)
        if not _repeats(forward) or forward.bound is None or compiled is not None:
            raise UnreadableError(f"{name} repeats no call")
        call: BoundCall = forward.bound
        return call


def _repeats(forward: Any) -> bool:
    return isinstance(forward, SwappedForward | AcceleratedSequence)


class AcceleratedSequence(Replacement):
    """The forward of a sequence of accelerated modules.

    Attributes:
        bound: the last call, to be made again.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__(block)
        self.bound: BoundCall | None = None
        self._in_turn = InTurn()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "bound": None, "_in_turn": InTurn()}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The call before made again, where it is the same; else module by module."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or args or kwargs:
            return own_forward(self.block, x, *args, **kwargs)
        out = None if self.bound is None else self.bound(x)
        if out is None:
            out = own_forward(self.block, x)
            self.bound = self._in_turn.bind(self.block, self.block._modules)
        return out


def accelerate_sequences(model: nn.Module) -> None:
    """Swap every ``torch.nn.Sequential`` whose modules were all swapped, the inner ones first."""
    for sequence in reversed(list(model.modules())):
        if type(sequence) is not nn.Sequential:
            continue
        block: nn.Module = sequence
        restore_module(block)
        forwards = [module.__dict__.get("forward") for module in block.children()]
        if len(forwards) > 1 and all(map(_repeats, forwards)):
            block.forward = AcceleratedSequence(block)
