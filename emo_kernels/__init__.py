"""Fused kernels and reference models for the inverted residual mobile block (EMO, iRMB)."""

from emo_kernels import ops
from emo_kernels.accelerate import accelerate, restore
from emo_kernels.backends import available_backends, use_backend
from emo_kernels.explain import explain

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "available_backends",
    "explain",
    "ops",
    "restore",
    "use_backend",
]
