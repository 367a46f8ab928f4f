// experts_down_back_wgmma: the way back through the down projection and the activation, for every slot.
//
// Reads  down_map       TensorMap of down_proj [NUM_EXPERTS, HIDDEN, INTERMEDIATE] SCALAR, or where TRANSPOSED is 0 of
//                       [NUM_EXPERTS, INTERMEDIATE, HIDDEN]: its columns are the rows of this product
//        factor_map     the same as down_map, with LOW_RANK in the place of HIDDEN; only with LOW_RANK
//        low            [slots, LOW_RANK] SCALAR, in expert order; only with LOW_RANK
//        grad_output    [T, HIDDEN] SCALAR      of the layer
//        expert_offsets [NUM_EXPERTS + 1] i32, token_of_slot [slots] i32, weight_of_slot [slots] fp32   of sort_by_expert.cu
//        ticket         u32                     0; counts the tiles that are taken after each cluster's first
//        gate_up        [slots, GATE_UP] SCALAR   what the activation was applied to, as experts_up kept it
// Writes grad_gate_up   [slots, GATE_UP] SCALAR   weight * (grad_output W) * d activation / d gate_up
//        weighted       [slots, INTERMEDIATE] SCALAR   weight * activation: what the gradient of down_proj is a product of; not
//                       written without STORES_WEIGHTED
//        dot_parts      [slots, PARTS] fp32     of <activation, grad_output W>, one for each BLOCK_N columns: their sum is the
//                       gradient of the routing weight
// Grid   any multiple of BLOCKS; one block per multiprocessor. Block BLOCK_THREADS. Smem STAGES * STAGE_BYTES + sizeof(Shared).
// Needs  HIDDEN % 8 == 0, INTERMEDIATE % 8 == 0, 16-byte aligned rows, sm_90a.
// Maths  fp32 sums over ascending k, never rounded; the activation and its slopes in fp32, one rounding at each store. A part
//        adds its columns in a fixed order.
// Why    A token's gradient is gathered on its way into shared memory, and nothing between the product and the gradient of
//        gate_up goes through memory. Two lanes swap sums, so that each has 4 neighbouring columns to load and to store.
#include "common/activation_slopes.cuh"

#if !defined(SCALAR) || !defined(ACTIVATION) || !defined(GATED) || !defined(INTERLEAVED) || !defined(TRANSPOSED) ||              \
    !defined(STORES_WEIGHTED) || !defined(LOW_RANK) || !defined(NUM_EXPERTS) || !defined(HIDDEN) || !defined(INTERMEDIATE) ||                         \
    !defined(BLOCK_THREADS) || !defined(BLOCKS) || !defined(PRODUCTS) || !defined(BLOCK_N) ||             \
    !defined(BLOCK_K) || !defined(STAGES)
#error "define SCALAR, ACTIVATION, GATED, INTERLEAVED, TRANSPOSED, STORES_WEIGHTED, LOW_RANK, NUM_EXPERTS, HIDDEN, INTERMEDIATE, \
BLOCK_THREADS, BLOCKS, PRODUCTS, BLOCK_N, BLOCK_K and STAGES"
#endif
#define HAS_BIAS 0
typedef SCALAR scalar_t;
#include "common/expert_tiles.cuh"

#define GATE_UP ((GATED ? 2 : 1) * INTERMEDIATE)
#define PARTS ((INTERMEDIATE + BLOCK_N - 1) / BLOCK_N)
#define SIXTEENS_IN_FLIGHT 2  // of columns whose gate_up is loaded together: as many as registers are left, twice

struct DownBackGemm {
    static constexpr u32 kDepth = HIDDEN, kRows = INTERMEDIATE;
    static constexpr bool kDenseTokens = false, kTokensAreNew = false;
    typedef RowLoader<DownBackGemm> Loader;
    static constexpr int kBoxes = TRANSPOSED ? BLOCK_N / 64 : 1;
    const scalar_t* tokens;
    const int* token_of_slot;
    const float* weight_of_slot;
    const scalar_t* gate_up;
    scalar_t* grad_gate_up;
    scalar_t* weighted;
    float* dot_parts;

    __device__ __forceinline__ u32 row(int slot) const { return token_of_slot[slot]; }

    // Brings the tile's part of token_of_slot near before the tile begins. One warp.
    __device__ __forceinline__ void prefetch_rows(int first_slot, int slots) const { prefetch_of_slots(token_of_slot + first_slot, slots); }

    // The map is {k, 8 rows, 1, eights of rows, expert}; TRANSPOSED: {row, k, 1, 1, expert}.
    static __device__ __forceinline__ BoxStart box_start(int expert, u32 part, int box, int k) {
        if (TRANSPOSED) return {(int)part * BLOCK_N + box * 64, k, 0, expert};
        return {k, 0, (int)part * (BLOCK_N / 8), expert};
    }

    // Brings gate_up of a tile into L2 while the tile is multiplied: from memory its store would wait for each piece. Of the
    // warpgroup's slots a thread has 64 columns of one in 64, or of its gates or ups two neighbours of them.
    __device__ __forceinline__ void prefetch_inputs(const Tile& tile, u32 slot_group, u32 part) const {
        constexpr u32 kPieces = (GATED ? 2 : 1) * BLOCK_N / 64;
#pragma unroll
        for (int i = 0; i < PRODUCTS; i++) {
            int slot = (i * SLOT_GROUPS + (int)slot_group) * 64 + threadIdx.x % 64;
#pragma unroll
            for (u32 j = 0; j < kPieces / 2; j++) {
                u32 piece = threadIdx.x / 64 % 2 * (kPieces / 2) + j;
                bool is_up = GATED && !INTERLEAVED && piece >= BLOCK_N / 64;
                u32 column = part * (INTERLEAVED ? 2 * BLOCK_N : BLOCK_N) + (is_up ? piece - BLOCK_N / 64 : piece) * 64;
                bool inside = column < (INTERLEAVED ? GATE_UP : INTERMEDIATE);
                const scalar_t* from = gate_up + (u64)(tile.first_slot + slot) * GATE_UP + (is_up ? INTERMEDIATE : 0) + column;
                if (slot < tile.slots && inside) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
            }
        }
    }

    // Gates and ups of 4 neighbouring columns; ups of an ungated activation are undefined.
    struct GateUp {
        static constexpr u32 kHigh = INTERLEAVED ? 4 : INTERMEDIATE;  // from the low 4 to the high 4
        Pack<scalar_t, 4> low, high;

        __device__ __forceinline__ void load(const scalar_t* from) {
            low = pack_from_l2(from);
            if (GATED) high = pack_from_l2(from + kHigh);
        }

        // From L2, because a forward computed again in this backward is the grid before this one.
        static __device__ __forceinline__ Pack<scalar_t, 4> pack_from_l2(const scalar_t* address) {
            u64 bits = load_from_l2(reinterpret_cast<const u64*>(address));
            return *reinterpret_cast<Pack<scalar_t, 4>*>(&bits);
        }

        __device__ __forceinline__ void store(scalar_t* to) const {
            store_pack(to, low);
            if (GATED) store_pack(to + kHigh, high);
        }

        __device__ __forceinline__ scalar_t& gate(int i) { return !INTERLEAVED ? low.values[i] : pair(i)[0]; }

        __device__ __forceinline__ scalar_t& up(int i) { return !INTERLEAVED ? high.values[i] : pair(i)[1]; }

        __device__ __forceinline__ scalar_t* pair(int i) { return i < 2 ? low.values + 2 * i : high.values + 2 * i - 4; }
    };

    // Columns [part * BLOCK_N, ...) of rows slot and slot + 8.
    __device__ __forceinline__ void store(const Tile& tile, int slot, u32 part, const float (&sums)[SUMS]) const {
        u32 quad = threadIdx.x % 4;
        bool odd = quad % 2;
        // The lane's first columns after the swap, and how many are left from there on.
        u32 first = part * BLOCK_N + odd * 8 + quad / 2 * 4;
        int left = INTERMEDIATE - (int)first;
        constexpr u32 kWidth = INTERLEAVED ? 2 : 1;  // of a column in gate_up
        u64 row = tile.first_slot + slot;
#pragma unroll
        for (int half = 0; half < 2; half++, row += 8) {
            bool wanted = slot + half * 8 < tile.slots;
            float weight = wanted ? load_from_l2(weight_of_slot + row) : 0.0f, dot = 0.0f;
            const scalar_t* from = gate_up + row * GATE_UP + first * kWidth;
            scalar_t *to = grad_gate_up + row * GATE_UP + first * kWidth, *to_weighted = weighted + row * INTERMEDIATE + first;
            // The next columns' gate_up is on its way while these are computed.
            GateUp inputs[2][SIXTEENS_IN_FLIGHT];
            auto load = [&](int group) {
#pragma unroll
                for (int i = 0; i < SIXTEENS_IN_FLIGHT; i++) {
                    int column = (group * SIXTEENS_IN_FLIGHT + i) * 16;
                    if (wanted && column < left) inputs[group % 2][i].load(from + column * kWidth);
                }
            };
            load(0);
#pragma unroll
            for (int group = 0; group < BLOCK_N / 16 / SIXTEENS_IN_FLIGHT; group++) {
                if (group + 1 < BLOCK_N / 16 / SIXTEENS_IN_FLIGHT) load(group + 1);
#pragma unroll
                for (int i = 0; i < SIXTEENS_IN_FLIGHT; i++) {
                    int sixteen = group * SIXTEENS_IN_FLIGHT + i;
                    int column = sixteen * 16;
                    const float *own = sums + 8 * sixteen + 2 * half, *next = own + 4;
                    float grads[4];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float got = __shfl_xor_sync(FULL_WARP, either(odd, own[j], next[j]), 1);
                        float kept = either(odd, next[j], own[j]);
                        grads[j] = odd ? got : kept;
                        grads[2 + j] = odd ? kept : got;
                    }
                    if (wanted && column < left) {
                        dot += go_back(inputs[group % 2][i], grads, weight, to + column * kWidth, to_weighted + column);
                    }
                }
            }
            dot += __shfl_xor_sync(FULL_WARP, dot, 1);
            dot += __shfl_xor_sync(FULL_WARP, dot, 2);
            if (wanted && quad == 0) dot_parts[row * PARTS + part] = dot;
        }
    }

    // Chosen here and not before the products end: where the compiler moved the choice there, they would run one by one.
    static __device__ __forceinline__ float either(bool first, float one, float other) {
        float chosen;
        asm volatile("{\n.reg .pred first;\nsetp.ne.u32 first, %1, 0;\nselp.f32 %0, %2, %3, first;\n}"
                     : "=f"(chosen) : "r"((u32)first), "f"(one), "f"(other));
        return chosen;
    }

    // Stores the gradient of 4 columns' gates and ups, given that of their unweighted outputs; returns what they add to the dot.
    static __device__ __forceinline__ float go_back(GateUp inputs, const float (&grads)[4], float weight, scalar_t* to, scalar_t* to_weighted) {
        Pack<scalar_t, 4> outputs;
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            Gradients of = activation_gradients<ACTIVATION>(to_float(inputs.gate(i)), GATED ? to_float(inputs.up(i)) : 1.0f);
            float grad = grads[i] * weight;
            dot = fma_rn(of.value, grads[i], dot);
            outputs.values[i] = from_float<scalar_t>(of.value * weight);
            inputs.gate(i) = from_float<scalar_t>(grad * of.gate);
            if (GATED) inputs.up(i) = from_float<scalar_t>(grad * of.up);
        }
        inputs.store(to);
        if (STORES_WEIGHTED) store_pack(to_weighted, outputs);
        return dot;
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
experts_down_back_wgmma(const __grid_constant__ TensorMap down_map, GATHERED_ADAPTER_PARAMETERS const scalar_t* grad_output,
                        const int* expert_offsets, const int* token_of_slot, const float* weight_of_slot, u32* ticket, const scalar_t* gate_up,
                        scalar_t* grad_gate_up, scalar_t* weighted, float* dot_parts) {
    DownBackGemm gemm = {grad_output, token_of_slot, weight_of_slot, gate_up, grad_gate_up, weighted, dot_parts};
    multiply_experts(gemm, PlainWeights{down_map, GATHERED_ADAPTER}, Schedule{expert_offsets, ticket});
}
