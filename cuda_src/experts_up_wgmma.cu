// experts_up_wgmma: act(x W_gate^T) * (x W_up^T) for every slot; for thousands of tokens, at the speed of the tensor cores.
//
// Reads  gate_up_map    TensorMap of gate_up_proj [NUM_EXPERTS, kRows, HIDDEN] SCALAR (kernels/experts_up_wgmma.py);
//                       TRANSPOSED: of [NUM_EXPERTS, HIDDEN, kRows]. Rows: first all of gate, then all of up; INTERLEAVED: gate
//                       and up in turn; not GATED: INTERMEDIATE rows and no up
//        hidden_states  [T, HIDDEN] SCALAR
//        expert_offsets [NUM_EXPERTS + 1] i32, token_of_slot [slots] i32   of sort_by_expert.cu; not with INLINE_PAIRS
//        ticket         u32   0; counts the tiles that are taken after each cluster's first; not with INLINE_PAIRS
//        top_k_index    [T * TOP_K] INDEX        only with INLINE_PAIRS; with HAS_EXPERT_MAP also expert_map of common/pairs.cuh
//        bias           [NUM_EXPERTS, kRows] SCALAR, added before the activation; not read without HAS_BIAS
//        factor_map     the same as gate_up_map, with LOW_RANK in the place of HIDDEN; only with LOW_RANK
//        low            [slots, LOW_RANK] SCALAR, in expert order; only with LOW_RANK
// Writes intermediate   [slots, INTERMEDIATE] SCALAR
//        gate_up        [slots, kRows] SCALAR     what the activation is applied to, in the order of the weight's rows, for a
//                       backward; not written without KEEPS_GATE_UP
//        slot_of_pair   [T * TOP_K] i32          as of sort_by_expert.cu; only with INLINE_PAIRS
// Grid   any multiple of BLOCKS; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_90a; T * TOP_K <= INLINE_PAIRS, or INLINE_PAIRS 0.
// Maths  fp32 sums over ascending k, then over an adapter's; activation in fp32, of the unrounded sums; one rounding at the store.
// Why    Gate and up of a column are sums of the same thread, so the activation costs no exchange: the map takes gate rows and
//        up rows in turn, 8 of each. Of transposed weights it brings 64 gate columns and then the 64 up columns; interleaved
//        ones are neighbours in memory already. Tokens are gathered on their way into shared memory: a copy in expert order
//        would cost 11% of the whole call at 16384 tokens.
#include "common/activations.cuh"

#if !defined(SCALAR) || !defined(ACTIVATION) || !defined(GATED) || !defined(INTERLEAVED) || !defined(TRANSPOSED) ||          \
    !defined(HAS_BIAS) || !defined(LOW_RANK) || !defined(KEEPS_GATE_UP) || !defined(NUM_EXPERTS) || !defined(HIDDEN) ||      \
    !defined(INTERMEDIATE) || !defined(BLOCK_THREADS) || !defined(BLOCKS) || !defined(PRODUCTS) || !defined(BLOCK_N) ||      \
    !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, ACTIVATION, GATED, INTERLEAVED, TRANSPOSED, HAS_BIAS, LOW_RANK, KEEPS_GATE_UP, NUM_EXPERTS, HIDDEN, INTERMEDIATE, \
BLOCK_THREADS, BLOCKS, PRODUCTS, BLOCK_N, BLOCK_K and STAGES"
#endif
typedef SCALAR scalar_t;
#include "common/store_pairs.cuh"
#if INLINE_PAIRS
#define PAIRS_PARAMETERS const INDEX* top_k_index, const EXPERT_MAP* expert_map, u64 num_pairs, int* slot_of_pair,
#define TOKEN_OF_SLOT
#define SCHEDULE Schedule{{top_k_index, (u32)num_pairs, expert_map}, slot_of_pair}
#else
#define PAIRS_PARAMETERS const int* expert_offsets, const int* token_of_slot, u32* ticket,
#define TOKEN_OF_SLOT token_of_slot,
#define SCHEDULE Schedule{expert_offsets, ticket}
#endif

struct UpGemm {
    static constexpr u32 kDepth = HIDDEN, kRows = (GATED ? 2 : 1) * INTERMEDIATE;
    static constexpr bool kDenseTokens = false, kTokensAreNew = false;
    typedef RowLoader<UpGemm> Loader;
    static constexpr u32 kColumns = BLOCK_N / (GATED ? 2 : 1);  // of the intermediate, that a part is for
    // Boxes of transposed weights are 64 columns, or with two halves side by side twice that.
    static constexpr bool kHalves = GATED && !INTERLEAVED;
    static constexpr int kBoxes = !TRANSPOSED ? 1 : BLOCK_N / (kHalves ? 128 : 64);
    static_assert(!(TRANSPOSED && kHalves) || BLOCK_N == 128, "a part is one box of both halves");
    const scalar_t* tokens;
#if !INLINE_PAIRS
    const int* token_of_slot;
#endif
    scalar_t* intermediate;
    const scalar_t* bias;
    scalar_t* gate_up;

#if INLINE_PAIRS
    __device__ __forceinline__ u32 row(int slot) const { return shared_of_block().pair_of_slot[slot] / TOP_K; }
#else
    __device__ __forceinline__ u32 row(int slot) const { return token_of_slot[slot]; }

    // Brings the tile's part of token_of_slot near before the tile begins. One warp.
    __device__ __forceinline__ void prefetch_rows(int first_slot, int slots) const { prefetch_of_slots(token_of_slot + first_slot, slots); }
#endif

    // The map is {k, 8 rows, gate or up, eights of rows, expert}, without up {k, 8 rows, 1, eights of rows, expert};
    // TRANSPOSED: {row, k, gate or up, 1, expert}, where they are not halves {row, k, 1, 1, expert}.
    static __device__ __forceinline__ BoxStart box_start(int expert, u32 part, int box, int k) {
        if (TRANSPOSED) return {(int)(part * (kHalves ? kColumns : BLOCK_N)) + box * 64, k, 0, expert};
        return {k, 0, (int)part * (int)(kColumns / 8), expert};
    }

    __device__ __forceinline__ void prefetch_inputs(const Tile& tile, u32, u32 part) const {
        if (HAS_BIAS) prefetch_bias(*this, tile.expert, part);
    }

    // The weight row that is row 8 * eight + place of a part; past the last column it may be a row of the other half, whose
    // sum is not stored.
    static __device__ __forceinline__ u32 weight_row(u32 part, u32 eight, u32 place) {
        if (!GATED || (TRANSPOSED && INTERLEAVED)) return part * BLOCK_N + eight * 8 + place;
        u32 eights = TRANSPOSED ? BLOCK_N / 16 : 1, up = eight / eights % 2;  // so many of gate before as many of up
        u32 column = part * kColumns + (TRANSPOSED ? eight % eights : eight / 2) * 8 + place;
        return INTERLEAVED ? column * 2 + up : column + up * INTERMEDIATE;
    }

    // Columns [part * kColumns, ...) of rows slot and slot + 8.
    __device__ __forceinline__ void store(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
        constexpr int kPartner = TRANSPOSED && INTERLEAVED ? 2 : 1;
        if (KEEPS_GATE_UP) keep_gate_up(tile, slot, part, sums);
        store_pairs<INTERMEDIATE, INTERMEDIATE, kColumns / 8, kPartner>(intermediate, tile, slot, part * kColumns,
                                                          [&](int eight, int half) { return activated(sums, eight, half); });
    }

    // The sums themselves, rounded.
    __device__ __forceinline__ void keep_gate_up(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
        auto rounded = [&](int eight, int half) {
            Pack<scalar_t, 2> pair = {from_float<scalar_t>(sums[4 * eight + 2 * half]), from_float<scalar_t>(sums[4 * eight + 2 * half + 1])};
            return *reinterpret_cast<u32*>(&pair);
        };
        if constexpr (!GATED || (TRANSPOSED && INTERLEAVED)) {
            store_pairs<kRows, kRows, BLOCK_N / 8, 1, true>(gate_up, tile, slot, part * BLOCK_N, rounded);
        } else if constexpr (INTERLEAVED) {
            // An eight of gates and the next eight, their ups: of a column the lane has both, which are neighbours in a row.
            scalar_t* to = gate_up + (u64)(tile.first_slot + slot) * kRows + part * BLOCK_N + threadIdx.x % 4 * 4;
#pragma unroll
            for (int half = 0; half < 2; half++, to += 8 * kRows) {
#pragma unroll
                for (int eight = 0; eight < BLOCK_N / 8; eight += 2) {
                    if (slot + half * 8 >= tile.slots || part * BLOCK_N + eight * 8 >= kRows) continue;
                    const float *gates = sums + 4 * eight + 2 * half, *ups = gates + 4;
                    store_pack(to + eight * 8, Pack<scalar_t, 4>{from_float<scalar_t>(gates[0]), from_float<scalar_t>(ups[0]),
                                                                from_float<scalar_t>(gates[1]), from_float<scalar_t>(ups[1])});
                }
            }
        } else {
#pragma unroll
            for (int up = 0; up < 2; up++) {
                store_pairs<kRows, INTERMEDIATE, kColumns / 8, 1, true>(gate_up + up * INTERMEDIATE, tile, slot, part * kColumns, [&](int eight, int half) {
                    return rounded(TRANSPOSED ? eight + up * (kColumns / 8) : eight * 2 + up, half);
                });
            }
        }
    }

    // Two neighbouring columns of a row, as one word.
    static __device__ __forceinline__ u32 activated(const float (&sums)[SUMS], int eight, int half) {
        Pack<scalar_t, 2> outputs;
        if (!GATED) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(sums[4 * eight + 2 * half + i], 1.0f));
            }
        } else if (TRANSPOSED && INTERLEAVED) {
            // The lane has columns quad and 4 + quad of the eight, its neighbour those beside them.
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* gate = sums + 8 * eight + 4 * i + 2 * half;
                outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(gate[0], gate[1]));
            }
            u32 own = *reinterpret_cast<u32*>(&outputs), got = __shfl_xor_sync(FULL_WARP, own, 1);
            return threadIdx.x % 2 ? __byte_perm(got, own, 0x7632) : __byte_perm(own, got, 0x5410);
        } else {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float* gate = sums + (TRANSPOSED ? 4 : 8) * eight + 2 * half + i;
                outputs.values[i] = from_float<scalar_t>(activate<ACTIVATION, false>(gate[0], gate[TRANSPOSED ? BLOCK_N / 4 : 4]));
            }
        }
        return *reinterpret_cast<u32*>(&outputs);
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
experts_up_wgmma(const __grid_constant__ TensorMap gate_up_map, GATHERED_ADAPTER_PARAMETERS
                 const scalar_t* hidden_states, PAIRS_PARAMETERS scalar_t* intermediate, const scalar_t* bias,
                 scalar_t* gate_up) {
    UpGemm gemm = {hidden_states, TOKEN_OF_SLOT intermediate, bias, gate_up};
    multiply_experts(gemm, PlainWeights{gate_up_map, GATHERED_ADAPTER}, SCHEDULE);
}
