// lora_outer: for each expert, scale * low^T rows over its slots: the gradient of a factor of a low-rank adapter.
//
// Reads  low            [slots, RANK] SCALAR   in expert order, as lora_shrink.cu writes it
//        rows           [T, columns] SCALAR, by token_of_slot; not GATHERED: [slots, columns] SCALAR in expert order
//        expert_offsets [E + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu; the latter only where GATHERED
//        weight_of_slot [slots] fp32           multiplies low, which is then rounded again; only where WEIGHTED
// Writes output         [E, ranks, columns] OUT_SCALAR, by strides in elements; zeros for an expert without slots
// Grid   (ceil(columns / COLUMNS), E). A block owns COLUMNS columns of one expert.
// Needs  columns % 8 == 0, RANK % 16 == 0, ranks <= RANK, rows and low aligned to 16 bytes, sm_80 or newer.
// Smem   STAGES * STAGE_BYTES.
// Maths  fp32 sums, 16 slots at a time in ascending order, times scale, rounded once at the store.
// Why    One owner for each element, and all of an expert's slots in one chain: the same bits every run, and no second pass.
//        Both operands lie in memory with slots as rows, which is how ldmatrix transposes them. By strides, because PEFT keeps
//        factors in orders of its own.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(OUT_SCALAR) || !defined(RANK) || !defined(GATHERED) || !defined(WEIGHTED) || \
    !defined(COLUMNS) || !defined(STAGES)
#error "define SCALAR, OUT_SCALAR, RANK, GATHERED, WEIGHTED, COLUMNS and STAGES"
#endif
typedef SCALAR scalar_t;
#include "common/low_rank.cuh"
#define WARP_COLUMNS 32
#define BLOCK_THREADS (COLUMNS / WARP_COLUMNS * 32)
#define STEP 32              // slots of a stage
#define PACKS (COLUMNS / 8)  // of a row
#define LOW_PACKS (RANK / 8)
#define ROWS_PER_PASS (BLOCK_THREADS / PACKS)
#define PASSES (STEP / ROWS_PER_PASS)
#define ROW_PITCH PITCH(COLUMNS)
#define LOW_PITCH PITCH(RANK)
#define ROWS_BYTES (STEP * ROW_PITCH)
#define LOW_BYTES (STEP * LOW_PITCH)
#define STAGE_BYTES (ROWS_BYTES + LOW_BYTES + (WEIGHTED ? STEP * 4 : 0))
static_assert(RANK % 16 == 0 && COLUMNS % WARP_COLUMNS == 0 && STAGES >= 2, "RANK, COLUMNS, STAGES");

extern __shared__ __align__(16) unsigned char ring[];

// 4 bytes; zeros where bytes is 0.
__device__ __forceinline__ void copy_word(u32 destination, const void* source, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(bytes) : "memory");
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
lora_outer(const scalar_t* low, const scalar_t* rows, const int* expert_offsets, const int* token_of_slot,
           const float* weight_of_slot, OUT_SCALAR* output, u64 scale_bits, u64 ranks, u64 columns, u64 expert_stride,
           u64 rank_stride, u64 column_stride) {
    wait_for_previous_grid();
    release_next_grid();
    u32 expert = blockIdx.y, first_column = blockIdx.x * COLUMNS;
    u32 first = expert_offsets[expert], slots = expert_offsets[expert + 1] - first;

    // A thread copies a pack of every ROWS_PER_PASS-th slot's row. Where that row is, it looks up one step before it needs it.
    u32 line = threadIdx.x / PACKS, pack = threadIdx.x % PACKS;
    bool has_pack = first_column + pack * 8 < columns;
    rows += first_column + pack * 8;
    u32 next_rows[PASSES];
    auto look_up = [&](u32 step) {
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            u32 slot = step * STEP + line + i * ROWS_PER_PASS;
            next_rows[i] = slot >= slots ? 0 : GATHERED ? token_of_slot[first + slot] : first + slot;
        }
    };
    u32 shared = shared_address(ring);
    u64 policy = evict_unchanged_policy();
    auto load = [&](u32 step, u32 stage) {
        u32 to = shared + stage * STAGE_BYTES, from = step * STEP;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            u32 slot = line + i * ROWS_PER_PASS;
            bool wanted = has_pack && from + slot < slots;
            copy_pack(to + slot * ROW_PITCH + pack * 16, rows + next_rows[i] * columns, wanted ? 16 : 0, policy);
        }
        look_up(step + 1);
        to += ROWS_BYTES;
#pragma unroll
        for (u32 index = threadIdx.x; index < STEP * LOW_PACKS; index += BLOCK_THREADS) {
            u32 slot = index / LOW_PACKS, place = index % LOW_PACKS;
            const scalar_t* source = low + (u64)(first + from + slot) * RANK + place * 8;
            copy_pack(to + slot * LOW_PITCH + place * 16, source, from + slot < slots ? 16 : 0, policy);
        }
        if (WEIGHTED && threadIdx.x < STEP) {
            u32 slot = from + threadIdx.x;
            copy_word(to + LOW_BYTES + threadIdx.x * 4, weight_of_slot + first + slot, slot < slots ? 4 : 0);
        }
    };

    u32 lane = threadIdx.x % 32, of_warp = threadIdx.x / 32 * WARP_COLUMNS;
    SquareSums sums[RANK / 16][WARP_COLUMNS / 16] = {};
    look_up(0);
    run_ring((slots + STEP - 1) / STEP, load, [&](u32 stage) {
        u32 from = shared + stage * STAGE_BYTES;
        const unsigned char* weights = ring + stage * STAGE_BYTES + ROWS_BYTES + LOW_BYTES;
#pragma unroll
        for (int k = 0; k < STEP; k += 16) {
            Square rights[WARP_COLUMNS / 16];
#pragma unroll
            for (int n = 0; n < WARP_COLUMNS / 16; n++) {
                rights[n] = load_square<false, true>(from + k * ROW_PITCH + (of_warp + n * 16) * 2, ROW_PITCH);
            }
#pragma unroll
            for (int m = 0; m < RANK / 16; m++) {
                Square left = load_square<true, true>(from + ROWS_BYTES + k * LOW_PITCH + m * 32, LOW_PITCH);
                if (WEIGHTED) {
                    const float* of_lane = (const float*)weights + k + lane % 4 * 2;
                    weight_slots(left, {of_lane[0], of_lane[1], of_lane[8], of_lane[9]});
                }
#pragma unroll
                for (int n = 0; n < WARP_COLUMNS / 16; n++) multiply_squares(sums[m][n], left, rights[n], scalar_t());
            }
        }
    });

    store_factor_gradient(output + expert * expert_stride, sums, __uint_as_float((u32)scale_bits), first_column + of_warp, ranks,
                          columns, rank_stride, column_stride);
}
