"""What a check is told, and what it answers."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from cupymoe.config import Gemma4MoEConfig
from cupymoe.weights.quantized import Weight

SHAPES = {
    "gemma4-26b": Gemma4MoEConfig.gemma4_26b_a4b(),
    "small": Gemma4MoEConfig(
        hidden_size=256,
        moe_intermediate_size=88,
        num_experts=12,
        top_k_experts=4,
        hidden_activation="gelu_pytorch_tanh",
    ),
}

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    status: Literal["pass", "fail", "skipped"]
    detail: str

    @classmethod
    def of(cls, name: str, passed: bool, detail: str) -> Result:
        """Pass or fail."""
        return cls(name, "pass" if passed else "fail", detail)


@dataclass(frozen=True)
class Setting:
    """What is verified: sizes, dtype, seed and device."""

    config: Gemma4MoEConfig
    dtype: torch.dtype
    seed: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels can run."""
        return self.device.type == "cuda"

    def generator(self) -> torch.Generator:
        """Random numbers on the device, the same ones on every call."""
        return torch.Generator(self.device).manual_seed(self.seed)

    @functools.cached_property
    def weights(self) -> tuple[Weight, Weight]:
        """Random gate_up_proj and down_proj, scaled so that every layer keeps its input's size."""
        config, generator = self.config, self.generator()
        size, intermediate = config.hidden_size, config.moe_intermediate_size
        gate_up = torch.empty(config.num_experts, 2 * intermediate, size, dtype=self.dtype, device=self.device)
        down = torch.empty(config.num_experts, size, intermediate, dtype=self.dtype, device=self.device)
        return (
            gate_up.normal_(std=size**-0.5, generator=generator),
            down.normal_(std=intermediate**-0.5, generator=generator),
        )


def ulp(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of neighbouring values of ``dtype`` at each float64 ``truth``, down to the subnormals' own."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(truth).exponent - 1
    smallest = torch.full_like(truth, info.smallest_normal * info.eps)
    return torch.maximum(torch.ldexp(torch.full_like(truth, info.eps), exponent), smallest)


def ulp_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest distance from a float64 truth, in ulp of the output's dtype, where the truth is in its range."""
    in_range = torch.isfinite(truth) & (truth.abs() <= torch.finfo(output.dtype).max)
    distance = (output.double() - truth).abs() / ulp(truth, output.dtype)
    worst = distance[in_range].max()
    return float("inf") if torch.isnan(worst) else worst.item()


def relative_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """``|output - truth| / |truth|`` in the 2-norm."""
    return float((output.double() - truth).norm() / truth.norm())


def largest_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest elementwise error: what a norm over many elements would hide."""
    return float((output.double() - truth).abs().max())
