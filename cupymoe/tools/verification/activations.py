"""The activation contract: every member against its definition in float64, and erf told from tanh."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.functional import moe_activation
from cupymoe.tools.verification.result import Result, Setting, relative_error, ulp_error

# Where erf and tanh GELU differ most, in float64, and by how much on standard normal gates.
_LARGEST_DIFFERENCE, _AT = 4.73e-4, 2.70
_NORM_DIFFERENCE = 2.0e-4


def checks(setting: Setting) -> Iterator[Result]:
    """The contract of every member, and that erf and tanh GELU are told apart."""
    yield _definitions()
    yield _erf_is_not_tanh("reference", torch.float64, torch.device("cpu"))
    for activation in MoEActivation:
        yield _member(activation, setting)
    if setting.on_gpu:
        yield _erf_is_not_tanh("kernels", torch.float32, setting.device)


def _definition(activation: MoEActivation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Each member as torch or its paper spells it: another wording than the reference's."""
    match activation.function:
        case "SILU":
            return F.silu(gate) * up
        case "GELU":
            return F.gelu(gate) * up
        case "GELU_TANH":
            return F.gelu(gate, approximate="tanh") * up
        case "RELU2":
            return F.relu(gate) ** 2 * up
        case "SWIGLUOAI":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
        case "SWIGLUSTEP":
            return torch.minimum(F.silu(gate), torch.tensor(7.0)) * up.clamp(-7.0, 7.0)
        case "SITU":
            return torch.tanh(gate) / (1 + torch.exp(-gate)) * up
        case _:
            raise NotImplementedError(f"no second wording of {activation.name} to check it against")


def _definitions() -> Result:
    generator = torch.Generator().manual_seed(0)
    input = 4 * torch.randn(1000, 64, dtype=torch.float64, generator=generator)
    worst = 0.0
    for activation in MoEActivation:
        gate, up = reference.split_gate_up(input, activation)
        error = (reference.activate(input, activation) - _definition(activation, gate, up)).abs().max().item()
        worst = max(worst, error)
    return Result.of("reference activations are their definitions", worst < 1e-12, f"float64, max |diff| {worst:.1e}")


def _erf_is_not_tanh(name: str, dtype: torch.dtype, device: torch.device) -> Result:
    x = torch.linspace(-6, 6, 12001, dtype=dtype, device=device)
    normal = torch.randn(1 << 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    erf, tanh = (
        [moe_activation(member, values).double() for values in (x, normal)]
        for member in (MoEActivation.GELU_NO_MUL, MoEActivation.GELU_TANH_NO_MUL)
    )
    difference = (erf[0] - tanh[0]).abs()
    largest, at = difference.max().item(), x[difference.argmax()].abs().item()
    norm = relative_error(tanh[1], erf[1])
    passed = abs(largest - _LARGEST_DIFFERENCE) < 1e-6 and abs(at - _AT) < 0.01 and abs(norm - _NORM_DIFFERENCE) < 1e-5
    detail = f"max |diff| {largest:.2e} at |x| = {at:.2f}, {norm:.2e} in norm on normal gates"
    return Result.of(f"gelu is erf and gelu_tanh is tanh ({name})", passed, detail)


def _gates(setting: Setting) -> torch.Tensor:
    """Every finite value of a 16-bit dtype; for float32 random bit patterns and a dense range."""
    if setting.dtype.itemsize == 2:
        bits = torch.arange(-(2**15), 2**15, device=setting.device).to(torch.int16)
        values = bits.view(setting.dtype)
    else:
        generator = setting.generator()
        bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator, device=setting.device)
        dense = torch.empty(1 << 20, device=setting.device).uniform_(-30, 30, generator=generator)
        values = torch.cat([bits.to(torch.int32).view(torch.float32), dense])
    return values[torch.isfinite(values)]


def _member(activation: MoEActivation, setting: Setting) -> Result:
    gate = _gates(setting)
    if activation.is_gated:
        # Powers of two: the product with up is exact, so the bound on act(gate) is a bound on the result.
        up = torch.ldexp(torch.ones_like(gate), torch.arange(gate.numel(), device=gate.device) % 3)
        input = torch.stack([gate, up], -1).flatten() if activation.is_interleaved else torch.cat([gate, up])
    else:
        input = gate
    error = ulp_error(moe_activation(activation, input), reference.activate(input.double(), activation))
    name = f"{activation.name} against float64 ({'kernel' if setting.on_gpu else 'reference'})"
    bound = 4.0 if setting.dtype == torch.float32 else 0.51
    return Result.of(name, error <= bound, f"{error:.4f} ulp of {bound}, {gate.numel()} gates")
