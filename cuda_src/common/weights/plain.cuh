// Weights that are stored as they are multiplied: 16 bits each, of the type of the activations.
//
// This is the one place where a stored weight becomes an operand. What a codec says of itself:
//   bytes(k)       that k neighbouring weights of a row take, in global memory and in a stage
//   kOfPack        weights of 16 bytes
//   swap_of_row    pack p of a row lies in a stage at p ^ swap_of_row(row), so that lanes load without bank conflicts
//   fragment       8 weights of this lane's row, whose pack is at a shared address, as the operand of a product
#pragma once
#include "../stream/stage.cuh"

struct Weights {
    static constexpr u32 kOfPack = 8;

    static __device__ __forceinline__ constexpr u64 bytes(u64 k) { return k * 2; }

    // Bulk copies leave rows as they are.
    static __device__ __forceinline__ constexpr u32 swap_of_row(u32 row) { return WHOLE_ROWS ? 0 : row % 2 * 4; }

    static __device__ __forceinline__ Fragment fragment(u32 address) { return load_fragment(address); }
};

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
