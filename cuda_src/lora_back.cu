// lora_back: from the gradient of what an adapter added, each row of which is read once, those of both that were multiplied there:
// of low, a row times its expert's factor; and of the factor, scale * low^T rows over the expert's slots.
//
// Reads  rows           [T, columns] SCALAR, by token_of_slot; not GATHERED: [slots, columns] SCALAR in expert order
//        factor         [E, RANK, columns] SCALAR; TRANSPOSED: [E, columns, RANK]
//        low            [slots, RANK] SCALAR   in expert order, as lora_shrink.cu writes it
//        expert_offsets [E + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu; the latter only where GATHERED
//        weight_of_slot [slots] fp32           multiplies low, which is then rounded again; only where WEIGHTED
// Writes grad_low       [slots, RANK] SCALAR   in expert order; rows from expert_offsets[E] on stay as they are
//        grad_factor    [E, ranks, columns] OUT_SCALAR, by strides in elements; zeros for an expert without slots
// Grid   (CLUSTER, E). A cluster owns an expert; a block of it BLOCK_COLUMNS columns, a warp of that SQUARES * 16.
// Needs  columns % 8 == 0 and columns > (CLUSTER - 1) * BLOCK_COLUMNS, up to all of theirs; RANK % 16 == 0, ranks <= RANK, pointers
//        aligned to 16 bytes, sm_90 or newer.
// Smem   STAGES * (STAGE_BYTES + 8) + 2 * WARPS * STEP_SUMS * 16, and in a cluster INBOXES * (STEP_SUMS * 16 + 16).
// Maths  grad_factor has the bits of lora_outer.cu: fp32 sums, 16 slots at a time in ascending order, times scale, one rounding.
//        grad_low: fp32 sums of a warp's columns in ascending order, of these a block's, of these the cluster's; one rounding.
// Why    One product adds along a row, the other down the columns. A warp keeps to its columns: their part of the factor and of its
//        gradient stay in registers for all of an expert's slots. What it has of low, 64 bytes a slot for rank 16 where it has read
//        up to 352, warps add up in shared memory, and blocks send each other their shares of it.
#include "common/dtypes.cuh"

#if !defined(SCALAR) || !defined(OUT_SCALAR) || !defined(RANK) || !defined(GATHERED) || !defined(WEIGHTED) || \
    !defined(TRANSPOSED) || !defined(WARPS) || !defined(SQUARES) || !defined(CLUSTER) || !defined(STAGES)
#error "define SCALAR, OUT_SCALAR, RANK, GATHERED, WEIGHTED, TRANSPOSED, WARPS, SQUARES, CLUSTER and STAGES"
#endif
typedef SCALAR scalar_t;
#include "common/cluster.cuh"
#include "common/low_rank.cuh"
#define BLOCK_THREADS (WARPS * 32)
#define BLOCK_COLUMNS (WARPS * SQUARES * 16)
#define STEP 16                    // slots of a stage
#define WARP_SLOTS (STEP / WARPS)  // whose rows a warp orders
#define ROW_PITCH PITCH(BLOCK_COLUMNS)
#define LOW_PITCH (RANK * 2)
#define ROWS_BYTES (STEP * ROW_PITCH)
#define STAGE_BYTES (ROWS_BYTES + STEP * LOW_PITCH)
#define STEP_SUMS (STEP * RANK / 4)  // of low, in fours
#define SHARE (STEP_SUMS / CLUSTER)  // of a block, which adds those of all blocks
#define INBOXES 4                    // each for the blocks' sums of a step; none where there is one block
#define LAG 2                        // steps until a block adds them
static_assert(RANK % 16 == 0 && STEP % WARPS == 0 && STEP_SUMS % CLUSTER == 0 && STAGES >= 2, "RANK, WARPS, CLUSTER, STAGES");

typedef Pack<float, 4> Four;

extern __shared__ __align__(16) unsigned char memory[];

__device__ __forceinline__ void add(Four& sum, const Four& part) {
#pragma unroll
    for (int i = 0; i < 4; i++) sum.values[i] += part.values[i];
}

// Zeros in shared memory; both places % 16 == 0.
__device__ __forceinline__ void clear(u32 from, u32 past) {
#pragma unroll 1
    for (u32 at = from + threadIdx.x * 16; at < past; at += BLOCK_THREADS * 16) *reinterpret_cast<Four*>(memory + at) = {};
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(BLOCK_THREADS, 8 / WARPS)
lora_back(const scalar_t* rows, const scalar_t* factor, const scalar_t* low, const int* expert_offsets, const int* token_of_slot,
          const float* weight_of_slot, scalar_t* grad_low, OUT_SCALAR* grad_factor, u64 scale_bits, u64 ranks, u64 columns,
          u64 expert_stride, u64 rank_stride, u64 column_stride) {
    Four* warp_sums = reinterpret_cast<Four*>(memory + STAGES * STAGE_BYTES);  // [2][WARPS][STEP_SUMS], by turns
    Four* inboxes = warp_sums + 2 * WARPS * STEP_SUMS;                         // [INBOXES][CLUSTER][SHARE]
    u32 shared = shared_address(memory), barriers = shared_address(CLUSTER > 1 ? inboxes + INBOXES * STEP_SUMS : inboxes);
    u32 filled = barriers + STAGES * 8, emptied = filled + INBOXES * 8;  // the inboxes here; the same inbox of every block
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; i++) init_barrier(barriers + i * 8, WARPS);
        for (u32 i = 0; CLUSTER > 1 && i < INBOXES; i++) {
            init_barrier(filled + i * 8, 1);
            init_barrier(emptied + i * 8, CLUSTER);
        }
        publish_barriers();
    }
    if (CLUSTER > 1) sync_cluster();
    wait_for_previous_grid();
    order_writes_before_bulk_copies();
    release_next_grid();
    u32 expert = blockIdx.y, first_column = blockIdx.x * BLOCK_COLUMNS;
    u32 first = expert_offsets[expert], slots = expert_offsets[expert + 1] - first, steps = (slots + STEP - 1) / STEP;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    // Each warp orders the copies of some of a stage's rows, a lane each. Where that row is, it looks up one step before.
    u32 line = warp * WARP_SLOTS + lane, row_bytes = min((u32)columns - first_column, (u32)BLOCK_COLUMNS) * 2, next_row;
    u64 policy = evict_unchanged_policy();
    auto look_up = [&](u32 step) {
        u32 slot = step * STEP + line;
        next_row = lane >= WARP_SLOTS || slot >= slots ? 0 : GATHERED ? token_of_slot[first + slot] : first + slot;
    };
    auto load = [&](u32 step) {
        u32 to = shared + step % STAGES * STAGE_BYTES, barrier = barriers + step % STAGES * 8;
        u32 from = step * STEP, lines = min(slots - from, (u32)STEP);
        if (lane == 0) {
            u32 low_bytes = warp == 0 ? lines * LOW_PITCH : 0;
            arrive_expecting(barrier, min((u32)WARP_SLOTS, lines - min(line, lines)) * row_bytes + low_bytes);
            if (warp == 0) copy_bulk(to + ROWS_BYTES, low + (u64)(first + from) * RANK, low_bytes, barrier, policy);
        }
        __syncwarp();
        if (lane < WARP_SLOTS && line < lines) {
            copy_bulk(to + line * ROW_PITCH, rows + next_row * columns + first_column, row_bytes, barrier, policy);
        }
        look_up(step + 1);
    };
    for (int i = 0; i < STAGES * STEP; i++) {  // columns that are none: no copy writes there
        u32 at = i / STEP * STAGE_BYTES + i % STEP * ROW_PITCH;
        clear(at + row_bytes, at + BLOCK_COLUMNS * 2);
    }
    __syncthreads();
    look_up(0);
    for (u32 step = 0; step < min(steps, (u32)STAGES - 1); step++) load(step);

    // The factor of the warp's columns, as the right operand of low's product.
    u32 of_warp = warp * SQUARES * 16;
    Square factors[SQUARES][RANK / 16];
    factor += (u64)expert * RANK * columns;
#pragma unroll
    for (int n = 0; n < SQUARES; n++) {
#pragma unroll
        for (int m = 0; m < RANK / 16; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 rank = m * 16 + i / 2 * 8 + lane / 4, column = first_column + of_warp + n * 16 + i % 2 * 8 + lane % 4 * 2;
                u32& word = factors[n][m].words[i];
                if (column >= columns) {
                    word = 0;
                } else if (TRANSPOSED) {
                    const scalar_t* from = factor + (u64)column * RANK + rank;
                    word = from[0].bits | (u32)from[RANK].bits << 16;
                } else {
                    word = *reinterpret_cast<const u32*>(factor + rank * columns + column);
                }
            }
        }
    }

    // Sums of low lie in the order of the threads that have them: by 16 ranks, half of the slots and lane. A four is of one slot,
    // ranks 2 q, 2 q + 1, 2 q + 8 and 2 q + 9.
    auto store_low = [&](u32 step, u32 index, const Four& four) {
        u32 slot = step * STEP + index / 32 % 2 * 8 + index % 32 / 4, rank = index / 64 * 16 + index % 4 * 2;
        if (slot >= slots) return;
        scalar_t* to = grad_low + (u64)(first + slot) * RANK + rank;
        store_pack(to, Pack<scalar_t, 2>{from_float<scalar_t>(four.values[0]), from_float<scalar_t>(four.values[1])});
        store_pack(to + 8, Pack<scalar_t, 2>{from_float<scalar_t>(four.values[2]), from_float<scalar_t>(four.values[3])});
    };
    // This block's share of the cluster's sums of a step, by one warp.
    auto add_blocks = [&](u32 step) {
        u32 inbox = step % INBOXES;
        if (warp != step % WARPS) return;
        wait_barrier(filled + inbox * 8, step / INBOXES % 2);
        for (u32 i = lane; i < SHARE; i += 32) {
            const Four* parts = inboxes + inbox * STEP_SUMS + i;
            Four sum = parts[0];
#pragma unroll
            for (int other = 1; other < CLUSTER; other++) add(sum, parts[other * SHARE]);
            store_low(step, blockIdx.x * SHARE + i, sum);
        }
        __syncwarp();
        if (lane < CLUSTER) arrive_in_block(emptied + inbox * 8, lane);
    };
    // The block's sums of a step, which go to the blocks whose share they are.
    auto add_warps = [&](u32 step) {
        u32 inbox = step % INBOXES;
        for (u32 i = threadIdx.x; i < STEP_SUMS; i += BLOCK_THREADS) {
            const Four* parts = warp_sums + step % 2 * (WARPS * STEP_SUMS) + i;
            Four sum = parts[0];
#pragma unroll
            for (int other = 1; other < WARPS; other++) add(sum, parts[other * STEP_SUMS]);
            if (CLUSTER == 1) {
                store_low(step, i, sum);
                continue;
            }
            if (step >= INBOXES) wait_barrier(emptied + inbox * 8, step / INBOXES % 2 ^ 1);
            u32 place = shared_address(inboxes + inbox * STEP_SUMS + blockIdx.x * SHARE + i % SHARE);
            store_in_block(place, reinterpret_cast<const u32(&)[4]>(sum), filled + inbox * 8, i / SHARE);
        }
        if (CLUSTER == 1) return;
        if (threadIdx.x == 0) arrive_expecting(filled + inbox * 8, STEP_SUMS * 16);
        if (step >= LAG) add_blocks(step - LAG);
    };

    float weights[4];
    auto load_weights = [&](u32 step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 slot = step * STEP + i / 2 * 8 + lane % 4 * 2 + i % 2;
            weights[i] = slot < slots ? weight_of_slot[first + slot] : 0.0f;
        }
    };
    if (WEIGHTED) load_weights(0);
    SquareSums outer[RANK / 16][SQUARES] = {};
#pragma unroll 1
    for (u32 step = 0; step < steps; step++) {
        u32 at = step % STAGES * STAGE_BYTES, lines = min(slots - step * STEP, (u32)STEP);
        wait_barrier(barriers + step % STAGES * 8, step / STAGES % 2);
        if (lines < STEP) {
            clear(at + lines * ROW_PITCH, at + ROWS_BYTES);
            clear(at + ROWS_BYTES + lines * LOW_PITCH, at + STAGE_BYTES);
        }
        __syncthreads();  // zeros and the warps' sums are there, and nobody still reads the stage that is filled next
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        if (step > 0) add_warps(step - 1);

        u32 from = shared + at;
        Square lows[RANK / 16];
#pragma unroll
        for (int m = 0; m < RANK / 16; m++) {
            lows[m] = load_square<true, true>(from + ROWS_BYTES + m * 32, LOW_PITCH);
            if (WEIGHTED) weight_slots(lows[m], weights);
        }
        if (WEIGHTED) load_weights(step + 1);
        SquareSums narrow[RANK / 16] = {};
#pragma unroll
        for (int n = 0; n < SQUARES; n++) {
            u32 square = from + (of_warp + n * 16) * 2;
            Square slots_first = load_square<true, false>(square, ROW_PITCH);
            Square columns_first = load_square<false, true>(square, ROW_PITCH);
#pragma unroll
            for (int m = 0; m < RANK / 16; m++) {
                multiply_squares(narrow[m], slots_first, factors[n][m], scalar_t());
                multiply_squares(outer[m][n], lows[m], columns_first, scalar_t());
            }
        }
        Four* to = warp_sums + (step % 2 * WARPS + warp) * STEP_SUMS + lane;
#pragma unroll
        for (int m = 0; m < RANK / 16; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float *low_ranks = narrow[m].values[0] + half * 2, *high_ranks = narrow[m].values[1] + half * 2;
                to[(m * 2 + half) * 32] = {low_ranks[0], low_ranks[1], high_ranks[0], high_ranks[1]};
            }
        }
    }
    if (steps > 0) {
        __syncthreads();
        add_warps(steps - 1);
    }
    if (CLUSTER > 1) {
        for (u32 step = max(steps, (u32)LAG) - LAG; step < steps; step++) add_blocks(step);
        arrive_at_cluster();
    }
    store_factor_gradient(grad_factor + expert * expert_stride, outer, __uint_as_float((u32)scale_bits), first_column + of_warp,
                          ranks, columns, rank_stride, column_stride);
    if (CLUSTER > 1) wait_for_cluster();  // a block's memory must not go while another may arrive there
}
