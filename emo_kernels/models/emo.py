"""EMO and EMOv2 as classifiers, with timm's conventions and without timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from emo_kernels.models.configs import EMOConfig
from emo_kernels.models.stages import EMOStages
from emo_kernels.nn.bad_input import check_integer, check_map
from emo_kernels.nn.layers import LayerNorm2d


class EMO(EMOStages):
    """Five stages, layer norm over channels, mean over pixels, linear head.

    Args:
        config: a row of the table of configurations.
        num_classes: of the head; 0: no head, the pooled features are returned.
        in_chans: channels of the image.

    Attributes:
        num_features: channels of the last stage.
        feature_info: for each stage its channels, its stride and its module's name.

    Example:
        >>> import torch
        >>> from emo_kernels.models.configs import CONFIGS
        >>> EMO(CONFIGS["emo_1m"], num_classes=10).eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, config: EMOConfig, *, num_classes: int = 1000, in_chans: int = 3) -> None:
        check_integer("EMO", "num_classes", num_classes, 0)
        check_integer("EMO", "in_chans", in_chans, 1)
        super().__init__(config, in_chans)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = config.dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stage{i}"}
            for i, (dim, stride) in enumerate(zip(self.stage_dims, self.stage_strides, strict=True))
        ]
        self.norm = LayerNorm2d(self.num_features)
        self.head = _head(self.num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised map of the last stage, (N, num_features, ceil(H / 32), ceil(W / 32))."""
        out: Tensor = self.norm(self.trunk(x))
        return out

    def trunk(self, x: Tensor) -> Tensor:
        """The map of the last stage as it leaves it, before :meth:`forward_features`' norm."""
        check_map("EMO", x, self.in_chans)
        for index in range(5):
            x = self.run_stage(index, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over pixels, then logits; with ``pre_logits`` the mean itself."""
        pooled = x.mean((2, 3))
        if pre_logits:
            return pooled
        out: Tensor = self.head(pooled)
        return out

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of stages, as timm's models give them.

        Args:
            x: (N, in_chans, H, W).
            indices: stages 0 to 4 to take (negative ones count from the end); a number n: the last
                n; ``None``: all.
            norm: normalise the last stage's map if it is taken.
            stop_early: do not compute stages behind the last one taken.
            output_fmt: only ``NCHW``.
            intermediates_only: leave out the final map.

        Returns:
            (what ``forward_features`` gives, the maps), or the maps alone.
        """
        check_map("EMO", x, self.in_chans)
        if output_fmt != "NCHW":
            raise ValueError(f"EMO: output_fmt must be 'NCHW', got {output_fmt!r}")
        taken = _stage_indices(indices)
        last = max(taken, default=-1) if stop_early else 4
        maps = {}
        for index in range(last + 1):
            x = self.run_stage(index, x)
            if index in taken:
                maps[index] = self.norm(x) if norm and index == 4 else x
        intermediates = [maps[index] for index in taken]
        if intermediates_only:
            return intermediates
        return (self.norm(x) if last == 4 else x), intermediates

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head with ``num_classes`` outputs, initialised; 0: none."""
        check_integer("EMO", "num_classes", num_classes, 0)
        if global_pool not in (None, "avg"):
            raise ValueError(f"EMO: global_pool must be 'avg' or None, got {global_pool!r}")
        weight = self.norm.norm.weight
        self.num_classes = num_classes
        self.head = _head(self.num_features, num_classes).to(weight.device, weight.dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the published optimiser exempts by name."""
        return {"token"}

    def no_weight_decay_keywords(self) -> set[str]:
        """Parameters whose names contain one of these are exempt, too (EMOv2's LayerScale)."""
        return {"alpha", "gamma", "beta"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that sort parameters into layers, for layer-wise learning rates."""
        blocks = r"^stage([1-4])" if coarse else r"^stage([1-4])\.(\d+)"
        return {"stem": r"^stage0", "blocks": [(blocks, None), (r"^norm", (99999,))]}


def _head(features: int, num_classes: int) -> nn.Module:
    """A linear layer, weights from a normal distribution of standard deviation 0.02, or nothing."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(features, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def _stage_indices(indices: int | list[int] | tuple[int, ...] | None) -> list[int]:
    """Stages 0 to 4 as they were asked for, negative ones counted from the end."""
    if indices is None:
        return list(range(5))
    if isinstance(indices, int):
        if not 1 <= indices <= 5:
            raise ValueError(f"EMO: indices must be 1 to 5 stages or a list, got {indices}")
        return list(range(5 - indices, 5))
    if not all(isinstance(i, int) and -5 <= i < 5 for i in indices):
        raise ValueError(f"EMO: indices must lie in 0 to 4 (or -5 to -1), got {list(indices)}")
    return [i % 5 for i in indices]
