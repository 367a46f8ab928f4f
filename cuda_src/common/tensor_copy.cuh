// The copy engine's boxes of a tensor, which a map describes that the host encoded (cupymoe/kernels/tensor_map.py).
// Rows of 128 bytes arrive with their eight 16-byte packs swapped as wgmma.cuh wants them; out of bounds are zeros.
#pragma once
#include "async_copy.cuh"

static_assert(HAS_BULK_COPY, "boxes of a tensor need bulk copies, which begin with sm_90");

struct alignas(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box of a two-dimensional tensor that starts at these coordinates, innermost first.
__device__ __forceinline__ void copy_box(u32 destination, const TensorMap& map, int column, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(destination), "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// Where a box of a five-dimensional tensor starts, innermost first; the third coordinate is 0.
struct BoxStart {
    int first, second, fourth, fifth;
};

// A box, into the same place of the first kBlocks blocks of the cluster; its bytes arrive at the same barrier of each.
template <int kBlocks>
__device__ __forceinline__ void copy_box_to_blocks(u32 destination, const TensorMap& map, BoxStart start, u32 barrier, u64 policy) {
    if constexpr (kBlocks == 1) {
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                     "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;"
                     ::"r"(destination), "l"(&map), "r"(start.first), "r"(start.second), "r"(0), "r"(start.fourth), "r"(start.fifth),
                       "r"(barrier), "l"(policy) : "memory");
    } else {
        asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
                     "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8, %9;"
                     ::"r"(destination), "l"(&map), "r"(start.first), "r"(start.second), "r"(0), "r"(start.fourth), "r"(start.fifth),
                       "r"(barrier), "h"((unsigned short)((1 << kBlocks) - 1)), "l"(policy) : "memory");
    }
}
