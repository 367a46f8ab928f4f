// operand_rows: copies every token's hidden state to its slots, turned, so that the rows of one expert are neighbours, for the copy
// engine of experts_up_codes_wgmma.cu. NARROWED: bf16 rows become fp16 ones and a power of two each.
//
// Reads  hidden_states [T, COLS] SCALAR
//        slot_of_pair  [T, TOP_K] i32     row of each pair; -1: masked, no row. The grid before this one may have written all of these
//        BY_SLOT, as rows of a batch are no pairs: token_of_slot [slots] i32, or null where rows lie by slot already, and num_slots
//                      i32, how many of these there are
// Writes rows          [slots, kPlaces] SCALAR, as common/turned_rows.cuh says; NARROWED: fp16, hidden state / factor
//        factors       [slots] fp32       NARROWED: a power of two that puts the largest magnitude of the row into [2^14, 2^15)
// Grid   T blocks, each a token, which is read once whatever its slots; BY_SLOT one for each slot that there may be.
// Needs  COLS % 8 == 0, pointers aligned to 16 bytes.
// Maths  Exact, but NARROWED for what is below 2^-31 of the row's largest magnitude: that is rounded, by at most 2^-39 of it.
//        Infinities and NaN stay what they are; a row without a magnitude of 2^-111 has the factor of one that has it.
// Why    The tiles of quantised weights take token rows where they are neighbours (common/coded_tiles.cuh), and multiply fp16 where
//        a weight is a code times a scale, which has too many bits for bf16 and almost none too many for fp16. Beside gather.cu
//        this narrows and turns: a block reads its token once, keeps it in registers, and writes it to each slot. A thread loads
//        pairs of columns from four places, and stores them as 16 bytes: slots are many and tokens few.
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(COLS) || !defined(BY_SLOT) || !defined(TOP_K) || !defined(NARROWED) || !defined(BLOCK_THREADS)
#error "define SCALAR, COLS, BY_SLOT, TOP_K, NARROWED and BLOCK_THREADS"
#endif
#include "common/turned_rows.cuh"
#include "common/warp.cuh"

#if NARROWED
typedef fp16 operand_t;
#else
typedef SCALAR operand_t;
#endif
constexpr u32 kPlaces = turned_columns(COLS);                       // of a row
#define PACKS ((kPlaces / 8 + BLOCK_THREADS - 1) / BLOCK_THREADS)  // of a thread

// The largest exponent of the block's bf16 numbers, with its bias of 127.
__device__ __forceinline__ u32 largest_exponent(const Pack<SCALAR, 8> (&packs)[PACKS]) {
    __shared__ u32 of_warp[BLOCK_THREADS / 32];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
#pragma unroll
        for (int j = 0; j < 8; j++) largest = max(largest, packs[i].values[j].bits & 0x7fffu);
    }
    largest = warp_max(largest);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < BLOCK_THREADS / 32; warp++) largest = max(largest, of_warp[warp]);
    return largest >> 7;
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
operand_rows(const SCALAR* hidden_states, const int* slot_of_pair, const int* token_of_slot, const int* num_slots, operand_t* rows,
             float* factors) {
    wait_for_previous_grid();
    release_next_grid();
    if (BY_SLOT && (int)blockIdx.x >= *num_slots) return;
    u64 token = BY_SLOT && token_of_slot ? token_of_slot[blockIdx.x] : blockIdx.x;
    Pack<SCALAR, 8> packs[PACKS] = {};
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            u32 column = turned((i * BLOCK_THREADS + threadIdx.x) * 8 + j);
            if (column >= COLS) continue;
            Pack<SCALAR, 2> pair = load_pack<SCALAR, 2>(hidden_states + token * COLS + column);
            packs[i].values[j] = pair.values[0], packs[i].values[j + 1] = pair.values[1];
        }
    }
    u32 exponent = 0;
    if constexpr (NARROWED) exponent = min(max(largest_exponent(packs), 16u), 254u);
    Pack<operand_t, 8> outputs[PACKS];
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        if constexpr (NARROWED) {
            float multiplier = __uint_as_float((268 - exponent) << 23);
#pragma unroll
            for (int j = 0; j < 8; j++) outputs[i].values[j] = from_float<operand_t>(mul_rn(to_float(packs[i].values[j]), multiplier));
        } else {
            outputs[i] = *reinterpret_cast<Pack<operand_t, 8>*>(&packs[i]);
        }
    }
    for (int k = 0; k < (BY_SLOT ? 1 : TOP_K); k++) {
        int slot = BY_SLOT ? blockIdx.x : slot_of_pair[token * TOP_K + k];
        if (slot < 0) continue;
        if (NARROWED && threadIdx.x == 0) factors[slot] = __uint_as_float((exponent - 14) << 23);
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            u32 place = (i * BLOCK_THREADS + threadIdx.x) * 8;
            if (place < kPlaces) store_pack(rows + (u64)slot * kPlaces + place, outputs[i]);
        }
    }
}
