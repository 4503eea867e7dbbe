"""Fused kernels and reference models for the inverted residual mobile block (EMO, iRMB)."""

from emo_kernels import ops
from emo_kernels.backends import available_backends, use_backend

__version__ = "0.1.0"

__all__ = [
    "available_backends",
    "ops",
    "use_backend",
]
