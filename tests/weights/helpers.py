"""Random weights of every format, and the formats' definitions once more, in numpy and by other formulas."""

import numpy as np
import torch

from cupymoe.weights import FORMATS, QuantizedWeight

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070983824729919, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _float(code, exponent_bits, mantissa_bits, bias):
    """An OCP float without infinities."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    return sign * (mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))


def value(codes, code):
    """Of one code, as a Python float."""
    if codes == "int4":
        return code - 8.0
    if codes == "int8":
        return float(np.array(code, np.uint8).view(np.int8))
    if codes == "e2m1":
        return _float(code, 2, 1, 1)
    if codes == "e4m3":
        return float("nan") if code & 127 == 127 else _float(code, 4, 3, 7)
    return float(np.float32(NF4[code]))


def factors_of(name, num_experts, rows, k, scale_dtype=None):
    """Random scales, zeros and row_scales, as QuantizedWeight.of takes them."""
    format = FORMATS[name]
    groups = format.groups(k)
    factors = {}
    if groups:
        dtype = scale_dtype or format.scale_dtypes[0]
        if dtype == torch.float8_e8m0fnu:
            factors["scales"] = torch.randint(115, 125, (num_experts, rows, groups), dtype=torch.uint8).view(dtype)
        else:
            scales = torch.rand(num_experts, rows, groups) * 0.02 + 0.002
            if name.startswith("int4"):
                scales *= torch.randint(0, 2, scales.shape) * 2 - 1
            factors["scales"] = (scales * 100 if name == "nvfp4" else scales).to(dtype)
    if format.has_zeros:
        factors["zeros"] = torch.randint(0, 16, (num_experts, rows, groups), dtype=torch.uint8)
    if format.has_row_scales:
        factors["row_scales"] = torch.rand(num_experts, rows) * 0.01 + 0.001
    return factors


def codes_of(name, num_experts, rows, k):
    """Random codes, none of them NaN."""
    format = FORMATS[name]
    codes = torch.randint(0, 2**format.bits, (num_experts, rows, k), dtype=torch.uint8)
    for nan in format.nan_codes:
        codes[codes == nan] = 1
    return codes


def random_weight(name, num_experts=2, rows=6, k=None, scale_dtype=None):
    """A weight of a format, of a depth that its groups divide."""
    k = k or 2 * (FORMATS[name].group or 32)
    codes = codes_of(name, num_experts, rows, k)
    return QuantizedWeight.of(name, codes, **factors_of(name, num_experts, rows, k, scale_dtype))


def dequantized(name, codes, scales=None, zeros=None, row_scales=None):
    """The weight in float64, one number after the other."""
    format = FORMATS[name]
    output = np.zeros(codes.shape)
    for (e, r, c), code in np.ndenumerate(codes.numpy()):
        number = float(code) if format.has_zeros else value(format.codes, int(code))
        if zeros is not None:
            number -= float(zeros[e, r, c // format.group])
        if scales is not None:
            number *= float(scales[e, r, c // format.group].double())
        if row_scales is not None:
            number *= float(row_scales[e, r])
        output[e, r, c] = number
    return torch.from_numpy(output)
