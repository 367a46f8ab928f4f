// How sums leave a tile: through shared memory behind the ring, to the output that the GEMM makes of them.
#pragma once
#include "schedule.cuh"

#define PASS_TOKENS (COLUMNS < 16 ? COLUMNS : 16)
#define SUMS_PITCH (TILE_ROWS + 4)                           // no bank conflict between a warp's four token pairs
#define SUMS_BYTES (K_WARPS * PASS_TOKENS * SUMS_PITCH * 4)  // after the ring

static_assert(CONSUMER_THREADS % (TILE_UNITS / 2) == 0, "WARPS");

// Stores a tile's outputs. The sums go through shared memory, PASS_TOKENS tokens at a time: the K_WARPS parts of a sum meet
// there, and a warp then writes neighbouring outputs of one token. Nothing here waits for global memory, as the ring stands
// still meanwhile: with a look-up for each token experts_down took 10% longer at 512 tokens.
template <class Gemm>
__device__ __forceinline__ void store_tile(const Gemm& gemm, const Cursor<Gemm>& tile, const Sums& sums, float* shared) {
    Place place;
    u32 lane = threadIdx.x % 32;
    float* mine = shared + (place.k_warp * PASS_TOKENS + place.token_warp * 8 + lane % 4 * 2) * SUMS_PITCH +
                  place.row_warp * (ROW_BLOCKS * 16) + lane / 4;
#pragma unroll
    for (int first = 0; first < TOKENS; first += PASS_TOKENS) {
        if (first >= tile.chunk.tokens) break;
        sync_threads(1, CONSUMER_THREADS);  // the last pass has been read
#pragma unroll
        for (int group = 0; group < PASS_TOKENS / 8 / TOKEN_WARPS; group++) {
            if (first / 8 / TOKEN_WARPS + group >= TOKEN_GROUPS) break;
#pragma unroll
            for (int b = 0; b < ROW_BLOCKS; b++) {
                const float* s = sums[b][first / 8 / TOKEN_WARPS + group];
                float* to = mine + group * 8 * SUMS_PITCH + b * 16;
                to[0] = s[0], to[SUMS_PITCH] = s[1], to[8] = s[2], to[SUMS_PITCH + 8] = s[3];
            }
        }
        sync_threads(1, CONSUMER_THREADS);
        u32 tokens = min(tile.chunk.tokens - first, PASS_TOKENS);
        u32 unit = threadIdx.x % (TILE_UNITS / 2) * 2;
        if (unit >= tile.units) continue;
        for (u32 token = threadIdx.x / (TILE_UNITS / 2); token < tokens; token += CONSUMER_THREADS / (TILE_UNITS / 2)) {
            const float* from = shared + token * SUMS_PITCH + Gemm::first_row_of_unit(unit);
            Pack<float, 2> one = load_pack<float, 2>(from), other = load_pack<float, 2>(from + Gemm::kSecondRows);
#pragma unroll
            for (int w = 1; w < K_WARPS; w++) {
                from += PASS_TOKENS * SUMS_PITCH;
                Pack<float, 2> more = load_pack<float, 2>(from), more_other = load_pack<float, 2>(from + Gemm::kSecondRows);
                one.values[0] += more.values[0], one.values[1] += more.values[1];
                other.values[0] += more_other.values[0], other.values[1] += more_other.values[1];
            }
            gemm.store(tile.chunk.first_slot + first + token, tile.first_unit + unit, one, other);
        }
    }
}
