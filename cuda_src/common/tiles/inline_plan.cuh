// The plan of a call of up to INLINE_PAIRS pairs, made by every block of a tile kernel for itself: cheaper than a launch before it.
//
// Slots are in the order of sort_by_expert.cu. A key is an expert and a pair of it, so a pair's slot is how many keys are less than
// its own, and an expert's first slot how many are less than all that it could have. No expert has more slots than a tile.
#pragma once
#include "schedule.cuh"

static_assert(BLOCKS == 1, "tickets are dealt to blocks");
static_assert(INLINE_PAIRS <= TILE_SLOTS && INLINE_PAIRS % 4 == 0 && INLINE_PAIRS < BLOCK_THREADS, "INLINE_PAIRS");

// Fills first_slot, first_tile and pair_of_slot. The whole block, which has all of them after its next barrier.
__device__ __forceinline__ void plan_tiles(const Schedule& schedule, Shared& shared) {
    u32 pair = threadIdx.x, num_pairs = schedule.routing.num_pairs;
    int expert = schedule.routing.expert_of(pair);
    u32 key = expert < 0 ? ~0u : expert * INLINE_PAIRS + pair;
    if (pair < INLINE_PAIRS) shared.keys[pair] = key;
    __syncthreads();
    auto keys_below = [&](u32 bound) {
        int below = 0;
        for (u32 i = 0; i < num_pairs; i += 4) {
            Pack<u32, 4> some = load_pack<u32, 4>(shared.keys + i);
#pragma unroll
            for (int j = 0; j < 4; j++) below += some.values[j] < bound;
        }
        return below;
    };
    if (pair < num_pairs) {
        int slot = expert < 0 ? -1 : keys_below(key);
        if (slot >= 0) shared.pair_of_slot[slot] = pair;
        if (schedule.slot_of_pair && blockIdx.x == 0) schedule.slot_of_pair[pair] = slot;
    }
    for (int e = (int)threadIdx.x - INLINE_PAIRS; e >= 0 && e <= NUM_EXPERTS; e += BLOCK_THREADS - INLINE_PAIRS) {
        shared.first_slot[e] = keys_below(e * INLINE_PAIRS);
    }
    __syncthreads();
    if (threadIdx.x / 32 != CONSUMER_THREADS / 32) return;
    u32 lane = threadIdx.x % 32;
    int tiles = 0;
#pragma unroll 4
    for (u32 base = 0; base < NUM_EXPERTS; base += 32) {
        u32 e = base + lane;
        u32 hit = __ballot_sync(FULL_WARP, e < NUM_EXPERTS && shared.first_slot[e + 1] > shared.first_slot[e]);
        if (e < NUM_EXPERTS) shared.first_tile[e] = tiles + __popc(hit & ((1u << lane) - 1));
        tiles += __popc(hit);
    }
    if (lane == 0) shared.first_tile[NUM_EXPERTS] = tiles;
}
