// experts_up_wgmma: act(x W_gate^T) * (x W_up^T) for every slot; for thousands of tokens, at the speed of the tensor cores.
//
// Reads  gate_up_map    TensorMap of gate_up_proj [NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN] SCALAR (kernels/experts_up_wgmma.py)
//        hidden_states  [T, HIDDEN] SCALAR
//        expert_offsets [NUM_EXPERTS + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu
//        ticket         u32                      0; counts the tiles that are taken after each cluster's first
// Writes intermediate   [slots, INTERMEDIATE] SCALAR
// Grid   any multiple of BLOCKS; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_90a.
// Maths  fp32 sums over ascending k; activation in fp32; one rounding at the store.
// Why    The map takes gate rows and up rows in turn, 8 of each, so both sums of a column lie in one thread and the activation
//        costs no exchange. Tokens are gathered on their way into shared memory: a copy in expert order would cost 11% of the
//        whole call at 16384 tokens.
#include "common/activations.cuh"

#if !defined(SCALAR) || !defined(ACTIVATION) || !defined(NUM_EXPERTS) || !defined(HIDDEN) || !defined(INTERMEDIATE) || \
    !defined(BLOCK_THREADS) || !defined(BLOCKS) || !defined(PRODUCTS) || !defined(BLOCK_N) || !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, ACTIVATION, NUM_EXPERTS, HIDDEN, INTERMEDIATE, BLOCK_THREADS, BLOCKS, PRODUCTS, BLOCK_N, BLOCK_K and STAGES"
#endif
typedef SCALAR scalar_t;
#include "common/expert_tiles.cuh"

struct UpGemm {
    static constexpr u32 kDepth = HIDDEN, kRows = 2 * INTERMEDIATE;
    static constexpr bool kDenseTokens = false;
    const scalar_t* tokens;
    const int* token_of_slot;
    scalar_t* intermediate;

    __device__ __forceinline__ u32 row(int slot) const { return token_of_slot[slot]; }

    // Brings the tile's part of token_of_slot near before the tile begins. One warp.
    __device__ __forceinline__ void prefetch_rows(int first_slot, int slots) const {
        int slot = threadIdx.x % 32 * 32;
        if (slot < slots + 31) asm volatile("prefetch.global.L1 [%0];" ::"l"(token_of_slot + first_slot + min(slot, slots - 1)));
    }

    // The map is {k, 8 rows, gate or up, eights of rows, expert}.
    static __device__ __forceinline__ int third_coordinate(const Tile& tile, u32 rank) { return (tile.column * BLOCKS + rank) * (BLOCK_N / 16); }

    static __device__ __forceinline__ int fourth_coordinate(const Tile& tile, u32) { return tile.expert; }

    // Columns [part * BLOCK_N / 2, ...) of rows slot and slot + 8. Two lanes swap, so that each stores 4 neighbours.
    __device__ __forceinline__ void store(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
        constexpr bool kWholeTiles = kRows % TILE_ROWS == 0;
        u32 quad = threadIdx.x % 4;
        bool odd = quad % 2;
        // The lane's place among the columns of two eights, and how many are left from there on.
        int first = part * (BLOCK_N / 2) + odd * 8 + quad / 2 * 4, left = INTERMEDIATE - first;
        scalar_t* to = intermediate + (u64)(tile.first_slot + slot) * INTERMEDIATE + first;
#pragma unroll
        for (int half = 0; half < 2; half++, to += 8 * INTERMEDIATE) {
            bool wanted = slot + half * 8 < tile.slots;
#pragma unroll
            for (int eight = 0; eight < BLOCK_N / 16; eight += 2) {
                bool inside = wanted && (kWholeTiles || eight * 8 < left);
                u32 own = activated(sums, eight, half);
                if (eight + 1 == BLOCK_N / 16) {
                    scalar_t* alone = to + eight * 8 - odd * 6;
                    if (wanted && (kWholeTiles || eight * 8 - odd * 6 < left)) *reinterpret_cast<u32*>(alone) = own;
                    break;
                }
                u32 next = activated(sums, eight + 1, half);
                u32 got = __shfl_xor_sync(FULL_WARP, odd ? own : next, 1);
                Pack<u32, 2> both = odd ? Pack<u32, 2>{got, next} : Pack<u32, 2>{own, got};
                if (inside) store_pack(reinterpret_cast<u32*>(to + eight * 8), both);
            }
        }
    }

    // Two neighbouring columns of a row, as one word.
    static __device__ __forceinline__ u32 activated(const float (&sums)[SUMS], int eight, int half) {
        Pack<scalar_t, 2> outputs;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float* gate = sums + 8 * eight + 2 * half + i;
            outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(gate[0], gate[4]));
        }
        return *reinterpret_cast<u32*>(&outputs);
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
experts_up_wgmma(const __grid_constant__ TensorMap gate_up_map, const scalar_t* hidden_states, const int* expert_offsets,
                 const int* token_of_slot, u32* ticket, scalar_t* intermediate) {
    multiply_experts(UpGemm{hidden_states, token_of_slot, intermediate}, gate_up_map, Schedule{expert_offsets, ticket});
}
