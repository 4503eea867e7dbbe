"""A model's inference as CUDA graphs: captured once for each kind of input, then replayed.

A replay reads weights and buffers where they lie, so what an optimizer or ``load_state_dict``
writes into them is seen. All else that a captured run depends on is watched at every call: tensors
that moved, switches, modes, children and hooks of every module. Where something has changed, every
graph of the model is dropped and captured anew.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels import backends
from emo_kernels.ops.registration import needs_gradient, runs_standard_operators
from emo_kernels.structure import has_global_hooks
from emo_kernels.swap import Replacement
from emo_kernels.watch import Watch

DEVICE = "cuda"
MOST_GRAPHS = 8  # kinds of input a model keeps graphs for; the one not used for longest goes
_WARM_UPS = 3  # runs that compile kernels and let libraries choose theirs, before the capture


def check_capturable(model: nn.Module) -> None:
    """Raise where the graphs asked for cannot be had: without a GPU, or a model that is not on one.

    Raises:
        NotImplementedError: torch sees no CUDA device.
        ValueError: the model is elsewhere, or on more than one device.
    """
    if not torch.cuda.is_available():
        raise NotImplementedError(
            "accelerate: cuda_graphs=True needs a GPU, and torch sees no CUDA device; "
            "use cuda_graphs=False"
        )
    devices = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or not devices.pop().startswith(DEVICE):
        found = ", ".join(sorted({str(t.device) for t in model.parameters()})) or "no parameters"
        raise ValueError(
            f"accelerate: cuda_graphs=True needs a model on one CUDA device, got {found}; "
            "move it there first, or use cuda_graphs=False"
        )


class GraphedForward(Replacement):
    """The forward of a model whose inference is captured. Copied and pickled without its graphs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._start_empty()

    def _start_empty(self) -> None:
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._watch: Watch | None = None
        self._stream: Any = None  # of the last replay, whose buffers the next one overwrites
        self._pool: Any = None  # memory that all graphs share: results are copied before the next
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "previous": self.previous}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A replay where the call is plain inference on a GPU, else the model as it is."""
        if kwargs or not args or not self._is_inference(args):
            return self._run(*args, **kwargs)
        with self._lock:
            if self._watch is None or not self._watch.holds():
                self.release()
                self._watch = Watch(self.block)
            if self._watch.reason is not None:
                return self._run(*args)
            return self._replay(args)

    def release(self) -> None:
        """Forget every graph; its memory is torch's again."""
        self._graphs.clear()
        self._watch = self._pool = None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if self.previous is None:
            return type(self.block).forward(self.block, *args, **kwargs)
        return self.previous(*args, **kwargs)

    def _is_inference(self, args: tuple[Any, ...]) -> bool:
        """Whether only the numbers in the input may differ from a call that was captured."""
        if torch.compiler.is_compiling() or has_global_hooks():
            return False
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return False
        for x in args:
            if type(x) is not Tensor or x.device.type != DEVICE or runs_standard_operators(x):
                return False
            if x.numel() == 0 or x.layout is not torch.strided or x.is_neg() or x.is_conj():
                return False
        if torch.is_grad_enabled() and needs_gradient((*args, *self.block.parameters())):
            return False
        return not torch.cuda.is_current_stream_capturing()

    def _replay(self, args: tuple[Tensor, ...]) -> Any:
        stream = torch.cuda.current_stream(args[0].device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream
        key = _kind(args)
        graph = self._graphs.get(key)
        if graph is None:
            while len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)
            graph = self._graphs[key] = _Graph(self._run, args, self._pool)
            self._pool = graph.pool
            self._watch = Watch(self.block)  # the run may have counted itself
        self._graphs.move_to_end(key)
        return graph(args)


def _kind(args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """What a graph holds for."""
    maps = tuple((x.shape, x.dtype, x.device, _layout(x)) for x in args)
    autocast = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else None
    return maps, autocast, backends.requested(None)


def _layout(x: Tensor) -> torch.memory_format:
    """The dense layout in which a graph reads x."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return torch.contiguous_format


class _Graph:
    """One captured run: the memory it reads its input from, and where it leaves its results."""

    def __init__(self, run: Callable[..., Any], args: tuple[Tensor, ...], pool: Any) -> None:
        device = args[0].device
        self.pool = torch.cuda.graph_pool_handle() if pool is None else pool
        # Ordinary tensors, whatever mode the caller is in: later calls may be in another.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            self.inputs = [torch.empty_like(x, memory_format=_layout(x)) for x in args]
            self._fill(args)
            # A cache of cast weights would outlive the graph that holds them.
            enabled, dtype = torch.is_autocast_enabled(DEVICE), torch.get_autocast_dtype(DEVICE)
            with torch.autocast(DEVICE, dtype, enabled=enabled, cache_enabled=False):
                self._capture(run, device)

    def _capture(self, run: Callable[..., Any], device: torch.device) -> None:
        side, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                outputs = run(*self.inputs)
        current.wait_stream(side)
        _map_tensors(outputs, lambda t: t)
        del outputs
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Threads that load data go on meanwhile.
            how: dict[str, Any] = {"stream": side, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(self.graph, pool=self.pool, **how):
                self.outputs = run(*self.inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"accelerate: cuda_graphs: the model's forward cannot be captured ({error}); it "
                "may not wait for the GPU or read from the host; use cuda_graphs=False"
            ) from error

    def _fill(self, args: tuple[Tensor, ...]) -> None:
        for static, x in zip(self.inputs, args, strict=True):
            static.copy_(x)

    def __call__(self, args: tuple[Tensor, ...]) -> Any:
        """The captured run on other numbers; results are copies, the caller's to keep."""
        with torch.no_grad():
            self._fill(args)
            self.graph.replay()
            copies: dict[int, Tensor] = {}
            return _map_tensors(self.outputs, lambda t: copies.setdefault(id(t), t.clone()))


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value)
    if value is None:
        return None
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(v, change) for v in value)
    if isinstance(value, dict):
        return type(value)((k, _map_tensors(v, change)) for k, v in value.items())
    raise NotImplementedError(
        "accelerate: cuda_graphs: the model must return tensors in tuples, lists and dicts, got "
        f"{type(value).__name__}; use cuda_graphs=False"
    )
