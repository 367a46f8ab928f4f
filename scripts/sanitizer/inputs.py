"""Small inputs that reach every path, made on the CPU, and the check of what the kernels gave for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cupymoe import QuantizedWeight
from cupymoe.tools.verification.result import relative_error
from cupymoe.weights import FORMATS

HIDDEN_SIZE = 64
TOP_K = 4
RANK = 16


class Weights(NamedTuple):
    """Plain weights of the experts."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    def cuda(self) -> Weights:
        """On the GPU."""
        return Weights(self.gate_up_proj.cuda(), self.down_proj.cuda())

    def double(self) -> Weights:
        """For the truth."""
        return Weights(self.gate_up_proj.double(), self.down_proj.double())


def check(output: torch.Tensor, truth: torch.Tensor, what: str) -> None:
    """What a call gave, against float64. On the CPU: what torch's kernels write is not watched, so that to initcheck it
    is never written."""
    error = relative_error(output.cpu(), truth)
    assert error < 0.01, f"{what}: relative error {error:.4f}"


def masked_routing(tokens: int, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices, some of them masked and none the last expert's, and weights."""
    index = torch.rand(tokens, num_experts - 1).topk(TOP_K).indices
    index[torch.rand(index.shape) < 0.1] = num_experts
    return index, torch.rand(tokens, TOP_K)


def expert_weights(num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> Weights:
    """Of gated experts."""
    shapes = ((num_experts, 2 * intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size))
    return Weights(*(0.1 * torch.randn(shape).to(dtype) for shape in shapes))


def adapter_factors(weights: Weights) -> list[torch.Tensor]:
    """A and B of gate_up_proj, and those of down_proj."""
    sizes = [weight.shape for weight in weights]
    shapes = [shape for experts, rows, columns in sizes for shape in ((experts, RANK, columns), (experts, rows, RANK))]
    return [0.1 * torch.randn(shape).to(weights.down_proj.dtype) for shape in shapes]


def random_weight(name: str, num_experts: int, rows: int, k: int) -> QuantizedWeight:
    """A weight of a format with codes that are no NaN."""
    format, of_rows = FORMATS[name], (num_experts, rows)
    codes = torch.randint(0, min(2**format.bits, 120), (*of_rows, k), dtype=torch.uint8)
    of_groups = (*of_rows, format.groups(k))
    scales = (torch.rand(of_groups) + 0.5).to(format.scale_dtypes[0]) if format.group else None
    zeros = torch.randint(0, 16, of_groups, dtype=torch.uint8) if format.has_zeros else None
    row_scales = torch.rand(of_rows) / 64 if format.has_row_scales else None
    return QuantizedWeight.of(format, codes, scales, zeros, row_scales)
