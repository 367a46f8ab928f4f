// The weight stream that both expert GEMMs share: every block reads an equal part of the hit experts' weight rows
// once, through a ring in shared memory, and multiplies each stage with the expert's tokens.
//
//   stream/schedule.cuh  the work       Chunks of the plan times units of an expert (a unit is 2 weight rows, 8 units one 16-row
//                                       tensor-core block) are one line, cut into tiles of one chunk and at most TILE_UNITS units.
//                                       Every block gets the same number of bytes, so blocks end together whatever the routing is.
//   stream/stage.cuh     the ring       A stage is TILE_ROWS weight rows x BLOCK_K, and TOKENS rows x BLOCK_K of activations
//                                       gathered by row. Past the depth there are zeros.
//   stream/producer.cuh  who fills it   PRODUCER_WARPS, which run ahead as far as it reaches.
//   stream/consumer.cuh  who empties it WARPS: ROW_WARPS side by side over the rows, ROW_BLOCKS times 16 of them each, and either
//                                       K_WARPS over the 32-wide k steps of a stage or TOKEN_WARPS over the groups of 8 tokens, in
//                                       turn. What a warp loads of a stage it multiplies ROW_BLOCKS or TOKEN_GROUPS times: where
//                                       products take the time, and not the weights, several of both halve the loads.
//   stream/store.cuh     the outputs    The K_WARPS parts of a sum meet, and the GEMM stores what it makes of it.
//   weights/             the weights    How they are stored, and how they become operands: WEIGHTS says which codec.
//
// WHOLE_ROWS  BLOCK_K is the depth and both operands are neighbouring rows: a stage is two bulk copies, whose packs aren't swapped.
// TRANSPOSED  Weights are [NUM_EXPERTS, depth, rows] in memory, and a stage has them as BLOCK_K k rows of TILE_ROWS. A 16-byte
//             pack is 8 weight rows at one k, and ldmatrix makes of it what a lane would have loaded from 8 rows: the order of the
//             sums is the same, so are their bits where K_WARPS is.
// LOW_RANK    A row's sums go on in the factor b [NUM_EXPERTS, rows, LOW_RANK] of a low-rank adapter, which lies as the weight does
//             (TRANSPOSED: [NUM_EXPERTS, LOW_RANK, rows]), times what lora_shrink_chunks.cu has made of the token, low [slots,
//             LOW_RANK]: so what the adapter adds is not rounded by itself. Both are far less than a tile of weights, and come
//             straight into registers while the tile before is stored; in the ring they would take the place of a stage.
// Order       An output element is the sum over K_WARPS of sums over ascending k, whatever the tile, the chunk or the column:
//             it depends on its own row and token alone. LOW_RANK's come last. With HAS_BIAS the first of them begins with the bias
//             of its row. With Weights::kTwoChains every other 32 k of a stage are summed apart, and added at the stage's end. Unused
//             rows and columns of a tile keep what the ring held: they reach no output that is stored.
#pragma once
#include "stream/consumer.cuh"

// Ends with every output of this block stored. With LOW_RANK the previous grid writes low, for which the consumers wait; without
// kTokensAreNew all else that is read must be two grids back.
template <bool kTokensAreNew, class Gemm>
__device__ __forceinline__ void stream_experts(const Gemm& gemm, const Plan& plan) {
    __shared__ __align__(8) u64 barriers[2][STAGES];
    Ring ring = {shared_address(block_memory), shared_address(barriers[0]), shared_address(barriers[1])};
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) {
            init_barrier(ring.filled + s * 8, WHOLE_ROWS ? 1 : PRODUCER_THREADS);
            init_barrier(ring.emptied + s * 8, WARPS);
        }
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x < CONSUMER_THREADS) {
        if (kTokensAreNew || LOW_RANK) wait_for_previous_grid(), release_next_grid();
        consume_ring(gemm, plan, ring, reinterpret_cast<float*>(block_memory + STAGES * STAGE_BYTES));
    } else {
        fill_ring<kTokensAreNew>(gemm, plan, ring);
    }
}
