"""The tail of an accelerated network: found by what it computes, never stale, inference only."""

import copy
import pickle

import pytest
import torch
from test_accelerate import realistic
from torch import nn

import emo_kernels as ek
from emo_kernels.models import EMO
from emo_kernels.models.configs import CONFIGS
from emo_kernels.swap import SwappedForward
from emo_kernels.tail import AcceleratedTail, find_tails


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return realistic(ek.create_model("emo_1m", num_classes=10)).eval()


@pytest.fixture
def fast(plain):
    return ek.accelerate(copy.deepcopy(plain), strict=True)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 96)


def images(x):
    """Kinds of calls, the last one made until it is one call."""
    return [x, x[:1], x.contiguous(memory_format=torch.channels_last), x, x, x, x]


def assert_same(plain, fast, x):
    with torch.no_grad():
        for image in images(x):
            torch.testing.assert_close(fast(image), plain(image), rtol=1e-3, atol=1e-4)


def operators(model, x):
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(x)
    return {event.key for event in profile.key_averages()}


def test_it_runs_on_the_kernel_with_the_same_numbers(plain, fast, x):
    assert [path for path, _ in find_tails(fast)] == [""]
    assert isinstance(fast.forward, AcceleratedTail)
    calls = operators(fast, x)
    assert "emo_kernels::norm_pool_linear" in calls
    assert not calls & {"aten::linear", "aten::mean", "aten::layer_norm"}
    assert_same(plain, fast, x)
    assert fast.forward._bound_tail is not None


def test_the_whole_is_one_call_when_it_is_repeated(fast, x, monkeypatch):
    calls = []
    own = SwappedForward.__call__
    monkeypatch.setattr(
        SwappedForward, "__call__", lambda self, x: calls.append(self.block) or own(self, x)
    )
    with torch.no_grad():
        expected = fast(x)
        assert len(calls) > 10
        for _ in range(2):
            fast(x)
        assert fast.forward.bound is not None
        calls.clear()
        assert torch.equal(fast(x), expected)
        assert calls == [fast]


def test_a_trunk_of_another_class_is_called(x):
    plain = realistic(DoubledStages(CONFIGS["emo_1m"], num_classes=5)).eval()
    fast = ek.accelerate(copy.deepcopy(plain), strict=True)
    assert_same(plain, fast, x)
    assert fast.forward.bound is None and fast.forward._bound_tail is not None


def test_a_model_inside_another_is_found(plain, fast, x):
    outer = ek.accelerate(nn.Sequential(copy.deepcopy(plain), nn.Softmax(1)), strict=True)
    assert [path for path, _ in find_tails(outer)] == ["0"]
    with torch.no_grad():
        torch.testing.assert_close(outer(x), plain(x).softmax(1), rtol=1e-3, atol=1e-5)


def test_explain_says_so(plain, fast, x):
    tail = ek.explain(fast, x).rows[-1]
    assert (tail.operator, tail.inference, tail.training) == (
        "norm_pool_linear",
        "cpu",
        "reference",
    )
    assert "own forward" in tail.training_reasons["cpu"]
    assert ek.explain(plain).rows[-1].inference == "reference"


def change_data(model):
    for tensor in (*model.norm.parameters(), *model.head.parameters()):
        tensor.data.mul_(1.2)


def change_memory(model):
    model.head.weight = nn.Parameter(model.head.weight.detach() * 0.5)


def change_eps(model):
    model.norm.norm.eps = 0.5


def change_head(model):
    model.reset_classifier(7)
    nn.init.constant_(model.head.bias, 0.25)
    nn.init.eye_(model.head.weight)


def change_head_class(model):
    model.head = nn.Sequential(model.head, nn.Tanh())


def change_method(model):
    model.forward_features = lambda x: 2 * EMO.forward_features(model, x)


def change_trunk(model):
    model.trunk = lambda x: 2 * EMO.trunk(model, x)


def change_run_stage(model):
    model.run_stage = lambda index, x: 2 * EMO.run_stage(model, index, x)


def change_stage(model):
    model.stage4 = nn.Sequential(*model.stage4, nn.Tanh())


def change_block(model):
    model.stage3[1] = nn.Tanh()


def change_block_data(model):
    model.stage3[1].proj.conv.weight.data.mul_(3)


def hook_stage(model):
    model.stage2.register_forward_hook(lambda module, args, out: 2 * out)


def hook_block(model):
    model.stage3[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hook_layer(model):
    model.stage1[0].proj.conv.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES = [change_data, change_memory, change_eps, change_head, change_head_class, change_method]
CHANGES += [change_trunk, change_run_stage, change_stage, change_block, change_block_data]
CHANGES += [hook_stage, hook_block, hook_layer]


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed(plain, fast, x, change):
    assert_same(plain, fast, x)
    for model in (plain, fast):
        change(model)
    assert_same(plain, fast, x)


class Doubled(EMO):
    def forward_features(self, x):
        return 2 * super().forward_features(x)


class DoubledStages(EMO):
    def run_stage(self, index, x):
        return 2 * super().run_stage(index, x)


class WithoutNorm(EMO):
    def forward(self, x):
        return self.forward_head(self.trunk(x))


@pytest.mark.parametrize("kind", [Doubled, WithoutNorm])
def test_a_forward_of_its_own_stays(kind, x):
    plain = realistic(kind(CONFIGS["emo_1m"], num_classes=5)).eval()
    fast = ek.accelerate(copy.deepcopy(plain))
    assert "forward" not in fast.__dict__
    assert_same(plain, fast, x)


@pytest.mark.parametrize("layer", ["norm", "head"])
def test_hooks_inside_are_called(plain, fast, x, layer):
    assert_same(plain, fast, x)
    seen = []
    getattr(fast, layer).register_forward_hook(lambda *_: seen.append(layer))
    assert_same(plain, fast, x)
    assert len(seen) == len(images(x))


def test_gradients_autocast_and_training_are_its_own(plain, fast, x):
    for model in (plain, fast):
        model(x).square().sum().backward()
    torch.testing.assert_close(fast.head.weight.grad, plain.head.weight.grad, rtol=1e-3, atol=1e-3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast(x).dtype == plain(x).dtype == torch.bfloat16
        assert "emo_kernels::norm_pool_linear" not in operators(fast, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(plain, fast, x, dtype):
    plain, fast, x = plain.to(dtype), fast.to(dtype), x.to(dtype)
    assert "emo_kernels::norm_pool_linear" in operators(fast, x)
    with torch.no_grad():
        got, want = fast(x), plain(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def test_swapping_moves_no_statistics(plain):
    before = copy.deepcopy(plain.train()).state_dict()
    after = ek.accelerate(plain).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert plain.forward.block is plain and plain.training and plain.stage1[0].training


def test_copies_pickles_and_restore(plain, fast, x):
    assert_same(plain, fast, x)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.forward.block is twin
        assert_same(plain, twin, x)
    ek.restore(fast)
    assert "forward" not in fast.__dict__
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


def test_bad_images_are_named(fast):
    with torch.no_grad(), pytest.raises(ValueError, match="4 dimensions"):
        fast(torch.randn(3, 64, 64))
    with torch.no_grad(), pytest.raises((TypeError, ValueError), match="Tensor"):
        fast([1.0])


def test_it_exports_and_compiles_as_before(plain, fast, x):
    with torch.no_grad():
        want = plain(x)
        program = torch.export.export(fast, (x,)).module()
        torch.testing.assert_close(program(x), want, rtol=1e-3, atol=1e-4)
        compiled = torch.compile(fast, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), want, rtol=1e-3, atol=1e-4)
