"""The passes over memory that eager PyTorch makes for a block under autocast to 16 bits.

One :class:`Op` for each operator of ATen that moves a map: its inputs and outputs counted once.
Convolutions run in 16 bits, layer norm and softmax in fp32; the rearrangements of einops copy; in
training SiLU(inplace=True) clones its input first, because batch norm keeps it.
"""

from __future__ import annotations

from typing import NamedTuple

from roofline_blocks import Block, blocks

from emo_kernels.models.configs import CONFIGS


class Op(NamedTuple):
    """One pass."""

    name: str
    backward: bool
    bytes: int


class _Passes(list[Op]):
    """The passes so far; forward and backward ones side by side, as they belong together."""

    def forward(self, **passes: int) -> None:
        self += [Op(name, False, count) for name, count in passes.items()]

    def backward(self, **passes: int) -> None:
        self += [Op(name, True, count) for name, count in passes.items()]

    def batch_norm(self, t: int, training: bool) -> None:
        """Statistics and the norm itself; backward reads gradient and input twice."""
        self.forward(batch_norm=(3 if training else 2) * t)
        self.backward(batch_norm=5 * t)

    def silu(self, t: int, training: bool) -> None:
        self.forward(silu=(4 if training else 2) * t)
        self.backward(silu=3 * t)

    def convolution(self, x: int, y: int, *, bias: bool) -> None:
        self.forward(convolution=x + y)
        self.backward(convolution_input=x + y, convolution_weight=x + y)
        if bias:
            self.backward(convolution_bias=y)


def eager_block(block: Block, batch: int, *, training: bool, element: int = 2) -> list[Op]:
    """The passes of one block: forward, and in training backward too."""
    p = element * batch * block.h * block.w
    q = element * batch * block.output_size[0] * block.output_size[1]
    c, m, y, o = p * block.c, p * block.m, q * block.m, q * block.o
    passes = _Passes()
    if block.norm == "batch":
        passes.batch_norm(c, training)
    elif block.norm == "layer":
        _layer_norm(passes, c, attends=bool(block.head_dim))
    if block.head_dim:
        _attention(passes, block, batch, c, element)
    if block.expands:
        _expansion(passes, block, c, m, training)
    passes.convolution(m, y, bias=False)
    passes.batch_norm(y, training)
    passes.silu(y, training)
    if block.gated:
        passes.forward(squeeze=y, gate=2 * y)
        passes.backward(gate=5 * y, squeeze=3 * y)
    if block.skip:
        passes.forward(add_local=3 * y)
        passes.backward(add_local=3 * y)
    passes.convolution(y, o, bias=False)
    if block.skip:
        passes.forward(drop_path=2 * o if training else 0, residual=3 * o)
        passes.backward(drop_path=2 * o, residual=3 * o)
    return [op for op in passes if training or not op.backward]


def _layer_norm(passes: _Passes, c: int, *, attends: bool) -> None:
    """LN over channels of an NCHW map, in fp32 between two transposes."""
    passes.forward(to_rows=2 * c, to_fp32=3 * c, layer_norm=4 * c, to_map=4 * c)
    passes.backward(to_rows=4 * c, layer_norm=10 * c, to_16_bit=3 * c, to_map=2 * c)
    if not attends:
        passes.forward(to_16_bit=3 * c)
        passes.backward(to_fp32=3 * c)


def _attention(passes: _Passes, block: Block, batch: int, c: int, element: int) -> None:
    """Windows cut out in fp32, q and k projected, scores written in both precisions."""
    windows, tokens = block.window_pixels
    heads = block.c // block.head_dim
    s = element * batch * windows * heads * tokens**2
    cut = c if windows > 1 else 0
    passes.forward(
        pad=4 * c,
        cut_windows=4 * cut,
        to_16_bit=3 * c,
        qk_convolution=3 * c,
        qk_to_heads=4 * c,
        scores=2 * c + s,
        scale=2 * s,
        scores_to_fp32=3 * s,
        softmax=4 * s,
        v_to_heads=4 * c,
        softmax_to_16_bit=3 * s,
        v_to_16_bit=3 * c,
        values=s + 2 * c,
        values_to_map=2 * c,
    )
    passes.backward(
        values_to_heads=2 * c,
        values_scores=2 * c + s,
        values_v=2 * c + s,
        v_to_fp32=3 * c,
        softmax_to_fp32=3 * s,
        v_to_map=4 * c,
        softmax=6 * s,
        scores_to_16_bit=3 * s,
        scale=2 * s,
        scores_q_k=2 * (2 * c + s),
        split_q_k=6 * c,
        add_q_k=6 * c,
        qk_to_map=4 * c,
        qk_convolution=8 * c,
        to_fp32=3 * c,
        add_v=6 * c,
        join_windows=4 * cut,
        unpad=4 * c,
    )


def _expansion(passes: _Passes, block: Block, c: int, m: int, training: bool) -> None:
    passes.convolution(c, m, bias=True)
    if block.act == "silu":
        passes.silu(m, training)
    else:
        passes.forward(gelu=2 * m)
        passes.backward(gelu=3 * m)
    if block.head_dim and block.window_pixels[0] > 1:
        passes.forward(join_windows=2 * m)
        passes.backward(cut_windows=2 * m)


def eager_stem(
    batch: int, dim: int, size: tuple[int, int], *, training: bool, element: int = 2
) -> list[Op]:
    """The stem's 3x3 convolution with stride 2, and its batch norm."""
    image = batch * 3 * size[0] * size[1]
    y = element * batch * dim * -(-size[0] // 2) * -(-size[1] // 2)
    passes = _Passes()
    if element == 2:
        passes.forward(to_16_bit=6 * image)
    passes.forward(convolution=element * image + y)
    passes.backward(convolution_weight=element * image + y, convolution_bias=y)
    passes.batch_norm(y, training)
    return [op for op in passes if training or not op.backward]


def eager(
    model: str, batch: int, *, training: bool, size: tuple[int, int] = (224, 224)
) -> list[Op]:
    """Every pass of a model but for the final norm, the head and the loss."""
    found = eager_stem(batch, CONFIGS[model].stem_dim, size, training=training)
    for block in blocks(model, *size):
        found += eager_block(block, batch, training=training)
    return found
