// lora_shrink: each slot's row times the transposed factor of its expert, the first of a low-rank adapter's two products.
//
// Reads  rows           [T, depth] SCALAR, by token_of_slot; not GATHERED: [slots, depth] SCALAR in expert order
//        factor         [E, RANK, depth] SCALAR; TRANSPOSED: [E, depth, RANK]
//        expert_offsets [E + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu; the latter only where GATHERED
// Writes low            [slots, RANK] SCALAR   in expert order; rows from expert_offsets[E] on stay as they are
// Grid   slots / SLOTS + E. A block owns up to SLOTS slots of one expert. Expert e has the blocks from expert_offsets[e] / SLOTS
//        + e on: enough for its slots wherever they begin; those that are left over end at once.
// Needs  depth % 8 == 0, RANK % 16 == 0, pointers aligned to 16 bytes, E >= 1, sm_80 or newer.
// Smem   STAGES * STAGE_BYTES.
// Maths  fp32 sums over ascending k, one rounding at the store.
// Why    Reading the rows through L2 is the floor: an expert's factor is read once for SLOTS of them, and small blocks, several on
//        a multiprocessor, keep many copies on their way.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(RANK) || !defined(GATHERED) || !defined(TRANSPOSED) || !defined(SLOTS) || !defined(STAGES)
#error "define SCALAR, RANK, GATHERED, TRANSPOSED, SLOTS and STAGES"
#endif
typedef SCALAR scalar_t;
#include "common/squares.cuh"
#define BLOCK_THREADS (SLOTS * 2)  // a warp for each 16 slots
#define STEP 64                    // k of a stage
#define PACKS (STEP / 8)           // of a row in a stage
#define ROW_PITCH PITCH(STEP)
#define FACTOR_PITCH PITCH(TRANSPOSED ? RANK : STEP)
#define ROWS_BYTES (SLOTS * ROW_PITCH)
#define STAGE_BYTES (ROWS_BYTES + (TRANSPOSED ? STEP : RANK) * FACTOR_PITCH)
#define ROWS_PER_PASS (BLOCK_THREADS / PACKS)
#define PASSES (SLOTS / ROWS_PER_PASS)
static_assert(RANK % 16 == 0 && SLOTS % 16 == 0 && STAGES >= 2, "RANK, SLOTS, STAGES");

extern __shared__ __align__(16) unsigned char ring[];

// The last expert whose blocks begin at or before this one. All threads of the block.
__device__ __forceinline__ u32 expert_of_block(const int* expert_offsets, u32 num_experts) {
    u32 expert = 0;
    for (u32 base = 1; base < num_experts; base += BLOCK_THREADS) {
        u32 other = base + threadIdx.x;
        expert += __syncthreads_count(other < num_experts && expert_offsets[other] / SLOTS + other <= blockIdx.x);
    }
    return expert;
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
lora_shrink(const scalar_t* rows, const scalar_t* factor, const int* expert_offsets, const int* token_of_slot, scalar_t* low,
            u64 num_experts, u64 depth) {
    wait_for_previous_grid();
    release_next_grid();
    u32 expert = expert_of_block(expert_offsets, num_experts);
    u32 first = expert_offsets[expert], past = expert_offsets[expert + 1];
    u32 slot = first + (blockIdx.x - (first / SLOTS + expert)) * SLOTS;
    if (slot >= past) return;
    u32 slots = min(past - slot, SLOTS);
    factor += expert * RANK * depth;

    // A thread copies a pack of every ROWS_PER_PASS-th row; of rows that are none it makes zeros.
    u32 row = threadIdx.x / PACKS, pack = threadIdx.x % PACKS;
    const scalar_t* sources[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; i++) {
        u32 of_tile = slot + min(row + i * ROWS_PER_PASS, slots - 1);
        sources[i] = rows + (u64)(GATHERED ? token_of_slot[of_tile] : of_tile) * depth + pack * 8;
    }
    u32 shared = shared_address(ring);
    u64 policy = evict_unchanged_policy();
    auto load = [&](u32 step, u32 stage) {
        u32 to = shared + stage * STAGE_BYTES, from = step * STEP;
        bool inside = from + pack * 8 < depth;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            u32 line = row + i * ROWS_PER_PASS;
            copy_pack(to + line * ROW_PITCH + pack * 16, sources[i] + from, inside && line < slots ? 16 : 0, policy);
        }
        to += ROWS_BYTES;
#pragma unroll
        for (u32 index = threadIdx.x; index < RANK * PACKS; index += BLOCK_THREADS) {
            constexpr u32 kPacks = TRANSPOSED ? RANK / 8 : PACKS;
            u32 line = index / kPacks, place = index % kPacks;
            u32 k = from + (TRANSPOSED ? line : place * 8);
            const scalar_t* source = TRANSPOSED ? factor + (u64)k * RANK + place * 8 : factor + line * depth + k;
            copy_pack(to + line * FACTOR_PITCH + place * 16, source, k < depth ? 16 : 0, policy);
        }
    };

    u32 of_warp = threadIdx.x / 32 * 16;  // the first of the warp's slots
    SquareSums sums[RANK / 16] = {};
    run_ring((depth + STEP - 1) / STEP, load, [&](u32 stage) {
        u32 from = shared + stage * STAGE_BYTES;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            Square left = load_square<true, false>(from + of_warp * ROW_PITCH + k * 2, ROW_PITCH);
#pragma unroll
            for (int j = 0; j < RANK; j += 16) {
                u32 place = TRANSPOSED ? k * FACTOR_PITCH + j * 2 : j * FACTOR_PITCH + k * 2;
                Square right = load_square<false, TRANSPOSED>(from + ROWS_BYTES + place, FACTOR_PITCH);
                multiply_squares(sums[j / 16], left, right, scalar_t());
            }
        }
    });

    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        u32 line = of_warp + lane / 4 + half * 8;
        if (line >= slots) continue;
        scalar_t* to = low + (u64)(slot + line) * RANK + lane % 4 * 2;
#pragma unroll
        for (int eight = 0; eight < RANK / 8; eight++) {
            const float* pair = sums[eight / 2].values[eight % 2] + half * 2;
            store_pack(to + eight * 8, Pack<scalar_t, 2>{from_float<scalar_t>(pair[0]), from_float<scalar_t>(pair[1])});
        }
    }
}
