"""What every operator owes, whatever it computes: the tests that each operator's file inherits.

A file ``test_<stem>.py`` subclasses :class:`OperatorContract`, names its operator and a few rows,
and adds the tests that only make sense there. Ground truth is ``oracle.py``, never the package;
the yardstick in lower precision is the reference.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import memory
import oracle
import pytest
import shapes
import torch
from cases import CASES, function, integers
from grid import (
    DTYPES,
    ITS_OWN,
    device_of,
    on_device_of,
    over,
    refusal_of_row,
    slow_motion,
    slow_with,
    work,
)
from numerics import (
    DENSE,
    UNIT_ROUNDOFF,
    Case,
    Comparison,
    Layouts,
    check_draws,
    check_operator,
    round_all,
    run,
)
from shapes import Row
from torch import Tensor

from emo_kernels import backends, ops, reference

FEW_NUMBERS, ENOUGH = 8, 16
MAP_LAYOUTS = [name for name in memory.VALUE_LAYOUTS if name != "contiguous"]
GRAD_LAYOUTS = [name for name in memory.LAYOUTS if name != "contiguous"]
HARD_DATA = ("offset1000", "tiny", "large", "constant_channels", "sharp", "sharper")


class OperatorContract:
    """Inherit, set the class variables, and the operator is held to its contract.

    Attributes:
        operator: its stem.
        few: names of small rows that between them use every switch of the operator.
        integer_rows: names of rows that give exact results on integers.
        tiny: rows of a few dozen numbers, for numerical differentiation.
        batch_orders_sums: backends whose sums have another order where there are few images, which
            share out what many need not: to rounding then, to the last bit in equal batches.
    """

    operator: ClassVar[str]
    few: ClassVar[tuple[str, ...]]
    integer_rows: ClassVar[tuple[str, ...]]
    tiny: ClassVar[tuple[Row, ...]]
    integer_gradients: ClassVar[bool] = True
    batch_orders_sums: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------------------------- tools

    def kernel(self, backend: str) -> Callable[..., Tensor]:
        """The public operator on one backend, called by keywords."""
        call = function(self.operator, getattr(ops, self.operator), backend=backend)
        return call if backends.unavailable(backend) else on_device_of(backend, call)

    @property
    def plain(self) -> Callable[..., Tensor]:
        """The reference composition, called by keywords."""
        return function(self.operator, getattr(reference, self.operator))

    def case(self, row: Row, **how: Any) -> Case:
        """The call that a row stands for."""
        return CASES[self.operator](row, **how)

    def integer_case(self, row: Row) -> Case:
        """A call whose result and gradients are integers, or fractions that every dtype holds."""
        return integers(self.case(row))

    def check(self, backend: str, case: Case, dtype: torch.dtype, **how: Any) -> list[Comparison]:
        """Hold one call against the oracle."""
        how = {"name": f"{self.operator} on {backend}", "device": device_of(backend), **how}
        truth = getattr(oracle, self.operator)
        return check_operator(self.kernel(backend), self.plain, case, dtype, oracle=truth, **how)

    def check_gradients(
        self,
        backend: str,
        dtype: torch.dtype,
        make: Callable[[int], Case],
        *,
        seed: int = 0,
        draws: int = 1,
        layouts: Layouts = DENSE,
    ) -> None:
        """Hold the call ``make(seed)`` and its gradients against the oracle.

        Where a gradient has a few numbers, or ``draws`` says that few count, over several seeds.
        """
        case = make(seed)
        sizes = [case.tensors[name].numel() for name in case.differentiable()]
        if 0 < min(sizes) < FEW_NUMBERS:
            draws = max(draws, -(-ENOUGH // min(sizes)))
        own = self.owns_gradient(backend, dtype)  # else it is torch's, the yardstick itself
        if draws == 1 or not own or dtype == torch.float64 or 0 in sizes:
            self.check(backend, case, dtype, layouts=layouts)
            return
        self.check(backend, case, dtype, layouts=layouts, gradients=False)
        cases = [make(seed + more) for more in range(draws)]
        self.check_several(backend, cases, dtype, layouts=layouts)

    def check_several(
        self, backend: str, cases: Sequence[Case], dtype: torch.dtype, **how: Any
    ) -> None:
        """Hold several draws of one call against the oracle, as one."""
        if len(cases) == 1:
            self.check(backend, cases[0], dtype, **how)
            return
        name = f"{self.operator} on {backend}, {len(cases)} draws"
        how = {"oracle": getattr(oracle, self.operator), "device": device_of(backend), **how}
        check_draws(self.kernel(backend), self.plain, cases, dtype, name=name, **how)

    # ------------------------------------------------------------------------------------ numbers

    @over(covered=True)
    def test_forward(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        self.check(backend, self.case(row), dtype, gradients=False)

    @over()
    def test_backward(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        self.check_gradients(backend, dtype, lambda seed: self.case(row, seed=seed))

    @over("integer_rows", reference=tuple(DTYPES))
    def test_integers_are_exact(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        gradients = self.integer_gradients
        self.check(backend, self.integer_case(row), dtype, exact=True, gradients=gradients)

    @over("few", dtypes=("fp32", "fp64"))
    @pytest.mark.parametrize("data", HARD_DATA)
    def test_hard_data(self, backend: str, row: Row, dtype: torch.dtype, data: str) -> None:
        sharpness = {"sharp": 10.0, "sharper": 30.0}.get(data)

        def make(seed: int) -> Case:
            if sharpness is None:
                return self.case(row, data=data, seed=seed)
            return replace(self.case(row, qk_scale=sharpness, seed=seed), sharpness=sharpness)

        # A sharp softmax leaves its gradient to the few pixels that nearly tie.
        self.check_gradients(backend, dtype, make, draws=4 if sharpness else 1)

    @over("few", dtypes=("fp32", "fp64"))
    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    def test_special_values_go_where_the_oracle_sends_them(
        self, backend: str, row: Row, dtype: torch.dtype, value: float
    ) -> None:
        case = self.case(row)
        first = next(iter(case.tensors.values()))
        assert first is not None
        if first.shape[0]:
            first[-1, first.shape[1] // 2, first.shape[2] // 2, first.shape[3] // 2] = value
        self.check(backend, case, dtype, gradients=False)

    # ------------------------------------------------------------------------------------- memory

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    @pytest.mark.parametrize("layout", MAP_LAYOUTS)
    def test_layouts_of_maps_and_weights(
        self, backend: str, row: Row, dtype: torch.dtype, layout: str
    ) -> None:
        layouts = Layouts(maps=layout, weights="sliced" if "sliced" in layout else "offset")
        gradients = self.owns_gradient(backend, dtype)
        self.check(backend, self.case(row), dtype, layouts=layouts, gradients=gradients)

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    @pytest.mark.parametrize("layout", GRAD_LAYOUTS)
    def test_layouts_of_the_gradient(
        self, backend: str, row: Row, dtype: torch.dtype, layout: str
    ) -> None:
        layouts = Layouts(maps="channels_last", grad=layout)
        gradients = self.owns_gradient(backend, dtype)
        self.check(backend, self.case(row), dtype, layouts=layouts, gradients=gradients)

    def owns_gradient(self, backend: str, dtype: torch.dtype) -> bool:
        """Whether gradients in other layouts are held to the rule: where they are the backend's.

        A gradient of last resort is torch's, whose channels_last sums round several times worse
        than the contiguous ones that the rule takes as its yardstick (and, in 16 bits, read
        memory that nobody wrote on narrow maps). In fp64 that still counts.
        """
        return dtype == torch.float64 or backends.has(backend, f"{self.operator}_backward")

    @over("few", dtypes=("fp32", "bf16", "fp64"))
    def test_memory_nobody_wrote_is_not_read(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        for poison in memory.POISONS:
            self.check(backend, self.case(row), dtype, poison=poison)

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are Linux's mmap")
    @pytest.mark.parametrize(
        "mode", ["pages", "far", pytest.param("pages of all rows", marks=pytest.mark.slow)]
    )
    @slow_with("reference")
    def test_addresses_stay_inside(self, backend: str, mode: str) -> None:
        """Not one byte outside any tensor is read, and offsets pass 2^31: in a process to spare."""
        if device_of(backend) != "cpu":
            pytest.skip("guard pages and address space are the CPU's: compute-sanitizer's task")
        script = Path(__file__).with_name("guards.py")
        mode, *all_rows = mode.split(maxsplit=1)
        names = self.few
        if all_rows:
            rows = [row for row in shapes.VIEWS[self.operator]() if not row.slow]
            most = ITS_OWN.light if slow_motion(backend) else max(map(work, rows))
            names = tuple(row.name for row in rows if work(row) <= most)
        command = [sys.executable, str(script), mode, self.operator, backend, *names]
        child = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
        report = (
            f"exit {child.returncode}; last calls {child.stdout[-200:]!r}; {child.stderr[-800:]}"
        )
        assert child.returncode == 0 and "survived" in child.stdout, report

    @over("few", dtypes=("fp32", "bf16"))
    def test_threads_batches_and_repeats_agree(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """A promise of the kernels to the last bit; torch itself keeps it to rounding only."""
        case = self.case(replace(row, n=5))
        inputs = round_all(case.tensors, dtype)
        kernel = self.kernel(backend)
        once = run(kernel, inputs, case.options)["out"]
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            self.assert_same(run(kernel, inputs, case.options)["out"], once, backend)
        torch.set_num_threads(1)
        order = torch.tensor([3, 0, 4, 1, 2])
        batched = [n for n, t in inputs.items() if t is not None and self.has_batch(n)]

        def part(index: Tensor | slice) -> Tensor:
            chosen = {n: t[index] if n in batched else t for n, t in inputs.items()}
            return run(kernel, chosen, case.options)["out"]

        self.assert_same(part(order), once[order], backend)
        pieces = torch.cat([part(slice(0, 3)), part(slice(3, 4)), part(slice(4, 5))])
        if backend in self.batch_orders_sums:
            error = float((pieces - once).double().norm())
            assert error <= 4 * UNIT_ROUNDOFF[dtype] * float(once.double().norm())
        else:
            self.assert_same(pieces, once, backend)

    @staticmethod
    def has_batch(name: str) -> bool:
        """Whether the first dimension of that argument is the batch."""
        return name in ("x", "y", "local", "residual", "gate", "drop_scale")

    @staticmethod
    def assert_same(actual: Tensor, expected: Tensor, backend: str) -> None:
        """Equal bits from a kernel, equal to 1e-12 from the reference (in fp64)."""
        if backend != "reference":
            assert torch.equal(actual, expected)
        else:
            assert actual.dtype == torch.float64
            assert float((actual - expected).norm()) <= 1e-12 * float(expected.norm())

    # ----------------------------------------------------------------------------------- autograd

    @over("few", dtypes=("fp32", "fp64"))
    def test_each_gradient_alone(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """Asking for one gradient gives what asking for all gives."""
        case = self.case(row)
        for name in case.differentiable():
            others = tuple(n for n in case.tensors if n != name)
            self.check(backend, replace(case, constant=others), dtype)

    @over("few", dtypes=("fp32", "fp64"))
    def test_the_result_may_be_changed_in_place(
        self, backend: str, row: Row, dtype: torch.dtype
    ) -> None:
        """As published models do with their in-place activations."""
        case = self.case(row)
        kernel = self.kernel(backend)

        def then(step: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
            return lambda **arguments: step(kernel(**arguments))

        inputs = round_all(case.tensors, dtype)
        wanted = case.differentiable()
        grad = torch.ones_like(run(kernel, inputs, case.options)["out"])
        try:
            inplace = run(then(lambda y: y.mul_(2).relu_()), inputs, case.options, wanted, grad)
        except RuntimeError as error:  # torch's relu needs its own result, and says so
            assert backend == "reference" and row.act == "relu", error
            assert "modified by an inplace operation" in str(error)
            return
        plain = run(then(lambda y: (y * 2).relu()), inputs, case.options, wanted, grad)
        for name, value in inplace.items():
            assert torch.equal(value, plain[name]), name

    # --------------------------------------------------------------------------------- refusals

    def test_refuses_what_it_cannot_run(self, backend: str) -> None:
        """A backend asked for by name runs the call or names the reason; it never falls back."""
        seen: set[str] = set()
        for row in shapes.VIEWS[self.operator]():
            for name, dtype in DTYPES.items():
                reason = refusal_of_row(self.operator, backend, row, name)
                if reason is None or row.slow or reason in seen:
                    continue
                seen.add(reason)
                case = self.case(row)
                with pytest.raises(NotImplementedError) as caught:
                    self.kernel(backend)(**round_all(case.tensors, dtype), **case.options)
                for part in (f"{self.operator}: ", repr(backend), reason, "reference"):
                    assert part in str(caught.value)
        assert not seen or backend != "reference"

    @over("few", dtypes=("fp32",))
    def test_runs_at_least_once(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """A positive control: the combinations counted as supported do run on that backend."""
        case = self.case(row)
        inputs = round_all(case.tensors, dtype)
        out = self.kernel(backend)(**inputs, **case.options)
        assert out.dtype == dtype and torch.isfinite(out).all()
