"""accelerate, restore: found by structure, same numbers, never stale, undone bit for bit."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from pasted import ContiguousBlock, InvertedBlock, PastedBackbone, SubclassedBlock
from torch import nn

import emo_kernels as ek
from emo_kernels.accelerate import AcceleratedForward, find_blocks

CLOSE = {"rtol": 1e-4, "atol": 2e-6}  # fp32, a few layers of at most 48 channels


def realistic(model: nn.Module) -> nn.Module:
    """Random weights and running statistics that no mistake leaves unseen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def quietly(model: nn.Module, **options) -> nn.Module:
    """Accelerated; blocks without a kernel on this machine are no surprise here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ek.accelerate(model, **options)


@pytest.fixture(params=[InvertedBlock, SubclassedBlock], ids=["renamed", "subclassed"])
def model(request):
    torch.manual_seed(0)
    return realistic(PastedBackbone(request.param)).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 33, 29, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def cpu_kernels():
    """Tests that need the compiled kernels: a build without them is a failure, not a skip."""
    assert ek.available_backends()["cpu"] is None


@pytest.fixture
def twins(model, x):
    """(plain, accelerated) with the same weights."""
    return copy.deepcopy(model), quietly(model)


def assert_same(plain, fast, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), **CLOSE)


def fused_blocks(model, x):
    return [row.path for row in ek.explain(model, x).rows if row.inference != "reference"]


def test_finds_every_block_by_structure(twins, x):
    plain, fast = twins
    assert [path for path, _ in find_blocks(fast)] == ["stem.1", "stages.0", "stages.1", "stages.2"]
    assert all(isinstance(b.forward, AcceleratedForward) for _, b in find_blocks(fast))
    assert_same(plain, fast, x)


def test_kernels_run(twins, x, cpu_kernels):
    """Convolutional blocks run on the cpu backend, and what they compute comes from it."""
    _, fast = twins
    assert {"stages.0", "stages.1"} <= set(fused_blocks(fast, x))
    with torch.profiler.profile() as profile, torch.no_grad():
        fast(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["emo_kernels::irmb"] == len(fused_blocks(fast, x))


def test_same_name_other_function_is_left_alone(x):
    model = realistic(PastedBackbone(ContiguousBlock)).eval()
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="computes something else than the published block"):
        ek.accelerate(model)
    assert "forward" not in model.stages[2].__dict__
    assert_same(plain, model, x)


def test_strict_raises_and_changes_nothing():
    model = PastedBackbone(ContiguousBlock)
    with pytest.raises(ValueError, match=r"accelerate: .*stages\.2.*something else"):
        ek.accelerate(model, strict=True)
    assert all("forward" not in b.__dict__ for _, b in find_blocks(model))


def test_model_without_blocks_warns():
    with pytest.warns(UserWarning, match="contains no inverted residual mobile block"):
        ek.accelerate(nn.Linear(2, 2))


def test_restore_is_bit_for_bit(twins, x):
    plain, fast = twins
    ek.restore(fast)
    assert all(
        b.__dict__.keys() == plain.get_submodule(p).__dict__.keys() for p, b in find_blocks(fast)
    )
    with torch.no_grad():
        assert torch.equal(fast(x), plain(x))


def test_restore_keeps_a_forward_that_was_there_before(x):
    block = realistic(InvertedBlock(16, 16, attn_s=False)).eval()
    own = block.forward
    block.forward = lambda x: own(x)
    theirs = block.forward
    quietly(quietly(block))
    assert ek.restore(block).forward is theirs


def sgd_step(model):
    model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def data_edit(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.1)  # does not bump the version counter


@torch.no_grad()
def in_place_edit(model):
    for parameter in model.parameters():
        parameter.mul_(0.9)


def one_word(model):
    model.stages[1].v.conv.weight.data.view(-1)[7] += 0.5


def load(model):
    state = model.state_dict()
    model.load_state_dict({k: v * 1.05 if v.is_floating_point() else v for k, v in state.items()})


def training_statistics(model):
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    model.eval()


def new_parameter(model):
    conv = model.stages[1].proj.conv
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def new_layer(model):
    model.stages[1].conv_local.norm = realistic(nn.Sequential(nn.BatchNorm2d(40))).eval()[0]
    torch.manual_seed(3)
    nn.init.normal_(model.stages[1].conv_local.norm.bias)
    nn.init.constant_(model.stages[1].conv_local.norm.running_mean, 0.3)
    nn.init.constant_(model.stages[1].conv_local.norm.running_var, 0.8)
    nn.init.constant_(model.stages[1].conv_local.norm.weight, 0.8)


def switches(model):
    model.stages[2].window_size = 4
    model.stages[1].conv_local.norm.eps = 0.1
    model.stages[1].norm.eps = 0.1


def transposed_in_place(model):
    weight = model.stages[2].proj.conv.weight  # (16, 48): as many bytes at the same address
    weight.data = weight.data.flatten(1).t().contiguous().t()[:, :, None, None]
    square = model.stem[1].proj.conv.weight  # (12, 12): the same shape, too
    square.data = square.data.transpose(0, 1)


def to_double_and_back(model):
    model.double()
    model.float()


CHANGES = [
    sgd_step, data_edit, in_place_edit, one_word, load, training_statistics, new_parameter,
    new_layer, switches, transposed_in_place, to_double_and_back,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_is_missed(twins, x, change):
    plain, fast = twins
    assert_same(plain, fast, x)  # packs the weights
    for model in twins:
        torch.manual_seed(4)
        change(model)
    with torch.no_grad():
        before = copy.deepcopy(plain)(x)
    assert_same(plain, fast, x)
    assert torch.isfinite(before).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_other_dtypes(twins, x, dtype):
    plain, fast = (model.to(dtype) for model in twins)
    with torch.no_grad():
        tolerance = {torch.float64: 1e-10, torch.bfloat16: 5e-2}[dtype]
        torch.testing.assert_close(fast(x.to(dtype)), plain(x.to(dtype)), rtol=0, atol=tolerance)


def test_a_bound_call_is_made_again_only_for_the_same_call(twins, x, cpu_kernels):
    """Inference repeats a checked call; another size, mode or backend is a call of its own."""
    plain, fast = twins
    block = fast.stages[1]
    for image in (x, x, x[:, :, :25], x.double().float()[:1], x):
        assert_same(plain, fast, image)
    held = block.forward.bound
    assert_same(plain, fast, x)
    assert block.forward.bound is held is not None
    with torch.no_grad(), ek.use_backend("reference"), torch.profiler.profile() as profile:
        fast(x)
    assert not any("emo_kernels" in event.key for event in profile.key_averages())
    with torch.no_grad():
        image = torch.randn(1, 16, 9, 8)
        block(image)
        with pytest.raises(ValueError, match="x must|expected|channels"):
            block(torch.randn(1, 15, 9, 8))
        with pytest.raises(ValueError, match="4 dimensions"):
            block(image[0])
    assert isinstance(copy.deepcopy(block).forward, AcceleratedForward)


def test_exponential_moving_average(twins, x):
    _, fast = twins
    average = torch.optim.swa_utils.AveragedModel(
        fast, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    sgd_step(fast)
    average.update_parameters(fast)
    plain = ek.restore(copy.deepcopy(average.module))
    assert isinstance(average.module.stages[1].forward, AcceleratedForward)
    assert_same(plain, average.module, x)


def test_copies_and_pickles_are_accelerated_and_independent(twins, x):
    plain, fast = twins
    assert_same(plain, fast, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for path, block in find_blocks(other):
            assert block.forward.block is block is not fast.get_submodule(path)
        assert_same(plain, other, x)
        data_edit(other)
        assert_same(ek.restore(copy.deepcopy(other)), other, x)
        assert_same(plain, fast, x)


def test_state_dict_and_parameters_are_untouched(twins):
    plain, fast = twins
    assert list(plain.state_dict()) == list(fast.state_dict())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in fast.named_modules()]
    fast.load_state_dict(plain.state_dict())


def test_hooks_are_called(twins, x):
    plain, fast = twins
    seen = []
    fast.stages[1].register_forward_hook(lambda m, i, o: seen.append("block"))
    with torch.no_grad():
        fast(x)
    assert seen == ["block"]
    handle = fast.stages[1].conv_local.register_forward_hook(lambda m, i, o: seen.append("inside"))
    with torch.no_grad():
        fast(x)
    assert seen == ["block", "inside", "block"]
    handle.remove()
    assert_same(plain, fast, x)
    assert seen == ["block", "inside", "block", "block"]


def test_training_gives_the_same_gradients_and_statistics(twins, x):
    results = []
    for model in twins:
        model.train()
        torch.manual_seed(5)
        model(x).square().sum().backward()
        results.append((model.state_dict(), {n: p.grad for n, p in model.named_parameters()}))
    (state, grads), (fast_state, fast_grads) = results
    for name in grads:
        torch.testing.assert_close(fast_grads[name], grads[name], rtol=1e-4, atol=1e-6)
    for name in state:
        torch.testing.assert_close(fast_state[name], state[name], **CLOSE)


def test_gradients_in_eval_and_of_gradients(twins, x):
    grads = []
    for model in twins:
        image = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(image).square().sum(), image, create_graph=True)
        model.zero_grad()
        grad.square().sum().backward()
        grads.append(
            [grad, image.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        )
    assert len(grads[0]) == len(grads[1])
    for plain, fast in zip(*grads, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4 * scale)


def test_compile_export_trace_fx(twins, x):
    plain, fast = twins
    with torch.no_grad():
        expected = plain(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(x), expected, **CLOSE)
        torch.testing.assert_close(compiled(x[:, :, :25]), plain(x[:, :, :25]), **CLOSE)
        exported = torch.export.export(fast, (x,)).module()
        torch.testing.assert_close(exported(x), expected, **CLOSE)
        assert not any("emo_kernels" in str(node.target) for node in exported.graph.nodes)
        torch.testing.assert_close(torch.fx.symbolic_trace(fast)(x), expected, **CLOSE)


@pytest.mark.filterwarnings(  # torch's own, of tracing
    "ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning"
)
def test_jit_trace(twins, x):
    plain, fast = twins
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fast, x)(x), plain(x), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inference_under_autocast(twins, x, dtype, cpu_kernels):
    """As near fp64 as eager, and of its dtype; by the block's kernel where nothing is wider."""
    plain, fast = twins
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            found = fast(x.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            expected = plain(x.to(dtype))
    assert found.dtype == expected.dtype
    error, allowed = ((t.double() - exact).norm() for t in (found, expected))
    assert error <= 1.25 * allowed + 2**-8 * exact.norm()
    if dtype == torch.bfloat16:
        assert any(event.key == "emo_kernels::irmb" for event in profile.key_averages())


@pytest.mark.parametrize("how", ["bf16 weights", "autocast"])
def test_whole_model_in_bf16(how, cpu_kernels):
    """Every block by its kernel, and as near fp64 as eager."""
    plain = realistic(ek.create_model("emo_1m", num_classes=10)).eval()
    image = torch.randn(2, 3, 64, 64).bfloat16()
    if how == "bf16 weights":
        plain = plain.bfloat16()
    fast = ek.accelerate(copy.deepcopy(plain), strict=True)
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(image.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            expected = plain(image)
            with torch.profiler.profile() as profile:
                found = fast(image)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["emo_kernels::irmb"] == len(list(find_blocks(fast)))
    error, allowed = (float((t.double() - exact).norm()) for t in (found, expected))
    assert found.dtype == expected.dtype
    assert error <= 1.25 * allowed + 2**-8 * float(exact.norm())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own
def test_functional_transforms(twins, x):
    plain, fast = twins
    tangent = torch.randn_like(x)
    with torch.no_grad():
        expected = torch.func.jvp(plain, (x,), (tangent,))
        found = torch.func.jvp(fast, (x,), (tangent,))
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    # vmap has no rule for the batch norm's running statistics in plain PyTorch either in training
    images = x[:, None]
    torch.testing.assert_close(
        torch.func.vmap(fast)(images), torch.func.vmap(plain)(images), rtol=1e-3, atol=1e-5
    )


def test_two_threads_give_the_single_thread_result(twins, x):
    _, fast = twins
    with torch.no_grad():
        expected = fast(x)
        found = [[] for _ in range(2)]

        def work(results):
            with torch.no_grad():  # grad mode is per thread
                results.extend(fast(x) for _ in range(10))

        threads = [threading.Thread(target=work, args=(results,)) for results in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(result, expected) for results in found for result in results)
    assert [len(results) for results in found] == [10, 10]


def test_unknown_and_unusable_backends_are_refused_before_anything_changes(model):
    with pytest.raises(
        ValueError, match=r"must be one of cuda, triton, cpu, reference.*did you mean"
    ):
        ek.accelerate(model, backend="cpuu")
    unusable = [name for name, reason in ek.available_backends().items() if reason]
    for name in unusable:
        with pytest.raises(NotImplementedError, match=f"{name}.*not usable here"):
            ek.accelerate(model, backend=name)
    assert all("forward" not in b.__dict__ for _, b in find_blocks(model))


def test_use_backend_is_obeyed_or_raises(twins, x, cpu_kernels, monkeypatch):
    _, fast = twins
    block, image = fast.stages[1], torch.randn(2, 16, 9, 8)
    with torch.no_grad(), ek.use_backend("reference"):
        with torch.profiler.profile() as profile:
            block(image)
    assert not any(event.key == "emo_kernels::irmb" for event in profile.key_averages())
    with ek.use_backend("cpu"), torch.no_grad():
        block(image)
        with pytest.raises(NotImplementedError, match=r"irmb: use_backend 'cpu' cannot run"):
            block.half()(image.half())
    monkeypatch.setenv("EMO_KERNELS_BACKEND", "banana")
    with pytest.raises(ValueError, match=r"EMO_KERNELS_BACKEND must be one of .*'banana'"):
        fast.stages[1].float()(image)
    with pytest.raises(ValueError, match="use_backend"), ek.use_backend("banana"):
        pass
