"""Every row of the dtype table against torch.finfo."""

import pytest
import torch

from qwen_precision.dtypes import DTYPES, largest


@pytest.mark.parametrize("name", DTYPES)
def test_every_number_equals_torch_finfo(name: str) -> None:
    row = DTYPES[name]
    info = torch.finfo(getattr(torch, row.torch_name))
    assert (row.max, row.smallest_normal, row.eps, row.bytes * 8) == (
        info.max,
        info.smallest_normal,
        info.eps,
        info.bits,
    )
    assert row.smallest_subnormal == info.smallest_normal * info.eps
    dtype = getattr(torch, row.torch_name)
    assert torch.tensor(row.smallest_subnormal, dtype=torch.float64).to(dtype) > 0
    assert torch.tensor(row.smallest_subnormal / 2, dtype=torch.float64).to(dtype) == 0


def test_fp64_is_known_as_a_wider_format() -> None:
    assert largest("fp64") == torch.finfo(torch.float64).max
