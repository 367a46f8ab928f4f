// The producer warps of a tile kernel: token rows and weights, into a ring of STAGES stages of BLOCK_K k.
//
// Token rows come, wherever they lie, by 16-byte copies, or by the copy engine where they are neighbours; weights by the copy
// engine.
//
// Cache  Where tokens are gathered, an expert's mean number of slots decides what L2 holds on to. Below WEIGHTS_ONCE_BELOW
//        weights go first: each is wanted once, and what the next grid reads stays. From there to TOKENS_KEPT_BELOW tokens
//        stay: other experts want them again. Each is 1 to 2% of a call on plain weights there, and both together less than either.
//
// Of a Gemm it wants kDenseTokens (slots are token rows) and their map, or the Loader of token rows that lie anywhere and what that wants,
// and kTokensAreNew (the grid before writes the token rows, and nothing else that is read here); of Weights adapter, and load(), with
// which one thread orders a stage's part of them and says how many bytes will arrive.
#pragma once
#include "../tensor_copy.cuh"
#include "../warpgroup.cuh"
#include "schedule.cuh"

#define WEIGHTS_ONCE_BELOW 80
#define TOKENS_KEPT_BELOW 176
#define BLOCK_SLOTS (TILE_SLOTS / BLOCKS)
#define ROWS_PER_PASS (PRODUCER_THREADS / 8)
#define PASSES (BLOCK_SLOTS / ROWS_PER_PASS)
#define LINES (BLOCK_K * 2 / ROW_BYTES)  // of 128 bytes, that a stage has of a token row: tiles one after the other
#define LINE_BYTES (BLOCK_SLOTS * ROW_BYTES)
#ifndef BOX_SLOTS
#define BOX_SLOTS 64  // that the copy engine brings together
#endif
static_assert(BLOCK_K * 2 % ROW_BYTES == 0, "BLOCK_K");

// Of an adapter, where there is one. low comes as token rows do: by the copy engine where these are dense, else by address. Where
// 16-byte copies fill the other stages, boxes of the copy engine took 160 us of 4096 tokens' 680.
struct Adapter {
    const TensorMap* factor;
    const TensorMap* low_map;
    const SCALAR* low;
};

// Brings near what a tile's slots have of an array of 4 bytes each. One warp.
__device__ __forceinline__ void prefetch_of_slots(const int* first, int slots) {
    int slot = threadIdx.x % 32 * 32;
    if (slot < slots + 31) asm volatile("prefetch.global.L1 [%0];" ::"l"(first + min(slot, slots - 1)));
}

// The token rows of a tile, each thread one 16-byte pack of every ROWS_PER_PASS-th row. It makes their addresses anew for each stage, as
// these would take more registers than it has.
template <class Gemm> struct RowLoader {
    u32 rows[PASSES], passes, offset;
    const unsigned char* source;

    // A pass that starts before the last slot is done in full: its rows past that one repeat it.
    __device__ __forceinline__ RowLoader(const Gemm& gemm, const Tile& tile, u32 thread) {
        u32 row = thread / 8, pack = thread % 8;
        passes = (tile.slots + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
        offset = row * ROW_BYTES + (pack ^ row % 8) * 16;
        source = reinterpret_cast<const unsigned char*>(gemm.tokens + pack * 8);
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            rows[i] = i < passes ? gemm.row(tile.first_slot + min((int)row + i * ROWS_PER_PASS, tile.slots - 1)) : 0;
        }
    }

    __device__ __forceinline__ void load(u32 stage, u32 step, u64 policy) const {
        static_assert(LINES == 1, "a thread has one pack of a row");
        const unsigned char* step_source = source + step * ROW_BYTES;
        u32 bytes = Gemm::kDepth % BLOCK_K == 0 || step * BLOCK_K + threadIdx.x % 8 * 8 < Gemm::kDepth ? 16 : 0;
        u32 to = stage + offset;
#pragma unroll
        for (int i = 0; i < PASSES; i += 4, to += 4 * ROWS_PER_PASS * ROW_BYTES) {
            const void* sources[4];
#pragma unroll
            for (int j = 0; j < 4; j++) sources[j] = step_source + (u64)rows[i + j] * (Gemm::kDepth * sizeof(SCALAR));
            if (i + 4 <= passes) {
                copy_4_packs<ROWS_PER_PASS * ROW_BYTES>(to, sources, bytes, policy);
                continue;
            }
#pragma unroll
            for (int j = 0; j < 3; j++) {
                if (i + j < passes) copy_pack(to + j * ROWS_PER_PASS * ROW_BYTES, sources[j], bytes, policy);
            }
            break;
        }
    }

    // The same of low, rows in slot order; zeros past the rank.
    __device__ __forceinline__ void load_low(u32 stage, const Tile& tile, const SCALAR* low, u32 step, u64 policy) const {
        u32 row = (threadIdx.x - CONSUMER_THREADS) / 8, k = step * BLOCK_K + threadIdx.x % 8 * 8, to = stage + offset;
#pragma unroll 1
        for (u32 i = 0; i < passes; i++, to += ROWS_PER_PASS * ROW_BYTES) {
            u32 slot = tile.first_slot + min((int)(row + i * ROWS_PER_PASS), tile.slots - 1);
            copy_pack(to, low + (u64)slot * LOW_RANK + k, (int)k < LOW_RANK ? 16 : 0, policy);
        }
    }
};

// The same, for at most ten rows of a thread, each of one line or more. It keeps their addresses: an address that is made while copies
// are on their way waits until one of them has left its registers, and with 20 copies of a stage these waits took longer than
// the products.
template <class Gemm> struct LineLoader {
    u32 passes, offset;
    const unsigned char* rows[PASSES];  // the next stage's part

    __device__ __forceinline__ LineLoader(const Gemm& gemm, const Tile& tile, u32 thread) {
        static_assert(PASSES <= 10 && PASSES % 2 == 0, "PASSES");
        u32 row = thread / 8, pack = thread % 8;
        passes = (tile.slots + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
        offset = row * ROW_BYTES + (pack ^ row % 8) * 16;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            rows[i] = reinterpret_cast<const unsigned char*>(gemm.tokens + pack * 8);
            if (i < passes) {
                u64 row_of_slot = gemm.row(tile.first_slot + min((int)row + i * ROWS_PER_PASS, tile.slots - 1));
                rows[i] += row_of_slot * (Gemm::kTokenPitch * sizeof(SCALAR));
            }
        }
    }

    __device__ __forceinline__ void load(u32 stage, u32 step, u64 policy) {
        u32 to = stage + offset, k = step * BLOCK_K + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            if (i % 2 == 0 && i >= passes) break;
#pragma unroll
            for (int line = 0; line < LINES; line++) {
                u32 bytes = Gemm::kTokenPitch % BLOCK_K == 0 || k + line * (ROW_BYTES / 2) < Gemm::kTokenPitch ? 16 : 0;
                copy_pack(to + line * LINE_BYTES + i * (ROWS_PER_PASS * ROW_BYTES), rows[i] + line * ROW_BYTES, bytes, policy);
            }
        }
#pragma unroll
        for (int i = 0; i < PASSES; i++) rows[i] += BLOCK_K * sizeof(SCALAR);
    }
};

// Where tokens are new, weights, offsets and choices are older: so the first weights come before the end of the previous grid.
template <class Gemm, class Weights>
__device__ __forceinline__ void fill_ring(const Gemm& gemm, const Weights& weights, const Schedule& schedule, const Pipeline& pipeline) {
    u32 thread = threadIdx.x - CONSUMER_THREADS, rank = rank_in_cluster();
    u64 weights_policy = evict_unchanged_policy(), tokens_policy = weights_policy;
    if (!Gemm::kDenseTokens) {
        u32 mean_slots = pipeline.shared.first_slot[NUM_EXPERTS] / NUM_EXPERTS;
        if (mean_slots < WEIGHTS_ONCE_BELOW) weights_policy = evict_first_policy();
        else if (mean_slots < TOKENS_KEPT_BELOW) tokens_policy = evict_last_policy();
    }
    bool leader = thread == 0, scheduler = thread < 32 && rank == 0;
    auto load_weights = [&](const Tile& tile, u32 step, u32 stage) {
        u32 token_bytes = Gemm::kDenseTokens ? (tile.slots + BOX_SLOTS - 1) / BOX_SLOTS * BOX_SLOTS * (LINES * ROW_BYTES) : 0;
        weights.load(gemm, pipeline, tile, step, stage, token_bytes, weights_policy);
    };
    u32 ticket = 0;
    if (scheduler) {
        ticket = cluster_index();  // a cluster's first; the others are counted after these
        take_tile(gemm, schedule, pipeline, 0, ticket);
    }
    Turn turn = {0, 1};
    u32 ahead = 0;  // steps of the first tile whose weights are under way
    for (u32 index = 0;; index++) {
        if (leader) arrive_expecting(pipeline.tile_ready(index), BLOCKS == 1 ? 0 : sizeof(Tile));
        __syncwarp();
        Tile tile = pipeline.tile(index);
        if (Gemm::kTokensAreNew && index == 0) {
            if (leader && tile.expert >= 0) {
                for (; ahead < min((u32)STAGES, kDepthSteps<Gemm>); ahead++) load_weights(tile, ahead, ahead);
            }
            wait_for_previous_grid();
            order_writes_before_bulk_copies();
        }
        if (tile.expert < 0) break;
        if (scheduler) take_tile(gemm, schedule, pipeline, index + 1, ticket);
        if constexpr (Gemm::kDenseTokens) {
            for (u32 step = 0; leader && step < kSteps<Gemm>; step++, turn.next()) {
                // Not for those ahead: a block without slots adds nothing to them, so they may be filled and emptied already,
                // and the wait would be for the round after.
                if (step >= ahead) {
                    wait_barrier(pipeline.emptied(turn.stage), turn.parity);
                    load_weights(tile, step, turn.stage);
                }
                const TensorMap& tokens = is_of_adapter<Gemm>(step) ? *weights.adapter.low_map : gemm.token_map;
                u32 column = (is_of_adapter<Gemm>(step) ? step_of_adapter<Gemm>(step) : step) * BLOCK_K;
                for (int slot = 0; slot < tile.slots; slot += BOX_SLOTS) {
#pragma unroll
                    for (int line = 0; line < LINES; line++) {
                        copy_box(pipeline.tokens(turn.stage) + line * LINE_BYTES + slot * ROW_BYTES, tokens, column + line * (ROW_BYTES / 2),
                                 tile.first_slot + slot, pipeline.filled(turn.stage));
                    }
                }
            }
            __syncwarp();
        } else {
            typename Gemm::Loader loader(gemm, tile, thread);
#pragma unroll 1  // of four unrolled steps ptxas made copies that tests/kernels/test_machine_code.py calls broken
            for (u32 step = 0; step < kSteps<Gemm>; step++, turn.next()) {
                wait_barrier(pipeline.emptied(turn.stage), turn.parity);
                if (leader && step >= ahead) load_weights(tile, step, turn.stage);
                u32 to = pipeline.tokens(turn.stage);
                if constexpr (LOW_RANK > 0) {
                    if (is_of_adapter<Gemm>(step)) loader.load_low(to, tile, weights.adapter.low, step_of_adapter<Gemm>(step), tokens_policy);
                    else loader.load(to, step, tokens_policy);
                } else {
                    loader.load(to, step, tokens_policy);
                }
                arrive_after_copies(pipeline.filled(turn.stage));
            }
        }
        ahead = 0;
    }
    wait_for_copies();
}
