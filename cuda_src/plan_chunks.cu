// plan_chunks: the chunks of common/expert_plan.cuh, for pairs that sort_by_expert.cu has sorted.
//
// Reads  expert_offsets [NUM_EXPERTS + 1] i32   first slot of each expert, and the number of all slots
// Writes chunks         [..] Chunk   by expert, then slot; at most min(P, NUM_EXPERTS + P / TOKENS) of them for P pairs
//        num_chunks     i32
// Grid   1 block of WARPS * 32 threads.
// Smem   NUM_EXPERTS + 1 counters of 4 bytes.
// Why    An expert's slots are cut into as few chunks as hold them, of nearly equal size: one of few tokens would cost a pass
//        over the weights as others do. A thread makes a chunk, so that one expert may have all of them.
#include "common/async_copy.cuh"

#if !defined(NUM_EXPERTS) || !defined(TOKENS) || !defined(WARPS)
#error "define NUM_EXPERTS, TOKENS and WARPS"
#endif
#define INDEX int
#define INLINE_PAIRS 0
#include "common/expert_plan.cuh"
#include "common/warp.cuh"
#define BLOCK_THREADS (WARPS * 32)
static_assert(TOKENS % 8 == 0, "a chunk's size is rounded to tensor-core blocks of 8 tokens");

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
plan_chunks(const int* expert_offsets, Chunk* __restrict__ chunks, int* __restrict__ num_chunks) {
    __shared__ int first_chunks[NUM_EXPERTS + 1];  // of each expert; then the number of all
    wait_for_previous_grid();
    release_next_grid();
    if (threadIdx.x < 32) {
        int total = warp_exclusive_sums(
            NUM_EXPERTS,
            [&](int expert) { return (expert_offsets[expert + 1] - expert_offsets[expert] + TOKENS - 1) / TOKENS; },
            [&](int expert, int sum) { first_chunks[expert] = sum; });
        if (threadIdx.x == 0) first_chunks[NUM_EXPERTS] = total, *num_chunks = total;
    }
    __syncthreads();
    for (int index = threadIdx.x; index < first_chunks[NUM_EXPERTS]; index += BLOCK_THREADS) {
        int expert = 0, end = NUM_EXPERTS;  // the last expert whose first chunk is not past this one
        while (end - expert > 1) {
            int middle = (expert + end) / 2;
            if (first_chunks[middle] <= index) expert = middle;
            else end = middle;
        }
        int slots = expert_offsets[expert + 1] - expert_offsets[expert], of_expert = first_chunks[expert + 1] - first_chunks[expert];
        int tokens = ((slots + of_expert - 1) / of_expert + 7) / 8 * 8, done = (index - first_chunks[expert]) * tokens;
        chunks[index] = {expert, expert_offsets[expert] + done, min(slots - done, tokens), 0};
    }
}
