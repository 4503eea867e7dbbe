"""Who takes part: the same module, weights and input in every engine.

An engine is a call without arguments that returns the result: the output in inference, the loss in
training, whose gradients are then in the parameters of its module. One that is not installed, does
not apply or fails to build is absent, with its reason; it is never left out in silence.
"""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from emo_kernels.accelerate import accelerate
from emo_kernels.explain import explain
from emo_kernels.measure.cache import compiled_mark
from emo_kernels.measure.case import Case, Work
from emo_kernels.measure.engine import OURS, Engine, rotation
from emo_kernels.measure.gpu_peers import attend_with_natten, captured
from emo_kernels.measure.pairs import channels_last
from emo_kernels.measure.runtimes import onnxruntime_engine, openvino_engine

# Engines that no environment variable limits to an instruction set.
UNLIMITED = ("onnxruntime",)


@dataclass
class Engines:
    """What takes part in one comparison, and why what does not does not."""

    run: dict[str, Engine] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, reason: str) -> None:
        """It takes part no longer."""
        self.run.pop(name)
        self.absent[name] = reason


def build_engines(
    work: Work,
    peers: Iterable[str],
    *,
    backend: str | None = None,
    on_build: Callable[[str], None] = lambda name: None,
    in_a_hurry: bool = False,
) -> Engines:
    """Ours and ``peers``, each of :func:`peer_names`, ready to run; ``on_build`` hears of each.

    ``in_a_hurry`` leaves out what takes minutes to build.
    """
    case, engines = work.case, Engines()
    torch.set_num_threads(case.threads)
    for name in (OURS, *peers):
        on_build(name)
        reason = _does_not_apply(name, case)
        if reason is None and in_a_hurry:
            reason = _takes_minutes(name, case)
        if reason is not None:
            engines.absent[name] = reason
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine = _ours(work, backend) if name == OURS else _BUILDERS[name](work)
                engine.call()
            engines.run[name] = engine
        except ImportError as error:
            engines.absent[name] = f"not installed: {error}"
        except Exception as error:  # an engine that fails is reported, not fatal
            if name == OURS and is_out_of_memory(error):
                raise
            engines.absent[name] = short(error)
    return engines


def short(error: BaseException) -> str:
    """The kind of an error and the first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says so, in the words of Python, CUDA, torch's allocator or glibc."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def peer_names() -> tuple[str, ...]:
    """Every engine but ours."""
    return tuple(_BUILDERS)


def check_peers(names: Iterable[str]) -> tuple[str, ...]:
    """The peers that ``--peers`` asks for.

    Raises:
        ValueError: there is no such peer; close matches are named.
    """
    chosen = tuple(names)
    if "all" in chosen:
        return peer_names()
    for name in chosen:
        if name not in _BUILDERS:
            near = difflib.get_close_matches(name, _BUILDERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(("all", *_BUILDERS))
            raise ValueError(f"bench: --peers must be of {known}, got {name!r}{hint}")
    return chosen


def _takes_minutes(name: str, case: Case) -> str | None:
    if name != "compile" or compiled_mark(case).is_file():
        return None
    return "not compiled yet, which takes minutes: bench_cpu.py --warm, or bench without a limit"


def _does_not_apply(name: str, case: Case) -> str | None:
    if name in ("onnxruntime", "openvino"):
        if case.trains:
            return "inference only"
        if case.device != "cpu":
            return "compared on the CPU only"
    if name == "cuda graphs" and case.device == "cpu":
        return "a GPU's"
    return None


# ------------------------------------------------------------------------------ engines of PyTorch


def _ours(work: Work, backend: str | None) -> Engine:
    graphs = work.case.device != "cpu" and not (work.case.trains or work.case.block)
    module = accelerate(
        _channels_last(work),
        backend=backend,
        strict=not work.case.trains,
        cuda_graphs=graphs,
    )
    x = work.x.contiguous(memory_format=torch.channels_last)
    training = work.case.trains
    engine = _torch_engine(work, module, x)
    engine.call()
    rows = explain(module, None if work.case.block else x).rows
    chosen = [row.training if training else row.inference for row in rows]
    reasons = [row.training_reasons if training else row.reasons for row in rows]
    if all(name == "reference" for name in chosen):
        raise NotImplementedError(next(iter(reasons[0].values()), "no kernel runs its blocks"))
    runs = sorted(set(chosen), key=chosen.count, reverse=True)
    engine.note = ", ".join(f"{name} runs {chosen.count(name)} of {len(rows)}" for name in runs)
    if graphs:
        engine.note, engine.peaks = f"{engine.note}, as a CUDA graph", False
    return engine


def _channels_last(work: Work) -> nn.Module:
    return channels_last(work.copy())


def _torch_engine(
    work: Work,
    module: nn.Module,
    x: Tensor,
    forward: Callable[[Tensor], Tensor] | None = None,
    *,
    rotate: bool = True,
) -> Engine:
    """A call of ``forward``, or of the module: inference, or a step without the optimizer's."""
    forward = module if forward is None else forward
    inputs = rotation(x) if rotate else itertools.repeat(x)

    def infer() -> Tensor:
        with torch.inference_mode():
            return forward(next(inputs))

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        loss = work.loss(forward(next(inputs)))
        loss.backward()
        return loss.detach()

    return Engine(step if work.case.trains else infer, module)


def _eager(work: Work) -> Engine:
    return _torch_engine(work, work.copy(), work.x.contiguous())


def _eager_channels_last(work: Work) -> Engine:
    x = work.x.contiguous(memory_format=torch.channels_last)
    return _torch_engine(work, _channels_last(work), x)


def _cuda_graphs(work: Work) -> Engine:
    """Eager in channels_last, captured: what it costs without launching each kernel."""
    x = work.x.contiguous(memory_format=torch.channels_last)
    engine = _torch_engine(work, _channels_last(work), x, rotate=False)
    engine.call()
    return Engine(captured(engine.call), engine.module, peaks=False, saves=False)


def _natten(work: Work) -> Engine:
    x = work.x.contiguous(memory_format=torch.channels_last)
    return _torch_engine(work, attend_with_natten(_channels_last(work)), x)


def _compile(work: Work) -> Engine:
    """Frozen in inference: the weights become constants of the compiled program."""
    import torch._inductor.config as inductor

    module, x = _channels_last(work), work.x.contiguous(memory_format=torch.channels_last)
    torch._dynamo.reset()
    inference = not work.case.trains
    inductor.freezing = inference and work.case.device == "cpu"
    inductor.cpp.threads = work.case.threads  # it is compiled in, and part of the cache's key
    mode = "max-autotune" if work.case.device != "cpu" else None
    compiled = torch.compile(module, dynamic=False, mode=mode)

    def forward(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    if inference:
        inputs = rotation(x)

        def run() -> Tensor:
            with torch.no_grad():  # freezing does not take inference mode
                return forward(next(inputs))

        engine = Engine(run, module)
    else:
        engine = _torch_engine(work, module, x, forward)
        engine.saves = False
    engine.call()
    mark = compiled_mark(work.case)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return engine


_BUILDERS: dict[str, Callable[[Work], Engine]] = {
    "eager": _eager,
    "eager channels_last": _eager_channels_last,
    "compile": _compile,
    "onnxruntime": onnxruntime_engine,
    "openvino": openvino_engine,
    "cuda graphs": _cuda_graphs,
    "natten": _natten,
}
