"""How rows are cut."""

import pytest
import torch

from cupymoe.kernels.rows import row_geometry, vector_width


@pytest.mark.parametrize(
    ("dtype", "columns", "aligned", "width"),
    [
        (torch.bfloat16, 64, True, 8),
        (torch.float16, 64, True, 8),
        (torch.float32, 64, True, 4),
        (torch.bfloat16, 63, True, 1),  # rows are no whole number of packs
        (torch.bfloat16, 60, True, 1),
        (torch.float32, 60, True, 4),
        (torch.bfloat16, 64, False, 1),
    ],
)
def test_vector_width(dtype, columns, aligned, width):
    assert vector_width(dtype, columns, aligned) == width


@pytest.mark.parametrize("columns", [1, 31, 32, 352, 2816, 5000, 100_000])
@pytest.mark.parametrize("width", [1, 8])
def test_row_geometry_covers_a_row(columns, width):
    blocks, threads = row_geometry(columns, width)
    assert threads % 32 == 0
    assert threads <= 256
    assert blocks * threads * width >= columns
    assert (blocks - 1) * threads * width < columns
