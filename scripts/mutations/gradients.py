"""Faults of the gradients by tiles, and of what is kept for them."""

from __future__ import annotations

from scripts.mutations.mutation import cuda, launcher

OUTER_OF_SLOTS = ("tests/kernels/test_experts_outer_wgmma.py",)
SUMS = ("tests/kernels/test_sum_parts.py",)
SLOPES = ("tests/kernels/test_activation_slopes.py",)
GRADIENTS = ("tests/test_experts_backward.py::test_experts_of_any_number_of_slots",)
TRAINING = ("tests/test_experts_backward.py::test_the_training_forward_has_the_bits_of_inference",)
KEPT = ("tests/test_experts_backward.py::test_what_is_kept",)


FAULTS = (
    cuda(
        "gate kept for up",
        "experts_up.cu",
        "store_pack(row + INTERMEDIATE + unit, rounded(other));",
        "store_pack(row + INTERMEDIATE + unit, rounded(one));",
        TRAINING,
        defines=("GATED=1", "INTERLEAVED=0", "KEEPS_GATE_UP=1"),
    ),
    cuda(
        "up kept for gate in the tiles",
        "experts_up_wgmma.cu",
        "eight * 2 + up, half);",
        "eight * 2 + 1, half);",
        TRAINING,
        defines=("GATED=1", "INTERLEAVED=0", "TRANSPOSED=0", "KEEPS_GATE_UP=1"),
    ),
    cuda(
        "the routing weight in its own gradient",
        "experts_down_back_wgmma.cu",
        "dot = fma_rn(of.value, grads[i], dot);",
        "dot = fma_rn(of.value, grad, dot);",
        GRADIENTS,
    ),
    cuda(
        "the gradient of down_proj without the routing weights",
        "experts_down_back_wgmma.cu",
        "from_float<scalar_t>(of.value * weight)",
        "from_float<scalar_t>(of.value)",
        GRADIENTS,
        defines=("STORES_WEIGHTED=1",),
    ),
    cuda(
        "gate_up of the columns before",
        "experts_down_back_wgmma.cu",
        "load(group + 1);",
        "load(group);",
        GRADIENTS,
    ),
    cuda(
        "the slopes of gate and up exchanged",
        "common/activation_slopes.cuh",
        "of_gate.slope * of_up.value, of_gate.value * of_up.slope",
        "of_gate.value * of_up.slope, of_gate.slope * of_up.value",
        GRADIENTS,
        source="experts_down_back_wgmma",
    ),
    cuda(
        "a slope beyond the clamp",
        "common/activation_slopes.cuh",
        "fabsf(up) <= limit ? 1.0f : 0.0f",
        "1.0f",
        SLOPES,
        source="experts_down_back_wgmma",
        defines=("ACTIVATION=SWIGLUOAI",),
    ),
    cuda(
        "the sums of the expert before for one without slots",
        "experts_outer_wgmma.cu",
        "if (slots > 0) return;",
        "return;",
        OUTER_OF_SLOTS,
    ),
    cuda(
        "tokens past an expert's last slot",
        "experts_outer_wgmma.cu",
        "slot(i) < tile.past ? problem.token_of_slot[slot(i)] : -1",
        "problem.token_of_slot[slot(i)]",
        OUTER_OF_SLOTS,
    ),
    cuda("slot 0 taken for masked in the sums of parts", "sum_parts.cu", "slot >= 0 && i", "slot > 0 && i", SUMS),
    launcher(
        "the tickets that the way back through the down projection has used up",
        "backends/fused_backward.py",
        "_THIRD_TICKET = 2",
        "_THIRD_TICKET = 1",
        GRADIENTS,
    ),
    launcher(
        "the gradient of a transposed weight as of a contiguous one",
        "backends/fused_backward.py",
        "slots_first = is_out_of_slots == weight.is_contiguous()",
        "slots_first = is_out_of_slots",
        TRAINING,
    ),
    launcher(
        "what was kept for the gradients dropped",
        "ops/experts.py",
        "ctx.save_for_backward(*inputs[:_NUM_TENSORS], *kept)",
        "ctx.save_for_backward(*inputs[:_NUM_TENSORS], *_NOTHING_KEPT)",
        KEPT,
    ),
)
