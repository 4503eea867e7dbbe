"""The end of a network, norm, mean and head, swapped for one fused operator in inference.

Recognised by structure: a model that has its blocks behind a method ``trunk``, and whose forward is
``head(norm(trunk(x)).mean((2, 3)))``, a layer norm over channels and a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels import backends, ops, reference
from emo_kernels.models.emo import EMO
from emo_kernels.ops.registration import runs_standard_operators
from emo_kernels.sequence import InTurn
from emo_kernels.spec import BoundCall
from emo_kernels.structure import OperatorReading, UnreadableError
from emo_kernels.swap import (
    SwappedForward,
    choose,
    disagreement,
    own_forward,
    restore_module,
)

# Whose change changes the forward.
_METHODS = ("trunk", "run_stage", "forward_features", "forward_head")


def find_tails(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every network with such an end."""
    return ((path, m) for path, m in model.named_modules() if _looks_like_tail(m))


def _looks_like_tail(module: nn.Module) -> bool:
    children = module._modules
    return (
        callable(getattr(module, "trunk", None))
        and children.keys() >= {"norm", "head"}
        and type(children["head"]) is nn.Linear
    )


class TailReading(OperatorReading):
    """Of one tail: what ``ops.norm_pool_linear`` takes."""

    def _read(self, model: nn.Module) -> dict[str, Any]:
        for name in _METHODS:
            self._places.append((model.__dict__, name))
            if name in model.__dict__:
                raise UnreadableError(f"its {name} was replaced")
        head = self._child(model, "head", "head")
        if type(head) is not nn.Linear:
            raise UnreadableError("its head is no torch.nn.Linear")
        self._parameters(head, "weight", "bias")
        norm = self._read_norm(self._child(model, "norm", "norm"))
        if norm["norm"] != "layer":
            raise UnreadableError("its norm is no layer norm over channels")
        del self._tensors[4:]  # statistics, which a layer norm has not
        return {"eps": norm["norm_eps"]}


class AcceleratedTail(SwappedForward[TailReading]):
    """The forward of a network with an accelerated tail: its own but for norm, mean and head.

    Of this library's networks the whole is one call, where every stage is.
    """

    read = TailReading

    def __init__(self, block: nn.Module, backend: str | None) -> None:
        super().__init__(block, backend)
        self._bound_tail: BoundCall | None = None  # of the trunk's map
        self._in_turn = InTurn()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_bound_tail": None, "_in_turn": InTurn()}

    def decide(self, x: Tensor, reading: TailReading) -> Tensor:
        """The trunk, then the backend's kernel if it takes this call; else the own forward."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
            or runs_standard_operators(x)
        ):
            return own_forward(self.block, x)
        network: Any = self.block
        y: Tensor = network.trunk(x)
        out = None if self._bound_tail is None else self._bound_tail(y)
        if out is None:
            out = self._compute(y, reading)
        self.bound = None
        if self._bound_tail is not None and _runs_stages_in_turn(network):
            self.bound = self._in_turn.bind(network, EMO.STAGES, self._bound_tail)
        return out

    def _compute(self, y: Tensor, reading: TailReading) -> Tensor:
        tensors, operator = reading.tensors(), "norm_pool_linear"
        backend = choose(operator, self.backend, y, *tensors, **reading.spec)
        if backend is None:
            return reference.norm_pool_linear(y, *tensors, **reading.spec)
        out = ops.norm_pool_linear(y, *tensors, **reading.spec, backend=backend)
        self._bound_tail = None
        if backends.has(backend, f"{operator}_bind"):
            bind = backends.function(backend, f"{operator}_bind")
            self._bound_tail = bind(y, *tensors, conditions=reading.conditions(), **reading.spec)
        return out


def _runs_stages_in_turn(network: nn.Module) -> bool:
    """Whether its trunk is this library's, which calls stage after stage."""
    kind: Any = type(network)
    return isinstance(network, EMO) and kind.trunk is EMO.trunk and kind.run_stage is EMO.run_stage


def accelerate_tails(model: nn.Module, backend: str | None) -> None:
    """Swap every tail that computes what its structure says; the others stay, which is no fault."""
    for _, network in find_tails(model):
        if unreadable_tail(network) is None:
            restore_module(network)
            network.forward = AcceleratedTail(network, backend)


def unreadable_tail(network: Any) -> str | None:
    """Why ``network`` computes something else than its structure says, or ``None``."""
    try:
        reading = TailReading(network)
    except UnreadableError as reason:
        return str(reason)
    tensors = reading.tensors()
    first = next((m.weight for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None or first.is_meta:
        return "it has no convolution of an image, or weights without values"

    def computes(x: Tensor) -> Tensor:
        y = network.trunk(x)
        return reference.norm_pool_linear(y, *tensors, **reading.spec)

    image = torch.randn(1, first.shape[1], 33, 33, generator=torch.Generator().manual_seed(0))
    return disagreement(network, image.to(first), computes, "norm, mean and head of its trunk")
