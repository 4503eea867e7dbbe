"""The table of shapes holds what it says: the published layers, and every corner by name."""

from __future__ import annotations

import pytest
import shapes
import torch

# Parameters of stages 0 to 4 as counted in the published models, and their depths. The stem
# convolution and its norm (3 * 24 * 9 + 24 + 48) are no block and taken off stage 0.
STEM_CONVOLUTION = 720
PUBLISHED = {
    "1m": ((2760, 11504, 27840, 452704, 697024), (2, 2, 8, 3)),
    "2m": ((2760, 16432, 40896, 1062624, 1053360), (3, 3, 9, 3)),
    "5m": ((2760, 29040, 105792, 2346384, 2335296), (3, 3, 9, 3)),
    "6m": ((2760, 29040, 105792, 2346384, 3362880), (3, 3, 9, 3)),
}


def parameters(name: str) -> int:
    named = shapes.rows(name)[0].weight_shapes().items()
    return sum(
        torch.Size(shape).numel() for key, shape in named if not key.endswith(("_mean", "_var"))
    )


@pytest.mark.parametrize("model", PUBLISHED)
def test_official_rows_have_the_published_parameters(model: str) -> None:
    counts, depths = PUBLISHED[model]
    assert parameters(f"{model}_stage0") == counts[0] - STEM_CONVOLUTION
    for stage, depth in enumerate(depths, start=1):
        repeated = (depth - 1) * parameters(f"{model}_stage{stage}")
        assert parameters(f"{model}_stage{stage}_down") + repeated == counts[stage], stage


def test_every_view_keeps_the_corners() -> None:
    """Each operator's rows contain batch 0, one pixel, C = 21, H < window, odd and narrow maps."""
    for stem, view in shapes.VIEWS.items():
        rows = view()
        assert len({row.name for row in rows}) == len(rows)
        assert any(row.n == 0 for row in rows), stem
        assert any(row.h == row.w == 1 for row in rows), stem
        assert any(row.c == 21 for row in rows), stem
        assert any(row.h != row.w for row in rows), stem
        if stem not in ("window_attention", "conv_norm_act", "norm_pool_linear"):
            assert any(row.m in (588, 700) for row in rows), stem
    assert any(row.h < row.window for row in shapes.attention_rows())
    assert {row.name for row in shapes.block_rows()} == {row.name for row in shapes.TABLE}


def test_weights_and_inputs_are_reproducible_and_fit_their_shapes() -> None:
    for row in shapes.rows("5m_stage1_small", "ragged_c21", "excite_with_skip", "v2_5m_stage3"):
        first, again, other = (dict(shapes.weights(row, seed=s).present()) for s in (0, 0, 1))
        assert {n: tuple(t.shape) for n, t in first.items()} == row.weight_shapes()
        assert all(torch.equal(first[n], again[n]) for n in first)
        assert not any(torch.equal(first[n], other[n]) for n in first)
        x = shapes.feature_map(row)
        assert tuple(x.shape) == row.input_shape and torch.equal(x, shapes.feature_map(row))
