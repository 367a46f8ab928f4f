// lora_shrink_chunks: lora_shrink.cu for few tokens: the first of a low-rank adapter's two products, for the chunks of the weight
// stream (common/expert_plan.cuh), just before the projection that takes it.
//
// Reads  rows         [T, DEPTH] SCALAR, by token; not GATHERED: [slots, DEPTH] SCALAR in slot order, written by the grid before
//        factor       [NUM_EXPERTS, RANK, DEPTH] SCALAR; TRANSPOSED: [NUM_EXPERTS, DEPTH, RANK]
//        top_k_index  [T * TOP_K] INDEX           only with INLINE_PAIRS; with HAS_EXPERT_MAP also expert_map of common/pairs.cuh
//        chunks       [..] Chunk, pair_of_slot [T * TOP_K] i32, num_chunks i32   of plan_experts.cu; without INLINE_PAIRS
// Writes low          [slots, RANK] SCALAR   rows in slot order
// Grid   (PIECES * most chunks, RANK / 16). A block owns up to PIECE slots of a chunk and 16 columns; one that has no slots ends
//        as soon as it may.
// Needs  DEPTH % 8 == 0, RANK % 16 == 0, pointers aligned to 16 bytes, sm_80; INLINE_PAIRS as experts_up.cu.
// Maths  fp32: a warp sums every WARPS-th 32 k in ascending order, and the warps' sums are added in theirs. One rounding.
// Why    Few blocks have little to do, so what takes time is one read of memory: all threads of a block read at once, straight
//        into registers. Small, so that a block fits beside one of the projections. Without GATHERED it comes between
//        experts_up and experts_down, and lets experts_down begin before it has waited for experts_up: that has waited for all
//        before it, so what experts_down reads early is complete, and its weights are on their way meanwhile.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(INDEX) || !defined(NUM_EXPERTS) || !defined(TOP_K) || !defined(INLINE_PAIRS) || !defined(TOKENS) || \
    !defined(DEPTH) || !defined(RANK) || !defined(GATHERED) || !defined(TRANSPOSED) || !defined(PIECE) || !defined(WARPS)
#error "define SCALAR, INDEX, NUM_EXPERTS, TOP_K, INLINE_PAIRS, TOKENS, DEPTH, RANK, GATHERED, TRANSPOSED, PIECE and WARPS"
#endif
typedef SCALAR scalar_t;
#include "common/expert_plan.cuh"
#include "common/mma.cuh"
#define BLOCK_THREADS (WARPS * 32)
#define PIECES ((TOKENS + PIECE - 1) / PIECE)  // of a chunk
#define GROUPS (PIECE / 8)                     // of the 8 tokens of a product
#define STEPS ((DEPTH + 31) / 32)
#define STEPS_AT_ONCE (GROUPS == 1 ? 3 : 2)  // of a warp: what 64 registers hold
#define SUMS_PITCH 20                        // no bank conflict between a warp's four token pairs
// So many blocks: where experts_up and experts_down have the other registers of a multiprocessor, and else.
#define REGISTERS_FOR ((!GATHERED && INLINE_PAIRS && HAS_PDL ? 1280 : 1024) / BLOCK_THREADS)
static_assert(DEPTH % 8 == 0 && RANK % 16 == 0 && PIECE % 8 == 0 && PIECE * 8 <= BLOCK_THREADS, "DEPTH, RANK, PIECE");

// What a lane multiplies in a step of 32 k: 8 of them of columns 2c and 2c + 1, c = lane / 4, and of a token in each group.
struct Step {
    Fragment even, odd, tokens[GROUPS];
};

// Zeros from DEPTH on.
__device__ __forceinline__ Fragment load_row(const scalar_t* row, u32 k) {
    return k < DEPTH ? *reinterpret_cast<const Fragment*>(row + k) : Fragment{};
}

// The lane's two columns of a factor, of which `factor` is the first at k = 0.
__device__ __forceinline__ void load_columns(Step& step, const scalar_t* factor, u32 k) {
#if TRANSPOSED
    u32 pairs[8];  // of both columns, at each k
#pragma unroll
    for (int i = 0; i < 8; i++) pairs[i] = k < DEPTH ? *reinterpret_cast<const u32*>(factor + (u64)(k + i) * RANK) : 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        step.even.words[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x5410);
        step.odd.words[i] = __byte_perm(pairs[2 * i], pairs[2 * i + 1], 0x7632);
    }
#else
    step.even = load_row(factor, k);
    step.odd = load_row(factor + DEPTH, k);
#endif
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, REGISTERS_FOR)
lora_shrink_chunks(const scalar_t* rows, const scalar_t* factor, const INDEX* top_k_index, const Chunk* chunks,
                   const int* pair_of_slot, const int* num_chunks, scalar_t* low, u64 num_pairs, const EXPERT_MAP* expert_map) {
    if (GATHERED) wait_for_previous_grid();
    release_next_grid();
#if INLINE_PAIRS
    __shared__ SmallPlan small_plan;
    Plan plan = make_small_plan({top_k_index, (u32)num_pairs, expert_map}, small_plan, nullptr);
#else
    if (!GATHERED) empty_l1();
    Plan plan = {chunks, pair_of_slot, (u32)*num_chunks};
#endif
    Chunk chunk = {};
    if (blockIdx.x / PIECES < plan.num_chunks) chunk = plan.chunks[blockIdx.x / PIECES];
    int first = blockIdx.x % PIECES * PIECE, slots = min(chunk.tokens - first, PIECE);
    factor += (u64)chunk.expert * RANK * DEPTH;
    // As much as the block's columns are; of a TRANSPOSED factor the blocks of a chunk fetch each other's.
    if (slots > 0 && threadIdx.x == 0) prefetch_bulk(factor + blockIdx.y * 16 * DEPTH, 16 * DEPTH * sizeof(scalar_t));
    if (!GATHERED) wait_for_previous_grid();
    if (slots <= 0) return;

    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, column = blockIdx.y * 16 + lane / 4 * 2;
    factor += TRANSPOSED ? column : column * DEPTH;
    first += chunk.first_slot;
    const scalar_t* tokens[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        int slot = first + min(g * 8 + (int)lane / 4, slots - 1);  // again the last one where there are fewer; not stored
        tokens[g] = rows + (u64)(GATHERED ? plan.pair_of_slot[slot] / TOP_K : slot) * DEPTH;
    }
    float sums[GROUPS][4] = {};
    for (u32 begin = warp; begin < STEPS; begin += WARPS * STEPS_AT_ONCE) {
        Step steps[STEPS_AT_ONCE];
#pragma unroll
        for (int s = 0; s < STEPS_AT_ONCE; s++) {
            u32 k = (begin + s * WARPS) * 32 + lane % 4 * 8;
            load_columns(steps[s], factor, k);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) steps[s].tokens[g] = load_row(tokens[g], k);
        }
#pragma unroll
        for (int s = 0; s < STEPS_AT_ONCE; s++) {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) multiply(sums[g], steps[s].even, steps[s].odd, steps[s].tokens[g], scalar_t());
        }
    }

    __shared__ __align__(8) float parts[WARPS][PIECE][SUMS_PITCH];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            store_pack(&parts[warp][g * 8 + lane % 4 * 2 + i][lane / 4 * 2], Pack<float, 2>{sums[g][i], sums[g][2 + i]});
        }
    }
    __syncthreads();
    u32 slot = threadIdx.x / 8, pair = threadIdx.x % 8 * 2;
    if (slot >= (u32)slots) return;
    Pack<float, 2> sum = load_pack<float, 2>(&parts[0][slot][pair]);
#pragma unroll
    for (int w = 1; w < WARPS; w++) {
        Pack<float, 2> more = load_pack<float, 2>(&parts[w][slot][pair]);
        sum.values[0] += more.values[0], sum.values[1] += more.values[1];
    }
    store_pack(low + (u64)(first + slot) * RANK + blockIdx.y * 16 + pair,
               Pack<scalar_t, 2>{from_float<scalar_t>(sum.values[0]), from_float<scalar_t>(sum.values[1])});
}
