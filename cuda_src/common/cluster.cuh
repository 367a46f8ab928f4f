// Clusters: blocks that reach into each other's shared memory. A place in another block is named by the address that
// the same place has here, and the block's rank.
#pragma once
#include "async_copy.cuh"

static_assert(HAS_CLUSTERS, "clusters of blocks begin with sm_90");

#define SPECIAL_REGISTER(name, which)                               \
    __device__ __forceinline__ u32 name() {                         \
        u32 value;                                                  \
        asm volatile("mov.u32 %0, %%" which ";" : "=r"(value));     \
        return value;                                               \
    }
SPECIAL_REGISTER(rank_in_cluster, "cluster_ctarank")
SPECIAL_REGISTER(cluster_index, "clusterid.x")
SPECIAL_REGISTER(cluster_count, "nclusterid.x")

__device__ __forceinline__ u32 address_in_block(u32 address, u32 rank) {
    u32 result;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
    return result;
}

// Orders what this thread has read before what the waiter writes. With .release.cluster it would also wait for this thread's
// global stores, at every stage of a ring: a quarter of a GEMM's time.
__device__ __forceinline__ void arrive_in_block(u32 barrier, u32 rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in_block(barrier, rank)) : "memory");
}

// 16 bytes, which arrive at a barrier of that block.
__device__ __forceinline__ void store_in_block(u32 address, const u32 (&words)[4], u32 barrier, u32 rank) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(address_in_block(address, rank)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]),
                   "r"(address_in_block(barrier, rank)) : "memory");
}

// __syncthreads() over all blocks of the cluster, and its two halves.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ void sync_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}
