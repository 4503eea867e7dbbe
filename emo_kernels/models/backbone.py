"""EMO as the backbone of detectors and segmentation networks: a list of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from emo_kernels.models.configs import EMOConfig
from emo_kernels.models.stages import EMOStages
from emo_kernels.nn.bad_input import check_map


class EMOBackbone(EMOStages):
    """Stages without norm and head; maps as they leave the stages, not normalised.

    Args:
        config: a row of the table of configurations.
        in_chans: channels of the image.
        out_indices: stages whose maps are returned, 0 to 4.
        frozen_stages: stages 0 to this one keep weights and statistics; -1: none.
        norm_eval: all batch norms keep their statistics in training, too.
        output_stride: 32, 16 or 8; see :class:`EMOStages`.

    Attributes:
        out_channels, strides: of the returned maps, in their order.
    """

    def __init__(
        self,
        config: EMOConfig,
        *,
        in_chans: int = 3,
        out_indices: Sequence[int] = (1, 2, 3, 4),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        output_stride: int = 32,
    ) -> None:
        indices = tuple(out_indices)
        if not indices or not all(type(i) is int and 0 <= i <= 4 for i in indices):
            raise ValueError(
                f"create_backbone: out_indices must name stages 0 to 4, got {out_indices!r}; "
                "their strides are 2, 4, 8, 16 and 32"
            )
        if type(frozen_stages) is not int or not -1 <= frozen_stages <= 4:
            raise ValueError(
                "create_backbone: frozen_stages must be -1 (none) or the last of the stages 0 to "
                f"4 to freeze, got {frozen_stages!r}"
            )
        super().__init__(config, in_chans, output_stride)
        self.out_indices = indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.out_channels = [self.stage_dims[i] for i in indices]
        self.strides = [self.stage_strides[i] for i in indices]
        self.train()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in_chans, H, W) to one map for each of ``out_indices``."""
        check_map("EMOBackbone", x, self.in_chans)
        maps = []
        for index in range(max(self.out_indices) + 1):
            x = self.run_stage(index, x)
            maps.append(x)
        return [maps[index] for index in self.out_indices]

    def train(self, mode: bool = True) -> EMOBackbone:
        """Training mode for what is not frozen; returns the backbone."""
        super().train(mode)
        for stage in self.stages[: self.frozen_stages + 1]:
            stage.eval()
            stage.requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
