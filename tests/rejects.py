"""Bad input: every wrong argument gives one clear error, and leaves everything as it was.

The third part of the contract. A message begins with the operator's name, names the argument, and
holds what was expected and what came. Each rejection stands beside its positive control: the same
call without the mistake runs, before and after.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import OperatorContract
from numerics import Case, assert_bitwise_equal
from shapes import rows
from torch import Tensor

from emo_kernels import backends

Mistake = Callable[[Any], Any]

MAP_MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "list": (lambda x: x.tolist(), ("torch.Tensor", "list")),
    "none": (lambda x: None, ("torch.Tensor", "NoneType")),
    "numpy": (lambda x: x.numpy(), ("torch.Tensor", "ndarray")),
    "rank_3": (lambda x: x[0], ("4", "(N, C, H, W)")),
    "rank_5": (lambda x: x[None], ("4", "(N, C, H, W)")),
    "integer": (lambda x: x.int(), ("float", "int32")),
    "boolean": (lambda x: x > 0, ("float", "bool")),
    "complex": (lambda x: x.to(torch.complex64), ("float", "complex64")),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), ("float", "float8_e4m3fn")),
    "sparse": (lambda x: x.to_sparse(), ("dense", "sparse")),
    "no_rows": (lambda x: x[:, :, :0], ("H", ", 0,")),
    "no_columns": (lambda x: x[..., :0], ("W", ", 0)")),
    "no_channels": (lambda x: x[:, :0], ("C", ", 0,")),
}


def axis(t: Tensor) -> int:
    """A dimension of a parameter whose size another argument fixes: the inputs of a layer."""
    return 1 if t.dim() > 1 else 0


TENSOR_MISTAKES: dict[str, tuple[Mistake, tuple[str, ...]]] = {
    "longer": (lambda t: torch.cat([t, t.narrow(axis(t), 0, 1)], axis(t)), ("must be", "got")),
    "rank": (lambda t: t[None], ("must be", "got")),
    "dtype": (lambda t: t.bfloat16(), ("torch.float32", "torch.bfloat16")),
    "device": (lambda t: t.to("meta"), ("cpu", "meta")),
    "list": (lambda t: t.tolist(), ("Tensor", "list")),
}


class RejectContract(OperatorContract):
    """Mistakes that every operator can be handed; each operator's file adds its own."""

    reject_row: str
    map_name = "x"

    def good(self) -> Case:
        """A call in fp32 that every argument of the operator takes part in."""
        case = self.case(rows(self.reject_row)[0])
        tensors = {n: t.float() for n, t in case.tensors.items() if t is not None}
        return replace(case, tensors=tensors)

    def call(self, case: Case, **more: Any) -> Tensor:
        """The public operator, on the backend of its own choice."""
        return self.kernel(more.pop("backend", None))(**case.tensors, **{**case.options, **more})

    def assert_rejects(
        self,
        bad: Case,
        argument: str,
        *parts: str,
        error: type[Exception] | tuple[type[Exception], ...] = ValueError,
        **more: Any,
    ) -> str:
        """``bad`` raises a message of the house's form, and changes nothing."""
        before = {n: t.clone() for n, t in bad.tensors.items() if isinstance(t, Tensor)}
        with pytest.raises(error) as caught:
            self.call(bad, **more)
        message = str(caught.value)
        assert message.startswith(f"{self.operator}: "), message
        assert re.search(rf"\b{re.escape(argument)}\b", message), f"{argument} not in: {message}"
        for part in parts:
            assert part in message, f"{part!r} not in: {message}"
        for name, value in before.items():
            tensor = bad.tensors[name]
            assert isinstance(tensor, Tensor) and tensor.dtype == value.dtype
            if value.is_floating_point() and value.device.type == "cpu" and not value.is_sparse:
                assert_bitwise_equal(tensor.double(), value.double(), name=name)
        assert torch.isfinite(self.call(self.good())).all()
        return message

    def test_the_good_call_runs(self) -> None:
        assert torch.isfinite(self.call(self.good())).all()

    @pytest.mark.parametrize("mistake", MAP_MISTAKES)
    def test_rejects_a_wrong_map(self, mistake: str) -> None:
        spoil, parts = MAP_MISTAKES[mistake]
        bad = self.good()
        bad.tensors[self.map_name] = spoil(bad.tensors[self.map_name])
        self.assert_rejects(
            bad, self.map_name, *parts, error=(TypeError, ValueError, NotImplementedError)
        )

    @pytest.mark.parametrize("mistake", TENSOR_MISTAKES)
    def test_rejects_a_wrong_tensor(self, mistake: str) -> None:
        """Every tensor argument in turn."""
        spoil, parts = TENSOR_MISTAKES[mistake]
        for name in self.good().tensors:
            if name == self.map_name:
                continue
            bad = self.good()
            bad.tensors[name] = spoil(bad.tensors[name])
            self.assert_rejects(bad, name, *parts, error=(TypeError, ValueError))

    def test_rejects_unknown_backends(self) -> None:
        for name, near in (("referense", "reference"), ("banana", "cpu")):
            message = self.assert_rejects(self.good(), "backend", name, near, backend=name)
            assert all(known in message for known in backends.NAMES)

    def test_rejects_an_unknown_backend_in_the_environment(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setenv(backends.ENVIRONMENT_VARIABLE, "banana")
            with pytest.raises(ValueError, match="banana") as caught:
                self.call(self.good())
        assert backends.ENVIRONMENT_VARIABLE in str(caught.value)
        assert torch.isfinite(self.call(self.good())).all()

    def test_an_unavailable_backend_says_why(self) -> None:
        for name, reason in backends.available_backends().items():
            if reason is not None:
                with pytest.raises(NotImplementedError) as caught:
                    self.call(self.good(), backend=name)
                assert reason in str(caught.value) and self.operator in str(caught.value)

    def test_torch_keeps_its_own_errors(self) -> None:
        """A second backward, and an input changed in between, are refused as torch refuses them."""
        good = self.good()
        leaf = good.tensors[self.map_name]
        assert leaf is not None
        leaf.requires_grad_()
        total = self.call(good).square().sum()
        total.backward()
        with pytest.raises(RuntimeError, match="second time"):
            total.backward()
        changed = {**good.tensors, self.map_name: leaf * 1}
        out = self.call(replace(good, tensors=changed))
        with torch.no_grad():
            for tensor in changed.values():
                if tensor is not None:
                    tensor.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.square().sum().backward()


def spoiled(case: Case, **options: Any) -> Case:
    """The case with other options; for the block, other switches of its spec."""
    if "spec" in case.options:
        return replace(case, options={"spec": case.options["spec"]._replace(**options)})
    return replace(case, options={**case.options, **options})


def without(case: Case, *names: str) -> Case:
    """The case without some of its tensors."""
    return replace(case, tensors={n: t for n, t in case.tensors.items() if n not in names})
