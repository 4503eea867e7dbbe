"""The whole-block operator with a call's checks and choices done once, for eager inference."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor

from emo_kernels import backends
from emo_kernels.ops.registration import define_eager
from emo_kernels.spec import IRMBSpec, IRMBWeights


class BoundBlock:
    """A call of ``irmb`` that was checked and made, to be made again with little Python.

    It holds for maps of the same shape while every weight lies where it lay; what the weights
    contain is read at every call.

    Args:
        x, weights, spec: arguments that :func:`emo_kernels.ops.irmb` has accepted.
        backend: the one that ran it; its namespace has ``irmb_bind``.
    """

    def __init__(self, x: Tensor, weights: IRMBWeights, spec: IRMBSpec, backend: str) -> None:
        self.run = backends.function(backend, "irmb_bind")(x, weights, spec)
        self._map = (x.shape, x.dtype, x.device)
        self._memory = _memory(weights)
        _BOUND[id(self)] = self

    def holds(self, x: Tensor, weights: IRMBWeights) -> bool:
        """Whether the call with these arguments is this one."""
        return (
            type(x) is Tensor
            and (x.shape, x.dtype, x.device) == self._map
            and _memory(weights) == self._memory
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        return _op(x, id(self))


_BOUND: WeakValueDictionary[int, BoundBlock] = WeakValueDictionary()
_op = define_eager("irmb.bound(Tensor x, int block) -> Tensor", lambda x, b: _BOUND[b].run(x))


def _memory(weights: IRMBWeights) -> list[Any]:
    return [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in weights]


def can_bind(backend: str, weights: IRMBWeights) -> bool:
    """Whether ``backend`` binds calls; copies of strided weights would go stale."""
    return backends.has(backend, "irmb_bind") and all(
        t.is_contiguous() for _, t in weights.present()
    )
