// Which tokens go to which expert: slots are the kept (token, k) pairs ordered by expert, then by pair, and a chunk is up
// to TOKENS neighbouring slots of one expert. A masked pair (its expert is not one of the NUM_EXPERTS here) has no slot.
#pragma once
#include "pairs.cuh"

struct alignas(16) Chunk {
    int expert;
    int first_slot;
    int tokens;
    int unused;
};

struct Plan {
    const Chunk* chunks;
    const int* pair_of_slot;
    u32 num_chunks;
};

#if INLINE_PAIRS
// The plan of up to INLINE_PAIRS pairs, made by every block for itself: cheaper than a launch before it.
struct SmallPlan {
    alignas(16) u32 keys[INLINE_PAIRS];        // expert * INLINE_PAIRS + pair; ~0: masked
    alignas(16) u32 first_keys[INLINE_PAIRS];  // the same for the first pair of each chunk; ~0: others
    Chunk chunks[INLINE_PAIRS];
    int pair_of_slot[INLINE_PAIRS];
};

__device__ __forceinline__ Plan make_small_plan(const Routing& routing, SmallPlan& plan, int* slot_of_pair) {
    u32 pair = threadIdx.x, num_pairs = routing.num_pairs;
    int expert = routing.expert_of(pair);
    u32 key = expert < 0 ? ~0u : expert * INLINE_PAIRS + pair;
    if (pair < INLINE_PAIRS) plan.keys[pair] = key;
    __syncthreads();
    u32 slot = 0, of_expert = 0, rank = 0;
    if (expert >= 0) {
        for (u32 i = 0; i < num_pairs; i += 4) {
            Pack<u32, 4> others = load_pack<u32, 4>(plan.keys + i);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                bool earlier = i + j < num_pairs && others.values[j] < key;
                bool same = i + j < num_pairs && others.values[j] / INLINE_PAIRS == (u32)expert;
                slot += earlier, of_expert += same, rank += earlier && same;
            }
        }
        plan.pair_of_slot[slot] = pair;
    }
    if (slot_of_pair && pair < num_pairs) slot_of_pair[pair] = expert < 0 ? -1 : (int)slot;
    bool first = expert >= 0 && rank % TOKENS == 0;
    if (pair < INLINE_PAIRS) plan.first_keys[pair] = first ? key : ~0u;
    u32 num_chunks = __syncthreads_count(first);
    if (first) {
        u32 index = 0;
        for (u32 i = 0; i < num_pairs; i += 4) {
            Pack<u32, 4> others = load_pack<u32, 4>(plan.first_keys + i);
#pragma unroll
            for (int j = 0; j < 4; j++) index += i + j < num_pairs && others.values[j] < key;
        }
        plan.chunks[index] = {expert, (int)slot, (int)min(of_expert - rank, (u32)TOKENS), 0};
    }
    __syncthreads();
    return {plan.chunks, plan.pair_of_slot, num_chunks};
}
#endif
