"""The blocks of EMO as sizes: what the counts of roofline.py start from."""

from __future__ import annotations

from dataclasses import dataclass

from emo_kernels.models.configs import CONFIGS
from emo_kernels.spec import conv_output_size, conv_padding


@dataclass(frozen=True)
class Block:
    """Sizes of one block: (N, C, H, W) to (N, O, H', W') by way of M channels."""

    name: str
    c: int
    m: int
    o: int
    h: int
    w: int
    kernel: int
    stride: int
    norm: str  # none, batch, layer
    act: str
    skip: bool
    head_dim: int = 0
    window: int = 7
    gated: bool = False

    @property
    def expands(self) -> bool:
        """Whether there is a norm and a 1x1 convolution in front; not in the stem's block."""
        return not self.gated

    @property
    def output_size(self) -> tuple[int, int]:
        """(H', W')."""
        step = (self.kernel, self.stride, conv_padding(self.kernel, self.stride), 1)
        return conv_output_size(self.h, *step), conv_output_size(self.w, *step)

    @property
    def window_pixels(self) -> tuple[int, int]:
        """(windows of one image, pixels of one window)."""
        if self.window <= 0:
            return 1, self.h * self.w
        return -(-self.h // self.window) * -(-self.w // self.window), self.window**2


def blocks(model: str, height: int = 224, width: int | None = None) -> list[Block]:
    """The blocks of a model for images of that size, in order.

    Raises:
        ValueError: no such model, or one whose blocks are not counted here.
    """
    if model not in CONFIGS:
        raise ValueError(f"roofline: model must be one of {', '.join(CONFIGS)}, got {model!r}")
    config = CONFIGS[model]
    if config.stem != "emo" or not config.attn_pre:
        raise ValueError(f"roofline: counts EMO, whose attention comes before V, not {model}")
    h, w = (-(-side // 2) for side in (height, height if width is None else width))
    stem = config.stem_dim
    found = [Block("stem", stem, stem, stem, h, w, 3, 1, "none", "silu", False, gated=True)]
    c = stem
    for i, (depth, o) in enumerate(zip(config.depths, config.dims, strict=True)):
        norm = {"bn_2d": "batch", "ln_2d": "layer"}[config.norm_layers[i]]
        for j in range(depth):
            down = j == 0
            attends = config.attn_stages[i] and not down
            block = Block(
                name=f"s{i + 1}.{j}",
                c=c,
                m=int(c * config.exp_ratios[i] * (2 if down else 1)),
                o=o,
                h=h,
                w=w,
                kernel=config.dw_kss[i],
                stride=2 if down else 1,
                norm=norm,
                act=config.act_layers[i],
                skip=not down,
                head_dim=config.dim_heads[i] if attends else 0,
                window=config.window_sizes[i],
            )
            found.append(block)
            (h, w), c = block.output_size, o
    return found


def _useful_products(block: Block, batch: int) -> int:
    """FLOPs of the block's own forward."""
    p, q = batch * block.h * block.w, batch * block.output_size[0] * block.output_size[1]
    flops = 2 * q * block.m * (block.kernel**2 + block.o)
    if block.expands:
        flops += 2 * p * block.c * block.m
    if block.head_dim:
        windows, tokens = block.window_pixels
        flops += 4 * p * block.c**2 + 4 * batch * windows * tokens**2 * block.c
    if block.gated:
        flops += 4 * batch * block.m**2
    return flops


def useful_flops(model: str, batch: int, size: tuple[int, int] = (224, 224)) -> int:
    """FLOPs of a forward as the equations have them; a training step has three times these."""
    h, w = (-(-side // 2) for side in size)
    stem = 2 * batch * h * w * 27 * CONFIGS[model].stem_dim
    return stem + sum(_useful_products(block, batch) for block in blocks(model, *size))
