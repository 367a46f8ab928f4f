// Global -> shared copies that need no register, barriers in shared memory, and programmatic dependent launch (nothing where
// an architecture has none).
#pragma once
#include "arch.cuh"
#include "dtypes.cuh"

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

// A value of 1, 2, 4 or 8 bytes at a shared address.
template <typename T> __device__ __forceinline__ T load_shared(u32 address) {
    static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "at most two words");
    if constexpr (sizeof(T) == 8) {
        u64 words;
        asm volatile("ld.shared.u64 %0, [%1];" : "=l"(words) : "r"(address) : "memory");
        return *reinterpret_cast<T*>(&words);
    } else {
        u32 word;
        if constexpr (sizeof(T) == 4) asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
        else if constexpr (sizeof(T) == 2) asm volatile("ld.shared.u16 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
        else asm volatile("ld.shared.u8 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
        return *reinterpret_cast<T*>(&word);
    }
}

// A copy's policy says how long L2 keeps what the copy reads. These are made by an instruction, and lie in registers.
#define CACHE_POLICY(kind)                                                                       \
    __device__ __forceinline__ u64 kind##_policy() {                                             \
        u64 policy;                                                                              \
        asm volatile("createpolicy.fractional.L2::" #kind ".b64 %0, 1.0;" : "=l"(policy));       \
        return policy;                                                                           \
    }
// What is read once leaves L2 before what is read again: without it the weight stream evicts the activations between two
// uses (2 to 3% of experts_up at 16 to 128 tokens).
CACHE_POLICY(evict_first)
CACHE_POLICY(evict_last)
// As a copy without a policy. evict_normal is not: with it experts_up_wgmma takes 1 to 3% longer.
CACHE_POLICY(evict_unchanged)

// The same policies as constants, which they are on Hopper and newer; before, they come from the instruction. A constant lies where
// a copy wants it, while each copy takes an instruction to bring a register's value there: without constants the stream took 2 to
// 4% longer with few tokens of quantised weights.
//
// Where the address of a stage is in a uniform register, ptxas 12.9 and 13.0 may put a copy's constant policy into an odd one,
// which is an illegal instruction; tests/kernels/test_machine_code.py looks for it. So a ring whose copies have constant policies
// counts its stages from first_stage() on.
#if HAS_BULK_COPY
__device__ __forceinline__ u64 constant_evict_first_policy() { return 0x12f0000000000000; }
__device__ __forceinline__ u64 constant_evict_last_policy() { return 0x14f0000000000000; }
#else
__device__ __forceinline__ u64 constant_evict_first_policy() { return evict_first_policy(); }
__device__ __forceinline__ u64 constant_evict_last_policy() { return evict_last_policy(); }
#endif

// Zero: the highest bit of the mask of the lanes before this one. ptxas does not know that all threads have the same, so that no
// address which is counted from it is put into a uniform register.
__device__ __forceinline__ u32 first_stage() {
    u32 lanes_before;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lanes_before));
    return lanes_before >> 31;
}

// 16 bytes, the last 16 - bytes of them zeros; nothing where not wanted. A predicate and no branch: copies stay in a row.
// The hint fetches the aligned 256 bytes around into L2: rows that are read 128 bytes at a time lose 4% without it.
__device__ __forceinline__ void copy_16(bool wanted, u32 destination, const void* source, u32 bytes, u64 policy) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %0, 0;\n"
                 "@wanted cp.async.cg.shared.global.L2::cache_hint.L2::256B [%1], [%2], 16, %3, %4;\n}"
                 ::"r"((u32)wanted), "r"(destination), "l"(source), "r"(bytes), "l"(policy) : "memory");
}

// 16 bytes; zeros where bytes is 0.
__device__ __forceinline__ void copy_pack(u32 destination, const void* source, u32 bytes, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
                 ::"r"(destination), "l"(source), "r"(bytes), "l"(policy) : "memory");
}

// The same for four sources, to places kDistance bytes apart. One statement, so that each address gets registers of its own:
// a copy holds its address until it leaves the queue, and in shared registers the next would wait for that.
template <int kDistance> __device__ __forceinline__ void copy_4_packs(u32 destination, const void* const (&sources)[4], u32 bytes, u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %5, %6;\n"
                 "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0 + %7], [%2], 16, %5, %6;\n"
                 "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0 + %8], [%3], 16, %5, %6;\n"
                 "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0 + %9], [%4], 16, %5, %6;"
                 ::"r"(destination), "l"(sources[0]), "l"(sources[1]), "l"(sources[2]), "l"(sources[3]), "r"(bytes), "l"(policy),
                   "n"(kDistance), "n"(2 * kDistance), "n"(3 * kDistance) : "memory");
}

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// mbarrier: a phase ends when all its arrivals are in and all its expected bytes have landed.
__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After init_barrier and before the __syncthreads() that shows the barriers to the block.
__device__ __forceinline__ void publish_barriers() {
#if HAS_CLUSTERS
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

// Arrives once this thread's copies so far have landed.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 parity) {
    u32 ended;
    do {
#if HAS_BULK_COPY
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ended) : "r"(barrier), "r"(parity) : "memory");
#else
        asm volatile("{\n.reg .pred p;\nmbarrier.test_wait.parity.shared.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(ended) : "r"(barrier), "r"(parity) : "memory");
#endif
    } while (!ended);
}

#if HAS_BULK_COPY
// The copy engine: one thread announces a stage's bytes, then orders the copies; source, size and destination % 16 == 0.
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;\n}" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_bulk(u32 destination, const void* source, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(destination), "l"(source), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}

// Ordinary global writes seen so far are visible to this thread's bulk copies.
__device__ __forceinline__ void order_writes_before_bulk_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }
#endif

// Fetches `bytes` into L2 where bulk copies do it, for a kernel that will want them; bytes and source % 16 == 0.
__device__ __forceinline__ void prefetch_bulk(const void* source, u32 bytes) {
#if HAS_BULK_COPY
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
#endif
}

// A barrier among `threads` of the block.
__device__ __forceinline__ void sync_threads(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Until the grids before this one have finished and their writes are visible. Before any read of their results and
// before any write to what they read.
__device__ __forceinline__ void wait_for_previous_grid() {
#if HAS_PDL
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next grid start its blocks. Only after wait_for_previous_grid(): then what is two grids back is complete too. But for
// lora_shrink_chunks.cu, which says why it may.
__device__ __forceinline__ void release_next_grid() {
#if HAS_PDL
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What is read before the wait was written two grids back, but the first-level cache may hold what lay at the address in the call
// before. So either of these: the first for many loads of a block, the second for few.
__device__ __forceinline__ void empty_l1() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

template <typename T> __device__ __forceinline__ T load_from_l2(const T* address) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "half a word, a word or two");
    if constexpr (sizeof(T) == 2) {
        unsigned short half;
        asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(half) : "l"(address) : "memory");
        return *reinterpret_cast<T*>(&half);
    } else if constexpr (sizeof(T) == 4) {
        u32 word;
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
        return *reinterpret_cast<T*>(&word);
    } else {
        u64 words;
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(words) : "l"(address) : "memory");
        return *reinterpret_cast<T*>(&words);
    }
}
