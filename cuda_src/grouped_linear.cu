// grouped_linear: each row times the transposed weight of its expert, for rows in expert order, on the CUDA cores.
//
// Reads  rows           [S, K] ROW_SCALAR        in expert order
//        weight         [E, N, K] WEIGHT_SCALAR  by strides in elements, so that a transposed view is as good as its base
//        expert_offsets [E + 1] i32              first slot of each expert; the last is the number of slots that hold a row
// Writes output         [S, N] OUT_SCALAR        rows from expert_offsets[E] on stay as they are
// Grid   (S / TILE + E, ceil(N / TILE)). A block owns up to TILE slots of one expert and TILE columns. Expert e has the block
//        rows from expert_offsets[e] / TILE + e on: enough for its slots wherever they begin, and more than the host, which
//        knows S and E alone, can tell; those that are left over end at once.
// Needs  E >= 1, sm_80 or newer. No alignment beyond an element's own.
// Maths  fp32 (common/simt_product.cuh), rounded once at the store.
// Why    It serves what the tensor-core kernels can't: sizes are arguments, not defines, so one compilation a dtype will do.
#include "common/simt_product.cuh"

#if !defined(ROW_SCALAR) || !defined(WEIGHT_SCALAR) || !defined(OUT_SCALAR)
#error "define ROW_SCALAR, WEIGHT_SCALAR and OUT_SCALAR"
#endif

// The last expert whose block rows begin at or before `block_row`.
__device__ __forceinline__ u32 expert_of_block_row(const int* expert_offsets, u32 num_experts, u32 block_row) {
    u32 expert = 0, past = num_experts;
    while (past - expert > 1) {
        u32 middle = (expert + past) / 2;
        bool begins = (u32)expert_offsets[middle] / TILE + middle <= block_row;
        expert = begins ? middle : expert, past = begins ? past : middle;
    }
    return expert;
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS_AT_ONCE)
grouped_linear(const ROW_SCALAR* __restrict__ rows, const WEIGHT_SCALAR* __restrict__ weight,
               const int* __restrict__ expert_offsets, OUT_SCALAR* __restrict__ output, u64 num_experts, u64 num_columns, u64 depth,
               u64 expert_stride, u64 column_stride, u64 k_stride) {
    u32 expert = expert_of_block_row(expert_offsets, num_experts, blockIdx.x);
    u64 first = expert_offsets[expert], past = expert_offsets[expert + 1];
    u64 slot = first + (blockIdx.x - (first / TILE + expert)) * TILE;
    if (slot >= past) return;
    u64 column = (u64)blockIdx.y * TILE;
    Operand<ROW_SCALAR> left = {rows + slot * depth, depth, 1, past - slot};
    Operand<WEIGHT_SCALAR> right = {
        weight + expert * expert_stride + column * column_stride, column_stride, k_stride, num_columns - column};
    multiply_tile(left, right, depth, output + slot * num_columns + column, num_columns);
}
