"""Models by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from typing import Any

from emo_kernels.models.backbone import EMOBackbone
from emo_kernels.models.checkpoint import load_checkpoint
from emo_kernels.models.configs import CONFIGS, DENSE_WINDOW_SIZES, EMOConfig, field_names
from emo_kernels.models.emo import EMO
from emo_kernels.nn.bad_input import unknown_name


def list_models() -> list[str]:
    """The names that :func:`create_model` and :func:`create_backbone` know.

    Example:
        >>> list_models()[:4]
        ['emo_1m', 'emo_2m', 'emo_5m', 'emo_6m']
    """
    return list(CONFIGS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    checkpoint: str | PathLike[str] | None = None,
    **overrides: Any,
) -> EMO:
    """A classifier: logits (N, num_classes) from images (N, in_chans, H, W).

    Args:
        name: ``emo_1m``, ``emo_2m``, ``emo_5m``, ``emo_6m``, ``emo2_1m`` ... ``emo2_50m``;
            official spellings such as ``EMO_5M`` are known, too.
        num_classes: 0: no head.
        in_chans: channels of the images.
        checkpoint: a file for :func:`load_checkpoint`; ``None``: random weights.
        **overrides: fields of :class:`emo_kernels.models.EMOConfig`.

    Raises:
        ValueError: an unknown name or override (the message has the close matches), or switches
            that no block can have.
        FileNotFoundError: no such checkpoint.

    Example:
        >>> model = create_model("emo_1m", num_classes=10, window_sizes=4)
        >>> sum(p.numel() for p in model.parameters())
        1193858
    """
    model = EMO(
        _configure("create_model", name, overrides), num_classes=num_classes, in_chans=in_chans
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def create_backbone(
    name: str,
    out_indices: Sequence[int] = (1, 2, 3, 4),
    frozen_stages: int = -1,
    norm_eval: bool = False,
    window_sizes: int | Sequence[int] | None = None,
    output_stride: int = 32,
    *,
    in_chans: int = 3,
    checkpoint: str | PathLike[str] | None = None,
    **overrides: Any,
) -> EMOBackbone:
    """A backbone for detection and segmentation: a list of maps, not normalised.

    Args:
        name: as for :func:`create_model`.
        out_indices: stages 0 to 4 (strides 2, 4, 8, 16, 32) to return.
        frozen_stages: stages 0 to this one keep weights and statistics; -1: none.
        norm_eval: all batch norms keep their statistics in training, too.
        window_sizes: sides of the attention windows; ``None``: those of the published dense
            backbones: 7 for EMO-1M and 2M, 16 for EMO-5M (segmentation; its detectors use 10, as
            EMOv2 does).
        output_stride: 32; 16 or 8 dilate the depthwise convolutions of late stages instead of
            striding.
        in_chans: channels of the images.
        checkpoint: a file for :func:`load_checkpoint`; norm and head in it are left out.
        **overrides: fields of :class:`emo_kernels.models.EMOConfig`.

    Raises:
        ValueError: an unknown name or override, indices that are no stages.
        FileNotFoundError: no such checkpoint.

    Example:
        >>> create_backbone("emo_1m", out_indices=(2, 3)).out_channels
        [48, 80]
    """
    if window_sizes is None:
        window_sizes = DENSE_WINDOW_SIZES[_key("create_backbone", name)]
    config = _configure("create_backbone", name, {**overrides, "window_sizes": window_sizes})
    model = EMOBackbone(
        config,
        in_chans=in_chans,
        out_indices=out_indices,
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        output_stride=output_stride,
    )
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def _configure(owner: str, name: str, overrides: dict[str, Any]) -> EMOConfig:
    """The row of the table called ``name``, with other fields."""
    config = CONFIGS[_key(owner, name)]
    known = field_names()
    for override in overrides:
        if override not in known:
            raise unknown_name(owner, "override", override, known)
    return config.override(**overrides)


def _key(owner: str, name: str) -> str:
    """The table's spelling of ``name``: EMO_5M, emo-5m, EMOv2_5M and emo2_5m are all known."""
    if not isinstance(name, str):
        raise ValueError(f"{owner}: name must be a string, got {name!r}")
    key = re.sub(r"^emov2(?=_)", "emo2", name.strip().lower().replace("-", "_"))
    if key not in CONFIGS:
        raise unknown_name(owner, "model", name, CONFIGS)
    return key
