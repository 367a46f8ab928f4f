"""Quantised experts as kernels read them, beside the float64 weights that they are, and turned rows of tokens."""

from typing import NamedTuple

import torch

from cupymoe.kernels.stored_weight import StoredWeight
from cupymoe.weights.format import DEPTH_MULTIPLE


class Quantised(NamedTuple):
    """One of the two weights, on the CPU or not."""

    stored: StoredWeight
    codes: torch.Tensor
    """Packed, uint8 ``[E, n, row_bytes]``."""
    values: torch.Tensor
    """float64 ``[E, n, k]``."""
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    row_scales: torch.Tensor | None = None

    def to(self, device):
        return Quantised(self.stored, *(None if part is None else part.to(device) for part in self[1:]))


def packed(codes, weight_format):
    """uint8 ``[E, n, k]``, one code a byte, as rows of words."""
    padding = -codes.shape[-1] % DEPTH_MULTIPLE
    codes = torch.nn.functional.pad(codes, (0, padding), value=weight_format.padding_code)
    of_words = codes.long().unflatten(-1, (-1, 32 // weight_format.bits))
    words = sum(
        (of_words[..., code] >> first_bit & 2**bits - 1) << place
        for code, first_bit, bits, place in weight_format.codec.fields
    )
    return torch.stack([words >> 8 * byte & 255 for byte in range(4)], -1).byte().flatten(-2)


def turned(rows):
    """Rows of tokens as the tiles of quantised weights take them: each 32 columns, 4 lines of 4 pairs, transposed."""
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 32))
    return rows.unflatten(-1, (-1, 4, 4, 2)).transpose(-3, -2).flatten(-4)


def padded(values):
    """Rows of whole 16 bytes."""
    rows = torch.nn.functional.pad(values.contiguous().view(torch.uint8), (0, -values.shape[-1] * values.itemsize % 16))
    return rows.view(values.dtype)


def random_scales(shape, dtype, largest, generator):
    """Of either sign where the dtype has signs; of 16 and 32 bits for codes whose values go up to ``largest``."""
    if dtype == torch.float8_e8m0fnu:
        return torch.randint(119, 124, shape, generator=generator, dtype=torch.uint8).view(dtype)
    if dtype == torch.float8_e4m3fn:
        return torch.rand(shape, generator=generator).to(dtype)
    return (torch.randn(shape, generator=generator) * (0.16 / largest)).to(dtype)


def random_weight(stored, num_experts, rows, depth, seed=0):
    """Every code but NaN; in every fifth row of the first expert scales of zero, where there is such a scale."""
    generator = torch.Generator().manual_seed(seed)
    its = stored.format
    codes = torch.randint(2**its.bits, (num_experts, rows, depth), generator=generator, dtype=torch.uint8)
    for code in its.nan_codes:
        codes[codes == code] = 0
    values = torch.tensor(its.values, dtype=torch.float64)[codes.long()]
    largest = values.abs().max().item()
    zeros = scales = row_scales = None
    if its.group is not None:
        group, shape = torch.arange(depth) // its.group, (num_experts, rows, its.groups(depth))
        if its.has_zeros:
            zeros = torch.randint(16, shape, generator=generator, dtype=torch.uint8)
            values -= zeros.double()[..., group]
            zeros = padded(zeros)
        scales = random_scales(shape, stored.scale_dtype, largest, generator)
        if stored.scale_dtype != torch.float8_e8m0fnu:  # which has no zero
            scales.view(torch.uint8).unflatten(-1, (-1, scales.itemsize))[0, ::5] = 0
        values *= scales.double()[..., group]
        scales = padded(scales)
    if its.has_row_scales:
        row_scales = random_scales((num_experts, rows), torch.float32, largest, generator)
        values *= row_scales.double()[..., None]
    return Quantised(stored, packed(codes, its), values, scales, zeros, row_scales)
