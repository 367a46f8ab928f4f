"""What the kernels of the fused backend take of quantised weights, of a call or of a batch."""

from __future__ import annotations

from cupymoe.backends import BatchTensors, ExpertsCall, ExpertsTensors
from cupymoe.kernels.coded_tiles import Scales
from cupymoe.kernels.stored_weight import StoredWeight, stored_weight
from cupymoe.weights.format import PLAIN, formats_of


def stored_weights(call: ExpertsCall, tensors: ExpertsTensors | BatchTensors) -> tuple[StoredWeight, ...]:
    """How both weights are stored; nothing where both are plain, as a shape has it."""
    if call.weight_format == PLAIN:
        return ()
    scales = tensors.gate_up_scales, tensors.down_scales
    dtypes = (None if each is None else each.dtype for each in scales)
    return tuple(map(stored_weight, call.weight_format.split(","), dtypes))


def scales_of(call: ExpertsCall, tensors: ExpertsTensors | BatchTensors) -> tuple[Scales | None, Scales | None]:
    """What belongs to the codes of each weight that is quantised, for the tiles."""
    if call.weight_format == PLAIN:
        return None, None
    up = Scales(tensors.gate_up_scales, tensors.gate_up_zeros, tensors.gate_up_row_scales)
    down = Scales(tensors.down_scales, tensors.down_zeros, tensors.down_row_scales)
    of_gate_up, of_down = formats_of(call.weight_format)
    return None if of_gate_up is None else up, None if of_down is None else down
