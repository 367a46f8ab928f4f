// Empties the ring: products of a stage's weights and tokens, what begins a tile's sums and what ends them.
#pragma once
#include "../ring.cuh"
#include "producer.cuh"
#include "store.cuh"

#define RANK_STEPS ((LOW_RANK + K_WARPS * 32 - 1) / (K_WARPS * 32))  // of each of the K_WARPS
// Whether the sums leave registers enough to load a step ahead.
#define RANK_AHEAD (ROW_BLOCKS == 1 && (WEIGHTS == PLAIN ? TOKENS <= 48 || !TRANSPOSED : TOKENS <= 32))

static_assert(LOW_RANK % 16 == 0, "LOW_RANK");

// A warp's view of the ring: where its weights and its tokens lie in a stage.
struct Warp {
    Place place;
    Weights weights;
    u32 tokens;                            // this lane's first token in a stage
    u32 first_pack, swap;                  // in a token's row, in bytes

    __device__ __forceinline__ Warp(u32 lane) : weights(place, lane) {
        u32 token = TOKENS < 8 ? lane / 4 % TOKENS : place.token_warp * 8 + lane / 4;
        tokens = FIRST_TOKEN + token * TOKEN_ROW_BYTES;
        first_pack = place.k_warp * PARTS_OF_STEP * 64 + lane % 4 * 16, swap = swap_of_token(token) * 16;
    }

    // sums += this warp's rows and k steps of the stage that begins at k x its first kGroups groups of 8 tokens; unrolled, so that
    // loads run ahead.
    template <int kGroups> __device__ __forceinline__ void multiply_stage(Sums& sums, u32 stage, u32 k) const {
        constexpr int kSteps = BLOCK_K / Weights::kStep;
        constexpr u32 kStepBytes = K_WARPS * PARTS_OF_STEP * 64;  // of a token's row, from a step to the warp's next
        constexpr u32 kSwappedBytes = 8 * 16;                     // swap_of_token() moves packs among 8
        u32 first_token = stage + tokens;
        [[maybe_unused]] float odd[ROW_BLOCKS][kGroups][4] = {};  // sums of every other part
#pragma unroll(Weights::unrolled_steps(kGroups))
        for (int s = 0; s < STEPS; s++) {
            if ((s + 1) * K_WARPS > kSteps && s * K_WARPS + place.k_warp >= kSteps) break;
            Weights::Step step = weights.load(stage, k, s);
#pragma unroll
            for (int part = 0; part < PARTS_OF_STEP; part++) {
                Weights::Operands operands = step.operands(part);
                u32 from = first_token + swapped<kStepBytes, kSwappedBytes>(swap, part * 64 + first_pack, s);
#pragma unroll
                for (int g = 0; g < kGroups; g++) {
                    // The compiler moves no load over this.
                    if (Weights::kLoadsAhead < kGroups && g && g % Weights::kLoadsAhead == 0) __syncwarp();
                    Fragment of_tokens = load_fragment(from + g * TOKEN_WARPS * 8 * TOKEN_ROW_BYTES);
#pragma unroll
                    for (int b = 0; b < ROW_BLOCKS; b++) {
                        operands.multiply_by(of_tokens, b, Weights::kTwoChains && part % 2 ? odd[b][g] : sums[b][g]);
                    }
                }
            }
        }
        if constexpr (Weights::kTwoChains) {
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) {
#pragma unroll
                for (int i = 0; i < kGroups * 4; i++) sums[b][i / 4][i % 4] += odd[b][i / 4][i % 4];
            }
        }
    }

    // The smallest compiled number of groups that holds `groups`.
    template <int kGroups> __device__ __forceinline__ void multiply_groups(u32 groups, Sums& sums, u32 stage, u32 k) const {
        constexpr int kNext = kGroups < 4 ? kGroups + 1 : kGroups + 2, kMore = kNext < TOKEN_GROUPS ? kNext : TOKEN_GROUPS;
        if constexpr (kGroups < TOKEN_GROUPS) {
            if (groups > kGroups) return multiply_groups<kMore>(groups, sums, stage, k);
        }
        multiply_stage<kGroups>(sums, stage, k);
    }
};

typedef Pack<scalar_t, 2 * ROW_BLOCKS> Biases;

// The biases of this lane's rows of a tile. Zeros past the tile, and in all but the first of the K_WARPS.
template <class Gemm> __device__ __forceinline__ Biases biases_of(const Gemm& gemm, const Cursor<Gemm>& tile) {
    Biases biases = {};
    u32 warp = threadIdx.x / 32, row = warp % ROW_WARPS * (ROW_BLOCKS * 16) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * ROW_BLOCKS; i++, row += 8) {
        if (!HAS_BIAS || K_WARPS > 1 && warp >= ROW_WARPS || Gemm::unit_of_row(row) >= tile.units) continue;
        biases.values[i] = load_from_l2(gemm.bias + Gemm::row_of(tile.chunk.expert, tile.first_unit, row));
    }
    return biases;
}

__device__ __forceinline__ void begin_sums(Sums& sums, Biases biases) {
#pragma unroll
    for (int b = 0; b < ROW_BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < TOKEN_GROUPS * 4; i++) {
            sums[b][i / 4][i % 4] = HAS_BIAS && !HAS_ROW_SCALES ? to_float(biases.values[b * 2 + i / 2 % 2]) : 0.0f;
        }
    }
}

// Of quantised weights: what sums of a row are multiplied by when they are finished.
typedef Pack<float, 2 * ROW_BLOCKS> RowScales;

// Zeros past the tile.
template <class Gemm> __device__ __forceinline__ RowScales row_scales_of(const Gemm& gemm, const Cursor<Gemm>& tile) {
    RowScales scales = {};
    u32 row = Place().row_warp * (ROW_BLOCKS * 16) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * ROW_BLOCKS; i++, row += 8) {
        if (tile.done() || Gemm::unit_of_row(row) >= tile.units) continue;
        u64 index = Gemm::row_of(tile.chunk.expert, tile.first_unit, row);
        scales.values[i] = load_from_l2(gemm.row_scales + index);
    }
    return scales;
}

// The scales are multiplied by the codec's factor here, and not where they are loaded, since that would wait for the loads.
__device__ __forceinline__ void finish_sums(Sums& sums, RowScales scales, Biases biases) {
#pragma unroll
    for (int b = 0; b < ROW_BLOCKS; b++) {
#pragma unroll
        for (int i = 0; i < TOKEN_GROUPS * 4; i++) {
            float bias = HAS_BIAS ? to_float(biases.values[b * 2 + i / 2 % 2]) : 0.0f;
            float scale = scales.values[b * 2 + i / 2 % 2] * Weights::kOfRowScale;
            sums[b][i / 4][i % 4] = fma_rn(sums[b][i / 4][i % 4], scale, bias);
        }
    }
}

// What a lane needs for 32 of an adapter's k: of its weight rows and of its token in each group.
struct RankStep {
    Fragment low[ROW_BLOCKS], high[ROW_BLOCKS], tokens[TOKEN_GROUPS];
};

__device__ __forceinline__ Fragment fragment_from_l2(const scalar_t* address) {
    const u64* words = reinterpret_cast<const u64*>(address);
    u64 first = load_from_l2(words), second = load_from_l2(words + 1);
    return {(u32)first, (u32)(first >> 32), (u32)second, (u32)(second >> 32)};
}

// Zeros past the rank, the tile and its tokens.
template <class Gemm> __device__ __forceinline__ RankStep load_rank_step(const Gemm& gemm, const Cursor<Gemm>& tile, u32 index) {
    RankStep step = {};
    Place place;
    u32 lane = threadIdx.x % 32, k = (index * K_WARPS + place.k_warp) * 32 + lane % 4 * 8;
    if (k >= LOW_RANK || tile.done()) return step;
    u32 row = place.row_warp * (ROW_BLOCKS * 16) + lane / 4;
#pragma unroll
    for (int half = 0; half < 2 * ROW_BLOCKS; half++, row += 8) {
        if (Gemm::unit_of_row(row) >= tile.units) continue;
        Fragment& fragment = half % 2 ? step.high[half / 2] : step.low[half / 2];
#if TRANSPOSED
        const scalar_t* from = gemm.factor + ((u64)tile.chunk.expert * LOW_RANK + k) * (2 * Gemm::kUnits) +
                               Gemm::row_of(0, tile.first_unit, row);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 bits = load_from_l2(reinterpret_cast<const unsigned short*>(from + (u64)i * (2 * Gemm::kUnits)));
            fragment.words[i / 2] |= bits << i % 2 * 16;
        }
#else
        fragment = fragment_from_l2(gemm.factor + Gemm::row_of(tile.chunk.expert, tile.first_unit, row) * LOW_RANK + k);
#endif
    }
#pragma unroll
    for (int g = 0; g < TOKEN_GROUPS; g++) {
        u32 token = (g * TOKEN_WARPS + place.token_warp) * 8 + lane / 4;
        if (token < tile.chunk.tokens) step.tokens[g] = fragment_from_l2(gemm.low + (u64)(tile.chunk.first_slot + token) * LOW_RANK + k);
    }
    return step;
}

// sums += what the adapter adds; with RANK_AHEAD the first step has been loaded.
template <class Gemm>
__device__ __forceinline__ void add_adapter(const Gemm& gemm, const Cursor<Gemm>& tile, Sums& sums, RankStep step) {
    Place place;
#pragma unroll 1
    for (int index = 0; index < RANK_STEPS; index++) {
        if ((index * K_WARPS + place.k_warp) * 32 >= LOW_RANK) break;
        if (index > 0 || !RANK_AHEAD) step = load_rank_step(gemm, tile, index);
#pragma unroll
        for (int g = 0; g < TOKEN_GROUPS; g++) {
            if ((g * TOKEN_WARPS + (int)place.token_warp) * 8 >= tile.chunk.tokens) continue;
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) multiply(sums[b][g], step.low[b], step.high[b], step.tokens[g], scalar_t());
        }
    }
}

template <class Gemm>
__device__ __forceinline__ void consume_ring(const Gemm& gemm, const Plan& plan, Ring ring, float* shared_sums) {
    u32 lane = threadIdx.x % 32;
    Warp warp(lane);
    Place place = warp.place;
    Sums sums = {};
    Cursor<Gemm> cursor(plan);
    Biases biases = {};
    if (HAS_BIAS) begin_sums(sums, biases = biases_of(gemm, cursor));
    [[maybe_unused]] RowScales row_scales;
    if constexpr (HAS_ROW_SCALES) row_scales = row_scales_of(gemm, cursor);
    [[maybe_unused]] RankStep rank_step;
    if constexpr (LOW_RANK > 0 && RANK_AHEAD) rank_step = load_rank_step(gemm, cursor, 0);
    for (Turn turn = {0, 0}; !cursor.done(); turn.next()) {
        wait_barrier(ring.filled + turn.stage * 8, turn.parity);
        if (place.row_warp * (ROW_BLOCKS * 8) < cursor.units) {
            // Every TOKEN_WARPS-th group of 8 tokens, from the token_warp-th on.
            u32 groups = ((cursor.chunk.tokens + 7) / 8 + TOKEN_WARPS - 1 - place.token_warp) / TOKEN_WARPS;
            warp.multiply_groups<1>(groups, sums, ring.data + turn.stage * STAGE_BYTES, cursor.k);
        }
        __syncwarp();
        if (lane == 0) arrive(ring.emptied + turn.stage * 8);

        Cursor<Gemm> tile = cursor;
        if (!cursor.advance(plan)) continue;
        if constexpr (HAS_ROW_SCALES) finish_sums(sums, row_scales, biases);
        if constexpr (LOW_RANK > 0) add_adapter(gemm, tile, sums, rank_step);
        // Of the next tile, on their way while this one is stored.
        biases = biases_of(gemm, cursor);
        if constexpr (HAS_ROW_SCALES) row_scales = row_scales_of(gemm, cursor);
        if constexpr (LOW_RANK > 0 && RANK_AHEAD) rank_step = load_rank_step(gemm, cursor, 0);
        store_tile(gemm, tile, sums, shared_sums);
        begin_sums(sums, biases);
    }
}
