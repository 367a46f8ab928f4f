// What the warps of a tile kernel do: four of them fill the ring, warpgroups of four, two or three, multiply what is in it.
#pragma once
#include "producer.cuh"
#if INLINE_PAIRS
#include "inline_plan.cuh"
#endif

#ifndef CONSUMER_REGISTERS
#define CONSUMER_REGISTERS 224
#endif
#ifndef PRODUCER_REGISTERS
#define PRODUCER_REGISTERS (CONSUMER_THREADS > 384 ? 40 : 56)
#endif

template <class Gemm, class Weights>
__device__ __forceinline__ void multiply_experts(const Gemm& gemm, const Weights& weights, const Schedule& schedule) {
    Shared& shared = shared_of_block();
    Pipeline pipeline = {shared, shared_address(block_memory)};
    if (threadIdx.x == 0) {
        weights.init();
        for (int s = 0; s < STAGES; s++) {
            init_barrier(pipeline.filled(s), Gemm::kDenseTokens ? 1 : 1 + PRODUCER_THREADS);
            init_barrier(pipeline.emptied(s), BLOCKS * CONSUMER_THREADS / 32);
        }
        for (int i = 0; i < 2; i++) {
            // A lone block's scheduler arrives itself. That it is the leader's warp would do with one arrival; then registers spill.
            init_barrier(pipeline.tile_ready(i), BLOCKS == 1 ? 2 : 1);
            init_barrier(pipeline.tile_read(i), BLOCKS * BLOCK_THREADS / 32);
        }
        publish_barriers();
    }
    if (!Gemm::kTokensAreNew) {
        wait_for_previous_grid();
        if (LOW_RANK > 0) order_writes_before_bulk_copies();  // which the factor may be
        release_next_grid();
    }
#if INLINE_PAIRS
    plan_tiles(schedule, shared);
#else
    if (threadIdx.x / 32 == CONSUMER_THREADS / 32) count_tiles(schedule.expert_offsets, shared);
#endif
    sync_cluster();
    if (threadIdx.x < CONSUMER_THREADS) {
        grow_registers<CONSUMER_REGISTERS>();
        if (Gemm::kTokensAreNew) {
            wait_for_previous_grid();
            release_next_grid();
        }
        consume_ring(gemm, weights, pipeline);
    } else {
        shrink_registers<PRODUCER_REGISTERS>();
        fill_ring(gemm, weights, schedule, pipeline);
    }
    sync_cluster();  // a block's memory must not go while the other may write there
}
