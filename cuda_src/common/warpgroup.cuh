// What Hopper's warpgroup products (sm_90a) share, wherever their operands are: how tiles lie in shared memory, the order of
// products and copies, and how many registers a warpgroup has. Includers define SCALAR.
//
// A tile in shared memory: rows of 128 bytes (64 k), the eight 16-byte packs of row r at pack ^ (r % 8); starts on 1024 bytes.
#pragma once
#include "arch.cuh"
#include "dtypes.cuh"

static_assert(HAS_WGMMA, "wgmma needs sm_90a: no other architecture has its instructions, nor has sm_90 without the a");

#define ROW_BYTES 128

// Address, 1024 bytes from a group of eight rows to the next, 128-byte swizzle; the other fields don't matter to it.
__device__ __forceinline__ u64 tile_descriptor(u32 address) { return (1ull << 62) | (64ull << 32) | (1ull << 16) | address >> 4; }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Copies landed in shared memory come before this thread's products, which read through another proxy.
__device__ __forceinline__ void order_copies_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int kRegisters> __device__ __forceinline__ void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters> __device__ __forceinline__ void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
