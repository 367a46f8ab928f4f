"""Faults of the activations, and of what moves and multiplies rows one stage at a time."""

from __future__ import annotations

from scripts.mutations.mutation import ACTIVATION, BITS, EXPERTS, Mutation, cuda, launcher

GATHER = ("tests/kernels/test_gather.py",)
DEQUANTIZE = ("tests/kernels/test_dequantize.py::test_the_bits_are_torchs",)
COMBINE = ("tests/kernels/test_combine.py",)
LINEAR = ("tests/kernels/test_grouped_linear.py",)
OUTER = ("tests/kernels/test_grouped_outer.py",)


def activation(fault: str, old: str, new: str, function: str) -> Mutation:
    """A fault in one activation function, compiled into the 16-bit kernel."""
    return cuda(
        fault,
        "common/activations.cuh",
        old,
        new,
        ACTIVATION,
        source="gated_activation",
        defines=(f"ACTIVATION={function}",),
    )


FAULTS = (
    activation(
        "erf for tanh", "mul_rn(gelu_tanh<kPrecise>(gate), up)", "mul_rn(gelu<kPrecise>(gate), up)", "GELU_TANH"
    ),
    activation("tanh for erf", "mul_rn(gelu<kPrecise>(gate), up)", "mul_rn(gelu_tanh<kPrecise>(gate), up)", "GELU"),
    activation(
        "gate for up in one activation",
        "mul_rn(gelu_tanh<kPrecise>(gate), up)",
        "mul_rn(gelu_tanh<kPrecise>(up), gate)",
        "GELU_TANH",
    ),
    activation("a coefficient to four digits", "fma_rn(a * a, 0.10294324f,", "fma_rn(a * a, 0.1029f,", "GELU_TANH"),
    activation("a clamp without its lower end", ": up < -limit ? -limit : up;", ": up;", "SWIGLUSTEP"),
    activation("the limit of another activation", "gate > limit ?", "gate > 2 * limit ?", "SWIGLUOAI"),
    cuda(
        "truncation for rounding",
        "common/dtypes.cuh",
        "cvt.rn.bf16.f32",
        "cvt.rz.bf16.f32",
        ACTIVATION,
        source="gated_activation",
        defines=("SCALAR=bf16",),
    ),
    cuda(
        "the gate read as the up",
        "gated_activation.cu",
        "(INTERLEAVED ? 2 * col + VEC : COLS + col)",
        "(INTERLEAVED ? 2 * col + VEC : col)",
        ACTIVATION,
    ),
    cuda("one row too many", "gated_activation.cu", "if (row >= (num_rows ?", "if (row > (num_rows ?", ACTIVATION),
    cuda("zero points added", "dequantize.cu", "value -= zero", "value += zero", DEQUANTIZE, defines=("HAS_ZEROS=1",)),
    cuda(
        "the scale of a row's first group for all",
        "dequantize.cu",
        "scales[row * scale_pitch + column / kGroup]",
        "scales[row * scale_pitch]",
        DEQUANTIZE,
        defines=("BITS=4",),
    ),
    cuda("slot 0 taken for masked in gather", "gather.cu", "if (slot >= 0)", "if (slot > 0)", GATHER),
    cuda(
        "slots of the first choice for all",
        "gather.cu",
        "slot_of_pair[token * TOP_K + k]",
        "slot_of_pair[token * TOP_K]",
        GATHER,
    ),
    cuda(
        "slot 0 taken for masked in combine",
        "combine.cu",
        "choices.slots[group + i] < 0",
        "choices.slots[group + i] <= 0",
        COMBINE,
    ),
    cuda(
        "the first choices for all",
        "combine.cu",
        "load_from_l2(slot_of_pair + first + i)",
        "load_from_l2(slot_of_pair + i % ROWS_IN_FLIGHT)",
        COMBINE,
        defines=("ROWS_IN_FLIGHT=2",),
    ),
    cuda(
        "a wait dropped: combine before the experts have ended",
        "combine.cu",
        "    wait_for_previous_grid();\n",
        "\n",
        BITS,
    ),
    cuda(
        "the first expert's weight for all",
        "grouped_linear.cu",
        "weight + expert * expert_stride",
        "weight",
        LINEAR,
    ),
    cuda(
        "the last, unfilled step of a sum forgotten",
        "common/simt_product.cuh",
        "from < depth; from += STEP",
        "from + STEP <= depth; from += STEP",
        LINEAR,
        source="grouped_linear",
    ),
    cuda(
        "a barrier dropped: a stage read before it is filled",
        "common/simt_product.cuh",
        "        __syncthreads();\n#pragma unroll 8",
        "#pragma unroll 8",
        LINEAR,
        source="grouped_linear",
    ),
    cuda("the slots of the first expert for all", "grouped_outer.cu", "right + first * num_columns", "right", OUTER),
    launcher(
        "a grid too small by its last block",
        "kernels/combine.py",
        "-(-columns // (width * tuning[1]))",
        "columns // (width * tuning[1])",
        EXPERTS,
    ),
    launcher(
        "the alignment of the output forgotten",
        "kernels/gated_activation.py",
        "(source | target) % 16 == 0",
        "source % 16 == 0",
        ACTIVATION,
    ),
    launcher(
        "the alignment of rows forgotten",
        "kernels/rows.py",
        "return width if aligned and columns % width == 0 else 1",
        "return width if columns % width == 0 else 1",
        GATHER,
    ),
    launcher(
        "the last expert without a block",
        "kernels/grouped_linear.py",
        "num_slots // TILE + num_experts",
        "num_slots // TILE + num_experts - 1",
        LINEAR,
    ),
)
