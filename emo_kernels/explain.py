"""Say which backend runs every block and operator of a model, and why not another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emo_kernels import backends
from emo_kernels.accelerate import AcceleratedForward, find_blocks, sample_input, unreadable
from emo_kernels.stem import (
    AcceleratedStem,
    StemReading,
    find_stems,
    sample_image,
    unreadable_stem,
)
from emo_kernels.structure import BlockReading
from emo_kernels.tail import AcceleratedTail, TailReading, find_tails, unreadable_tail


@dataclass(frozen=True)
class Row:
    """One operator of one block.

    Attributes:
        path: of the block in the model; empty if the model is the block.
        operator: ``irmb``, the whole block, ``conv_norm_act``, the stem, or ``norm_pool_linear``,
            the tail.
        shape: of the input, (N, C, H, W), where one was seen.
        inference, training: the backend that runs it; ``reference`` is the block's own forward.
        reasons: for each backend not chosen for inference, why not.
        training_reasons: the same for training.
    """

    path: str
    operator: str
    shape: tuple[int, ...] | None
    inference: str
    training: str
    reasons: dict[str, str]
    training_reasons: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found: ``print`` shows a table, ``rows`` is data."""

    rows: list[Row]

    def to_json(self) -> str:
        """The rows as a JSON list."""
        return json.dumps([asdict(row) for row in self.rows], indent=2)

    def __str__(self) -> str:
        table = format_table(
            ("block", "operator", "input", "inference", "training"),
            [
                (
                    row.path or "(model)",
                    row.operator,
                    _times(row.shape),
                    row.inference,
                    row.training,
                )
                for row in self.rows
            ],
        )
        return "\n".join([table, *self._reason_lines()])

    def _reason_lines(self) -> list[str]:
        """Each distinct reason once, with how many rows it holds for."""
        counts: dict[tuple[str, str, str], int] = {}
        for row in self.rows:
            for mode, reasons in (("inference", row.reasons), ("training", row.training_reasons)):
                for name, reason in reasons.items():
                    counts[mode, name, reason] = counts.get((mode, name, reason), 0) + 1
        return [
            f"{mode}: not {name} for {count} of {len(self.rows)}: {reason}"
            for (mode, name, reason), count in counts.items()
        ]


def explain(model_or_block: nn.Module, x: Tensor | None = None) -> Report:
    """One row for each block and operator: the backend that runs it now, and why not the others.

    Args:
        model_or_block: a model, accelerated or not.
        x: an input of the model; it is run once, in inference, to learn every block's shape.

    Returns:
        A :class:`Report`.

    Example:
        >>> from emo_kernels.nn import iRMB
        >>> print(explain(iRMB(8, 8, attn_s=False)).rows[0].inference)
        reference
    """
    inputs = {} if x is None else _record_inputs(model_or_block, x)
    blocks = list(find_blocks(model_or_block))
    stems = [
        _stem_row(path, stem, inputs.get(path))
        for path, stem in (find_stems(model_or_block) if blocks else ())
    ]
    tails = [_tail_row(path, tail) for path, tail in (find_tails(model_or_block) if blocks else ())]
    return Report(
        [*stems, *(_row(path, block, inputs.get(path)) for path, block in blocks), *tails]
    )


def _row(path: str, block: nn.Module, x: Tensor | None) -> Row:
    shape = None if x is None else tuple(x.shape)
    forward = block.__dict__.get("forward")
    reason = unreadable(block)
    if reason is not None or not isinstance(forward, AcceleratedForward):
        reason = reason or "the block is not accelerated: call emo_kernels.accelerate(model)"
        reasons = dict.fromkeys((n for n in backends.NAMES if n != "reference"), reason)
        return Row(path, "irmb", shape, "reference", "reference", reasons, reasons)
    reading = BlockReading(block)
    weights, spec = reading.weights(), reading.spec
    if x is None:
        x = sample_input(weights, spec)
    inference, reasons = _choose("irmb", forward.backend, x, weights, spec)
    training, training_reasons = _choose("irmb_training", forward.backend, x, weights, spec)
    return Row(path, "irmb", shape, inference, training, reasons, training_reasons)


def _stem_row(path: str, stem: nn.Module, x: Tensor | None) -> Row:
    shape = None if x is None else tuple(x.shape)
    forward, reason = stem.__dict__.get("forward"), unreadable_stem(stem)
    if reason is not None or not isinstance(forward, AcceleratedStem):
        reason = reason or "the stem is not accelerated: call emo_kernels.accelerate(model)"
        reasons = dict.fromkeys((n for n in backends.NAMES if n != "reference"), reason)
        return Row(path, "conv_norm_act", shape, "reference", "reference", reasons, reasons)
    reading = StemReading(stem)
    tensors = reading.tensors()
    assert tensors[0] is not None
    x = sample_image(tensors[0], reading.spec) if x is None else x
    operators = ("conv_norm_act", "conv_norm_act_training")
    (inference, reasons), (training, training_reasons) = (
        _choose(operator, forward.backend, x, *tensors, **reading.spec) for operator in operators
    )
    return Row(path, operators[0], shape, inference, training, reasons, training_reasons)


def _tail_row(path: str, network: nn.Module) -> Row:
    """Norm, mean and head, whose training is their own forward's."""
    operator, others = "norm_pool_linear", [n for n in backends.NAMES if n != "reference"]
    training = dict.fromkeys(others, "the tail trains by its own forward")
    forward, reason = network.__dict__.get("forward"), unreadable_tail(network)
    if reason is not None or not isinstance(forward, AcceleratedTail):
        reason = reason or "the tail is not accelerated: call emo_kernels.accelerate(model)"
        reasons = dict.fromkeys(others, reason)
        return Row(path, operator, None, "reference", "reference", reasons, training)
    reading = TailReading(network)
    tensors = reading.tensors()
    assert tensors[0] is not None
    y = tensors[0].new_empty(1, tensors[0].shape[1], 7, 7)
    inference, reasons = _choose(operator, forward.backend, y, *tensors, **reading.spec)
    return Row(path, operator, None, inference, "reference", reasons, training)


def _choose(
    operator: str, backend: str | None, x: Tensor, *args: Any, **options: Any
) -> tuple[str, dict[str, str]]:
    """(the backend that runs it, reason for each that does not)."""
    asked = backends.requested(backend)
    chosen, reasons = "reference", {}
    for name in reversed(backends.NAMES):
        reason = backends.why_not(name, operator, x.device.type, x, *args, **options)
        if name == "reference":
            continue
        if asked is None:
            reason = reason or backends.only_by_name(name)
        if reason is None and asked in (None, name):
            if chosen != "reference":
                reasons[chosen] = f"{name} is preferred"
            chosen = name
        else:
            reasons[name] = reason or f"{asked} was asked for"
    return chosen, reasons


@torch.no_grad()
def _record_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The input of every block in one forward of the model in inference."""
    inputs: dict[str, Tensor] = {}

    def record(path: str) -> Any:
        return lambda _block, args: inputs.__setitem__(path, args[0])

    watched = [*find_stems(model), *find_blocks(model)]
    handles = [module.register_forward_pre_hook(record(path)) for path, module in watched]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return inputs


def _times(shape: Sequence[int] | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned by spaces: text to the left, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(headers))]
    lines = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%x"))
    except ValueError:
        return False
    return True
