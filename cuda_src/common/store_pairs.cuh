// The store of a tile's outputs where a lane has two neighbouring columns of every eight. Two lanes swap, so that each stores
// 4 neighbours, and four lanes together 32 bytes.
#pragma once
#include "expert_tiles.cuh"

__device__ __forceinline__ void store_for_later(void* address, Pack<u32, 2> pack) {
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(pack.values[0]), "r"(pack.values[1]) : "memory");
}

// kEights times eight columns, from first_column on, of rows slot and slot + 8 of a tile of an output [slots, kPitch], of which
// kColumns columns are stored here.
// kLater: nothing reads them soon, so they leave L2 first.
// pair(eight, half) gives columns 8 eight + 2 p and the next of row slot + 8 half as one word; p is the lane's place among its
// four, with its two bits swapped where kPartner, the distance of the lanes that swap, is 2 and not 1.
template <u32 kPitch, u32 kColumns, int kEights, int kPartner, bool kLater = false, class PairOf>
__device__ __forceinline__ void store_pairs(SCALAR* output, const Tile& tile, int slot, int first_column, PairOf pair) {
    constexpr bool kWholeTiles = kColumns % (kEights * 8 * BLOCKS) == 0;
    // Where each sum has an output of its own, ptxas would begin so many of them at once that registers spill: a branch, even
    // one that whole tiles never take, keeps it from that.
    constexpr bool kBranch = kEights == BLOCK_N / 8;
    u32 quad = threadIdx.x % 4;
    bool odd = kPartner == 1 ? quad % 2 : quad / 2;
    // The lane's place among the columns of two eights, and how many are left from there on.
    int first = first_column + odd * 8 + (kPartner == 1 ? quad / 2 : quad % 2) * 4, left = kColumns - first;
    SCALAR* to = output + (u64)(tile.first_slot + slot) * kPitch + first;
#pragma unroll
    for (int half = 0; half < 2; half++, to += 8 * kPitch) {
        bool wanted = slot + half * 8 < tile.slots;
#pragma unroll
        for (int eight = 0; eight < kEights; eight += 2) {
            if (kBranch && first_column + eight * 8 >= (int)kColumns) break;
            bool inside = wanted && (kWholeTiles || eight * 8 < left);
            u32 own = pair(eight, half);
            if (eight + 1 == kEights) {
                SCALAR* alone = to + eight * 8 - odd * 6;
                if (wanted && (kWholeTiles || eight * 8 - odd * 6 < left)) *reinterpret_cast<u32*>(alone) = own;
                break;
            }
            u32 next = pair(eight + 1, half);
            u32 got = __shfl_xor_sync(FULL_WARP, odd ? own : next, kPartner);
            Pack<u32, 2> both = odd ? Pack<u32, 2>{got, next} : Pack<u32, 2>{own, got};
            if (inside && kLater) store_for_later(reinterpret_cast<u32*>(to + eight * 8), both);
            else if (inside) store_pack(reinterpret_cast<u32*>(to + eight * 8), both);
        }
    }
}
