"""Sum of many partial results: in two steps, so that the first has programs enough for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from emo_kernels.triton.partials import reduce_partials


def _group(rows: int) -> int:
    """Rows left by the first step, about the root of all rows; 1: one step will do."""
    return 1 << rows.bit_length() // 2 if rows >= 128 else 1


def whole_groups(rows: int) -> int:
    """``rows`` or a little more, such that :func:`reduce_tall` can take two steps.

    Example:
        >>> [whole_groups(rows) for rows in (7, 1056, 14337)]
        [7, 1056, 14464]
    """
    group = _group(rows)
    return -(-rows // group) * group


def reduce_tall(
    partials: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """:func:`reduce_partials`, with a first step where there are many rows.

    Args:
        partials: (R, ...), R best of :func:`whole_groups`.
        out_dtype, out: as there.
    """
    rows, kept = partials.shape[0], partials.dtype if out is None else out.dtype
    group = _group(rows)
    if group > 1 and rows % group == 0:
        grouped = partials.view(rows // group, group, *partials.shape[1:])
        partials = reduce_partials(grouped, torch.float64)  # rounded once, at the end
    return reduce_partials(partials, out_dtype or kept, out)
