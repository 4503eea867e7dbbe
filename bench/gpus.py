"""Rates of GPUs, for floors and shares of them."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """Rates of one GPU: bytes/s and FLOP/s."""

    bandwidth: float
    tensor: float  # dense bf16 and fp16 with fp32 accumulation
    fp32: float  # ordinary fp32 arithmetic, one fused multiply-add counted as two


# H200: measured on this project's machine (DESIGN.md); the others: the vendor's data sheets.
GPUS = {
    "H200": Gpu(4.3e12, 790e12, 67e12),
    "H100": Gpu(3.35e12, 989e12, 67e12),
    "H100 PCIe": Gpu(2.0e12, 756e12, 51e12),
    "B200": Gpu(8.0e12, 2250e12, 80e12),
    "A100": Gpu(2.04e12, 312e12, 19.5e12),
    "A100 40GB": Gpu(1.56e12, 312e12, 19.5e12),
    "L40S": Gpu(0.864e12, 362e12, 91.6e12),
    "L4": Gpu(0.30e12, 121e12, 30.3e12),
    "RTX 4090": Gpu(1.008e12, 165e12, 82.6e12),
    "RTX 3090": Gpu(0.936e12, 71e12, 35.6e12),
}
