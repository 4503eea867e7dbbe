"""The whole-block CUDA kernels: their walk on the host, everywhere, and the kernels on a GPU."""

from __future__ import annotations

import oracle
import pytest
import shapes
import torch
from cases import CASES, function
from numerics import check_operator
from shapes import Row

from emo_kernels import _C, reference
from emo_kernels.cuda import irmb as cuda
from emo_kernels.spec import IRMBWeights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HAS_GPU = torch.cuda.is_available() and _C.build_info()["cuda"]
ON_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if HAS_GPU else []
on_both = pytest.mark.parametrize("device", [pytest.param("cpu", id="walk"), *ON_GPU])


def refusal(row: Row, dtype: torch.dtype = torch.float32) -> str | None:
    case = CASES["irmb"](row, data="empty")
    tensors = {n: None if t is None else t.to(dtype) for n, t in case.tensors.items()}
    x = tensors.pop("x")
    return cuda.irmb_unsupported(x, IRMBWeights(**tensors), case.options["spec"])


ROWS = [row for row in shapes.VIEWS["irmb"]() if not row.slow and refusal(row) is None]


@on_both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_output(device: str, row: Row, dtype: str) -> None:
    check_operator(
        function("irmb", cuda.irmb),
        function("irmb", reference.irmb),
        CASES["irmb"](row),
        DTYPES[dtype],
        oracle=oracle.irmb,
        gradients=False,
        device=device,
        name="irmb",
    )
