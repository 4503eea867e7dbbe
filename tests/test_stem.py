"""The stem of an accelerated model: swapped by structure, never stale."""

import copy
import pickle
import warnings

import pytest
import torch
from test_accelerate import quietly, realistic
from torch import nn

import emo_kernels as ek
from emo_kernels.stem import AcceleratedStem, find_stems
from emo_kernels.swap import SwappedForward


class PastedPatches(nn.Module):
    """As the published code has it; more branches are averaged."""

    def __init__(self, act, branches=1, bias=True):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 24, 3, 2, i, i, bias=bias), nn.BatchNorm2d(24), act())
            for i in range(1, branches + 1)
        )

    def forward(self, x):
        return sum(conv(x) for conv in self.convs) / len(self.convs)


class NamedLayers(nn.Module):
    def __init__(self, act, turned=False):
        super().__init__()
        self.turned = turned
        self.conv = nn.Conv2d(3, 24, 5, 2, 2)
        self.norm = nn.BatchNorm2d(24, eps=1e-3)
        self.act = act()

    def forward(self, x):
        return self.act(self.norm(self.conv(x.flip(3) if self.turned else x)))


def network(stem):
    torch.manual_seed(0)
    block = ek.nn.iRMB(24, 24, norm_in=False, has_skip=False, v_proj=False, attn_s=False)
    return realistic(nn.Sequential(stem, block)).eval()


STEMS = {
    "patches": lambda: PastedPatches(nn.Identity),
    "patches silu": lambda: PastedPatches(nn.SiLU, bias=False),
    "layers gelu": lambda: NamedLayers(nn.GELU),
    "layers relu": lambda: NamedLayers(nn.ReLU),
}


@pytest.fixture(params=STEMS.values(), ids=STEMS)
def twins(request):
    plain = network(request.param())
    return plain, ek.accelerate(copy.deepcopy(plain), strict=True)


@pytest.fixture
def x():
    return torch.randn(2, 3, 33, 30)


def assert_same(plain, fast, x):
    with torch.no_grad():
        for image in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x):
            torch.testing.assert_close(fast[0](image), plain[0](image), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(fast(image), plain(image), rtol=1e-4, atol=1e-5)


def test_it_runs_on_the_kernel_with_the_same_numbers(twins, x):
    plain, fast = twins
    assert [path for path, _ in find_stems(fast)] == ["0"]
    assert isinstance(fast[0].forward, AcceleratedStem)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fast(x)
    calls = [event.key for event in profile.key_averages()]
    assert "emo_kernels::conv_norm_act" in calls and "aten::convolution" not in calls
    assert_same(plain, fast, x)
    assert fast[0].forward.bound is not None


def test_a_channels_last_weight_is_read_where_it_lies(twins, x):
    plain, fast = (model.to(memory_format=torch.channels_last) for model in twins)
    assert_same(plain, fast, x)
    assert fast[0].forward.bound is not None
    with torch.no_grad():
        change_data(plain[0])
        change_data(fast[0])
    assert_same(plain, fast, x)


def test_explain_says_so(twins, x):
    plain, fast = twins
    stem = ek.explain(fast, x).rows[0]
    assert (stem.operator, stem.inference, stem.training) == ("conv_norm_act", "cpu", "cpu")
    assert stem.shape == tuple(x.shape)
    assert ek.explain(plain).rows[0].inference == "reference"


def change_data(stem):
    for tensor in filter(torch.is_floating_point, stem.state_dict(keep_vars=True).values()):
        tensor.data.mul_(1.2)


def change_memory(stem):
    for tensor in stem.parameters():
        tensor.data = tensor.data * 0.5


def change_switches(stem):
    (conv,) = (m for m in stem.modules() if isinstance(m, nn.Conv2d))
    (norm,) = (m for m in stem.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eps, conv.stride, conv.padding = 0.5, (1, 1), (0, 0)


def change_layer(stem):
    layers = stem.convs[0] if hasattr(stem, "convs") else stem
    name = "2" if hasattr(stem, "convs") else "act"
    setattr(layers, name, nn.Tanh())


def change_modes(stem):
    stem.train()(torch.ones(2, 3, 9, 9))
    stem.eval()


@pytest.mark.parametrize(
    "change", [change_data, change_memory, change_switches, change_layer, change_modes]
)
def test_no_change_is_missed(twins, x, change):
    plain, fast = twins
    assert_same(plain, fast, x)
    for model in twins:
        change(model[0])
    assert_same(plain, fast, x)


def test_hooks_inside_are_called(twins, x):
    plain, fast = twins
    seen = []
    assert_same(plain, fast, x)
    (conv,) = (m for m in fast[0].modules() if isinstance(m, nn.Conv2d))
    conv.register_forward_hook(lambda *_: seen.append("conv"))
    with torch.no_grad():
        fast(x)
    assert seen == ["conv"]


def test_copies_pickles_and_restore(twins, x):
    plain, fast = twins
    assert_same(plain, fast, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_same(plain, other, x)
    assert other[0].forward.block is other[0]
    ek.restore(fast)
    assert not any(isinstance(m.__dict__.get("forward"), SwappedForward) for m in fast.modules())
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


@pytest.mark.filterwarnings(  # torch's own, of tracing
    "ignore:.*jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
def test_compile_export_trace(twins, x):
    plain, fast = twins
    with torch.no_grad():
        expected = plain(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(fast, (x,)).module()
        traced = torch.jit.trace(fast, x)
        for call in (compiled, exported, traced):
            torch.testing.assert_close(call(x), expected, rtol=1e-4, atol=1e-5)
    assert not any("emo_kernels" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize(
    "stem",
    [lambda: PastedPatches(nn.SiLU, branches=2), lambda: NamedLayers(nn.SiLU, turned=True)],
    ids=["two branches", "another function"],
)
def test_another_stem_is_left_alone_and_is_no_failed_block(stem, x):
    plain = network(stem())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = ek.accelerate(copy.deepcopy(plain), strict=True)
    assert "forward" not in fast[0].__dict__
    with torch.no_grad():
        assert torch.equal(fast[0](x), plain[0](x))


@pytest.mark.parametrize("name", ["emo_1m", "emo2_1m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_models(name, dtype):
    torch.manual_seed(0)
    model = realistic(ek.create_model(name, num_classes=10)).eval().to(dtype)
    fast = quietly(copy.deepcopy(model))
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    assert [path for path, _ in find_stems(fast)] == ["stage0.0"]
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)
        assert fast.stage0[0].forward.bound is not None
