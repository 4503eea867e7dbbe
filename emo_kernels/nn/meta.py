"""The meta mobile block, Y = X + shrink(F(expand(X))), and the blocks that are instances of it.

The paper's induction as code: a feed-forward network, multi-head self-attention, the inverted
residual and the inverted residual mobile block differ in the expansion ratio and the operator F.
"""

from __future__ import annotations

from torch import Tensor, nn

from emo_kernels.nn.bad_input import check_integer, check_map
from emo_kernels.nn.layers import ConvNormAct, DropPath, get_norm
from emo_kernels.reference.window_attention import Windows, attend, pad_to_windows


class MetaMobileBlock(nn.Module):
    """Y = X + shrink(F(expand(norm(X)))), with widths C, M = int(C expand_ratio), C.

    Args:
        dim: channels C.
        expand_ratio: M / C.
        operator: F, a module from (N, M, H, W) to (N, M, H, W). If it has an attribute ``inputs``,
            expand makes that many maps of M channels, concatenated (attention: q, k and v). If it
            has an attribute ``reads_input`` that is true, it is called with the normalised X too.
        norm_layer: in front, ``none`` as in the equation.
        act_layer: behind the expansion.
        inner_norm: behind expand and behind shrink.
        bias, shrink_bias: of the two 1x1 convolutions.

    Example:
        >>> import torch
        >>> block = MetaMobileBlock(8, 4.0, nn.Conv2d(32, 32, 3, padding=1, groups=32))
        >>> block(torch.randn(1, 8, 5, 6)).shape
        torch.Size([1, 8, 5, 6])
    """

    def __init__(
        self,
        dim: int,
        expand_ratio: float,
        operator: nn.Module,
        *,
        norm_layer: str = "none",
        act_layer: str = "none",
        inner_norm: str = "none",
        bias: bool = True,
        shrink_bias: bool = True,
    ) -> None:
        super().__init__()
        check_integer("MetaMobileBlock", "dim", dim, 1)
        dim_mid = int(dim * expand_ratio)
        if dim_mid < 1:
            raise ValueError(
                "MetaMobileBlock: expand_ratio must give at least one channel, got "
                f"int(dim expand_ratio) = {dim_mid}"
            )
        if not isinstance(operator, nn.Module):
            raise ValueError(
                f"MetaMobileBlock: operator must be a torch.nn.Module, got {operator!r}; "
                "torch.nn.Identity() stands for none"
            )
        width = dim_mid * getattr(operator, "inputs", 1)
        self.dim = dim
        self.norm = get_norm(norm_layer, dim, "MetaMobileBlock")
        self.expand = ConvNormAct(
            dim, width, kernel_size=1, bias=bias, norm_layer=inner_norm, act_layer=act_layer
        )
        self.operator = operator
        self.shrink = ConvNormAct(
            dim_mid, dim, kernel_size=1, bias=shrink_bias, norm_layer=inner_norm, act_layer="none"
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        check_map("MetaMobileBlock", x, self.dim)
        h = self.norm(x)
        e = self.expand(h)
        reads_input = getattr(self.operator, "reads_input", False)
        y = self.operator(e, h) if reads_input else self.operator(e)
        out: Tensor = x + self.shrink(y)
        return out

    @classmethod
    def ffn(
        cls, dim: int, expand_ratio: float = 4.0, act_layer: str = "gelu", norm_layer: str = "none"
    ) -> MetaMobileBlock:
        """A two-layer perceptron on every pixel: F is the identity.

        Example:
            >>> sum(p.numel() for p in MetaMobileBlock.ffn(8).parameters())
            552
        """
        return cls(dim, expand_ratio, nn.Identity(), norm_layer=norm_layer, act_layer=act_layer)

    @classmethod
    def mhsa(
        cls, dim: int, num_heads: int = 1, bias: bool = True, norm_layer: str = "none"
    ) -> MetaMobileBlock:
        """Multi-head self-attention among all pixels: ratio 1, expand makes q, k and v.

        Example:
            >>> sum(p.numel() for p in MetaMobileBlock.mhsa(8, num_heads=2).parameters())
            288
        """
        operator = SelfAttention(dim, num_heads)
        return cls(dim, 1.0, operator, norm_layer=norm_layer, bias=bias, shrink_bias=bias)

    @classmethod
    def irb(
        cls, dim: int, expand_ratio: float = 6.0, kernel_size: int = 3, act_layer: str = "relu6"
    ) -> MetaMobileBlock:
        """The inverted residual: F is a depthwise convolution, a batch norm behind each of three.

        Example:
            >>> sum(p.numel() for p in MetaMobileBlock.irb(8).parameters())
            1408
        """
        dim_mid = int(dim * expand_ratio)
        check_integer("MetaMobileBlock", "kernel_size", kernel_size, 1)
        if kernel_size % 2 == 0:
            raise ValueError(
                f"MetaMobileBlock: kernel_size must be odd to keep the map, got {kernel_size}"
            )
        operator = ConvNormAct(
            dim_mid, dim_mid, kernel_size=kernel_size, groups=dim_mid, act_layer=act_layer
        )
        return cls(
            dim,
            expand_ratio,
            operator,
            act_layer=act_layer,
            inner_norm="bn_2d",
            bias=False,
            shrink_bias=False,
        )

    @classmethod
    def irmb(
        cls,
        dim: int,
        expand_ratio: float = 4.0,
        dim_head: int | None = None,
        window_size: int = 7,
        dw_ks: int = 5,
        norm_layer: str = "ln_2d",
        act_layer: str = "gelu",
        qkv_bias: bool = True,
    ) -> MetaMobileBlock:
        """The inverted residual mobile block: F is windowed attention, then a convolution.

        On maps that windows divide it computes what :class:`emo_kernels.nn.iRMB` does with
        ``attn_pre=False`` (which expands padded pixels, too).

        Args:
            dim, expand_ratio, window_size, dw_ks, norm_layer, act_layer, qkv_bias: as there.
            dim_head: channels of a head, ``None``: one head.

        Example:
            >>> sum(p.numel() for p in MetaMobileBlock.irmb(8).parameters())
            1568
        """
        operator = WindowAttentionConv(
            dim,
            int(dim * expand_ratio),
            dim_head=dim if dim_head is None else dim_head,
            window_size=window_size,
            dw_ks=dw_ks,
            qkv_bias=qkv_bias,
        )
        return cls(
            dim,
            expand_ratio,
            operator,
            norm_layer=norm_layer,
            act_layer=act_layer,
            bias=qkv_bias,
            shrink_bias=False,
        )


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v among all pixels of (N, 3C, H, W), channels q, k, v."""

    inputs = 3

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_integer("SelfAttention", "num_heads", num_heads, 1)
        if dim % num_heads:
            raise ValueError(
                f"SelfAttention: dim must be divisible by num_heads, got {dim} and {num_heads}"
            )
        self.dim_head = dim // num_heads

    def forward(self, qkv: Tensor) -> Tensor:
        """(N, 3C, H, W) to (N, C, H, W)."""
        q, k, v = qkv.chunk(3, dim=1)
        windows = Windows.of(qkv, 0)
        return attend(q, k, v, head_dim=self.dim_head, windows=windows, window_mode="grid")


class WindowAttentionConv(nn.Module):
    """z + SiLU(BN(DWConv(z))), z = A e, with A from h in windows: the operator of iRMB.

    Args:
        dim: channels of h.
        dim_mid: channels of e.
        dim_head: channels of a head of q and k; 0: no attention, z = e.
        window_size: side of a window in pixels; <= 0: the whole map.
        dw_ks: depthwise kernel size; 0: no convolution, the result is z.
        dilation: of the convolution, counted in its padding.
        qkv_bias: bias of the q and k projection.
    """

    reads_input = True

    def __init__(
        self,
        dim: int,
        dim_mid: int,
        *,
        dim_head: int,
        window_size: int = 7,
        dw_ks: int = 5,
        dilation: int = 1,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        self.dim_head = dim_head
        self.window_size = window_size
        if dim_head:
            if dim % dim_head or dim_mid % (dim // dim_head):
                raise ValueError(
                    "WindowAttentionConv: heads of dim_head channels must share dim and dim_mid "
                    f"evenly, got dim = {dim}, dim_mid = {dim_mid}, dim_head = {dim_head}"
                )
            self.qk = ConvNormAct(
                dim, 2 * dim, 1, bias=qkv_bias, norm_layer="none", act_layer="none"
            )
        self.conv_local: nn.Module | None = None
        if dw_ks:
            self.conv_local = ConvNormAct(
                dim_mid,
                dim_mid,
                kernel_size=dw_ks,
                dilation=dilation,
                groups=dim_mid,
                act_layer="silu",
                pad_dilation=True,
            )

    def forward(self, e: Tensor, h: Tensor) -> Tensor:
        """(N, dim_mid, H, W) and (N, dim, H, W) to (N, dim_mid, H, W)."""
        z = self._attend(e, h) if self.dim_head else e
        return z if self.conv_local is None else z + self.conv_local(z)

    def _attend(self, e: Tensor, h: Tensor) -> Tensor:
        windows = Windows.of(h, self.window_size)
        q, k = self.qk(pad_to_windows(h, windows)).chunk(2, dim=1)
        z = attend(
            q,
            k,
            pad_to_windows(e, windows),
            head_dim=self.dim_head,
            windows=windows,
            window_mode="grid",
        )
        return z[:, :, : h.shape[2], : h.shape[3]]


class MetaFormerBlock(nn.Module):
    """The two-residual rival: X + Wp F(norm(X)), then X + FFN(norm(X)).

    F is the operator of iRMB on unexpanded maps; the feed-forward network carries the expansion.

    Args:
        dim: channels.
        ffn_ratio: expansion of the feed-forward network.
        norm_layer, act_layer: in front of both halves; inside the feed-forward network.
        dw_ks, dilation, dim_head, window_size, qkv_bias: of the operator.
        attn_s: attention on.
        drop_path: rate for each half.
    """

    def __init__(
        self,
        dim: int,
        *,
        ffn_ratio: float,
        norm_layer: str = "ln_2d",
        act_layer: str = "gelu",
        dw_ks: int = 5,
        dilation: int = 1,
        dim_head: int = 32,
        window_size: int = 7,
        attn_s: bool = True,
        qkv_bias: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dim_mid = int(dim * ffn_ratio)
        self.norm1 = get_norm(norm_layer, dim, "MetaFormerBlock")
        self.operator = WindowAttentionConv(
            dim,
            dim,
            dim_head=dim_head if attn_s else 0,
            window_size=window_size,
            dw_ks=dw_ks,
            dilation=dilation,
            qkv_bias=qkv_bias,
        )
        self.proj = ConvNormAct(dim, dim, 1, norm_layer="none", act_layer="none")
        self.norm2 = get_norm(norm_layer, dim, "MetaFormerBlock")
        self.fc1 = ConvNormAct(dim, dim_mid, 1, bias=True, norm_layer="none", act_layer=act_layer)
        self.fc2 = ConvNormAct(dim_mid, dim, 1, norm_layer="none", act_layer="none")
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        h = self.norm1(x)
        x = x + self.drop_path(self.proj(self.operator(h, h)))
        out: Tensor = x + self.drop_path(self.fc2(self.fc1(self.norm2(x))))
        return out
