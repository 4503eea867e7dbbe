"""The meta mobile block against the blocks it is said to contain."""

from __future__ import annotations

import pytest
import torch
from block_kinds import DOUBLE, randomise
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, relu6

from emo_kernels.nn import MetaMobileBlock, iRMB


class TestMetaMobileBlock:
    @pytest.mark.parametrize("heads", [1, 3])
    @pytest.mark.parametrize("bias", [True, False])
    def test_mhsa_is_torch_attention(self, heads: int, bias: bool) -> None:
        block = randomise(MetaMobileBlock.mhsa(12, num_heads=heads, bias=bias))
        attention = nn.MultiheadAttention(12, heads, bias=bias, batch_first=True).double()
        with torch.no_grad():
            attention.in_proj_weight.copy_(block.expand.conv.weight.flatten(1))
            attention.out_proj.weight.copy_(block.shrink.conv.weight.flatten(1))
            if bias:
                attention.in_proj_bias.copy_(block.expand.conv.bias)
                attention.out_proj.bias.copy_(block.shrink.conv.bias)
        x = torch.randn(2, 12, 4, 5, **DOUBLE)
        tokens = x.flatten(2).transpose(1, 2)
        want = tokens + attention(tokens, tokens, tokens, need_weights=False)[0]
        got = block(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def test_ffn_is_a_two_layer_perceptron(self) -> None:
        block = randomise(MetaMobileBlock.ffn(6, expand_ratio=4.0))
        mlp = nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6)).double()
        with torch.no_grad():
            for layer, conv in ((mlp[0], block.expand.conv), (mlp[2], block.shrink.conv)):
                layer.weight.copy_(conv.weight.flatten(1))
                layer.bias.copy_(conv.bias)
        x = torch.randn(2, 6, 3, 4, **DOUBLE)
        pixels = x.permute(0, 2, 3, 1)
        torch.testing.assert_close(block(x), (pixels + mlp(pixels)).permute(0, 3, 1, 2))

    def test_irb_is_an_inverted_residual(self) -> None:
        block = randomise(MetaMobileBlock.irb(4, expand_ratio=6.0))
        x = torch.randn(2, 4, 6, 5, **DOUBLE)

        def normalised(layer: nn.Module, y: Tensor) -> Tensor:
            n = layer.norm
            return batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-6)

        y = relu6(normalised(block.expand, conv2d(x, block.expand.conv.weight)))
        depthwise = conv2d(y, block.operator.conv.weight, padding=1, groups=24)
        y = relu6(normalised(block.operator, depthwise))
        want = x + normalised(block.shrink, conv2d(y, block.shrink.conv.weight))
        torch.testing.assert_close(block(x), want)

    @pytest.mark.parametrize("dim_head", [4, 8])
    def test_irmb_is_the_block(self, dim_head: int) -> None:
        meta = randomise(MetaMobileBlock.irmb(8, 2.0, dim_head=dim_head, window_size=3))
        block = iRMB(
            8,
            8,
            exp_ratio=2.0,
            norm_layer="ln_2d",
            act_layer="gelu",
            dw_ks=5,
            dim_head=dim_head,
            window_size=3,
            qkv_bias=True,
        )
        block = block.double().eval()
        names = {"expand.conv": "v.conv", "shrink.conv": "proj.conv", "operator.": ""}
        state = {}
        for name, tensor in meta.state_dict().items():
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            state[name] = tensor
        block.load_state_dict(state)
        x = torch.randn(2, 8, 6, 9, **DOUBLE)
        torch.testing.assert_close(meta(x), block(x), rtol=1e-12, atol=1e-12)

    def test_any_operator(self) -> None:
        block = MetaMobileBlock(4, 2.0, nn.AvgPool2d(3, 1, 1, count_include_pad=False))
        x = torch.randn(1, 4, 5, 6)
        want = x + block.shrink(block.operator(block.expand(x)))
        torch.testing.assert_close(block(x), want)
