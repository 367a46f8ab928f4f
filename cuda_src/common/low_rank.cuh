// What the kernels of a low-rank adapter's gradients share: slots' weights in a product, and how its sums are stored.
#pragma once
#include "squares.cuh"

// Of a square of low, [slot][rank] in memory and a transposed left operand: each slot times its weight, rounded again. The weights
// are those of slots 2 q, 2 q + 1, 2 q + 8 and 2 q + 9, with q = lane % 4.
__device__ __forceinline__ void weight_slots(Square& low, const float (&weights)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {  // words 0 and 1 are of the first eight slots
        Pack<scalar_t, 2> pair = *reinterpret_cast<Pack<scalar_t, 2>*>(&low.words[i]);
#pragma unroll
        for (int j = 0; j < 2; j++) pair.values[j] = from_float<scalar_t>(to_float(pair.values[j]) * weights[i / 2 * 2 + j]);
        low.words[i] = *reinterpret_cast<u32*>(&pair);
    }
}

// scale * sums, whose lines are ranks and whose columns begin at first_column, rounded once into [ranks, columns] of these strides.
template <int kSquares>
__device__ __forceinline__ void store_factor_gradient(OUT_SCALAR* output, const SquareSums (&sums)[RANK / 16][kSquares],
                                                      float scale, u32 first_column, u64 ranks, u64 columns, u64 rank_stride,
                                                      u64 column_stride) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < RANK / 16; m++) {
#pragma unroll
        for (int n = 0; n < kSquares; n++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                u32 rank = m * 16 + i / 2 % 2 * 8 + lane / 4;
                u32 column = first_column + n * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
                if (rank >= ranks || column >= columns) continue;
                float sum = scale * sums[m][n].values[i / 4][i % 4];
                output[rank * rank_stride + column * column_stride] = from_float<OUT_SCALAR>(sum);
            }
        }
    }
}
