"""Activations of the blocks and their derivatives, as device functions for every kernel.

Computes: ``none``, ``relu``, ``gelu`` (x Phi(x), exact, by erf) and ``silu`` (x sigmoid(x)).
Tiling: element by element, on a tile of any shape.
Traffic: none; GELU's arithmetic is what a stage-3 epilogue mostly does (DESIGN.md 2.6), so erf and
    the density share one exponential, and no branch is computed twice as in the library's erf.
Numerics: fp32 in, fp32 out. Phi is off by at most 1.4e-8 before fp32 rounding, 3e-7 with it (by
    tl.erf: 6e-8), and has relative accuracy where a < 0, which 1 + erf has not. NaN and infinities
    come out as PyTorch's own formulas give them.
Limits: an activation named otherwise does not compile.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

_MINUS_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)
_INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)); exp overflows to infinity below -88, and the quotient is zero."""
    return 1.0 / (1.0 + tl.exp(-a))


@triton.jit
def silu(a):
    """a sigmoid(a)."""
    return a * sigmoid(a)


@triton.jit
def silu_grad(a):
    """Derivative of SiLU at a."""
    s = sigmoid(a)
    return s * (1.0 + a * (1.0 - s))


@triton.jit
def normal(a):
    """(Phi(a), exp(-a^2 / 2)): the normal distribution and sqrt(2 pi) times its density.

    Phi(-|a|) = exp(-a^2 / 2) t P(t), t = 1 / (1 + |a| / 4), after Abramowitz and Stegun 7.1.26;
    P is a minimax fit to Phi(-|a|) exp(a^2 / 2) / t with the weight exp(-a^2 / 8) on [0, 10].
    """
    t = 1.0 / (1.0 + 0.25 * tl.abs(a))
    bell = tl.exp2(a * a * _MINUS_HALF_LOG2_E)
    p = -0.09534580605824707 * t + 0.3586832233956692
    p = p * t - 0.29893713089215374
    p = p * t + 0.312489977039237
    p = p * t + 0.007866253250682709
    p = p * t + 0.11697103350816404
    p = p * t + 0.09827243605601968
    tail = bell * (p * t)
    return tl.where(a > 0.0, 1.0 - tail, tail), bell


@triton.jit
def gelu(a):
    """a Phi(a)."""
    cdf, _ = normal(a)
    return a * cdf


@triton.jit
def gelu_grad(a):
    """Derivative of GELU at a: Phi(a) + a phi(a)."""
    cdf, bell = normal(a)
    return cdf + a * (bell * _INV_SQRT_2_PI)


@triton.jit
def activate(a, ACT: tl.constexpr):
    """ACT at the pre-activation a, fp32."""
    tl.static_assert(ACT == "none" or ACT == "relu" or ACT == "gelu" or ACT == "silu")
    if ACT == "relu":
        a = tl.where(a < 0.0, 0.0, a)  # not max: NaN must pass
    elif ACT == "gelu":
        a = gelu(a)
    elif ACT == "silu":
        a = silu(a)
    return a


@triton.jit
def activate_grad(a, ACT: tl.constexpr):
    """Derivative of ACT at the pre-activation a, fp32."""
    tl.static_assert(ACT == "none" or ACT == "relu" or ACT == "gelu" or ACT == "silu")
    if ACT == "relu":
        slope = tl.where(a <= 0.0, 0.0, 1.0)
    elif ACT == "gelu":
        slope = gelu_grad(a)
    elif ACT == "silu":
        slope = silu_grad(a)
    else:
        slope = tl.full(a.shape, 1.0, tl.float32)
    return slope


@triton.jit
def activate_backward(grad, a, ACT: tl.constexpr):
    """Gradient at the pre-activation a of one at ACT(a); an infinite one dies where ReLU does."""
    if ACT == "none":
        out = grad
    elif ACT == "relu":
        out = tl.where(a <= 0.0, 0.0, grad)
    else:
        out = grad * activate_grad(a, ACT)
    return out
