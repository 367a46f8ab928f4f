"""activation_slopes.cuh against activation_math.py in float64, by a kernel that does nothing else."""

import shutil

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.activation_math import FUNCTIONS
from cupymoe.kernels import cuda_sources, jit
from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from tests.helpers import WITH_PARAMETERS, every_value

SOURCE = """
#include "common/activation_slopes.cuh"
extern "C" __global__ void slopes(const float* gates, const float* ups, float* results) {
    u32 i = blockIdx.x * blockDim.x + threadIdx.x, count = gridDim.x * blockDim.x;
    Gradients of = activation_gradients<ACTIVATION>(gates[i], ups[i]);
    results[i] = of.value, results[count + i] = of.gate, results[2 * count + i] = of.up;
}
"""
THREADS = 256


@pytest.fixture
def with_slopes(tmp_path, monkeypatch):
    """The kernel is a source among the others, until the test ends."""
    shutil.copytree(cuda_sources.directory(), tmp_path / "cuda_src")
    (tmp_path / "cuda_src" / "slopes.cu").write_text(SOURCE)
    monkeypatch.setattr(cuda_sources, "directory", lambda: tmp_path / "cuda_src")
    monkeypatch.setattr(cuda_sources, "expanded", cuda_sources.expanded.__wrapped__)
    monkeypatch.setattr(jit, "_loaded_sources", set())


def variant(activation):
    return jit.Variant("slopes", activation_defines(activation))


def truth(activation, gates, ups):
    """Value and slopes in float64, and what an error of each is measured by: its factors, or 1 where that is more."""
    function, values = FUNCTIONS[activation.function], activation.parameters
    (gate, gate_slope), (up, up_slope) = function.gate(gates, values), function.up(ups, values)
    factors = ((gate, up), (gate_slope(), up), (gate, up_slope()))
    pairs = [torch.broadcast_tensors(one, other) for one, other in factors]
    return [(one * other, one.abs().clamp(min=1) * other.abs().clamp(min=1)) for one, other in pairs]


def test_compiles(with_slopes):
    assert jit.compile_offline(variant(MoEActivation.SITU), "sm_90a").spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [*(member for member in MoEActivation if member.is_gated), *WITH_PARAMETERS])
def test_value_and_slopes(with_slopes, activation):
    """At every float16, clamps and what is far beyond them among these: within 8% of an ulp of float16."""
    gates = every_value(torch.float16, "cuda").float()
    gates = torch.where(gates.isfinite(), gates, 0)
    ups = gates[torch.randperm(len(gates), device="cuda")]
    results = torch.full((3, len(gates)), torch.nan, device="cuda")
    pointers = [tensor.data_ptr() for tensor in (gates, ups, results)]
    device = gates.device.index
    jit.kernel(variant(activation), "slopes", device)(
        (len(gates) // THREADS, 1), THREADS, current_stream(device), *pointers
    )
    for found, (expected, allowed) in zip(results, truth(activation, gates.double(), ups.double()), strict=True):
        assert ((found - expected).abs() <= 0.08 * 2**-11 * allowed).all()
