// plan_batch: what the experts' kernels want to know of rows that lie by expert already, in batches of which the first ones count.
//
// Reads  expert_num_tokens [NUM_EXPERTS] i32   clamped to [0, max_tokens]
//
// plan_batch, for the tiles: slots are the rows that count, one after the other. With two plans the tiles are launched in two cuts,
// and here it is decided which of the launches computes: the second from many_from slots an expert on average on, else the first.
// Writes expert_offsets    [plans, NUM_EXPERTS + 1] i32   first slot of each expert; the last is the number of slots; of the plan that
//                                                  is not taken zeros, so that its launch finds no tile
//        row_of_slot       [NUM_EXPERTS * max_tokens] i32   row j of expert e is e * max_tokens + j; slots past the last stay as they are
//        tickets           [plans, TICKETS] u32    zeros, as of sort_by_expert.cu
//
// plan_batch_chunks, for the weight stream: a slot is a row, and those that don't count are in no chunk.
// Writes chunks            [..] Chunk   by expert, then slot; at most min(P, NUM_EXPERTS + P / chunk_tokens) of P = NUM_EXPERTS * max_tokens
//        row_of_slot       [NUM_EXPERTS * max_tokens] i32   the slot itself, of rows that count
//        num_chunks        i32
//
// Grid   NUM_EXPERTS blocks; each plans for its expert.
// Why    Each warp adds up the lower experts by itself: a few words that L2 has, and no block waits for another.
#include "common/async_copy.cuh"

#if !defined(NUM_EXPERTS) || !defined(TICKETS) || !defined(BLOCK_THREADS)
#error "define NUM_EXPERTS, TICKETS and BLOCK_THREADS"
#endif
#define INDEX int
#define INLINE_PAIRS 0
#include "common/expert_plan.cuh"
#include "common/warp.cuh"

struct Batch {
    const int* expert_num_tokens;
    int max_tokens;

    __device__ __forceinline__ int count(int expert) const { return min(max(expert_num_tokens[expert], 0), max_tokens); }

    // Pieces of up to so many rows that the experts below this one have. Whole warps.
    __device__ __forceinline__ int pieces_below(int expert, int rows) const {
        int pieces = 0;
        for (int lower = threadIdx.x % 32; lower < expert; lower += 32) pieces += (count(lower) + rows - 1) / rows;
        return __shfl_sync(FULL_WARP, warp_inclusive_sum(pieces), 31);
    }
};

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
plan_batch(const int* expert_num_tokens, int* expert_offsets, int* row_of_slot, u32* tickets, u64 max_tokens, u64 plans, u64 many_from) {
    wait_for_previous_grid();
    release_next_grid();
    Batch batch = {expert_num_tokens, (int)max_tokens};
    int expert = blockIdx.x, first = batch.pieces_below(expert, 1), count = batch.count(expert);
    int slots = batch.pieces_below(NUM_EXPERTS, 1);
    u32 taken = plans > 1 && (u64)slots >= NUM_EXPERTS * many_from;
    if (threadIdx.x < plans) {
        int* offsets = expert_offsets + threadIdx.x * (NUM_EXPERTS + 1);
        offsets[expert] = threadIdx.x == taken ? first : 0;
        if (expert == NUM_EXPERTS - 1) offsets[NUM_EXPERTS] = threadIdx.x == taken ? slots : 0;
    }
    if (expert == 0 && threadIdx.x < plans * TICKETS) tickets[threadIdx.x] = 0;
    for (int row = threadIdx.x; row < count; row += BLOCK_THREADS) row_of_slot[first + row] = expert * batch.max_tokens + row;
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
plan_batch_chunks(const int* expert_num_tokens, Chunk* chunks, int* row_of_slot, int* num_chunks, u64 max_tokens, u64 chunk_tokens) {
    wait_for_previous_grid();
    release_next_grid();
    Batch batch = {expert_num_tokens, (int)max_tokens};
    int expert = blockIdx.x, first = batch.pieces_below(expert, (int)chunk_tokens), count = batch.count(expert);
    // As few as hold them, of nearly equal size, as those of plan_chunks.cu.
    int of_expert = (count + (int)chunk_tokens - 1) / (int)chunk_tokens, first_slot = expert * batch.max_tokens;
    int tokens = of_expert > 0 ? ((count + of_expert - 1) / of_expert + 7) / 8 * 8 : 0;
    if (threadIdx.x == 0 && expert == NUM_EXPERTS - 1) *num_chunks = first + of_expert;
    for (int index = threadIdx.x; index < of_expert; index += BLOCK_THREADS) {
        int done = index * tokens;
        chunks[first + index] = {expert, first_slot + done, min(count - done, tokens), 0};
    }
    for (int row = threadIdx.x; row < count; row += BLOCK_THREADS) row_of_slot[first_slot + row] = first_slot + row;
}
