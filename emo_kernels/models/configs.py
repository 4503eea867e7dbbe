"""The table of configurations: one row for each published model, one field for each choice."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_args, get_origin, get_type_hints

from emo_kernels.nn.bad_input import check_choice, unknown_name

Ints4 = tuple[int, int, int, int]
Floats4 = tuple[float, float, float, float]
Bools4 = tuple[bool, bool, bool, bool]
Names4 = tuple[str, str, str, str]

_BLOCKS = ("irmb", "metaformer")
_STEMS = ("emo", "emo2")


@dataclass(frozen=True)
class EMOConfig:
    """One model. Fields of four values are for stages 1 to 4; a single value serves all four.

    Attributes:
        depths: blocks, the first of each stage halves the map.
        dims: channels.
        exp_ratios: expansion of the blocks; the first block of a stage expands its input twice
            as much.
        dim_heads: channels of an attention head.
        drop_path_rate: rate of the last block; it rises linearly from 0 at the first.
        stem_dim: channels of stage 0.
        stem: ``emo`` (convolution, then a block with squeeze-excite) or ``emo2`` (SiLU behind the
            convolution, no squeeze-excite).
        norm_layers, act_layers, dw_kss: of the blocks, as :class:`emo_kernels.nn.iRMB` takes them.
        window_sizes: sides of the attention windows; <= 0: the whole map.
        attn_stages: stages whose blocks, but for the first, have attention.
        qkv_bias, attn_pre, v_group, window_mode, qk_proj, op_order: as in the block.
        attn_drop, drop: rates of dropout.
        ls_value: initial LayerScale, 0: none.
        dw_conv: depthwise convolution in the blocks that keep the map's size.
        pad_dilation: count dilation in the padding of the depthwise convolutions.
        block: ``irmb`` or ``metaformer``: two residual halves, mixer and feed-forward.
    """

    depths: Ints4
    dims: Ints4
    exp_ratios: Floats4
    dim_heads: Ints4
    drop_path_rate: float = 0.05
    stem_dim: int = 24
    stem: str = "emo"
    norm_layers: Names4 = ("bn_2d", "bn_2d", "ln_2d", "ln_2d")
    act_layers: Names4 = ("silu", "silu", "gelu", "gelu")
    dw_kss: Ints4 = (3, 3, 5, 5)
    window_sizes: Ints4 = (7, 7, 7, 7)
    attn_stages: Bools4 = (False, False, True, True)
    qkv_bias: bool = True
    attn_pre: bool = True
    v_group: bool = False
    window_mode: str = "grid"
    qk_proj: bool = True
    op_order: str = "attn_conv"
    attn_drop: float = 0.0
    drop: float = 0.0
    ls_value: float = 0.0
    dw_conv: bool = True
    pad_dilation: bool = False
    block: str = "irmb"

    def override(self, **overrides: Any) -> EMOConfig:
        """This row with other fields; a single value stands for four equal ones.

        Raises:
            ValueError: no such field, or a value of another kind than the field's.

        Example:
            >>> CONFIGS["emo_5m"].override(window_sizes=10).window_sizes
            (10, 10, 10, 10)
        """
        kinds = get_type_hints(EMOConfig)
        values = {}
        for name, value in overrides.items():
            if name not in kinds:
                raise unknown_name("EMOConfig", "field", name, kinds)
            values[name] = _fit(name, value, kinds[name])
        config = replace(self, **values)
        check_choice("EMOConfig", "block", config.block, _BLOCKS)
        check_choice("EMOConfig", "stem", config.stem, _STEMS)
        return config


def _fit(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the field's kind, spread over four stages where the field has four."""
    if get_origin(kind) is not tuple:
        return _scalar(name, value, kind)
    if not isinstance(value, (list, tuple)):
        value = (value,) * 4
    if len(value) != 4:
        raise ValueError(
            f"EMOConfig: {name} must be one value or four, for stages 1 to 4, got {value!r}"
        )
    return tuple(_scalar(name, item, get_args(kind)[0]) for item in value)


def _scalar(name: str, value: Any, kind: type) -> Any:
    """``value`` if it is of the kind; integers pass for floats, nothing else for anything."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"EMOConfig: {name} must be of {kind.__name__}, got {value!r}")
    return value


def field_names() -> list[str]:
    """The fields that :meth:`EMOConfig.override` takes."""
    return [field.name for field in fields(EMOConfig)]


def _emo2(
    depths: Ints4, dims: Ints4, dim_heads: Ints4, exp_ratios: Floats4, drop_path_rate: float
) -> EMOConfig:
    """A row of EMOv2: spanning attention over the expanded map, LayerScale, 5x5 everywhere."""
    return EMOConfig(
        depths=depths,
        dims=dims,
        exp_ratios=exp_ratios,
        dim_heads=dim_heads,
        drop_path_rate=drop_path_rate,
        stem_dim=dims[0] // 2,
        stem="emo2",
        dw_kss=(5, 5, 5, 5),
        attn_pre=False,
        window_mode="both",
        ls_value=1e-6,
        pad_dilation=True,
    )


CONFIGS: dict[str, EMOConfig] = {
    "emo_1m": EMOConfig(
        depths=(2, 2, 8, 3),
        dims=(32, 48, 80, 168),
        exp_ratios=(2.0, 2.5, 3.0, 3.5),
        dim_heads=(16, 16, 20, 21),
        drop_path_rate=0.04036,
    ),
    "emo_2m": EMOConfig(
        depths=(3, 3, 9, 3),
        dims=(32, 48, 120, 200),
        exp_ratios=(2.0, 2.5, 3.0, 3.5),
        dim_heads=(16, 16, 20, 20),
    ),
    "emo_5m": EMOConfig(
        depths=(3, 3, 9, 3),
        dims=(48, 72, 160, 288),
        exp_ratios=(2.0, 3.0, 4.0, 4.0),
        dim_heads=(24, 24, 32, 32),
    ),
    "emo_6m": EMOConfig(
        depths=(3, 3, 9, 3),
        dims=(48, 72, 160, 320),
        exp_ratios=(2.0, 3.0, 4.0, 5.0),
        dim_heads=(16, 24, 20, 32),
    ),
    "emo2_1m": _emo2(
        (2, 2, 8, 3), (32, 48, 80, 180), (16, 16, 20, 20), (2.0, 2.5, 3.0, 3.5), 0.04036
    ),
    "emo2_2m": _emo2(
        (3, 3, 9, 3), (32, 48, 120, 200), (16, 16, 20, 20), (2.0, 2.5, 3.0, 3.5), 0.05
    ),
    "emo2_5m": _emo2(
        (3, 3, 9, 3), (48, 72, 160, 288), (16, 24, 32, 32), (2.0, 3.0, 4.0, 4.0), 0.05
    ),
    "emo2_20m": _emo2(
        (3, 3, 13, 3), (64, 128, 320, 448), (16, 32, 32, 32), (2.0, 3.0, 4.0, 4.0), 0.1
    ),
    "emo2_50m": _emo2(
        (5, 8, 20, 7), (64, 128, 384, 512), (16, 32, 32, 32), (2.0, 3.0, 4.0, 4.0), 0.2
    ),
}

# The ablations of the paper as overrides: create_model("emo_5m", **ABLATIONS["dw_only"]).
ABLATIONS: dict[str, dict[str, Any]] = {
    "neither": {"attn_stages": False, "dw_conv": False},
    "dw_only": {"attn_stages": False},
    "ew_only": {"dw_conv": False},
    "both": {},
    "swapped": {"op_order": "conv_attn"},
    "qkx": {"qk_proj": False},
    "post": {"attn_pre": False},
    "metaformer": {"block": "metaformer"},
}

# Window sides of the published detection and segmentation backbones; see create_backbone.
DENSE_WINDOW_SIZES: dict[str, int] = {
    "emo_1m": 7,
    "emo_2m": 7,
    "emo_5m": 16,
    "emo_6m": 16,
    "emo2_1m": 10,
    "emo2_2m": 10,
    "emo2_5m": 10,
    "emo2_20m": 10,
    "emo2_50m": 10,
}
