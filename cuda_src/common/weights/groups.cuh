// What GROUP neighbouring weights of a row share: scales and zero points, kSize bytes each.
//
// In memory a row of them is padded to whole packs of 16 bytes. A stage has of each of its rows the packs that hold the groups of
// its BLOCK_K weights, and with GROUP 128, 2 bytes and BLOCK_K 256 three quarters of such a pack are of other stages:
//
//   k             0           256         512         768         1024
//   groups        | 0     1   | 2     3   | 4     5   | 6     7   | 8 ..
//   packs         | 0                                             | 1 ..     stages 0..3 have pack 0, and read 4 bytes of it each
#pragma once
#include "../stream/stage.cuh"
#include "scales.cuh"

template <u32 kSize> struct GroupValues {
    static constexpr bool kWholeGroups = BLOCK_K % GROUP == 0;  // of a stage
    static constexpr u32 kBytes = (BLOCK_K / GROUP + (kWholeGroups ? 0 : 2)) * kSize;  // of a stage's row: at most so many
    static constexpr bool kWholePacks = kWholeGroups && kBytes % 16 == 0;
    static constexpr u32 kPacks = kWholePacks ? kBytes / 16 : kWholeGroups && 16 % kBytes == 0 ? 1 : (kBytes - kSize + 31) / 16;
    static constexpr u32 kStageRowBytes = kPacks * 16;
    static constexpr u32 kStageBytes = TILE_ROWS * kStageRowBytes;

    // Of a row in memory.
    static __device__ __forceinline__ constexpr u32 row_bytes(u32 depth) {
        return ((depth + GROUP - 1) / GROUP * kSize + 15) / 16 * 16;
    }

    // Where in a row the packs of the stage that begins at k begin.
    static __device__ __forceinline__ u32 first_byte(u32 k) { return k / GROUP * kSize / 16 * 16; }

    // Where in the stage's row the value of the group of k + more is; `more` is less than BLOCK_K.
    static __device__ __forceinline__ u32 place(u32 k, u32 more) {
        if (kWholePacks) return more / GROUP * kSize;
        if (kWholeGroups) return more / GROUP * kSize + k / GROUP * kSize % 16;
        return (k + more) / GROUP * kSize - first_byte(k);
    }
};
