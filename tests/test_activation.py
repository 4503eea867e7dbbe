"""The error bounds that ``csrc/cpu/activation.h`` states, over all finite floats of a dense sample.

Activations come out of the operators exactly: one channel, a weight of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from numerics import UNIT_ROUNDOFF
from torch import Tensor

from emo_kernels import _C, cpu
from emo_kernels.spec import IRMBSpec, IRMBWeights

FP32, FP64 = torch.float32, torch.float64
KERNELS = [(isa, FP32) for isa in _C.available_isas()] + [("portable", FP64)]


@pytest.fixture(params=KERNELS, ids=lambda k: f"{k[0]}-{str(k[1])[6:]}")
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Of the kernels of one instruction set, chosen."""
    monkeypatch.setenv("EMO_KERNELS_ISA", request.param[0])
    yield request.param[1]


def every_exponent() -> Tensor:
    """128 mantissas of every exponent, of both signs, denormals too; and -20 to 20 densely."""
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.randint(0, 2**23, (123,), generator=generator)
    mantissas = torch.cat([torch.tensor([0, 1, 2**22, 2**23 - 2, 2**23 - 1]), mantissas])
    positive = (torch.arange(255)[:, None] * 2**23 + mantissas).flatten()
    bits = torch.cat([positive, positive - 2**31]).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.linspace(-20, 20, 300_032)])
    return values[: values.numel() // 64 * 64]


SAMPLE = every_exponent()


# ---------------------------------------------------------------------- functions out of operators


def expanded(act: str, x: Tensor) -> Tensor:
    """act(1 x) of the expansion."""
    return cpu.expand(x.reshape(1, 1, -1, 64), x.new_ones(1, 1, 1, 1), act=act).flatten()


def slope(act: str, x: Tensor) -> Tensor:
    """Of the expansion's gradient, for a gradient of one."""
    x = x.reshape(1, 1, -1, 64)
    needed = [True, False, False, False, False]
    ones = torch.ones_like(x)
    (dx,) = cpu.expand_backward(ones, x, x.new_ones(1, 1, 1, 1), act=act, needed=needed)
    return dx.flatten()


def in_block(act: str, x: Tensor) -> Tensor:
    """Of the whole-block kernel: channel 0 takes the values, channel 1 shows them."""
    maps = torch.stack([x, torch.zeros_like(x)]).reshape(1, 2, -1, 64)
    eye = torch.eye(2, dtype=x.dtype).reshape(2, 2, 1, 1)
    zeros, ones = x.new_zeros(2), x.new_ones(2)
    w = IRMBWeights(bn_mean=zeros, bn_var=ones, proj_weight=eye.flip(0))
    if act == "silu":  # behind the depthwise convolution
        w = w._replace(dw_weight=x.new_ones(2, 1, 1, 1))
        out = cpu.irmb(maps, w, IRMBSpec(padding=0, bn_eps=0.0, skip=False))
    else:  # the expansion's, by the local skip around a convolution that gives nothing
        w = w._replace(dw_weight=x.new_zeros(2, 1, 1, 1), v_weight=eye)
        out = cpu.irmb(maps, w, IRMBSpec(padding=0, bn_eps=0.0, act=act))
    return out[0, 1].flatten()


def softmax(x: Tensor) -> Tensor:
    """x exp(x) / (exp(0) + exp(x)): what a window of the pixels 0 and x attends to."""
    maps = torch.stack([torch.zeros_like(x), x], 1).reshape(-1, 1, 1, 2)
    qk_weight, qk_bias = x.new_tensor([0.0, 1.0]).reshape(2, 1, 1, 1), x.new_tensor([1.0, 0.0])
    return cpu.window_attention(maps, qk_weight, qk_bias, head_dim=1, window_size=0)[:, 0, 0, 0]


def gate(x: Tensor, sign: float) -> Tensor:
    """silu(x) sigmoid(sign silu(x)): squeeze-excite of one pixel of one channel."""
    one, zero = x.new_ones(1), x.new_zeros(1)
    square = one.reshape(1, 1, 1, 1)
    w = IRMBWeights(
        dw_weight=square,
        bn_mean=zero,
        bn_var=one,
        se_reduce_weight=square,
        se_reduce_bias=zero,
        se_expand_weight=sign * square,
        se_expand_bias=zero,
        proj_weight=square,
    )
    maps = x.reshape(-1, 1, 1, 1)
    return cpu.irmb(maps, w, IRMBSpec(padding=0, bn_eps=0.0, skip=False)).flatten()


def exact_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.double().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return grad


def assert_bound(got: Tensor, want: Tensor, scale: Tensor, bound: float, what: str) -> None:
    """|got - want| <= bound u scale at every value of the sample."""
    units = (got.double() - want).abs() / scale / UNIT_ROUNDOFF[got.dtype]
    worst = int(units.nan_to_num(nan=float("inf")).argmax())
    message = f"{what} at {SAMPLE[worst]}: {got[worst]}, {units[worst]:.1f} units off"
    assert units[worst] <= bound, message


WAYS = {"expansion": expanded, "block": in_block}


@pytest.mark.parametrize("way", WAYS)
def test_silu(way: str, dtype: torch.dtype) -> None:
    want = F.silu(SAMPLE.double())
    got = WAYS[way]("silu", SAMPLE.to(dtype))
    assert_bound(got, want, want.abs().clamp_min(0.25), 6.0, "silu")


@pytest.mark.parametrize("way", WAYS)
def test_gelu(way: str, dtype: torch.dtype) -> None:
    got, want = WAYS[way]("gelu", SAMPLE.to(dtype)), F.gelu(SAMPLE.double())
    assert_bound(got, want, SAMPLE.double().abs().clamp_min(0.25), 4.0, "gelu")
    assert not got[SAMPLE < -40].any()  # no noise where the function has vanished


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("act", ["relu", "none"])
def test_exact_ones(way: str, act: str, dtype: torch.dtype) -> None:
    x = SAMPLE.to(dtype)
    assert torch.equal(WAYS[way](act, x), x.relu() if act == "relu" else x)


def test_slopes(dtype: torch.dtype) -> None:
    """Beside 1: the largest slope is 1.1."""
    for act, function, bound in (("silu", F.silu, 20.0), ("gelu", F.gelu, 5.0)):
        want = exact_slope(function, SAMPLE)
        assert_bound(slope(act, SAMPLE.to(dtype)), want, torch.ones_like(want), bound, act)
    assert torch.equal(slope("relu", SAMPLE.to(dtype)).double(), exact_slope(torch.relu, SAMPLE))


def test_exponential_of_the_softmax(dtype: torch.dtype) -> None:
    want = F.silu(SAMPLE.double())
    assert_bound(softmax(SAMPLE.to(dtype)), want, want.abs().clamp_min(0.25), 8.0, "softmax")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_sigmoid_of_squeeze_excite(sign: float, dtype: torch.dtype) -> None:
    c = F.silu(SAMPLE.double())
    want = c * (sign * c).sigmoid()
    assert_bound(gate(SAMPLE.to(dtype), sign), want, want.abs().clamp_min(0.25), 10.0, "gate")


@pytest.mark.parametrize("act", ["silu", "gelu", "relu", "none"])
def test_special_values(act: str, dtype: torch.dtype) -> None:
    """Infinities and NaN where PyTorch in fp64 has them, forward and backward."""
    inf = float("inf")
    x = torch.tensor([inf, -inf, float("nan"), 0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 1.0])
    function = {"silu": F.silu, "gelu": F.gelu, "relu": torch.relu, "none": torch.clone}[act]
    x = F.pad(x, (0, 54)).to(dtype)
    for got, want in (
        (expanded(act, x), function(x.double())),
        (slope(act, x), exact_slope(function, x)),
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("act", ["silu", "gelu", "relu", "none"])
def test_every_bf16_in_the_block(isa: str, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rounding to bf16 over the bounds that hold before it."""
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite() & ((x == 0) | (x.float().abs() > 2e-38))]  # products take denormals for zero
    x = torch.cat([x, x.new_zeros(-len(x) % 64)])
    got, exact = in_block(act, x).double(), x.double()
    want = {"silu": F.silu, "gelu": F.gelu, "relu": torch.relu, "none": torch.clone}[act](exact)
    limit = torch.zeros_like(exact)
    if act in ("silu", "gelu"):
        before = 2.0**-12 * want.abs() if act == "silu" else 2.0**-14 * exact.abs()
        limit = before + 2.0**-8 * (want.abs() + before) + 2.0**-118
    over = (got - want).abs() - limit
    worst = int(over.argmax())
    assert over[worst] <= 0, f"{act}({x[worst]}) = {got[worst]}, not {want[worst]}"
