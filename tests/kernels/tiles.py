"""Both products of the tiles, for tests that look at every slot."""

from cupymoe import MoEActivation
from cupymoe.kernels.expert_tiles import tile_shape_of
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma


def multiply(case, pairs, cut, activation=MoEActivation.GELU_TANH, gate_up_bias=None, down_bias=None, **of_tile_shape):
    """What experts_up gives of the pairs, and what experts_down makes of it; past the last slot, anything."""
    num_experts, hidden, intermediate_size = case.down_proj.shape
    shape = tile_shape_of(
        *cut,
        case.hidden_states.dtype,
        activation,
        num_experts,
        hidden,
        intermediate_size,
        not case.gate_up_proj.is_contiguous(),
        not case.down_proj.is_contiguous(),
        gate_up_bias is not None,
        down_bias is not None,
        **of_tile_shape,
    )
    intermediate = experts_up_wgmma(case.hidden_states, case.gate_up_proj, pairs, shape, gate_up_bias)
    return intermediate, experts_down_wgmma(intermediate, case.down_proj, pairs, shape, down_bias)
