"""Fused kernels and reference models for the inverted residual mobile block (EMO, iRMB)."""

from emo_kernels import nn, ops
from emo_kernels.accelerate import accelerate, restore
from emo_kernels.backends import available_backends, release_memory, use_backend
from emo_kernels.explain import explain
from emo_kernels.models import create_backbone, create_model, load_checkpoint, save_checkpoint

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "available_backends",
    "create_backbone",
    "create_model",
    "explain",
    "load_checkpoint",
    "nn",
    "ops",
    "release_memory",
    "restore",
    "save_checkpoint",
    "use_backend",
]
