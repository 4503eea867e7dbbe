"""A block as other code bases paste it: the published names, internals of their own.

Nothing here comes from emo_kernels; `accelerate` has to recognise it by structure alone. Windows
are cut with the explicit two-step reshape that einops patterns spell out.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

NORMS = {
    "none": lambda c: nn.Identity(),
    "bn_2d": lambda c: nn.BatchNorm2d(c, eps=1e-6),
    "ln_2d": lambda c: LayerNorm2d(c, eps=1e-6),
}
ACTS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class LayerNorm2d(nn.Module):
    def __init__(self, normalized_shape, eps=1e-6):
        super().__init__()
        self.norm = nn.LayerNorm(normalized_shape, eps)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2).contiguous()


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        mask = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.drop_prob)
        return x * mask.div_(1 - self.drop_prob)


class SqueezeExcite(nn.Module):
    def __init__(self, channels, rd_ratio, act_layer):
        super().__init__()
        reduced = round(channels * rd_ratio)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act1 = act_layer()
        self.conv_expand = nn.Conv2d(reduced, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.conv_expand(self.act1(self.conv_reduce(s))))


class ConvNormAct(nn.Module):
    def __init__(
        self, c_in, c_out, k, stride=1, dilation=1, groups=1, bias=False, norm="none", act="none"
    ):
        super().__init__()
        padding = math.ceil((k - stride) / 2)
        self.conv = nn.Conv2d(c_in, c_out, k, stride, padding, dilation, groups, bias)
        self.norm = NORMS[norm](c_out)
        self.act = ACTS[act]()

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class InvertedBlock(nn.Module):
    """Under another name than the published class, with its children and attributes."""

    def __init__(
        self, dim_in, dim_out, norm_in=True, has_skip=True, exp_ratio=1.0, norm_layer="bn_2d",
        act_layer="relu", v_proj=True, dw_ks=3, stride=1, dilation=1, se_ratio=0.0, dim_head=64,
        window_size=7, attn_s=True, qkv_bias=False, attn_drop=0.0, drop=0.0, drop_path=0.0,
        v_group=False, attn_pre=False,
    ):  # fmt: skip
        super().__init__()
        self.norm = NORMS[norm_layer](dim_in) if norm_in else nn.Identity()
        dim_mid = int(dim_in * exp_ratio)
        self.has_skip = (dim_in == dim_out and stride == 1) and has_skip
        self.attn_s = attn_s
        if attn_s:
            assert dim_in % dim_head == 0
            self.dim_head, self.window_size = dim_head, window_size
            self.num_head, self.scale = dim_in // dim_head, dim_head**-0.5
            self.attn_pre = attn_pre
            groups = self.num_head if v_group else 1
            self.qk = ConvNormAct(dim_in, 2 * dim_in, 1, bias=qkv_bias)
            self.v = ConvNormAct(dim_in, dim_mid, 1, groups=groups, bias=qkv_bias, act=act_layer)
            self.attn_drop = nn.Dropout(attn_drop)
        elif v_proj:
            self.v = ConvNormAct(dim_in, dim_mid, 1, bias=qkv_bias, act=act_layer)
        else:
            self.v = nn.Identity()
        self.conv_local = ConvNormAct(
            dim_mid, dim_mid, dw_ks, stride, dilation, groups=dim_mid, norm="bn_2d", act="silu"
        )
        has_se = se_ratio > 0
        self.se = SqueezeExcite(dim_mid, se_ratio, ACTS[act_layer]) if has_se else nn.Identity()
        self.proj_drop = nn.Dropout(drop)
        self.proj = ConvNormAct(dim_mid, dim_out, 1)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def attend(self, x):
        b, c, h, w = x.shape
        wh, ww = (self.window_size, self.window_size) if self.window_size > 0 else (h, w)
        x = F.pad(x, (0, -w % ww, 0, -h % wh))
        n1, n2 = x.shape[2] // wh, x.shape[3] // ww
        # b c (h1 n1) (w1 n2) -> (b n1 n2) c h1 w1
        x = x.reshape(b, c, wh, n1, ww, n2).permute(0, 3, 5, 1, 2, 4)
        x = x.reshape(b * n1 * n2, c, wh, ww).contiguous()
        heads = self.num_head
        # b (qk heads dim) h w -> qk b heads (h w) dim
        qk = self.qk(x).reshape(-1, 2, heads, self.dim_head, wh * ww).permute(1, 0, 2, 4, 3)
        scores = (qk[0] @ qk[1].transpose(-2, -1)) * self.scale
        weights = self.attn_drop(scores.softmax(dim=-1))
        values = x if self.attn_pre else self.v(x)
        values = values.reshape(x.shape[0], heads, -1, wh * ww).transpose(-2, -1)
        z = (weights @ values).transpose(-2, -1).reshape(x.shape[0], -1, wh, ww).contiguous()
        z = self.v(z) if self.attn_pre else z
        # (b n1 n2) c h1 w1 -> b c (h1 n1) (w1 n2)
        z = z.reshape(b, n1, n2, -1, wh, ww).permute(0, 3, 4, 1, 5, 2)
        return z.reshape(b, -1, wh * n1, ww * n2)[:, :, :h, :w].contiguous()

    def forward(self, x):
        shortcut = x
        x = self.norm(x)
        x = self.attend(x) if self.attn_s else self.v(x)
        x = x + self.se(self.conv_local(x)) if self.has_skip else self.se(self.conv_local(x))
        x = self.proj(self.proj_drop(x))
        return shortcut + self.drop_path(x) if self.has_skip else x


class SubclassedBlock(InvertedBlock):
    """A subclass that changes nothing."""


class ContiguousBlock(InvertedBlock):
    """A subclass that looks the same and computes something else: contiguous windows."""

    def attend(self, x):
        b, c, h, w = x.shape
        tile = self.window_size
        x = F.pad(x, (0, -w % tile, 0, -h % tile))
        rows = [r.split(tile, dim=3) for r in x.split(tile, dim=2)]
        out = [torch.cat([super(ContiguousBlock, self).attend(t) for t in r], 3) for r in rows]
        return torch.cat(out, 2)[:, :, :h, :w]


class PastedBackbone(nn.Module):
    """Four blocks of every kind in a nest of modules, as a detector would hold them."""

    def __init__(self, block=InvertedBlock):
        super().__init__()
        common = {"qkv_bias": True, "attn_pre": True}
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2, 1),
            block(12, 12, norm_in=False, has_skip=False, v_proj=False, se_ratio=1.0,
                  act_layer="silu", attn_s=False),
        )  # fmt: skip
        self.stages = nn.ModuleList(
            [
                block(12, 16, exp_ratio=4, act_layer="silu", stride=2, attn_s=False, **common),
                block(16, 16, exp_ratio=2.5, act_layer="silu", attn_s=False, **common),
                block(16, 16, exp_ratio=3, norm_layer="ln_2d", act_layer="gelu", dw_ks=5,
                      dim_head=8, drop_path=0.1, **common),
            ]
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))
