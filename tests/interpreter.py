"""Triton's interpreter made fit for tests: bf16 that is right, and fewer milliseconds a program.

Triton (3.6 to 3.9) keeps a bf16 value as its 16-bit pattern and then adds, multiplies and dots the
patterns; its conversion from fp32 truncates. ``install()`` puts a thin layer between the kernels
and numpy: bf16 operands are widened to fp32, the operation runs, the result is rounded to nearest
even, as a GPU and as torch do it. Products and sums of two bf16 are thereby rounded once (fp32 has
more than twice the digits); a reduction accumulates in fp32 and rounds at its end. Sums add halves
to halves, as threads and warps do.

What the interpreter cannot show, with or without this: TF32, races, reads out of bounds, registers,
``tl.dot`` below 16, and the order in which a GPU sums.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

VARIABLE = "TRITON_INTERPRET"


def switch_on() -> None:
    """Make Triton define interpreted kernels, in this process and its children."""
    assert os.environ.get(VARIABLE) == "1" or "triton" not in sys.modules, (
        f"{VARIABLE} must be set before anything imports triton"
    )
    os.environ[VARIABLE] = "1"


# ------------------------------------------------------------------------------- bit patterns


def decode(patterns: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16 patterns."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """The bf16 patterns nearest to the values, ties to even; NaN as torch writes it."""
    values = np.asarray(values).astype(np.float32)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


# ------------------------------------------------------------------------------------ the shim


def install() -> None:
    """Patch the interpreter of this process, once. Needs :func:`switch_on` before."""
    import triton.language as tl
    from triton.runtime import autotuner, interpreter

    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "rounds_bf16"):
        return
    builder.rounds_bf16 = True
    handle = interpreter.TensorHandle
    builder.create_dot = _dot_like_a_tensor_core(builder.create_dot, handle)
    _patch_arithmetic(builder, handle, tl)
    _patch_casts(builder, handle, tl)
    _patch_reductions(interpreter.ReduceScanOpInterface, handle, tl)
    _patch_sums(interpreter.ReduceOps)
    _patch_cost(interpreter, tl)
    _patch_lookups(interpreter, tl)
    _keep_first_configuration(autotuner.Autotuner)


def _is_bf16(value: Any, tl: Any) -> bool:
    """Whether a handle holds bf16 numbers (the result of a comparison keeps their type's name)."""
    return (
        hasattr(value, "data")
        and getattr(value, "dtype", None) is not None
        and value.dtype.scalar == tl.bfloat16
        and value.data.dtype == np.uint16
    )


def _patch_arithmetic(builder: Any, handle: Any, tl: Any) -> None:
    def in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
        """The method on widened operands; its result has the type of the last operand."""

        def run(self: Any, *args: Any) -> Any:
            if not any(_is_bf16(arg, tl) for arg in args):
                return method(self, *args)
            last = [arg for arg in args if hasattr(arg, "data")][-1]
            wide = [handle(decode(a.data), tl.float32) if _is_bf16(a, tl) else a for a in args]
            result = method(self, *wide)
            if result.data.dtype == bool:
                return handle(result.data, tl.int1)
            return handle(encode(result.data), tl.bfloat16) if _is_bf16(last, tl) else result

        return run

    for name in (
        "binary_op", "ternary_op", "unary_op",
        "create_fma", "create_dot", "create_erf", "create_rsqrt",
    ):  # fmt: skip
        setattr(builder, name, in_fp32(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: handle(encode(np.array([value])), tl.bfloat16)


def steady_dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + a @ b in fp32, where a row's bits do not depend on how many rows there are.

    BLAS picks its order by shape; a tensor core adds up a few exact products at a time.
    """
    for k in range(0, a.shape[-1], 32):
        product = np.matmul(a[..., k : k + 32], b[..., k : k + 32, :], dtype=np.float64)
        acc = (acc + product).astype(np.float32)
    return acc


def _dot_like_a_tensor_core(dot: Callable[..., Any], handle: Any) -> Callable[..., Any]:
    def run(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        kinds = {a.data.dtype.kind, b.data.dtype.kind}
        if kinds != {"f"} or acc.data.dtype != np.float32:
            return dot(self, a, b, acc, *options)
        return handle(steady_dot(a.data, b.data, acc.data), acc.dtype.scalar)

    return run


def _patch_casts(builder: Any, handle: Any, tl: Any) -> None:
    from triton._C.libtriton import ir

    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if _is_bf16(src, tl):
            src = handle(decode(src.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:
            return handle(encode(src.data), tl.bfloat16)
        return src if src.dtype.scalar == dst_type.scalar else cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        to_bf16 = dst_type.scalar == tl.bfloat16 and rounding != ir.ROUNDING_MODE.RTZ
        if _is_bf16(src, tl) or (to_bf16 and src.dtype.primitive_bitwidth > 8):
            return cast_impl(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _patch_reductions(interface: Any, handle: Any, tl: Any) -> None:
    apply = interface.apply

    def retyped(tensor: Any, data: np.ndarray, dtype: Any) -> Any:
        block = tensor.type.is_block()
        kind = tl.block_type(dtype, list(tensor.type.shape)) if block else dtype
        return tl.core.tensor(handle(data, dtype), kind)

    def apply_in_fp32(self: Any, inputs: Any) -> Any:
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        narrow = [_is_bf16(t.handle, tl) for t in inputs]
        if not any(narrow):
            return apply(self, inputs)
        wide = tuple(
            retyped(t, decode(t.handle.data), tl.float32) if n else t
            for t, n in zip(inputs, narrow, strict=True)
        )
        return tuple(
            retyped(t, encode(t.handle.data), tl.bfloat16) if n else t
            for t, n in zip(apply(self, wide), [*narrow, False, False])
        )

    interface.apply = apply_in_fp32


def tree_sum(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Sums of halves of halves, as threads and warps add up; ``np.sum`` adds rows one by one."""
    x = x.reshape(-1) if axis is None else np.moveaxis(x, axis, 0)
    while len(x) > 1:
        half = len(x) // 2
        pairs = x[:half] + x[half : 2 * half]
        x = pairs if len(x) % 2 == 0 else np.concatenate([pairs, x[2 * half :]])
    return x[0]


def _patch_sums(reduction: Any) -> None:
    plain = reduction.sum

    def total(self: Any, tensor: Any) -> Any:
        data = tensor.handle.data
        if data.dtype.kind != "f" or self.keep_dims:
            return plain(self, tensor)
        return self.to_tensor(tree_sum(data, self.axis), tensor.dtype)

    reduction.sum = total


def _patch_cost(interpreter: Any, tl: Any) -> None:
    """Overflow of integers is not looked for, and the language is patched once, not at each call.

    The interpreter replaces every function of ``tl`` before a launch and at every call of a device
    function, and puts them back: in a process where all kernels are interpreted, once is enough.
    """
    import torch

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    patch_lang = interpreter._patch_lang
    done: set[frozenset[int]] = set()

    class Kept:
        def restore(self) -> None:
            pass

    def patch_once(function: Any) -> Any:
        seen = {id(v) for v in function.__globals__.values() if v is tl or v is tl.core}
        if frozenset(seen) not in done:
            patch_lang(function)
            # numpy 2.4 refuses int() of an array of one element, which triton 3.6 relies on
            tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
            done.add(frozenset(seen))
        return Kept()

    interpreter._patch_lang = patch_once

    def erf(self: Any, arg: Any) -> Any:
        data = torch.from_numpy(np.ascontiguousarray(arg.data)).double()
        result = torch.special.erf(data).numpy().astype(arg.data.dtype)
        return interpreter.TensorHandle(result, arg.dtype.scalar)

    interpreter.InterpreterBuilder.create_erf = erf
    launch = interpreter.GridExecutor.__call__

    def quietly(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Overflow and NaN are values, as on a GPU, not warnings."""
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return launch(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = quietly


def _patch_lookups(interpreter: Any, tl: Any) -> None:
    """The two helpers that took a quarter of the time, without a table or a walk at each call."""
    slow_dtype, slow_unwrap = interpreter._get_np_dtype, tl.core._unwrap_if_constexpr
    known: dict[str, np.dtype] = {}
    plain = (tl.tensor, int, float, str, bool, tl.dtype, type(None))

    def get_np_dtype(dtype: Any) -> np.dtype:
        name = dtype.name
        if name not in known:
            known[name] = slow_dtype(dtype)
        return known[name]

    def unwrap_if_constexpr(value: Any) -> Any:
        kind = type(value)
        if kind is tl.constexpr:
            return value.value
        return value if kind in plain else slow_unwrap(value)

    interpreter._get_np_dtype = get_np_dtype
    tl.core._unwrap_if_constexpr = unwrap_if_constexpr


def _keep_first_configuration(autotuner: Any) -> None:
    init = autotuner.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.configs = self.configs[:1]

    autotuner.__init__ = initialise
