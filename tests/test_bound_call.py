"""The repeated call in C++: made again only while nothing it depends on has changed."""

import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import emo_kernels as ek
from emo_kernels.cpu import bound


@pytest.fixture
def block():
    if bound._INTERFACE is None:
        pytest.skip("this torch has no DLPack exchange interface")
    torch.manual_seed(0)
    switches = {"norm_layer": "ln_2d", "act_layer": "gelu", "attn_pre": True, "qkv_bias": True}
    block = ek.nn.iRMB(16, 16, exp_ratio=2.0, dim_head=8, ls_value=0.5, **switches)
    return ek.accelerate(block.eval())


@pytest.fixture
def x():
    return torch.randn(2, 16, 9, 8).contiguous(memory_format=torch.channels_last)


def bind(block, x):
    with torch.no_grad():
        block(x)
    assert block.forward.bound is not None
    return block.forward.bound


def own(block, x):
    with torch.no_grad():
        return type(block).forward(block, x)


def assert_repeats(call, block, x):
    with torch.no_grad():
        out = call(x)
        assert out is not None
        torch.testing.assert_close(out, own(block, x), rtol=1e-4, atol=1e-5)


def test_it_runs_where_nothing_changed(block, x):
    call = bind(block, x)
    assert_repeats(call, block, x)
    assert_repeats(call, block, torch.randn_like(x))
    assert_repeats(call, block, x.contiguous())  # NCHW is brought into place
    assert_repeats(call, block, torch.randn(4, 32, 9, 8)[::2, ::2])
    with torch.inference_mode():
        out = call(x)
        assert out.is_inference() and out.is_contiguous(memory_format=torch.channels_last)
        assert type(out) is torch.Tensor and not out.requires_grad
    assert block.forward.bound is call


class _Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _dual():
    return torch.autograd.forward_ad.dual_level()


WATCHED = {
    "grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "profiler": torch.profiler.profile,
    "dispatch mode": _Seen,
    "function mode": lambda: torch.device("cpu"),
    "forward AD": _dual,
    "use_backend": lambda: ek.use_backend("reference"),
}


@pytest.mark.parametrize("context", WATCHED.values(), ids=WATCHED)
def test_it_leaves_the_call_to_the_operator_where_another_is_to_see_it(block, x, context):
    call = bind(block, x)
    with torch.no_grad(), context():
        assert call(x) is None
    assert_repeats(call, block, x)


def test_the_environment_variable_is_obeyed(block, x, monkeypatch):
    call = bind(block, x)
    monkeypatch.setenv("EMO_KERNELS_BACKEND", "reference")
    with torch.no_grad():
        assert call(x) is None
    monkeypatch.delenv("EMO_KERNELS_BACKEND")
    assert_repeats(call, block, x)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")  # torch's own
def test_a_traced_call_is_the_operators(block, x):
    call = bind(block, x)
    found = []
    with torch.no_grad():
        torch.jit.trace(lambda x: found.append(call(x)) or x * 1, x, check_trace=False)
        torch.func.vmap(lambda x: found.append(call(x)) or x)(x[None])
    assert found == [None, None]


def other_maps(x):
    yield x[:1]
    yield x[:, :, :5]
    yield x.double()
    yield x.bfloat16()
    yield x[0]
    yield x.to("meta")
    yield nn.Parameter(x)
    yield x.to_sparse()
    yield torch._neg_view(x)
    yield None


def test_other_maps_are_another_call(block, x):
    call = bind(block, x)
    with torch.no_grad():
        for other in other_maps(x):
            assert call(other) is None
        assert call() is None and call(x, x) is None and call(x=x) is None


def replace_parameter(block):
    block.v.conv.weight = nn.Parameter(block.v.conv.weight.detach().clone())


def replace_data(block):
    block.v.conv.weight.data = block.v.conv.weight.data.clone() * 2


def transpose_data(block):
    block.qk.conv.weight.data = block.qk.conv.weight.data.transpose(0, 1)


def replace_buffer(block):
    block.conv_local.norm.running_mean = torch.ones(32)


def remove_bias(block):
    block.v.conv.bias = None


CHANGES = {
    "parameter": replace_parameter,
    "data": replace_data,
    "strides": transpose_data,
    "buffer": replace_buffer,
    "bias": remove_bias,
    "gamma": lambda b: setattr(b.ls, "gamma", nn.Parameter(torch.ones(16))),
    "switch": lambda b: setattr(b, "window_size", 4),
    "epsilon": lambda b: setattr(b.norm.norm, "eps", 0.1),
    "mode": lambda b: b.train(),
    "layer": lambda b: setattr(b.v, "act", nn.ReLU()),
    "hook": lambda b: b.conv_local.register_forward_hook(lambda *_: None),
    "pre-hook": lambda b: b.proj.conv.register_forward_pre_hook(lambda *_: None),
    "dtype": lambda b: b.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_ends_it(block, x, change):
    call = bind(block, x)
    change(block)
    with torch.no_grad():
        assert call(x) is None


def test_a_hook_on_every_module_ends_it_while_it_is_there(block, x):
    call = bind(block, x)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert call(x) is None
    handle.remove()
    assert_repeats(call, block, x)


def test_what_the_weights_hold_is_read_at_every_call(block, x):
    call = bind(block, x)
    for tensor in filter(torch.is_floating_point, block.state_dict(keep_vars=True).values()):
        tensor.data.add_(0.25)
        assert_repeats(call, block, x)


def test_weights_that_are_no_plain_dense_tensors_are_not_bound(block, x):
    block.qk.conv.weight.data = block.qk.conv.weight.data[::1, ::1].transpose(0, 1).contiguous()
    block.qk.conv.weight.data = block.qk.conv.weight.data.transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(block(x), own(block, x), rtol=1e-4, atol=1e-5)
    assert block.forward.bound is None


def test_results_are_fresh_while_they_live(block):
    # 64 KB: smaller maps are malloc's, which is free to lay the next one elsewhere
    x = torch.randn(4, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    call = bind(block, x)
    with torch.no_grad():
        first, second = call(x), call(torch.zeros_like(x))
        assert first.data_ptr() != second.data_ptr()
        torch.testing.assert_close(first, own(block, x), rtol=1e-4, atol=1e-5)
        view = first[:, 3:5]
        memory, kept = first.data_ptr(), view.clone()
        del first
        assert call(x).data_ptr() != memory, "a view still reads there"
        assert torch.equal(view, kept)
        del view
        assert call(x).data_ptr() == memory
    assert torch.equal(pickle.loads(pickle.dumps(second)), second)


def test_memory_is_given_back_from_any_thread(block, x):
    call = bind(block, x)

    def work():
        with torch.no_grad():
            results.extend(call(x) for _ in range(50))
            del results[: len(results) // 2]

    results = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = own(block, x)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_thread_count_is_obeyed_at_every_call(block, x, threads, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: seen.append(threads) or threads)
    call = bind(block, x)
    seen.clear()
    assert_repeats(call, block, x)
    assert threads in seen


def test_a_refused_instruction_set_is_an_error(block, x, monkeypatch):
    call = bind(block, x)
    monkeypatch.setenv("EMO_KERNELS_ISA", "banana")
    with torch.no_grad(), pytest.raises(ValueError, match="EMO_KERNELS_ISA must be one of"):
        call(x)


def test_nothing_keeps_a_dead_block_alive(x):
    block = ek.accelerate(ek.nn.iRMB(16, 16, dim_head=8).eval())
    with torch.no_grad():
        out = block(x)
    dead = weakref.ref(block)
    weight = weakref.ref(block.proj.conv.weight)
    del block
    gc.collect()
    assert dead() is None and weight() is None
    assert torch.isfinite(out).all()


def test_without_the_interface_the_operator_runs_every_call(block, x, monkeypatch):
    monkeypatch.setattr(bound, "_INTERFACE", None)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(block(x), own(block, x), rtol=1e-4, atol=1e-5)
    assert block.forward.bound is None


def test_calls_leak_nothing(block, x):
    call = bind(block, x)
    with torch.no_grad():
        call(x)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(10_000):
            call(x)
        gc.collect()
    assert len(gc.get_objects()) - before < 100
