// The ring of the weight stream: what one of its stages looks like, and which warp takes what of it.
//
// A stage is BLOCK_K deep, in this picture 128: TILE_ROWS weight rows, what groups of weights share, then TOKENS rows of
// activations. p0 is a row's first 16 bytes, 8 values of 16 bits. 8 lanes that load pack p of two rows together touch all 32 banks
// of shared memory, because packs of odd rows are swapped in fours. Rows of quantised weights are shorter, and swapped otherwise.
//
//   data                   row 0  | p0  p1  p2  p3  p4  p5  p6  p7  p8  p9  p10 p11 p12 p13 p14 p15 |
//                          row 1  | p4  p5  p6  p7  p0  p1  p2  p3  p12 p13 p14 p15 p8  p9  p10 p11 |
//                          row 2  | p0  p1  ..                                                      |
//                          ..
//     + FIRST_SCALE, FIRST_ZERO    what groups of weights share, a row for each weight row, unswapped
//     + FIRST_TOKEN        token 0| p0  p1  ..        the same, of the activations                  |
//                          ..
//     + STAGE_BYTES        the next stage
//
// Eight consumer warps of a stage, K_WARPS 2, so TILE_ROWS 64; a k step is 32 deep, so 4 packs, and warps take them in turn:
//
//                            k step 0 | k step 1 | k step 2 | k step 3
//         rows  0..15         warp 0  |  warp 4  |  warp 0  |  warp 4     each times all groups of 8 tokens
//         rows 16..31         warp 1  |  warp 5  |  warp 1  |  warp 5
//         rows 32..47         warp 2  |  warp 6  |  warp 2  |  warp 6
//         rows 48..63         warp 3  |  warp 7  |  warp 3  |  warp 7
//
// With TOKEN_WARPS 2 warps 0..3 take all steps times every other group of tokens, and 4..7 the groups between. With ROW_BLOCKS 2
// each has 32 rows in the place of 16.
#pragma once
#include "../async_copy.cuh"
#include "../mma.cuh"

#define PRODUCER_WARPS (WHOLE_ROWS ? 1 : 4)
#define CONSUMER_THREADS (WARPS * 32)
#define PRODUCER_THREADS (PRODUCER_WARPS * 32)
#define BLOCK_THREADS (CONSUMER_THREADS + PRODUCER_THREADS)
#define ROW_WARPS (WARPS / K_WARPS / TOKEN_WARPS)
#define TILE_ROWS (ROW_WARPS * ROW_BLOCKS * 16)
#define TILE_UNITS (TILE_ROWS / 2)
#define COLUMNS (TOKENS < 8 ? 8 : TOKENS)         // of products; those past TOKENS repeat tokens, and are not stored
#define TOKEN_GROUPS (COLUMNS / 8 / TOKEN_WARPS)  // of a warp
#define K_ROW_BYTES (TILE_ROWS * 2)               // of TRANSPOSED weights, in a stage
#define TOKEN_ROW_BYTES (BLOCK_K * 2)             // in a stage
#define WEIGHT_ROW_BYTES ((u32)Weights::bytes(BLOCK_K))  // in a stage
#define WEIGHT_BYTES (TILE_ROWS * WEIGHT_ROW_BYTES)
#define FIRST_SCALE WEIGHT_BYTES                                     // in a stage
#define FIRST_ZERO (FIRST_SCALE + Weights::Scales::kStageBytes)      // in a stage
#define FIRST_TOKEN (FIRST_ZERO + Weights::Zeros::kStageBytes)       // in a stage
#define STAGE_BYTES (FIRST_TOKEN + TOKENS * TOKEN_ROW_BYTES)
#define STEPS ((BLOCK_K / (int)Weights::kStep + K_WARPS - 1) / K_WARPS)  // of each of the K_WARPS
#define PARTS_OF_STEP ((int)Weights::kStep / 32)                         // of 32 k

static_assert(BLOCK_K % 32 == 0 && WARPS % K_WARPS == 0, "BLOCK_K, WARPS, K_WARPS");
static_assert(WHOLE_ROWS || BLOCK_K % 64 == 0, "BLOCK_K");
static_assert(COLUMNS % TOKENS == 0 && COLUMNS % 8 == 0 && (TOKENS <= 32 || TOKENS % 16 == 0) && STAGES >= 2, "TOKENS, STAGES");
static_assert(TOKEN_WARPS == 1 || TOKEN_WARPS == 2 && K_WARPS == 1 && TOKENS % 16 == 0, "TOKEN_WARPS");
static_assert(ROW_BLOCKS == 1 || ROW_BLOCKS == 2, "ROW_BLOCKS");
static_assert(!TRANSPOSED || !WHOLE_ROWS && TILE_ROWS >= 32, "TRANSPOSED");

extern __shared__ __align__(128) unsigned char block_memory[];  // the ring, then the sums of store_tile

struct Ring {
    u32 data, filled, emptied;  // shared addresses: STAGES stages, and two barriers of each
};

// Pack p of a token's row lies at p ^ swap_of_token(token); bulk copies leave rows as they are.
__device__ __forceinline__ constexpr u32 swap_of_token(u32 token) { return WHOLE_ROWS ? 0 : token % 2 * 4; }

// Where a pack lies in its row: at (first + steps * kStep) ^ swap. All of these count packs, or all count bytes; swap is less than
// kSwapped, which is a power of two. If kStep is a multiple of kSwapped, the swap leaves steps * kStep as it is: then first ^ swap
// is computed once, before the loop over the steps, and each step only adds a constant.
template <u32 kStep, u32 kSwapped> __device__ __forceinline__ u32 swapped(u32 swap, u32 first, u32 steps) {
    return kStep % kSwapped ? (first + steps * kStep) ^ swap : (first ^ swap) + steps * kStep;
}

// Which part of a tile a consumer's warp has.
struct Place {
    u32 row_warp, k_warp, token_warp;

    __device__ __forceinline__ Place() {
        u32 warp = threadIdx.x / 32;
        row_warp = warp % ROW_WARPS;
        k_warp = TOKEN_WARPS > 1 ? 0 : warp / ROW_WARPS;
        token_warp = TOKEN_WARPS > 1 ? warp / ROW_WARPS : 0;
    }
};

// What weights without groups share; the others: weights/groups.cuh.
struct NoValues {
    static constexpr u32 kStageBytes = 0;
};

// Of a lane: for each block of 16 rows and each group of 8 tokens what mma.cuh says of its results.
typedef float Sums[ROW_BLOCKS][TOKEN_GROUPS][4];
