"""Accelerated modules in a ``torch.nn.Sequential``: one call, as long as it is the same."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import emo_kernels as ek
from emo_kernels.cpu import bound
from emo_kernels.sequence import AcceleratedSequence
from emo_kernels.swap import SwappedForward

pytestmark = pytest.mark.skipif(
    bound._INTERFACE is None, reason="this torch has no DLPack exchange interface"
)


@pytest.fixture
def sequence():
    torch.manual_seed(0)
    stage = {"norm_layer": "ln_2d", "act_layer": "gelu", "attn_pre": True, "qkv_bias": True}
    blocks = [
        ek.nn.iRMB(8, 16, exp_ratio=2.0, stride=2, has_skip=False, attn_s=False),
        ek.nn.iRMB(16, 16, exp_ratio=2.0, dim_head=8, ls_value=0.5, **stage),
        ek.nn.iRMB(16, 24, exp_ratio=3.0, has_skip=False, attn_s=False),
    ]
    return ek.accelerate(nn.Sequential(*blocks).eval())


@pytest.fixture
def x():
    return torch.randn(2, 8, 17, 15).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def calls(monkeypatch):
    """Every call of a module by itself."""
    seen = []
    own = SwappedForward.__call__
    monkeypatch.setattr(
        SwappedForward,
        "__call__",
        lambda self, *args, **kwargs: seen.append(self.block) or own(self, *args, **kwargs),
    )
    return seen


def one_by_one(sequence, x):
    for module in sequence:
        x = module(x)
    return x


def repeats(sequence, x, calls):
    """Whether the sequence is one call by now, which gives what its modules give."""
    with torch.no_grad():
        expected = one_by_one(sequence, x)
        calls.clear()
        found = sequence(x)
        assert torch.equal(found, expected)
    return not calls


def settle(sequence, x, calls):
    """Until it is one call: at first its modules settle, then it sees them repeated."""
    assert not repeats(sequence, x, calls)
    assert not repeats(sequence, x, calls)
    assert repeats(sequence, x, calls)


def test_modules_are_one_call_when_they_are_repeated(sequence, x, calls):
    settle(sequence, x, calls)
    assert repeats(sequence, torch.randn_like(x), calls)
    assert repeats(sequence, x.contiguous(), calls)
    with torch.inference_mode():
        assert sequence(x).is_inference()


def test_results_are_fresh(sequence, x, calls):
    assert repeats(sequence, x, calls) is False
    with torch.no_grad():
        first = sequence(x)
        kept = first.clone()
        second = sequence(torch.randn_like(x))
    assert torch.equal(first, kept) and first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_maps_between_do_not_overlap(x, calls, count, threads, monkeypatch):
    """Sequences of any length whose maps grow and shrink."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    widths = [8, 40, 16, 64, 8, 24][: count + 1]
    switches = {"has_skip": False, "attn_s": False}
    pairs = zip(widths, widths[1:], strict=False)
    sequence = nn.Sequential(*(ek.nn.iRMB(a, b, **switches) for a, b in pairs))
    ek.accelerate(sequence.eval())
    settle(sequence, x, calls)


def test_sizes_that_change_at_every_call_are_not_bound(sequence, x, calls):
    for _ in range(3):
        for image in (x, x[:1]):
            with torch.no_grad():
                sequence(image)
            assert sequence.forward.bound is None
    settle(sequence, x, calls)


def test_a_module_that_comes_twice(x, calls):
    block, wider = (ek.nn.iRMB(8, o, has_skip=False, attn_s=False) for o in (8, 16))
    same = ek.accelerate(nn.Sequential(block, block, block, wider).eval())
    settle(same, x, calls)
    halving = ek.nn.iRMB(8, 8, stride=2, has_skip=False, attn_s=False)
    smaller = ek.accelerate(nn.Sequential(halving, halving).eval())  # calls of two kinds
    for _ in range(4):
        assert not repeats(smaller, x, calls)


CHANGES = {
    "parameter": lambda s: setattr(s[1].v.conv, "weight", nn.Parameter(s[1].v.conv.weight * 2)),
    "data": lambda s: setattr(s[2].proj.conv.weight, "data", s[2].proj.conv.weight.data * 2),
    "in place": lambda s: s[1].v.conv.weight.data.mul_(2),
    "switch": lambda s: setattr(s[1], "window_size", 4),
    "mode": lambda s: s[0].conv_local.norm.train(),
    "layer": lambda s: setattr(s[1].v, "act", nn.ReLU()),
    "other module": lambda s: s.__setitem__(1, ek.nn.iRMB(16, 16, dim_head=8).eval()),
    "module of another kind": lambda s: s.__setitem__(1, nn.Identity()),
    "one more": lambda s: s.append(nn.ReLU()),
    "one less": lambda s: s.__delitem__(2),
    "another order": lambda s: s.insert(1, nn.Conv2d(16, 16, 1)),
    "forward": lambda s: setattr(s[1], "forward", lambda x: x + 1),
    "hook": lambda s: s[1].register_forward_hook(lambda module, args, out: out * 3),
    "pre-hook": lambda s: s[2].register_forward_pre_hook(lambda module, args: (args[0] * 3,)),
    "inner hook": lambda s: s[0].proj.register_forward_hook(lambda module, args, out: out * 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_seen_at_the_next_call(sequence, x, calls, change):
    settle(sequence, x, calls)
    with torch.no_grad():
        before = sequence(x)
        change(sequence)
        found = sequence(x)
        torch.testing.assert_close(found, one_by_one(sequence, x), rtol=1e-5, atol=1e-6)
    assert found.shape != before.shape or not torch.equal(found, before)


def test_a_restored_module_is_called(sequence, x, calls):
    repeats(sequence, x, calls)
    ek.restore(sequence[0])
    with torch.no_grad():
        for _ in range(2):
            calls.clear()
            sequence(x)
            assert calls == [sequence[1], sequence[2]]


def test_a_compiled_module_is_called(sequence, x, calls):
    settle(sequence, x, calls)
    seen = []
    sequence[1]._compiled_call_impl = lambda x: seen.append(x) or x
    with torch.no_grad():
        sequence(x)
        sequence(x)
    assert len(seen) == 2


def test_other_calls_go_module_by_module(sequence, x, calls):
    settle(sequence, x, calls)
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with torch.no_grad(), context:
            calls.clear()
            sequence(x)
            assert len(calls) == 3
    assert repeats(sequence, x, calls)
    with ek.use_backend("reference"):
        assert not repeats(sequence, x, calls)
    settle(sequence, x[:1], calls)  # another size
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not repeats(sequence, x[:1], calls)
    handle.remove()
    assert not repeats(sequence, x[:1], calls)
    assert repeats(sequence, x[:1], calls)


def test_training_goes_module_by_module(sequence, x, calls):
    repeats(sequence, x, calls)
    sequence.train()
    calls.clear()
    sequence(x.requires_grad_()).sum().backward()
    assert len(calls) == 3 and x.grad is not None


def test_copies_and_pickles_have_calls_of_their_own(sequence, x, calls):
    repeats(sequence, x, calls)
    for other in (copy.deepcopy(sequence), pickle.loads(pickle.dumps(sequence))):
        with torch.no_grad():
            other[2].proj.conv.weight.mul_(2)
        settle(other, x, calls)
        with torch.no_grad():
            assert not torch.equal(other(x), sequence(x))
    assert repeats(sequence, x, calls)


def test_restored_sequences_are_as_before(sequence, x, calls):
    repeats(sequence, x, calls)
    ek.restore(sequence)
    assert "forward" not in sequence.__dict__
    calls.clear()
    with torch.no_grad():
        sequence(x)
    assert calls == []


def test_a_sequence_with_another_module_keeps_its_forward():
    blocks = [ek.nn.iRMB(8, 8, attn_s=False), nn.ReLU(), ek.nn.iRMB(8, 8, attn_s=False)]
    sequence = ek.accelerate(nn.Sequential(*blocks).eval())
    assert "forward" not in sequence.__dict__
    assert "forward" in sequence[0].__dict__


def test_every_stage_of_a_model_is_one_call(calls):
    model = ek.accelerate(ek.create_backbone("emo_1m").eval())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        model(x)
        calls.clear()
        found = model(x)
        assert calls == []
        assert all(isinstance(stage.forward, AcceleratedSequence) for stage in model.stages)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_without_the_interface_modules_are_called(sequence, x, calls, monkeypatch):
    monkeypatch.setattr(bound, "_INTERFACE", None)
    for _ in range(2):
        assert not repeats(sequence, x, calls)


def test_a_call_that_does_not_fit_is_none(sequence, x):
    with torch.no_grad():
        sequence(x)
    first, second, third = (block.forward.bound for block in sequence)
    assert first.followed_by((first,), [], []) is None  # 16 channels instead of 8
    assert first.followed_by((len,), [], []) is None
    assert second.followed_by((third,), [], []) is not None
    with pytest.raises(ValueError, match="takes calls, places, sized"):
        first.followed_by((second,))
    with pytest.raises(ValueError, match="no dict"):
        first.followed_by((second,), [([], "a")], [])


def test_two_threads_share_one(sequence, x, calls):
    repeats(sequence, x, calls)
    with torch.no_grad():
        expected = sequence(x)
    results = []

    def work():
        with torch.no_grad():
            results.extend(sequence(x) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(torch.equal(result, expected) for result in results)


def test_nothing_keeps_a_dead_sequence_alive(sequence, x, calls):
    repeats(sequence, x, calls)
    other = copy.deepcopy(sequence)
    assert repeats(other, x, calls) is False
    dead, weight = weakref.ref(other), weakref.ref(other[1].v.conv.weight)
    calls.clear()
    del other
    gc.collect()
    assert dead() is None and weight() is None


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning")  # torch's own
def test_traced_exported_and_compiled_as_before(sequence, x, calls):
    repeats(sequence, x, calls)
    with torch.no_grad():
        expected = sequence(x)
        traced = torch.jit.trace(sequence, x, check_trace=False)
        exported = torch.export.export(sequence, (x,)).module()
        compiled = torch.compile(sequence, fullgraph=True, backend="eager")
        for other in (traced, exported, compiled):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
