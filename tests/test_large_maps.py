"""Maps of a megabyte and more, which the CPU's kernels write past the caches where they can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emo_kernels import _C
from emo_kernels.cpu import expand_depthwise_with_maps, shrink_backward

CHANNELS = 96  # rows of whole cache lines
SIDE = 28  # 0.3 MB an image


def nhwc(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [CHANNELS, CHANNELS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", _C.available_isas())
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_many_images_are_those_of_each(
    threads: int, isa: str, dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    torch.manual_seed(0)
    y, local = (nhwc(4, channels, SIDE, SIDE).to(dtype) for _ in range(2))
    grad, weight = nhwc(4, 24, SIDE, SIDE).to(dtype), torch.randn(24, channels, 1, 1)
    affine = torch.rand(4, channels) + 0.5
    needed = [True, False, False, False, True, False, False, False]

    def maps(*images: slice) -> list[list[Tensor]]:
        return [
            shrink_backward(
                grad[i], y[i], weight, None, None, local[i], affine=affine, needed=needed
            )
            for i in images
        ]

    torch.set_num_threads(threads)
    try:
        (whole,) = maps(slice(4))
        parts = maps(*(slice(i, i + 1) for i in range(4)))
    finally:
        torch.set_num_threads(1)
    for place, found in enumerate(whole):
        assert torch.equal(found, torch.cat([part[place] for part in parts]))


@pytest.mark.parametrize("isa", _C.available_isas())
def test_an_expansion_of_many_images_is_that_of_each(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMO_KERNELS_ISA", isa)
    torch.manual_seed(0)
    x, weight = nhwc(4, 24, SIDE, SIDE), torch.randn(CHANNELS, 24, 1, 1)
    tensors = (weight, None, None, None, torch.randn(CHANNELS, 1, 3, 3), None)
    options = {"norm": "none", "eps": 1e-6, "act": "gelu", "groups": 1}
    options |= {"stride": 1, "padding": 1, "dilation": 1, "statistics": False, "slope": True}

    def maps(images: Tensor) -> list[Tensor]:
        return expand_depthwise_with_maps(images, *tensors, **options)

    parts = [maps(image) for image in x.split(1)]
    for place, found in enumerate(maps(x)):
        assert torch.equal(found, torch.cat([part[place] for part in parts]))
