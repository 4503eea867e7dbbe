"""One table of blocks: every layer of EMO at 224, detection maps, EMOv2, odd and degenerate ones.

Each row names a block and yields its :class:`IRMBSpec`, the shapes of its tensors and its input;
``weights`` and ``feature_map`` fill them at the scale of trained networks. Rows marked ``slow``
have their published map; the default run has the same channels on a smaller map where the
published one is large. Tests of one operator take the rows that differ for that operator.

>>> rows("5m_stage3")[0].input_shape
(2, 160, 14, 14)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emo_kernels.spec import IRMBSpec, IRMBWeights, conv_output_size, conv_padding


@dataclass(frozen=True)
class Row:
    """One block: sizes as in the equations, switches as in :class:`IRMBSpec`."""

    name: str
    c: int
    m: int
    o: int
    h: int
    w: int
    n: int = 2
    kernel: int = 3  # 0: no depthwise convolution
    stride: int = 1
    dilation: int = 1
    norm: str = "batch"
    act: str = "silu"
    head_dim: int = 0  # 0: no attention
    window: int = 7
    window_mode: str = "grid"
    attn_pre: bool = True
    grouped_v: bool = False  # one group of the expanding convolution for each head
    qk_proj: bool = True
    bias: bool = True  # of the qk and the expanding convolution
    expands: bool = True  # False: no expanding convolution, M = C
    se: int = 0  # width of squeeze-excite; 0: none
    skip: bool = True
    gamma: bool = False  # LayerScale
    op_order: str = "attn_conv"
    slow: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def heads(self) -> int:
        """Heads of the attention; 0 without."""
        return self.c // self.head_dim if self.head_dim else 0

    @property
    def v_groups(self) -> int:
        """Groups of the expanding convolution."""
        return self.heads if self.grouped_v else 1

    @property
    def padding(self) -> int:
        """The published padding of the depthwise convolution."""
        return conv_padding(self.kernel, self.stride) if self.kernel else 0

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return (self.n, self.c, self.h, self.w)

    @property
    def output_size(self) -> tuple[int, int]:
        """(H', W') behind the depthwise convolution."""
        if not self.kernel:
            return (self.h, self.w)
        step = (self.kernel, self.stride, self.padding, self.dilation)
        return (conv_output_size(self.h, *step), conv_output_size(self.w, *step))

    @property
    def tokens(self) -> int:
        """Pixels of one attention window."""
        return self.h * self.w if self.window <= 0 else self.window**2

    def spec(self) -> IRMBSpec:
        """The row's switches."""
        return IRMBSpec(
            norm=self.norm,
            act=self.act,
            head_dim=self.head_dim,
            window_size=self.window,
            window_mode=self.window_mode,
            attn_pre=self.attn_pre,
            v_groups=self.v_groups,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            skip=self.skip,
            op_order=self.op_order,
        )

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor the block has, by its name in :class:`IRMBWeights`."""
        c, m, o = self.c, self.m, self.o
        shapes: dict[str, tuple[int, ...]] = {"proj_weight": (o, m, 1, 1)}
        if self.norm != "none":
            shapes |= {"norm_weight": (c,), "norm_bias": (c,)}
        if self.norm == "batch":
            shapes |= {"norm_mean": (c,), "norm_var": (c,)}
        if self.head_dim and self.qk_proj:
            shapes |= {"qk_weight": (2 * c, c, 1, 1)} | ({"qk_bias": (2 * c,)} if self.bias else {})
        if self.expands:
            shapes |= {"v_weight": (m, c // self.v_groups, 1, 1)}
            shapes |= {"v_bias": (m,)} if self.bias else {}
        if self.kernel:
            shapes |= {"dw_weight": (m, 1, self.kernel, self.kernel)}
            shapes |= dict.fromkeys(("bn_weight", "bn_bias", "bn_mean", "bn_var"), (m,))
        if self.se:
            shapes |= {"se_reduce_weight": (self.se, m, 1, 1), "se_reduce_bias": (self.se,)}
            shapes |= {"se_expand_weight": (m, self.se, 1, 1), "se_expand_bias": (m,)}
        if self.gamma:
            shapes |= {"gamma": (o,)}
        return shapes


# ------------------------------------------------------------------------------ official layers


class _Model(NamedTuple):
    dims: tuple[int, ...]
    ratios: tuple[float, ...]
    head_dims: tuple[int, ...]


_MODELS = {
    "1m": _Model((32, 48, 80, 168), (2.0, 2.5, 3.0, 3.5), (16, 16, 20, 21)),
    "2m": _Model((32, 48, 120, 200), (2.0, 2.5, 3.0, 3.5), (16, 16, 20, 20)),
    "5m": _Model((48, 72, 160, 288), (2.0, 3.0, 4.0, 4.0), (24, 24, 32, 32)),
    "6m": _Model((48, 72, 160, 320), (2.0, 3.0, 4.0, 5.0), (16, 24, 20, 32)),
}
_STEM = 24
_RESOLUTION = (112, 56, 28, 14, 7)  # of the stages' outputs at 224
_NORMS, _ACTS, _KERNELS = ("batch", "batch", "layer", "layer"), ("silu", "gelu"), (3, 3, 5, 5)


def _stem(model: str) -> Row:
    side = _RESOLUTION[0]
    return Row(
        f"{model}_stage0",
        c=_STEM,
        m=_STEM,
        o=_STEM,
        h=side,
        w=side,
        norm="none",
        expands=False,
        se=_STEM,
        skip=False,
    )


def _stage(model: str, stage: int) -> list[Row]:
    """The downsampling block of one stage and the block that repeats behind it."""
    dims, ratios, head_dims = _MODELS[model]
    before, c, ratio = (_STEM, *dims)[stage - 1], dims[stage - 1], ratios[stage - 1]
    attends = stage > 2
    switches: dict[str, Any] = {
        "kernel": _KERNELS[stage - 1],
        "norm": _NORMS[stage - 1],
        "act": _ACTS[stage > 2],
    }
    side = _RESOLUTION[stage - 1]
    down = Row(
        f"{model}_stage{stage}_down",
        c=before,
        m=int(before * 2 * ratio),
        o=c,
        h=side,
        w=side,
        stride=2,
        skip=False,
        **switches,
    )
    side = _RESOLUTION[stage]
    block = Row(
        f"{model}_stage{stage}",
        c=c,
        m=int(c * ratio),
        o=c,
        h=side,
        w=side,
        head_dim=head_dims[stage - 1] if attends else 0,
        **switches,
    )
    return [down, block]


def _official() -> tuple[list[Row], dict[str, str]]:
    """The distinct layers under the name of the first model that has them, and the other names."""
    first: dict[Row, str] = {}
    aliases: dict[str, str] = {}
    for model in _MODELS:
        layers = [_stem(model)] + [row for stage in (1, 2, 3, 4) for row in _stage(model, stage)]
        for row in layers:
            key = replace(row, name="")
            if key in first:
                aliases[row.name] = first[key]
            else:
                first[key] = row.name
    return [replace(key, name=name) for key, name in first.items()], aliases


_SMALL_SIDES = {112: (15, 18), 56: (14, 17), 28: (11, 13)}


def _default_and_full(row: Row) -> list[Row]:
    """A small map beside the published one, which is slow, unless that is small itself."""
    if row.h not in _SMALL_SIDES:
        return [row]
    h, w = _SMALL_SIDES[row.h]
    return [replace(row, name=f"{row.name}_small", h=h, w=w), replace(row, n=1, slow=True)]


_LAYERS, ALIASES = _official()
OFFICIAL = [variant for row in _LAYERS for variant in _default_and_full(row)]


def _like(name: str, layer: str, **changes: Any) -> Row:
    row = next(r for r in _LAYERS if r.name == ALIASES.get(layer, layer))
    return replace(row, name=name, **changes)


# --------------------------------------------------------------------------- maps of dense tasks

DETECTION = [
    _like("5m_stage2_100x168", "5m_stage2", h=100, w=168, n=1, slow=True),
    # So many images that torch's layer norm, which adds up its gradients over pixels in bf16, is
    # worse than the 50u from which fp32 takes its place: a little better is no yardstick either.
    _like("5m_stage3_84x50", "5m_stage3", h=84, w=50, slow=True),
    _like("5m_stage3_40x40", "5m_stage3", h=40, w=40, n=4, slow=True),
    _like("5m_stage3_40x40_window10", "5m_stage3", h=40, w=40, n=4, window=10, slow=True),
    _like("5m_stage4_42x25", "5m_stage4", h=42, w=25, n=1, slow=True),
    _like("5m_stage4_down_84x50", "5m_stage4_down", h=84, w=50, n=1, slow=True),
    _like("5m_stage4_20x20", "5m_stage4", h=20, w=20, n=1, window=10, slow=True),
    _like("1m_stage4_20x20", "1m_stage4", h=20, w=20, n=1),
    _like("2m_stage4_10x10", "2m_stage4", h=10, w=10, n=1, window=10),
    _like("1m_stage3_21x13", "1m_stage3", h=21, w=13, n=1),
]

# ------------------------------------------------------------------ EMOv2 and the paper's switches

_V2: dict[str, Any] = {"attn_pre": False, "window_mode": "both", "gamma": True, "kernel": 5}
_TOY = Row("toy", c=24, m=48, o=24, h=10, w=9, norm="layer", act="gelu", head_dim=8, window=5)

SWITCHES = [
    _like("v2_5m_stage3", "5m_stage3", **_V2),
    _like("v2_5m_stage1_small", "5m_stage1", h=9, w=12, kernel=5, gamma=True),
    Row(
        "v2_1m_stage4", c=180, m=630, o=180, h=7, w=7, norm="layer", act="gelu", head_dim=20, **_V2
    ),
    replace(_TOY, name="block_windows", window_mode="block", window=4),
    replace(_TOY, name="both_windows", window_mode="both", window=4),
    replace(_TOY, name="whole_map", window=0),
    replace(_TOY, name="post_expansion", attn_pre=False),
    replace(_TOY, name="post_expansion_grouped", attn_pre=False, grouped_v=True, act="relu"),
    replace(_TOY, name="grouped_v", grouped_v=True, act="none"),
    replace(_TOY, name="no_bias", bias=False),
    replace(_TOY, name="q_k_x", qk_proj=False),
    replace(_TOY, name="conv_then_attention", op_order="conv_attn"),
    replace(_TOY, name="attention_only", kernel=0),
    replace(_TOY, name="neither", kernel=0, head_dim=0),
    replace(_TOY, name="no_skip", skip=False, o=33),
    replace(_TOY, name="attention_and_excite", se=12, norm="batch"),
    replace(_TOY, name="no_norm", norm="none", act="relu"),
    Row("unexpanded", c=20, m=20, o=20, h=8, w=11, norm="none", expands=False),
    Row("excite_with_skip", c=16, m=40, o=16, h=9, w=6, se=2, act="relu"),
    Row("dilated", c=16, m=32, o=16, h=11, w=9, dilation=2, skip=False),
]

# -------------------------------------------------------------------------- odd and degenerate ones

ODD = [
    Row("pixel", c=16, m=24, o=16, h=1, w=1, norm="layer", act="gelu", head_dim=8),
    Row("pixel_global", c=16, m=24, o=16, h=1, w=1, head_dim=8, window=0),
    Row("row_1x9", c=12, m=36, o=12, h=1, w=9, kernel=5, norm="layer", act="gelu", head_dim=6),
    Row("column_9x1", c=12, m=36, o=12, h=9, w=1, kernel=5, norm="layer", act="gelu", head_dim=4),
    Row("below_window", c=16, m=40, o=16, h=4, w=6, norm="layer", act="gelu", head_dim=16),
    Row("ragged_c21", c=21, m=52, o=21, h=10, w=13, n=1, kernel=5, norm="layer", head_dim=7),
    Row("window_1", c=16, m=20, o=16, h=3, w=4, head_dim=8, window=1),
    Row("window_2", c=33, m=34, o=33, h=5, w=4, norm="layer", head_dim=33, window=2),
    Row("window_8", c=6, m=31, o=6, h=9, w=17, n=1, norm="layer", head_dim=3, window=8),
    Row("head_dim_1", c=5, m=15, o=5, h=6, w=7, norm="layer", head_dim=1, window=3),
    Row("batch_0", c=16, m=24, o=16, h=7, w=8, n=0, norm="layer", act="gelu", head_dim=8),
    Row("batch_0_conv", c=16, m=24, o=16, h=7, w=8, n=0),
    Row("batch_5", c=17, m=29, o=17, h=6, w=5, n=5, norm="batch"),
    Row("odd_c21_m31", c=21, m=31, o=21, h=13, w=9),
    Row("one_channel", c=1, m=1, o=1, h=5, w=6, kernel=5),
    Row("one_to_three", c=1, m=3, o=7, h=4, w=3, norm="none", act="relu", skip=False),
    Row("wide_129", c=13, m=129, o=13, h=7, w=3),
    Row("narrow_2x31", c=20, m=60, o=20, h=2, w=31, n=1),
    Row("narrow_31x2_k5", c=20, m=60, o=20, h=31, w=2, n=1, kernel=5),
    Row("stride_2_1x1", c=12, m=24, o=10, h=1, w=1, stride=2, skip=False),
    Row("stride_2_2x1_k5", c=12, m=24, o=9, h=2, w=1, kernel=5, stride=2, skip=False),
    Row("stride_2_13x9", c=21, m=42, o=33, h=13, w=9, stride=2, skip=False),
    Row("stride_2_8x15_k5", c=20, m=52, o=24, h=8, w=15, kernel=5, stride=2, skip=False),
    Row("stride_3_8x11", c=12, m=20, o=8, h=8, w=11, stride=3, skip=False),
    Row("kernel_1", c=12, m=20, o=12, h=5, w=4, kernel=1),
    Row("kernel_7", c=12, m=20, o=12, h=9, w=8, kernel=7),
]

# ------------------------------------------------------------------------------------------- stems

_IMAGE = Row("image", c=3, m=24, o=24, h=19, w=22, stride=2, act="none", skip=False)

STEMS = [
    replace(_IMAGE, name="stem_224", h=224, w=224, n=1, slow=True),
    replace(_IMAGE, name="stem_small"),
    replace(_IMAGE, name="stem_v2_small", act="silu", o=32, h=17, w=16),
    replace(_IMAGE, name="stem_no_norm", norm="none", act="gelu", o=7),
    replace(_IMAGE, name="stem_no_bias", bias=False, act="relu", o=40),
    replace(_IMAGE, name="stem_grey_k5_dilated", c=1, o=5, kernel=5, dilation=2, w=23, act="silu"),
    replace(_IMAGE, name="stem_patches_4x4", c=4, o=48, kernel=4, stride=4, h=16, w=20),
    replace(_IMAGE, name="stem_one_pixel", h=1, w=1, o=65, n=3),
    replace(_IMAGE, name="stem_k7_o21", kernel=7, c=13, o=21, stride=1, h=9, w=35, n=1),
    replace(_IMAGE, name="stem_pointwise", kernel=1, stride=1, o=33, h=5, w=31),
    replace(_IMAGE, name="stem_of_a_map", c=21, o=10),
    replace(_IMAGE, name="stem_batch_0", n=0),
]

# ------------------------------------------------------------------------------------------- heads

_HEAD = Row("head", c=48, m=48, o=100, h=7, w=7, norm="layer", skip=False)

HEADS = [
    replace(_HEAD, name="head_5m", c=288, o=1000, n=1, slow=True),
    replace(_HEAD, name="head_1m_small", c=168, o=30),
    replace(_HEAD, name="head_small"),
    replace(_HEAD, name="head_21x3x5_no_bias", c=21, o=33, h=3, w=5, n=5, bias=False),
    replace(_HEAD, name="head_plain_norm", c=20, o=7, h=3, w=35, norm="none"),
    replace(_HEAD, name="head_one_pixel", c=13, o=5, h=1, w=1, n=9),
    replace(_HEAD, name="head_one_channel", c=1, o=6, h=4, w=4),
    replace(_HEAD, name="head_one_output", c=66, o=1, h=2, w=20, n=4),
    replace(_HEAD, name="head_batch_0", n=0),
]

TABLE: list[Row] = [*OFFICIAL, *DETECTION, *SWITCHES, *ODD]
_BY_NAME = {row.name: row for row in [*TABLE, *STEMS, *HEADS]}
assert len(_BY_NAME) == len(TABLE) + len(STEMS) + len(HEADS), "two rows share a name"


# ------------------------------------------------------------------------------------------ views


def rows(*names: str) -> list[Row]:
    """Rows by name; a layer that several models share answers to every model's name."""
    return [_BY_NAME[ALIASES.get(name, name)] for name in names]


def _distinct(candidates: Iterable[Row], key: Callable[[Row], Hashable]) -> list[Row]:
    return list({key(row): row for row in reversed(list(candidates))}.values())[::-1]


def depthwise_rows() -> list[Row]:
    """Rows whose depthwise convolutions differ."""

    def key(r: Row) -> Hashable:
        return (r.n, r.m, r.h, r.w, r.kernel, r.stride, r.dilation)

    return _distinct((r for r in TABLE if r.kernel), key)


def expand_rows() -> list[Row]:
    """Rows whose expanding convolutions differ."""

    def key(r: Row) -> Hashable:
        return (r.n, r.c, r.m, r.h, r.w, r.norm, r.act, r.v_groups, r.bias)

    return _distinct((r for r in TABLE if r.expands), key)


def attention_rows() -> list[Row]:
    """Rows whose attention differs."""

    def key(r: Row) -> Hashable:
        post = None if r.attn_pre else (r.m, r.act, r.v_groups)
        windows = (r.window, r.window_mode, r.head_dim)
        return (r.input_shape, windows, r.norm, r.qk_proj, r.bias, post)

    return _distinct((r for r in TABLE if r.head_dim), key)


def shrink_rows() -> list[Row]:
    """Rows whose second halves differ."""

    def key(r: Row) -> Hashable:
        return (r.n, r.m, r.o, r.output_size, r.skip, bool(r.se), bool(r.kernel))

    return _distinct(TABLE, key)


def block_rows() -> list[Row]:
    """Every row."""
    return list(TABLE)


def stem_rows() -> list[Row]:
    """The convolutions of images."""
    return list(STEMS)


def head_rows() -> list[Row]:
    """The ends of networks."""
    return list(HEADS)


VIEWS: dict[str, Callable[[], list[Row]]] = {
    "conv_norm_act": stem_rows,
    "depthwise_conv2d": depthwise_rows,
    "expand": expand_rows,
    "window_attention": attention_rows,
    "shrink": shrink_rows,
    "norm_pool_linear": head_rows,
    "irmb": block_rows,
}


# ------------------------------------------------------------------------------------------- data


def generator(row: Row, salt: str, seed: int = 0) -> torch.Generator:
    """A source of numbers of its own for every tensor of every row."""
    text = f"{row.name}/{salt}/{seed}"
    return torch.Generator().manual_seed(sum(ord(c) * 257**i for i, c in enumerate(text)) % 2**63)


def random_map(shape: tuple[int, ...], source: torch.Generator, data: str = "normal") -> Tensor:
    """An fp64 map: ``normal``; ``shifted`` with channel means of 0.5 sigma; ``offset1000``;
    ``tiny`` and ``large`` (1e-3, 30); ``constant_channels``: every third channel constant;
    ``empty``: not filled, for questions about shapes alone."""
    if data == "empty":
        return torch.empty(shape, dtype=torch.float64)
    x = torch.randn(shape, generator=source, dtype=torch.float64)
    means = torch.randn((1, shape[1], 1, 1), generator=source, dtype=torch.float64)
    if data == "shifted":
        return x + 0.5 * means
    if data == "offset1000":
        return x + 1000.0
    if data in ("tiny", "large"):
        return x * {"tiny": 1e-3, "large": 30.0}[data]
    if data == "constant_channels":
        x[:, ::3] = means[:, ::3]
    return x


def feature_map(row: Row, *, data: str = "shifted", seed: int = 0) -> Tensor:
    """The block's input, (N, C, H, W) in fp64."""
    return random_map(row.input_shape, generator(row, f"x/{data}", seed), data)


def weights(row: Row, *, data: str = "normal", qk_scale: float = 1.0, seed: int = 0) -> IRMBWeights:
    """The block's tensors in fp64: unit-gain convolutions, statistics as trained networks have.

    ``qk_scale`` sharpens the attention, which scaling the input behind a norm cannot do.
    """
    values = trained(row, row.weight_shapes(), data=data, seed=seed)
    for name in ("qk_weight", "qk_bias"):
        if name in values and data != "empty":
            values[name] = values[name] * qk_scale
    return IRMBWeights(**values)


def trained(
    row: Row, shaped: dict[str, tuple[int, ...]], *, data: str = "normal", seed: int = 0
) -> dict[str, Tensor]:
    """Tensors of these names and shapes."""
    if data == "empty":
        return {name: torch.empty(shape, dtype=torch.float64) for name, shape in shaped.items()}
    return {n: _trained(n, shape, generator(row, n, seed)) for n, shape in shaped.items()}


def _trained(name: str, shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """Numbers such as training leaves in the tensor of that name."""
    noise = torch.randn(shape, generator=source, dtype=torch.float64)
    if name.endswith("_var"):
        return 0.5 + torch.rand(shape, generator=source, dtype=torch.float64)
    if name.endswith("_mean"):
        return 0.2 * noise
    if len(shape) > 1:
        return noise / torch.Size(shape[1:]).numel() ** 0.5
    if name.endswith("_bias"):
        return 0.1 * noise
    return 1.0 + 0.2 * noise  # scales of norms, LayerScale
