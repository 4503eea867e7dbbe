"""EMO and EMOv2 as one table of configurations; classifiers, dense backbones, checkpoints."""

from __future__ import annotations

from emo_kernels.models.backbone import EMOBackbone
from emo_kernels.models.checkpoint import (
    CheckpointError,
    LoadResult,
    load_checkpoint,
    save_checkpoint,
)
from emo_kernels.models.configs import ABLATIONS, CONFIGS, EMOConfig
from emo_kernels.models.emo import EMO
from emo_kernels.models.registry import create_backbone, create_model, list_models

__all__ = [
    "ABLATIONS",
    "CONFIGS",
    "EMO",
    "CheckpointError",
    "EMOBackbone",
    "EMOConfig",
    "LoadResult",
    "create_backbone",
    "create_model",
    "list_models",
    "load_checkpoint",
    "save_checkpoint",
]
