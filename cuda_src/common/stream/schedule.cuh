// Who streams what, and when: the line of units, cut among the blocks.
//
// The plan's chunks times the units of an expert are one line. Here an expert has 5 tiles of TILE_UNITS, and there are 4 blocks;
// the second expert's tokens need two chunks, so its weight is read twice:
//
//   chunk       | expert 3            | expert 7, tokens 0..31 | expert 7, the others
//   tile        | 0 | 1 | 2 | 3 | 4   | 5 | 6 | 7 | 8 | 9      | 10| 11| 12 | 13 | 14 |
//   block       | 0 | 1 | 2 | 3 | 0   | 1 | 2 | 3 | 0 | 1      | 2 | 3 | 0 .. | 1 .. | 2 .. | 3 ..
//                 `-- dealt in turn, whole rounds: 12 tiles --------------´ `-- 3 tiles, cut in four parts --´
//
// Where an expert is no whole number of tiles, nothing is dealt, and the whole line is cut in equal parts. A part that crosses
// into the next chunk, or is longer than a tile, is done as several tiles of nearly equal size; each goes through the ring in
// stages over ascending k.
#pragma once
#include "../expert_plan.cuh"
#include "../weight_rows.cuh"
#include "../weights/stored.cuh"
#include "stage.cuh"

#define PREFETCH_BYTES 65536  // of a block: what memory gives in a few microseconds

// The first byte of a tile's row.
template <class Gemm>
__device__ __forceinline__ const unsigned char* weight_row(const Gemm& gemm, int expert, u32 first_unit, u32 row) {
    return gemm.weights + Gemm::row_of(expert, first_unit, row) * Weights::bytes(Gemm::kDepth);
}

// A tile and the k of the next stage; walks this block's tiles. Whole rounds of tiles are dealt to the blocks in turn, so
// that each block meets all experts and not one with more tokens than most; the rest of the line is cut evenly. With
// TRANSPOSED tiles are dealt even where an expert is no whole number of them, because neighbouring blocks then read
// neighbouring bytes of each k; a tile that crosses into the next expert is done as two.
template <class Gemm> struct Cursor {
    u32 position, end;  // of the piece
    u32 next_tile, dealt_end, last_position, last_end;
    u32 k, first_unit, units;
    Chunk chunk;

    // Where a tile may begin, in units: a store is of 2, a pack of transposed weights of some more.
    static constexpr u32 kGrain = TRANSPOSED ? Gemm::kUnitsOfPack : 2;
    static_assert(Gemm::kUnits % kGrain == 0, "HIDDEN, INTERMEDIATE");

    // Where the part of a block begins: a multiple of `grain`, which is larger where a block has many units. In 32 bits, since a
    // division of 64 is a subroutine: total / grid times block, rounded down.
    static __device__ __forceinline__ u32 part_begin(u32 total, u32 grain, u32 block) {
        u32 grid = gridDim.x, each = total / grid, rest = total - each * grid;
        return block == grid ? total : (each * block + rest * block / grid) / grain * grain;
    }

    __device__ __forceinline__ Cursor(const Plan& plan) : position(0), end(0), k(0), units(0) {
        u32 total = plan.num_chunks * Gemm::kUnits, round = gridDim.x * TILE_UNITS;
        dealt_end = TRANSPOSED || Gemm::kUnits % TILE_UNITS == 0 ? total / round * round : 0;
        next_tile = blockIdx.x * TILE_UNITS;
        u32 grain = total / gridDim.x >= 64 * kGrain ? 2 * kGrain : kGrain;
        last_position = dealt_end + part_begin(total - dealt_end, grain, blockIdx.x);
        last_end = dealt_end + part_begin(total - dealt_end, grain, blockIdx.x + 1);
        open(plan);
    }

    __device__ __forceinline__ bool done() const { return position >= end; }

    // The next tile, if there is one.
    __device__ __forceinline__ void open(const Plan& plan) {
        if (position >= end) {
            bool dealt = next_tile < dealt_end;
            position = dealt ? next_tile : last_position;
            end = dealt ? next_tile + TILE_UNITS : last_end;
            if (dealt) next_tile += gridDim.x * TILE_UNITS;
            else last_position = last_end;
            if (position >= end) return;
        }
        u32 index = position / Gemm::kUnits;
        first_unit = position - index * Gemm::kUnits;
        chunk = plan.chunks[index];
        u32 left = min(end - position, Gemm::kUnits - first_unit);
        u32 tiles = (left + TILE_UNITS - 1) / TILE_UNITS;  // of nearly equal size: a short one would starve the ring
        units = min(left, ((left + tiles - 1) / tiles + 7) / 8 * 8);
    }

    // True when the tile changed.
    __device__ __forceinline__ bool advance(const Plan& plan) {
        k += BLOCK_K;
        if (k < Gemm::kDepth) return false;
        k = 0;
        position += units;
        open(plan);
        return true;
    }
};

// Fetches the start of each row of the tile that this block gets first if every expert has one chunk, while the plan is
// still being made; a wrong guess is another block's tile.
template <class Gemm> __device__ __forceinline__ void prefetch_first_tile(const Gemm& gemm) {
    u32 position = blockIdx.x * TILE_UNITS, expert = position / Gemm::kUnits, first_unit = position % Gemm::kUnits;
    u32 row = threadIdx.x;
    if (expert >= NUM_EXPERTS || row >= TILE_ROWS || first_unit + Gemm::unit_of_row(row) >= Gemm::kUnits) return;
    prefetch_bulk(weight_row(gemm, expert, first_unit, row), min(PREFETCH_BYTES / TILE_ROWS, (int)Weights::bytes(Gemm::kDepth)));
}
