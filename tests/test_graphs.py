"""accelerate(cuda_graphs=True): captured once for each kind of input, never stale, undone.

The graphs are recordings (recorded_graphs.py): a replay that should have been a capture repeats old
operations on old memory, as on a GPU. ``bench/gpu_campaign.py`` holds real ones to eager results.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from recorded_graphs import FakeStream, Stand
from torch import Tensor, nn

import emo_kernels as ek
from emo_kernels import _C, graphs, watch


class Small(nn.Module):
    """Two blocks and a head; returns what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        switches = {"norm_layer": "ln_2d", "act_layer": "gelu", "attn_pre": True}
        self.first = ek.nn.iRMB(8, 8, attn_s=False, exp_ratio=2.0)
        self.second = ek.nn.iRMB(8, 8, exp_ratio=2.0, dim_head=4, window_size=4, **switches)
        self.head = nn.Linear(8, 5)
        self.returns: Callable[[Tensor], object] = torch.clone
        self.runs, self.scale = 0, 1.0

    def forward(self, x: Tensor) -> object:
        self.runs += 1
        y = self.second(self.first(x))
        return self.returns(self.scale * self.head(y.mean((2, 3))))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    stand.install(monkeypatch)
    return stand


@pytest.fixture
def model(stand: Stand) -> nn.Module:
    torch.manual_seed(0)
    return accelerated(Small().eval())


def accelerated(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ek.accelerate(model, cuda_graphs=True)


def image(n: int = 2, seed: int = 0, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, side, side + 1, generator=generator)


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """What the model is now computes for x, by its own code."""
    twin = ek.restore(copy.deepcopy(model))
    with torch.no_grad():
        return twin(x)


def assert_current(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(model, x), rtol=1e-4, atol=1e-5)


def test_a_kind_of_input_is_captured_once(model: nn.Module, stand: Stand) -> None:
    for seed in range(3):
        assert_current(model, image(seed=seed))
    assert len(stand.captures) == 1
    assert model.runs == 4  # three to warm up, one captured: no replay ran the model's Python
    assert_current(model, image(n=1))
    assert_current(model, image().contiguous(memory_format=torch.channels_last))
    assert len(stand.captures) == 3
    assert_current(model, image(n=4)[::2])  # a slice of the first kind
    assert len(stand.captures) == 3
    assert len({id(pool) for pool in stand.pools}) == 1


def test_results_are_the_callers_to_keep(model: nn.Module) -> None:
    with torch.no_grad():
        first = model(image(seed=1))
        kept = first.clone()
        model(image(seed=2))
        assert torch.equal(first, kept)
        first.zero_()
        assert torch.equal(model(image(seed=1)), kept)


def test_the_kinds_kept_are_few(
    model: nn.Module, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    for side in (5, 6, 5, 7, 5):  # 7 takes the place of 6
        assert_current(model, image(side=side))
    assert len(stand.captures) == 3 and len(model.forward._graphs) == 2
    assert_current(model, image(side=6))
    assert len(stand.captures) == 4


# -------------------------------------------------------------------------------------- never stale


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.25)


def loaded(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.load_state_dict(Small().state_dict())


@pytest.mark.parametrize("change", [in_place, loaded])
def test_numbers_in_the_weights_are_read_at_every_replay(
    model: nn.Module, stand: Stand, change: Callable[[nn.Module], None]
) -> None:
    assert_current(model, image())
    change(model)
    assert_current(model, image())
    assert len(stand.captures) == 1


def new_memory(model: nn.Module) -> None:
    model.head.weight.data = 2 * model.head.weight.data


def new_parameter(model: nn.Module) -> None:
    model.first.proj.conv.weight = nn.Parameter(3 * model.first.proj.conv.weight.detach())


def assigned(model: nn.Module) -> None:
    torch.manual_seed(9)
    model.load_state_dict(Small().state_dict(), assign=True)


def buffer(model: nn.Module) -> None:
    model.first.conv_local.norm.running_mean = model.first.conv_local.norm.running_mean + 1


def child(model: nn.Module) -> None:
    model.head = nn.Linear(8, 7).eval()


def another_child(model: nn.Module) -> None:
    model.head = nn.Sequential(model.head).eval()
    assert_current(model, image())
    model.head.append(nn.ReLU().eval())


def switch(model: nn.Module) -> None:
    model.second.window_size = 3


def plain_tensor(model: nn.Module) -> None:
    """An attribute that no state dict knows, of values that do not compare as a whole."""
    model.scale = torch.ones(5)
    assert_current(model, image())
    model.scale = torch.full((5,), 2.0)


def forward(model: nn.Module) -> None:
    model.head.forward = lambda y: y[:, :5] + 1


def transposed(model: nn.Module) -> None:
    """The same memory, read otherwise."""
    qk = model.second.qk.conv.weight
    qk.data = qk.data.as_strided(qk.shape, (1, qk.shape[0], 1, 1))


def accelerated_again(model: nn.Module) -> None:
    accelerated(model)


CHANGES = (new_memory, new_parameter, assigned, buffer, child, another_child, switch, forward)
CHANGES += (plain_tensor,)


@pytest.mark.parametrize("change", [*CHANGES, transposed, accelerated_again])
def test_whatever_else_changes_is_captured_anew(
    model: nn.Module, stand: Stand, change: Callable[[nn.Module], None]
) -> None:
    assert_current(model, image())
    with torch.no_grad():
        change(model)
    before = len(stand.captures)
    assert_current(model, image())
    assert len(stand.captures) == before + 1
    assert len(model.forward._graphs) == 1


def renamed(model: nn.Module) -> None:
    """The same values under other names."""
    del model.scale
    model.other_scale = 1.0


def narrower(model: nn.Module) -> None:
    """The same memory and strides, fewer elements."""
    model.head.bias.data = model.head.bias.data[:3]


WATCHED = (*(c for c in CHANGES if c not in (plain_tensor, another_child)), transposed)


@pytest.mark.parametrize("in_cpp", [True, False], ids=["cpp", "python"])
@pytest.mark.parametrize("change", [*WATCHED, renamed, narrower])
def test_the_watch_sees_it(
    in_cpp: bool, change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass of C++, and in Python where that cannot be had."""
    if not in_cpp:
        monkeypatch.setattr(watch, "_DLPACK", None)
    model = Small().eval()
    seen = watch.Watch(model)
    assert isinstance(getattr(seen._look, "__self__", None), _C.Watch) == in_cpp
    assert seen.holds()
    in_place(model)
    model.runs = int("1000") - 1000  # another object, an equal number
    assert seen.holds()
    with torch.no_grad():
        change(model)
    assert not seen.holds()


def test_what_has_no_memory_is_not_watched_in_cpp() -> None:
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match="a tensor has no memory to look at"):
        _C.Watch(api=watch._DLPACK, empty=[], switches=[], holders=[], tensors=[sparse])


def test_the_backend_asked_for_is_part_of_the_kind(model: nn.Module, stand: Stand) -> None:
    assert_current(model, image())
    with ek.use_backend("reference"):
        assert_current(model, image())
    assert len(stand.captures) == 2


def test_autocast_is_part_of_the_kind_and_its_cache_is_not_kept(
    model: nn.Module, stand: Stand
) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = model(image())
        assert first.dtype == torch.bfloat16
        model.head.weight.mul_(4)
        model.head.bias.mul_(4)
        torch.testing.assert_close(model(image()), 4 * first)
    assert_current(model, image())
    assert len(stand.captures) == 2


# ------------------------------------------------------------------------------------ run as it is


def assert_runs_itself(model: nn.Module, stand: Stand, run: Callable[[], object]) -> None:
    runs, captures = model.runs, len(stand.captures)
    run()
    assert model.runs == runs + 1 and len(stand.captures) == captures


def test_training_and_gradients_are_the_models_own(model: nn.Module, stand: Stand) -> None:
    def step() -> None:
        model(image()).sum().backward()
        assert model.head.weight.grad is not None

    assert_runs_itself(model, stand, step)
    model.train()
    with torch.no_grad():
        assert_runs_itself(model, stand, lambda: model(image()))
    model.eval()
    assert_current(model, image())
    model.second.train()
    with torch.no_grad():
        assert_runs_itself(model, stand, lambda: model(image()))
    model.eval().requires_grad_(False)
    model(image())  # gradients are on, but nothing asks for one
    assert len(stand.captures) == 2


def test_hooks_are_called(model: nn.Module, stand: Stand) -> None:
    assert_current(model, image())
    seen: list[Tensor] = []
    handle = model.second.register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        for _ in range(2):
            assert_runs_itself(model, stand, lambda: model(image()))
    assert len(seen) == 2
    handle.remove()
    assert_current(model, image())
    assert len(stand.captures) == 2


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model(x=image()),
        lambda model: model(torch.empty(0, 8, 5, 5)),
        lambda model: torch.func.vmap(model)(image()[None]),
        lambda model: model(torch._neg_view(image())),
        lambda model: model(nn.Parameter(image(), requires_grad=False)),
    ],
    ids=["keyword", "no_image", "vmap", "negative_view", "subclass"],
)
def test_other_calls_are_the_models_own(
    model: nn.Module, stand: Stand, run: Callable[[nn.Module], object]
) -> None:
    with torch.no_grad():
        assert_runs_itself(model, stand, lambda: run(model))


def test_a_capture_around_it_captures_the_model(model: nn.Module, stand: Stand) -> None:
    stand.capturing = True
    with torch.no_grad():
        assert_runs_itself(model, stand, lambda: model(image()))


def test_compiled_it_is_the_model(
    model: nn.Module, stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler would use it
    with torch.no_grad():
        exported = torch.export.export(model, (image(),))
        torch.testing.assert_close(exported.module()(image(seed=3)), plain(model, image(seed=3)))
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(image(seed=3)), plain(model, image(seed=3)))
    assert not stand.captures


# ----------------------------------------------------------------------------- results and streams


class Pair(tuple):
    """A tuple that is not one."""


def test_results_of_every_structure(model: nn.Module) -> None:
    x = image()
    want = plain(model, x)

    def check(returns: Callable[[Tensor], object]) -> object:
        model.returns = returns
        model.forward.release()
        with torch.no_grad():
            return model(x)

    found = check(lambda y: {"out": y, "out_kd": y})
    assert found["out"] is found["out_kd"] and list(found) == ["out", "out_kd"]
    torch.testing.assert_close(found["out"], want)
    found = check(lambda y: [y, (y + 1, None)])
    assert isinstance(found, list) and isinstance(found[1], tuple) and found[1][1] is None
    torch.testing.assert_close(found[1][0], want + 1)
    for returns in (lambda y: Pair((y, y)), lambda y: y.shape, lambda y: (y, 1.5)):
        with pytest.raises(NotImplementedError, match="must return tensors in tuples, lists and"):
            check(returns)


def test_a_forward_that_waits_for_the_gpu_is_refused(model: nn.Module, stand: Stand) -> None:
    model.returns = lambda y: y * y.sum().item()
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=r"accelerate: cuda_graphs: .*cannot be captured"
            ):
                model(image())
    model.returns = lambda y: y
    assert_current(model, image())


def test_inference_mode_and_none_share_a_graph(model: nn.Module, stand: Stand) -> None:
    with torch.inference_mode():
        assert model(image()).is_inference()
    with torch.no_grad():
        assert not model(image()).is_inference()
    assert len(stand.captures) == 1


def test_another_stream_waits_for_the_last_replay(model: nn.Module, stand: Stand) -> None:
    first = stand.stream
    assert_current(model, image())
    stand.stream = second = FakeStream()
    assert_current(model, image())
    assert second.waited == [first]
    assert_current(model, image())
    assert second.waited == [first]


def test_threads_take_turns(model: nn.Module) -> None:
    inputs = [image(seed=seed) for seed in range(4)]
    want = [plain(model, x) for x in inputs]
    faults: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(inputs[i]), want[i], rtol=1e-4, atol=1e-5):
                    faults.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


# --------------------------------------------------------------------------------- undone, refused


def test_copies_and_pickles_have_graphs_of_their_own(model: nn.Module, stand: Stand) -> None:
    model.returns = torch.relu
    assert_current(model, image())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.head.weight.mul_(-1)
            assert twin.forward.block is twin
        assert_current(twin, image())
    assert_current(model, image())
    assert len(stand.captures) == 3


def test_restore_gives_everything_back(model: nn.Module, stand: Stand) -> None:
    assert_current(model, image())
    ek.restore(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert isinstance(accelerated(model).forward, graphs.GraphedForward)
    ek.accelerate(model)
    assert "forward" not in model.__dict__ and "forward" in model.first.__dict__


def test_a_block_may_be_the_model(stand: Stand) -> None:
    torch.manual_seed(0)
    block = accelerated(ek.nn.iRMB(8, 8, attn_s=False).eval())
    assert_current(block, image())
    assert len(stand.captures) == 1
    block.train()
    assert block(image()).requires_grad  # the block's own forward is found behind both
    ek.restore(block)
    assert "forward" not in block.__dict__


def test_what_cannot_be_had_is_refused_and_changes_nothing(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small().eval()
    monkeypatch.setattr(graphs, "DEVICE", "cuda")
    with pytest.raises(ValueError, match="needs a model on one CUDA device, got cpu; move it"):
        ek.accelerate(model, cuda_graphs=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="torch sees no CUDA device; use cuda_graphs=F"):
        ek.accelerate(model, cuda_graphs=True)
    assert not any("forward" in m.__dict__ for m in model.modules())
