"""What one row measures: a model or one of its blocks, in which mode, type, batch and on what."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from emo_kernels.measure.pairs import calibrate_batch_norm, noise_images
from emo_kernels.models import create_model
from emo_kernels.models.macs import count_macs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("infer", "train", "memory")


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: as :func:`create_model` takes it.
        mode: ``infer``, ``train`` (forward and backward) or ``memory`` (the peak of a training
            step).
        dtype: a key of :data:`DTYPES`.
        batch, size: of the input, (height, width).
        threads: of every engine.
        isa: the widest instruction set allowed, such as ``avx2``; empty for all there are.
        block: path of one block, which is then measured alone on the map it gets in the model.
        settings: fields of the model's configuration.
        device: where it runs.
    """

    model: str
    mode: str = "infer"
    dtype: str = "fp32"
    batch: int = 1
    size: tuple[int, int] = (224, 224)
    threads: int = 1
    isa: str = ""
    block: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Its name in tables and files, such as ``infer emo_5m fp32 b16 224 2thr``."""
        h, w = self.size
        words = [self.mode, f"{self.model}/{self.block}" if self.block else self.model, self.dtype]
        words += [f"b{self.batch}", str(h) if h == w else f"{h}x{w}", f"{self.threads}thr"]
        words += [f"{key}={value}" for key, value in self.settings]
        words += [word for word in (self.isa, self.device) if word not in ("", "cpu")]
        return " ".join(words)

    @property
    def trains(self) -> bool:
        """Whether a call is a training step."""
        return self.mode != "infer"

    @staticmethod
    def of(fields: dict[str, Any]) -> Case:
        """The case that ``dataclasses.asdict`` turned into JSON."""
        settings = tuple((key, _tuples(value)) for key, value in fields["settings"])
        return Case(**{**fields, "size": tuple(fields["size"]), "settings": settings})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class Work:
    """What every engine of a case computes: the same module, rounded weights and input.

    Attributes:
        module: in the dtype of the case, in training mode if the case trains.
        x: (N, C, H, W) in the dtype of the case.
        labels: (N,) classes, for the loss.
    """

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        settings = dict(case.settings)
        if case.trains:
            settings["drop_path_rate"] = 0.0  # the engines would draw different numbers
        module: nn.Module = create_model(case.model, **settings).to(case.device)
        channels = settings.get("in_chans", 3)
        x = torch.randn(case.batch, channels, *case.size).to(case.device)
        self.labels = torch.randint(0, 10, (case.batch,)).to(case.device)
        calibrate_batch_norm(module, noise_images(channels, x.device))
        if case.block:
            module, x = _block_and_input(module, case.block, x)
        dtype = DTYPES[case.dtype]
        self.module = module.to(dtype).train(case.trains)
        self.x = x.to(dtype)

    def copy(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The module again, in another type if asked for: the weights stay rounded as they are."""
        return copy.deepcopy(self.module).to(dtype or self.x.dtype)

    def loss(self, out: Tensor) -> Tensor:
        """Of a training step."""
        return cross_entropy(out, self.labels)

    @cached_property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.module.parameters())

    @cached_property
    def gflop(self) -> float:
        """Useful work of one call in GFLOP: a backward pass costs two forwards of products."""
        macs = count_macs(self.copy(torch.float32), tuple(self.x.shape)).total
        return 2e-9 * macs * (3 if self.case.trains else 1)

    @cached_property
    def least_bytes(self) -> int:
        """Bytes that one inference call must move: input, output and weights once."""
        with torch.no_grad():
            out = copy.deepcopy(self.module).to("meta")(self.x.to("meta"))
        return (self.x.numel() + out.numel() + self.parameters) * self.x.element_size()

    @cached_property
    def onnx(self) -> bytes:
        """The model as ONNX in fp32."""
        silenced, sys.stdout = sys.stdout, io.StringIO()  # the exporter prints its progress
        logging.disable(logging.WARNING)  # and that torchvision is not installed
        try:
            module, x = self.copy(torch.float32), self.x.float().contiguous()
            program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
        finally:
            sys.stdout = silenced
            logging.disable(logging.NOTSET)
        assert program is not None
        return program.model_proto.SerializeToString()

    def digest(self) -> str:
        """Of everything that the exact result depends on but the code."""
        found = hashlib.sha256(f"{torch.__version__} {self.case.mode}".encode())
        tensors = [*self.module.state_dict().values(), self.x, self.labels]
        for tensor in tensors:
            found.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
        return found.hexdigest()[:24]


def _block_and_input(model: nn.Module, path: str, x: Tensor) -> tuple[nn.Module, Tensor]:
    """One block of a model and the map that it gets."""
    blocks = dict(model.named_modules())
    if path not in blocks or not path:
        raise ValueError(f"bench: the model has no block {path!r}; explain lists its blocks")
    seen: list[Tensor] = []
    handle = blocks[path].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    return blocks[path], seen[0].contiguous()
