"""dequantize.cu against the same in torch: the same bits."""

import pytest
import torch

from cupymoe.kernels.dequantize import dequantize
from cupymoe.weights import FORMATS
from cupymoe.weights.dequantize import some_of
from tests.helpers import DTYPES, poison_free_memory
from tests.weights.helpers import random_weight

SIZES = [(name, k) for name in FORMATS for k in (2 * (FORMATS[name].group or 32), 6 * (FORMATS[name].group or 32))]
SIZES += [
    ("int8", 41),
    ("fp8", 23),
    ("fp8_g128", 200),
    ("fp8_g128", 97),
    ("int4_g32", 704),
    ("nvfp4", 2816),
    ("nf4", 704),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "k"), SIZES)
def test_the_bits_are_torchs(name, k, dtype):
    for scale_dtype in FORMATS[name].scale_dtypes or (None,):
        weight = random_weight(name, 5, 37, k, scale_dtype)
        expected = weight.dequantize(dtype)
        buffers = weight.cuda().tensors()
        poison_free_memory()
        output = dequantize(weight.format, k, buffers, dtype)
        assert torch.equal(output.cpu(), expected)
        some = slice(2, 4)
        assert torch.equal(dequantize(weight.format, k, some_of(buffers, some), dtype).cpu(), expected[some])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_every_scale_of_8_bits(name):
    format, last = FORMATS[name], 127 if name == "nvfp4" else 255
    weight = random_weight(name, 2, 3, last * format.group)
    scales = torch.arange(last, dtype=torch.uint8).view(format.scale_dtypes[0])
    weight.scales.view(torch.uint8)[..., :last] = scales.view(torch.uint8)
    expected = weight.dequantize(torch.float32)
    assert torch.equal(dequantize(format, weight.shape[2], weight.cuda().tensors(), torch.float32).cpu(), expected)
