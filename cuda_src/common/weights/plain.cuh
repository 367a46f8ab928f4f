// Weights that are stored as they are multiplied: 16 bits each, of the type of the activations.
//
// A codec is the one place where a stored weight becomes an operand. What each says of itself:
//   bytes(k)        that k neighbouring weights of a row take, in global memory and in a stage
//   kOfPack         weights of 16 bytes
//   kOfRowScale     what sums lack beside the scale of their row
//   Scales, Zeros   what groups of weights share, of which a stage has rows behind its weights (groups.cuh)
//   swap_of_row     pack p of a row lies in a stage at p ^ swap_of_row(row), so that lanes load without bank conflicts. Of a + b
//                   it is swap_of_row(a) ^ swap_of_row(b) where a and b have no binary digit in common
//   kStep           k that a warp loads at a time, 32 or 64
//   load            of step s of a stage, this lane's part of the warp's rows, as a Step, which has Operands for each 32 k
//   multiply_by     of Operands: sums += their products with 8 tokens
//   unrolled_steps  how many steps' code stands in a row, where each multiplies `groups` times 8 tokens
//   kTwoChains      whether sums of every other 32 k of a stage are made apart
//   kLoadsAhead     how many groups of tokens may be loaded before one is multiplied
#pragma once
#include "../stream/stage.cuh"

// TRANSPOSED weights are [NUM_EXPERTS, depth, rows] in memory, and a stage has them as BLOCK_K k rows of TILE_ROWS: a pack is 8
// weight rows at one k.
#define PACKS_PER_K_ROW (TILE_ROWS / 8)

// Pack p of a k row of transposed weights lies at p ^ swap_of_k(k), so that the 8 k rows that ldmatrix reads together, 0, 1,
// 8, 9, 16, 17, 24, 25 and as many more of each, are in different banks. With 4 packs a row, k % 2 is in the address already.
// Where a and b have no binary digit in common, swap_of_k(a + b) is swap_of_k(a) ^ swap_of_k(b).
__device__ __forceinline__ constexpr u32 swap_of_k(u32 k) { return PACKS_PER_K_ROW >= 8 ? k / 8 % 4 * 2 + k % 2 : k / 8 % 4; }

// Where in a stage this lane's k row of load_transposed_fragments is, in the first k step of its warp and the first of its
// blocks of 16 rows; the second is two packs on, whose distance is a binary digit that swap_of_k may flip: 32 bytes, exclusive or.
__device__ __forceinline__ u32 k_row_of_fragment(u32 row_warp, u32 k_warp, u32 lane) {
    u32 k = k_of_matrix_row(lane), pack = row_warp * ROW_BLOCKS * 2 + lane / 8 % 2;
    return (k_warp * 32 + k) * K_ROW_BYTES + (pack ^ swap_of_k(k)) * 16;
}

struct Weights {
    static constexpr u32 kOfPack = 8, kStep = 32, kOfRowScale = 1;

    typedef NoValues Scales, Zeros;

    static __device__ __forceinline__ constexpr u64 bytes(u64 k) { return k * 2; }

    // Bulk copies leave rows as they are.
    static __device__ __forceinline__ constexpr u32 swap_of_row(u32 row) { return WHOLE_ROWS ? 0 : row % 2 * 4; }

    static constexpr bool kTwoChains = false;

    // 32 k of 16 rows for each of ROW_BLOCKS.
    struct Operands {
        Fragment low[ROW_BLOCKS], high[ROW_BLOCKS];

        // sums += block b times 8 tokens.
        __device__ __forceinline__ void multiply_by(Fragment tokens, int b, float (&sums)[4]) const {
            multiply(sums, low[b], high[b], tokens, scalar_t());
        }
    };

    struct Step {
        Operands only;

        __device__ __forceinline__ Operands operands(int) const { return only; }
    };

    u32 first;         // of a stage, where this lane's first row is
    u32 packs[STEPS];  // where this lane's pack of each of its steps lies in a row

    __device__ __forceinline__ Weights(Place place, u32 lane) {
        first = TRANSPOSED ? k_row_of_fragment(place.row_warp, place.k_warp, lane)
                           : (place.row_warp * (ROW_BLOCKS * 16) + lane / 4) * WEIGHT_ROW_BYTES;
#pragma unroll
        for (int s = 0; s < STEPS; s++) packs[s] = (s * K_WARPS + place.k_warp) * 64 + lane % 4 * 16 ^ swap_of_row(lane / 4) * 16;
    }

    static constexpr int kLoadsAhead = TOKEN_GROUPS;

    static __device__ __forceinline__ constexpr int unrolled_steps(int) { return STEPS; }

    __device__ __forceinline__ Step load(u32 stage, u32, int s) const {
        Operands operands;
        u32 from = stage + first;
#pragma unroll
        for (int b = 0; b < ROW_BLOCKS; b++) {
#if TRANSPOSED
            u32 k_row = (from ^ b * 32) + s * K_WARPS * 32 * K_ROW_BYTES;
            load_transposed_fragments(operands.low[b], operands.high[b], k_row, K_ROW_BYTES);
#else
            operands.low[b] = load_fragment(from + packs[s] + b * 16 * WEIGHT_ROW_BYTES);
            operands.high[b] = load_fragment(from + packs[s] + (b * 16 + 8) * WEIGHT_ROW_BYTES);
#endif
        }
        return {operands};
    }
};
