"""Stages 0 to 4, which the classifier and the dense backbone share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from emo_kernels.models.configs import EMOConfig
from emo_kernels.nn.irmb import iRMB
from emo_kernels.nn.layers import get_act, get_norm
from emo_kernels.nn.meta import MetaFormerBlock
from emo_kernels.spec import conv_padding


class PatchEmbedding(nn.Module):
    """act(BN(conv3x3(x))) with stride 2 and a bias."""

    def __init__(self, in_chans: int, dim: int, act_layer: str) -> None:
        super().__init__()
        conv = nn.Conv2d(in_chans, dim, 3, stride=2, padding=conv_padding(3, 2))
        # A list of parallel branches in the published state dict; all released models have one.
        self.convs = nn.ModuleList(
            [nn.Sequential(conv, get_norm("bn_2d", dim), get_act(act_layer))]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, dim, ceil(H / 2), ceil(W / 2))."""
        out: Tensor = self.convs[0](x)
        return out


class EMOStages(nn.Module):
    """stage0 (stride 2) to stage4 (stride 32), run one after the other.

    Args:
        config: the row of the table.
        in_chans: channels of the image.
        output_stride: 32, or 16 or 8: late stages keep the map's size and dilate their depthwise
            convolutions instead.
    """

    STAGES = tuple(f"stage{i}" for i in range(5))  # names of the children

    def __init__(self, config: EMOConfig, in_chans: int, output_stride: int = 32) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"EMO: output_stride must be 8, 16 or 32, got {output_stride!r}")
        self.config = config
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.stage_dims = (config.stem_dim, *config.dims)
        self.stage_strides = tuple(min(2 ** (i + 1), output_stride) for i in range(5))

        self.stage0 = _stem(config, in_chans)
        rates = drop_path_rates(config)
        for i in range(4):
            stage = [
                _block(config, i, j, next(rates), output_stride) for j in range(config.depths[i])
            ]
            setattr(self, f"stage{i + 1}", nn.Sequential(*stage))

    @property
    def stages(self) -> list[nn.Sequential]:
        """The five stages in order."""
        return [getattr(self, name) for name in self.STAGES]

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """One stage's blocks in order."""
        stage: nn.Sequential = getattr(self, self.STAGES[index])
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            out: Tensor = stage(x)
            return out
        for block in stage:
            x = _checkpointed(block, x)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs in training and compute the rest again in backward."""
        self.grad_checkpointing = enable


def drop_path_rates(config: EMOConfig) -> Iterator[float]:
    """Rates of all blocks of stages 1 to 4 in order, rising linearly from 0."""
    total = sum(config.depths)
    return (config.drop_path_rate * i / max(total - 1, 1) for i in range(total))


def _stem(config: EMOConfig, in_chans: int) -> nn.Sequential:
    """stage0: a convolution, then DWConv, BN, SiLU, squeeze-excite (EMO) and a projection."""
    second = config.stem == "emo2"
    dim = config.stem_dim
    block = iRMB(
        dim,
        dim,
        norm_in=False,
        has_skip=False,
        act_layer="silu",
        v_proj=False,
        se_ratio=0.0 if second else 1.0,
        attn_s=False,
    )
    return nn.Sequential(PatchEmbedding(in_chans, dim, "silu" if second else "none"), block)


def _block(config: EMOConfig, i: int, j: int, drop_path: float, output_stride: int) -> nn.Module:
    """Block ``j`` of stage ``i + 1``; block 0 is the one that halves the map."""
    stride, dilation = _stride_and_dilation(i, j, output_stride)
    downsampler = j == 0
    dim_in = (config.stem_dim, *config.dims)[i] if downsampler else config.dims[i]
    if config.block == "metaformer" and not downsampler:
        return MetaFormerBlock(
            dim_in,
            ffn_ratio=config.exp_ratios[i],
            norm_layer=config.norm_layers[i],
            act_layer=config.act_layers[i],
            dw_ks=config.dw_kss[i] if config.dw_conv else 0,
            dilation=dilation,
            dim_head=config.dim_heads[i],
            window_size=config.window_sizes[i],
            attn_s=config.attn_stages[i],
            qkv_bias=config.qkv_bias,
            drop_path=drop_path,
        )
    return iRMB(
        dim_in,
        config.dims[i],
        has_skip=not downsampler,
        exp_ratio=config.exp_ratios[i] * (2 if downsampler else 1),
        norm_layer=config.norm_layers[i],
        act_layer=config.act_layers[i],
        dw_ks=config.dw_kss[i] if config.dw_conv or downsampler else 0,
        stride=stride,
        dilation=dilation,
        dim_head=config.dim_heads[i],
        window_size=config.window_sizes[i],
        attn_s=config.attn_stages[i] and not downsampler,
        qkv_bias=config.qkv_bias,
        attn_drop=config.attn_drop,
        drop=config.drop,
        drop_path=drop_path,
        v_group=config.v_group,
        attn_pre=config.attn_pre,
        window_mode=config.window_mode,
        qk_proj=config.qk_proj,
        op_order=config.op_order,
        ls_value=config.ls_value,
        pad_dilation=config.pad_dilation or dilation > 1,
    )


def _stride_and_dilation(i: int, j: int, output_stride: int) -> tuple[int, int]:
    """Of block ``j`` of stage ``i + 1``: a stage that must not halve the map dilates instead.

    The first block of a stage still has the dilation of the stage before it, as its input is still
    sampled that densely.
    """
    beyond = max(2 ** (i + 2) // output_stride, 1)
    if j > 0:
        return 1, beyond
    return (2, 1) if beyond == 1 else (1, beyond // 2)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)`` without keeping what backward needs."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _batch_norms_keep_statistics(block)

    out: Tensor
    if torch.compiler.is_compiling():
        out = checkpoint(block, x, use_reentrant=False)
    else:
        out = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return out


@contextmanager
def _batch_norms_keep_statistics(block: nn.Module) -> Iterator[None]:
    """Batch norms normalise by the batch but leave running statistics alone.

    Computing a block again in backward would otherwise move them twice in one step. With momentum 0
    the same tensors are saved for backward as the first time.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
