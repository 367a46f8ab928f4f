// grouped_outer: for each expert, left^T right over its slots: the gradient of its weight, on the CUDA cores.
//
// Reads  left           [S, M] LEFT_SCALAR    rows in expert order
//        right          [S, N] RIGHT_SCALAR   rows in expert order
//        expert_offsets [E + 1] i32           first slot of each expert; slots from the last on are not read
// Writes output         [E, M, N] OUT_SCALAR  zeros for an expert without slots
// Grid   (E * ceil(M / TILE), ceil(N / TILE)). A block owns up to TILE x TILE elements of one expert.
// Needs  sm_80 or newer. No alignment beyond an element's own.
// Maths  fp32, slots in ascending order (common/simt_product.cuh), rounded once at the store.
// Why    One owner for each element: no atomics, so the same bits every run.
#include "common/simt_product.cuh"

#if !defined(LEFT_SCALAR) || !defined(RIGHT_SCALAR) || !defined(OUT_SCALAR)
#error "define LEFT_SCALAR, RIGHT_SCALAR and OUT_SCALAR"
#endif

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, BLOCKS_AT_ONCE)
grouped_outer(const LEFT_SCALAR* __restrict__ left, const RIGHT_SCALAR* __restrict__ right,
              const int* __restrict__ expert_offsets, OUT_SCALAR* __restrict__ output, u64 num_lines, u64 num_columns) {
    u32 tiles = (num_lines + TILE - 1) / TILE;
    u64 expert = blockIdx.x / tiles, line = (u64)(blockIdx.x % tiles) * TILE, column = (u64)blockIdx.y * TILE;
    u64 first = expert_offsets[expert], past = expert_offsets[expert + 1];
    Operand<LEFT_SCALAR> lines = {left + first * num_lines + line, 1, num_lines, num_lines - line};
    Operand<RIGHT_SCALAR> columns = {right + first * num_columns + column, 1, num_columns, num_columns - column};
    OUT_SCALAR* tile = output + (expert * num_lines + line) * num_columns + column;
    multiply_tile(lines, columns, past - first, tile, num_columns);
}
