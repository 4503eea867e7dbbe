"""What PyTorch does to an operator: differentiate, check, compile, export, map, transform.

The second half of the contract; operators inherit it beside :class:`contract.OperatorContract`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import oracle
import pytest
import torch
from cases import registered, registered_arguments
from contract import OperatorContract
from grid import device_of, implementing, over, placed, refusal
from numerics import MAPS, Case, Layouts, check_operator, round_all, run
from shapes import Row
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck


class TransformContract(OperatorContract):
    """Derivatives of any order, ``opcheck``, compilation, export, ``torch.func``.

    Attributes:
        traced, traced_slow: names of rows that are compiled and exported: seconds each.
        checked, checked_slow: names of rows that go through ``opcheck``.
    """

    traced: ClassVar[tuple[str, ...]]
    traced_slow: ClassVar[tuple[str, ...]] = ()
    checked: ClassVar[tuple[str, ...]]
    checked_slow: ClassVar[tuple[str, ...]] = ()

    # ------------------------------------------------------------------------------------- tools

    def routes(self, case: Case) -> list[tuple[str, Callable[..., Tensor]]]:
        """Every way to call the operator that takes this fp64 case: ops and torch.ops."""
        found = []
        for backend in implementing(self.operator):
            if refusal(self.operator, backend, case, torch.float64) is None:
                found.append((f"ops/{backend}", self.kernel(backend)))
                found.append((f"torch.ops/{backend}", registered(self.operator, backend)))
        return found

    @staticmethod
    def leaves(case: Case, dtype: torch.dtype = torch.float64) -> tuple[list[str], list[Tensor]]:
        """Names and fresh leaf tensors of what is differentiated."""
        names = case.differentiable()
        values = round_all(case.tensors, dtype)
        return names, [values[n].requires_grad_() for n in names]

    @staticmethod
    def of_leaves(
        call: Callable[..., Tensor], case: Case, names: list[str]
    ) -> Callable[..., Tensor]:
        """``call`` as a function of the named tensors alone, positionally."""
        fixed = {n: t for n, t in case.tensors.items() if n not in names}
        return lambda *values: call(
            **fixed, **dict(zip(names, values, strict=True)), **case.options
        )

    # ------------------------------------------------------------------------------- derivatives

    def test_gradcheck(self) -> None:
        for row in self.tiny:
            case = self.case(row)
            names, leaves = self.leaves(case)
            for _route, call in self.routes(case):
                gradcheck(self.of_leaves(call, case, names), leaves, fast_mode=False)

    def test_double_backward(self) -> None:
        for row in self.tiny:
            case = self.case(row)
            names, leaves = self.leaves(case)
            for _route, call in self.routes(case):
                gradgradcheck(self.of_leaves(call, case, names), leaves, fast_mode=True)

    @pytest.mark.filterwarnings(
        "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
    )  # torch's own
    def test_forward_mode_is_right_or_refused(self) -> None:
        """``jvp`` and dual numbers: the oracle's tangent, or an error, never a silent zero."""
        for row in self.tiny:
            case = self.case(row)
            names, leaves = self.leaves(case)
            points = [t.detach() for t in leaves]
            tangents = [torch.randn_like(t) for t in points]
            truth = self.of_leaves(getattr(oracle, self.operator), case, names)
            _, want = torch.func.jvp(truth, tuple(points), tuple(tangents))
            for route, call in self.routes(case):
                of_leaves = self.of_leaves(call, case, names)
                for transform in (_jvp, _dual):
                    try:
                        got = transform(of_leaves, points, tangents)
                    except NotImplementedError:
                        assert route.startswith("torch.ops")
                    else:
                        assert got is not None, f"{route}: no tangent"
                        assert float((got - want).norm()) <= 1e-10 * float(want.norm()), route

    def test_vmap_and_functional_gradients(self) -> None:
        for row in self.tiny:
            case = self.case(replace(row, n=3))
            batched = {n: t for n, t in case.tensors.items() if t is not None and self.has_batch(n)}
            shared = {n: t for n, t in case.tensors.items() if n not in batched}
            for route, call in self.routes(case):
                if not route.startswith("ops"):
                    continue

                mapped = vmapped(call, {**shared, **case.options})
                want = call(**case.tensors, **case.options)
                got = mapped(batched)
                assert float((got - want).norm()) <= 1e-12 * float(want.norm()), route
                grads = torch.func.grad(summed(mapped))(batched)
                assert grads.keys() == batched.keys()

    @over("few", dtypes=("fp32", "fp64"))
    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
    def test_registered_operator(
        self, backend: str, row: Row, dtype: torch.dtype, layout: str
    ) -> None:
        """``torch.ops.emo_kernels.<op>`` called directly, with gradients."""
        check_operator(
            registered(self.operator, backend),
            self.plain,
            self.case(row),
            dtype,
            oracle=getattr(oracle, self.operator),
            layouts=Layouts(maps=layout, grad=layout),
            gradients=layout == "contiguous" or self.owns_gradient(backend, dtype),
            name=f"torch.ops.emo_kernels.{self.operator}",
            device=device_of(backend),
        )

    @over("checked", "checked_slow", dtypes=("fp32",), reference=("fp32",))
    def test_opcheck(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        case = self.case(row)
        values = placed(backend, round_all(case.tensors, dtype))
        for name in case.differentiable():
            values[name].requires_grad_()
        arguments = registered_arguments(self.operator, replace(case, tensors=values), backend)
        op = getattr(torch.ops.emo_kernels, self.operator).default
        torch.library.opcheck(op, arguments)

    # --------------------------------------------------------------------- compilation and export

    @over("traced", "traced_slow", dtypes=("fp32",))
    def test_compiles_once_for_all_sizes(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """One graph without breaks for any H and W, forward and backward."""
        for call in (self.kernel(backend), registered(self.operator, backend)):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(call, backend=counter, fullgraph=True)
            for h, w in ((row.h + 5, row.w + 3), (row.h + 6, row.w + 10), (row.h + 11, row.w + 4)):
                case = self.case(replace(row, h=h, w=w))
                inputs = placed(backend, round_all(case.tensors, dtype))
                wanted = case.differentiable()
                grad = torch.ones_like(run(call, inputs, case.options)["out"])
                want = run(call, inputs, case.options, wanted, grad)
                got = run(_any_size(compiled), inputs, case.options, wanted, grad)
                _assert_close(got, want, dtype)
            most = KINDS_OF_GRAPH.get(row.name, 1)
            assert counter.frame_count <= most, f"{counter.frame_count} graphs were compiled"

    @over("traced", "traced_slow", dtypes=("fp32",))
    def test_exports_standard_operators(self, backend: str, row: Row, dtype: torch.dtype) -> None:
        """``torch.export`` sees torch's own operators, with H and W free, and equal results."""
        kernel = self.kernel(backend)
        traced, other = (
            self.case(replace(row, h=row.h + more, w=row.w + 2 * more)) for more in (3, 8)
        )

        class Module(torch.nn.Module):
            def forward(self, tensors: dict[str, Tensor]) -> Tensor:
                return kernel(**tensors, **traced.options)

        def present(case: Case) -> dict[str, Tensor]:
            rounded = placed(backend, round_all(case.tensors, dtype))
            return {n: t for n, t in rounded.items() if t is not None}

        free = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
        shapes = {n: free if n in MAPS else None for n in present(traced)}
        # Else sizes that happen to be 1, such as the windows of a small map, are taken for fixed.
        with torch.fx.experimental._config.patch(backed_size_oblivious=True):
            program = torch.export.export(
                Module(), (present(traced),), dynamic_shapes=(shapes,), strict=False
            )
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert calls and not any("emo_kernels" in target for target in calls), calls
        for case in (traced, other):
            got = program.module()(present(case))
            want = kernel(**present(case), **case.options)
            _assert_close({"out": got}, {"out": want}, dtype)


# torch asks of some maps whether they are channels_last, and so whether they were padded or fell
# into one window or several: such a reference has a graph for each kind of map, and no more.
KINDS_OF_GRAPH = {
    "both_windows": 3,
    "conv_then_attention": 2,
    "post_expansion_grouped": 2,
    "q_k_x": 2,
}


def vmapped(call: Callable[..., Tensor], others: dict[str, Any]) -> Callable[..., Tensor]:
    """The operator on maps of images by name, one at a time, with ``others`` for all of them."""
    return torch.func.vmap(lambda one: call(**{n: t[None] for n, t in one.items()}, **others)[0])


def summed(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sum of what ``call`` gives, for its gradients."""
    return lambda inputs: call(inputs).sum()


def _any_size(compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(**arguments: Any) -> Tensor:
        for name in MAPS:
            if isinstance(arguments.get(name), Tensor):
                torch._dynamo.mark_dynamic(arguments[name], (2, 3))
        return compiled(**arguments)

    return call


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Equal up to the order of sums; the floor is for gradients that are zero by structure."""
    bound = 1e-11 if dtype == torch.float64 else 1e-5
    for name, value in got.items():
        error, size = (float(t.double().norm()) for t in (value - want[name], want[name]))
        assert error <= bound * (size + 1.0), f"{name}: {error} of {size}"


def _jvp(call: Callable[..., Tensor], points: list[Tensor], tangents: list[Tensor]) -> Tensor:
    return torch.func.jvp(call, tuple(points), tuple(tangents))[1]


def _dual(
    call: Callable[..., Tensor], points: list[Tensor], tangents: list[Tensor]
) -> Tensor | None:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(points, tangents, strict=True)]
        return forward_ad.unpack_dual(call(*duals)).tangent
