"""The inverted residual mobile block as a module, with every switch of the published class."""

from __future__ import annotations

from torch import Tensor, nn

from emo_kernels.nn.bad_input import check_choice, check_integer, check_map, check_rate
from emo_kernels.nn.layers import ConvNormAct, DropPath, LayerScale2d, SqueezeExcite, get_norm
from emo_kernels.reference.window_attention import Windows, attend, pad_to_windows
from emo_kernels.spec import OP_ORDERS, WINDOW_MODES


class iRMB(nn.Module):
    """Inverted residual mobile block: x + Wp (u + SE(SiLU(BN(DWConv(u))))), u from attention.

    u = act(Wv h + bv) without attention; with it u = act(Wv (A h) + bv) if ``attn_pre``, else
    u = A act(Wv h + bv). h = norm(x), A = softmax(q k^T / sqrt(d)) inside windows of h. Both skips
    exist only if ``has_skip``, ``dim_in == dim_out`` and ``stride == 1``.

    Args:
        dim_in, dim_out: channels C and O.
        norm_in: normalise the input.
        has_skip: allow the two skips.
        exp_ratio: M = int(C exp_ratio) channels between the 1x1 convolutions.
        norm_layer: of the input: none, bn_2d, ln_2d, gn, in_2d.
        act_layer: behind the expansion and in squeeze-excite: none, relu, gelu, silu, ...
        v_proj: expand at all; ignored with attention.
        dw_ks: depthwise kernel size; 0: no depthwise convolution, its norm and activation, y = u.
        stride, dilation: of the depthwise convolution. Its padding is ceil((k - s) / 2).
        se_ratio: squeeze-excite with round(M se_ratio) channels; 0: none.
        dim_head: channels d of one attention head.
        window_size: side of a window in pixels; <= 0: the whole map.
        attn_s: attention on.
        qkv_bias: biases of the qk and v convolutions.
        attn_drop, drop, drop_path: rates of dropout on A, on the projection's input, and of
            dropping the block for a sample (only with skips).
        v_group: the v convolution has one group for each head; ignored without attention.
        attn_pre: attention before the expansion (the released EMO) or behind it.
        window_mode: ``grid`` (strided, as published), ``block`` (contiguous) or ``both`` (summed).
        qk_proj: learn q and k; False: q = k = h, as the paper writes it.
        op_order: ``attn_conv`` as published; ``conv_attn``: the depthwise convolution first, then
            attention over its M-channel output (``attn_pre`` has no meaning then).
        ls_value: initial LayerScale behind the projection; 0: none.
        pad_dilation: count dilation in the padding, so that the map keeps its size.

    Raises:
        ValueError: switches that no block can have, or at forward an input that does not fit.

    Example:
        >>> import torch
        >>> block = iRMB(16, 16, exp_ratio=2.0, dim_head=8, act_layer="gelu", norm_layer="ln_2d")
        >>> block(torch.randn(1, 16, 9, 10)).shape
        torch.Size([1, 16, 9, 10])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        norm_in: bool = True,
        has_skip: bool = True,
        exp_ratio: float = 1.0,
        norm_layer: str = "bn_2d",
        act_layer: str = "relu",
        v_proj: bool = True,
        dw_ks: int = 3,
        stride: int = 1,
        dilation: int = 1,
        se_ratio: float = 0.0,
        dim_head: int = 64,
        window_size: int = 7,
        attn_s: bool = True,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        v_group: bool = False,
        attn_pre: bool = False,
        window_mode: str = "grid",
        qk_proj: bool = True,
        op_order: str = "attn_conv",
        ls_value: float = 0.0,
        pad_dilation: bool = False,
    ) -> None:
        super().__init__()
        check_integer("iRMB", "dim_in", dim_in, 1)
        check_integer("iRMB", "dim_out", dim_out, 1)
        dim_mid = int(dim_in * exp_ratio)
        self.dim_in = dim_in
        self.dim_head = dim_head
        self.num_head = _count_heads(dim_in, dim_head) if attn_s else 0
        self.window_size = window_size
        self.window_mode = window_mode
        self.attn_s = attn_s
        self.attn_pre = attn_pre
        self.v_group = v_group
        self.qk_proj = qk_proj
        self.op_order = op_order
        self.has_skip = has_skip and dim_in == dim_out and stride == 1
        self._check_switches(dim_mid, v_proj, dw_ks, stride, se_ratio, window_size)

        self.norm = get_norm(norm_layer, dim_in, "iRMB") if norm_in else nn.Identity()
        if attn_s:
            self._add_attention(qkv_bias, attn_drop)
        self.v: nn.Module = nn.Identity()
        if attn_s or v_proj:
            groups = self.num_head if attn_s and v_group else 1
            self.v = _pointwise(dim_in, dim_mid, groups, qkv_bias, act_layer)
        local = (dim_mid, dw_ks, stride, dilation, pad_dilation)
        self.conv_local: nn.Module = self._make_local(*local) if dw_ks else nn.Identity()
        squeeze = (dim_mid, round(dim_mid * se_ratio), act_layer)
        self.se: nn.Module = SqueezeExcite(*squeeze) if se_ratio else nn.Identity()
        self.proj_drop = nn.Dropout(_rate("drop", drop))
        self.proj = _pointwise(dim_mid, dim_out)
        self.ls = LayerScale2d(dim_out, ls_value) if ls_value else nn.Identity()
        drops = _rate("drop_path", drop_path) > 0 and self.has_skip
        self.drop_path = DropPath(drop_path) if drops else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        check_map("iRMB", x, self.dim_in, getattr(self.proj.conv, "weight", None))
        h = self.norm(x)
        if self.op_order == "attn_conv":
            y = self._local(self._attend_and_expand(h))
        else:
            y = self._attend_over(h, self._local(self.v(h)))
        out: Tensor = self.ls(self.proj(self.proj_drop(y)))
        return x + self.drop_path(out) if self.has_skip else out

    def _attend_and_expand(self, h: Tensor) -> Tensor:
        """u, (N, M, H, W)."""
        if not self.attn_s:
            u: Tensor = self.v(h)
        elif self.attn_pre:
            u = self.v(self._attend_over(h, h))
        else:
            windows = Windows.of(h, self.window_size)
            padded = pad_to_windows(h, windows)
            u = self._attend(padded, self.v(padded), windows)[:, :, : h.shape[2], : h.shape[3]]
        return u

    def _attend_over(self, h: Tensor, value: Tensor) -> Tensor:
        """A value, with A from h."""
        if not self.attn_s:
            return value
        windows = Windows.of(h, self.window_size)
        padded = pad_to_windows(h, windows)
        value = padded if value is h else pad_to_windows(value, windows)
        return self._attend(padded, value, windows)[:, :, : h.shape[2], : h.shape[3]]

    def _attend(self, h: Tensor, value: Tensor, windows: Windows) -> Tensor:
        """A value on padded maps."""
        q, k = self.qk(h).chunk(2, dim=1) if self.qk_proj else (h, h)
        return attend(
            q,
            k,
            value,
            head_dim=self.dim_head,
            windows=windows,
            window_mode=self.window_mode,
            dropout=self.attn_drop,
        )

    def _local(self, u: Tensor) -> Tensor:
        """u + SE(SiLU(BN(DWConv(u)))), the first term with skips only."""
        if isinstance(self.conv_local, nn.Identity):
            return u
        c: Tensor = self.se(self.conv_local(u))
        return u + c if self.has_skip else c

    def _add_attention(self, qkv_bias: bool, attn_drop: float) -> None:
        """What makes A from h."""
        self.scale = self.dim_head**-0.5
        if self.qk_proj:
            self.qk = _pointwise(self.dim_in, 2 * self.dim_in, bias=qkv_bias)
        self.attn_drop = nn.Dropout(_rate("attn_drop", attn_drop))

    def _make_local(
        self, dim_mid: int, dw_ks: int, stride: int, dilation: int, pad_dilation: bool
    ) -> ConvNormAct:
        """SiLU(BN(DWConv)), of these kinds whatever the switches; the skips need the map's size."""
        layer = ConvNormAct(
            dim_mid,
            dim_mid,
            kernel_size=dw_ks,
            stride=stride,
            dilation=dilation,
            groups=dim_mid,
            norm_layer="bn_2d",
            act_layer="silu",
            pad_dilation=pad_dilation,
        )
        grown = 2 * int(layer.conv.padding[0]) - dilation * (dw_ks - 1)
        if self.has_skip and grown:
            raise ValueError(
                f"iRMB: dw_ks = {dw_ks} with dilation = {dilation} changes the map's sides by "
                f"{grown} pixels, which a block with skips cannot add up; set has_skip to False, "
                "an odd dw_ks, or pad_dilation to True"
            )
        return layer

    def _check_switches(
        self,
        dim_mid: int,
        v_proj: bool,
        dw_ks: int,
        stride: int,
        se_ratio: float,
        window_size: int,
    ) -> None:
        """Refuse what no block can have."""
        check_choice("iRMB", "window_mode", self.window_mode, WINDOW_MODES)
        check_choice("iRMB", "op_order", self.op_order, OP_ORDERS)
        check_integer("iRMB", "dw_ks", dw_ks, 0)
        check_integer("iRMB", "stride", stride, 1)
        if dim_mid < 1:
            raise ValueError(
                f"iRMB: exp_ratio must give at least one channel, got int(C exp_ratio) = {dim_mid}"
            )
        if not isinstance(window_size, int):
            raise ValueError(f"iRMB: window_size must be an integer, got {window_size!r}")
        if se_ratio < 0 or (se_ratio > 0 and round(dim_mid * se_ratio) < 1):
            raise ValueError(
                f"iRMB: se_ratio must be 0 or give at least one channel of M = {dim_mid}, "
                f"got {se_ratio!r}"
            )
        if dw_ks == 0 and (stride > 1 or se_ratio > 0):
            raise ValueError(
                "iRMB: without a depthwise convolution (dw_ks = 0) there is nothing to stride or "
                f"to squeeze, got stride = {stride}, se_ratio = {se_ratio}; set dw_ks, or stride "
                "to 1 and se_ratio to 0"
            )
        if not self.attn_s and not v_proj and dim_mid != self.dim_in:
            raise ValueError(
                f"iRMB: without expansion (v_proj = False) M must equal dim_in = {self.dim_in}, "
                f"got {dim_mid}; set exp_ratio to 1"
            )
        if self.attn_s:
            self._check_heads(dim_mid, stride)

    def _check_heads(self, dim_mid: int, stride: int) -> None:
        """The heads share the expanded channels evenly where they must."""
        behind = self.op_order == "conv_attn"
        if behind and stride > 1:
            raise ValueError(
                "iRMB: attention behind the depthwise convolution (op_order = 'conv_attn') needs "
                f"stride 1, got {stride}; set attn_s to False in a block that strides"
            )
        if dim_mid % self.num_head and (behind or self.v_group or not self.attn_pre):
            raise ValueError(
                f"iRMB: the M = {dim_mid} expanded channels must be divisible by the "
                f"{self.num_head} heads (dim_in / dim_head) where attention acts on them "
                "(attn_pre = False, v_group = True or op_order = 'conv_attn'); change exp_ratio "
                "or dim_head, or set attn_pre to True"
            )


def _pointwise(
    dim_in: int, dim_out: int, groups: int = 1, bias: bool = False, act_layer: str = "none"
) -> ConvNormAct:
    """A 1x1 convolution without norm."""
    return ConvNormAct(
        dim_in,
        dim_out,
        kernel_size=1,
        groups=groups,
        bias=bias,
        norm_layer="none",
        act_layer=act_layer,
    )


def _count_heads(dim_in: int, dim_head: int) -> int:
    check_integer("iRMB", "dim_head", dim_head, 1)
    if dim_in % dim_head:
        divisors = [d for d in range(1, dim_in + 1) if dim_in % d == 0]
        near = min(divisors, key=lambda d: abs(d - dim_head))
        raise ValueError(
            f"iRMB: dim_in must be divisible by dim_head, got dim_in = {dim_in}, "
            f"dim_head = {dim_head}; the nearest divisor is {near}"
        )
    return dim_in // dim_head


def _rate(argument: str, value: float) -> float:
    check_rate("iRMB", argument, value)
    return value
