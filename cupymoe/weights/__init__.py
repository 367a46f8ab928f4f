"""Quantised weights of the experts: their formats, the layout of their codes, and the modules that hold them."""

from cupymoe.weights.format import FORMATS, WeightFormat
from cupymoe.weights.pack import pack_codes, unpack_codes
from cupymoe.weights.quantized import QuantizedExperts, QuantizedWeight

__all__ = ["FORMATS", "QuantizedExperts", "QuantizedWeight", "WeightFormat", "pack_codes", "unpack_codes"]
