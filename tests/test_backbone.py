"""Dense backbones: dilation, freezing, windows, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from emo_kernels.models import create_backbone


class TestBackbone:
    @pytest.mark.parametrize("output_stride", [16, 8])
    def test_dilated_stages_sample_the_same_function(self, output_stride: int) -> None:
        """Without attention a dilated stage, taken at every other pixel, is the strided stage."""
        plain = create_backbone("emo_1m", attn_stages=False).double().eval()
        dense = create_backbone("emo_1m", attn_stages=False, output_stride=output_stride)
        dense = dense.double().eval()
        dense.load_state_dict(plain.state_dict())
        x = torch.randn(1, 3, 128, 192, dtype=torch.float64)
        assert dense.strides == [min(s, output_stride) for s in plain.strides]
        for want, got, s, t in zip(plain(x), dense(x), plain.strides, dense.strides, strict=True):
            step = s // t
            assert got.shape[2:] == (128 // t, 192 // t)
            torch.testing.assert_close(got[:, :, ::step, ::step], want, rtol=1e-10, atol=1e-10)

    def test_frozen_stages_keep_everything(self) -> None:
        backbone = create_backbone("emo_1m", frozen_stages=2)
        before = {k: v.clone() for k, v in backbone.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], 0.1)
        sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
        for name, after in backbone.state_dict().items():
            frozen = name.startswith(("stage0", "stage1", "stage2"))
            if frozen:
                assert torch.equal(after, before[name]), name
        assert not torch.equal(
            backbone.stage3[1].conv_local.norm.running_mean,
            before["stage3.1.conv_local.norm.running_mean"],
        )

    def test_runs_no_stage_behind_the_last_one_asked_for(self) -> None:
        backbone = create_backbone("emo_1m", out_indices=(3, 1)).eval()
        backbone.stage4[0].register_forward_hook(lambda *args: pytest.fail("stage4 ran"))
        maps = backbone(torch.randn(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == backbone.out_channels == [80, 32]
        assert backbone.strides == [16, 4]

    def test_default_windows(self) -> None:
        windows = {
            name: create_backbone(name, out_indices=(1,)).stage3[1].window_size
            for name in ("emo_1m", "EMO_2M", "emo_5m", "emo2_1m")
        }
        assert windows == {"emo_1m": 7, "EMO_2M": 7, "emo_5m": 16, "emo2_1m": 10}

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"out_indices": (1, 2, 4, 7)}, r"stages 0 to 4, got \(1, 2, 4, 7\)"),
            ({"out_indices": ()}, "stages 0 to 4"),
            ({"frozen_stages": 5}, "frozen_stages must be -1"),
            ({"output_stride": 4}, "8, 16 or 32, got 4"),
        ],
    )
    def test_backbone_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            create_backbone("emo_1m", **options)
