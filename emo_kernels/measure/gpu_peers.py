"""Peers that need more than a module: a captured CUDA graph, NATTEN's attention."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from emo_kernels.nn import iRMB
from emo_kernels.reference.window_attention import Windows, window_modes


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call`` as a CUDA graph: one launch replays all of its kernels, on the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def attend_with_natten(model: nn.Module) -> nn.Module:
    """``model`` with the attention of every block by NATTEN's ``na2d``, in place.

    Raises:
        ImportError: natten is not installed.
        NotImplementedError: no block of the model attends.
    """
    import natten

    blocks = [block for block in model.modules() if isinstance(block, iRMB) and block.attn_s]
    if not blocks:
        raise NotImplementedError("natten: the model has no attention")

    def attend(block: iRMB, h: Tensor, value: Tensor, windows: Windows) -> Tensor:
        """In place of ``iRMB._attend``.

        A strided window is every pixel of one residue: neighbourhood attention at dilation n1, n2,
        whose kernel covers all wh x ww pixels that there are. A contiguous window is shared by the
        wh x ww queries in it: the stride.
        """
        q, k = block.qk(h).chunk(2, dim=1) if block.qk_proj else (h, h)
        heads = q.shape[1] // block.dim_head
        pixels = [_heads_last(t, heads) for t in (q, k, value)]
        size = (windows.wh, windows.ww)
        sums = []
        for mode in window_modes(block.window_mode):
            how = {"dilation": (windows.n1, windows.n2)} if mode == "grid" else {"stride": size}
            found = natten.na2d(*pixels, kernel_size=size, scale=block.scale, **how)
            sums.append(found.flatten(3).permute(0, 3, 1, 2))
        return sums[0] if len(sums) == 1 else sums[0] + sums[1]

    for block in blocks:
        # of this copy alone: the class keeps its own
        vars(block)["_attend"] = types.MethodType(attend, block)
    return model


def _heads_last(x: Tensor, heads: int) -> Tensor:
    """(N, heads D, H, W) to (N, H, W, heads, D)."""
    return x.permute(0, 2, 3, 1).unflatten(3, (heads, -1)).contiguous()
