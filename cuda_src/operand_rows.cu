// operand_rows: token rows as the tiles of quantised weights take them: turned and, NARROWED, from bf16 to fp16 and a power of two each.
//
// Reads  source        [rows, COLS] SCALAR   which the grid before this one may have written, as all of these
//        row_of_slot   [slots] i32           which row each block has; null: its own number
//        num_slots     i32                   how many blocks have a row; null: all
// Writes rows          [rows, kPlaces] SCALAR, as common/turned_rows.cuh says; NARROWED: fp16, source / factor
//        factors       [rows] fp32           NARROWED: a power of two that puts the largest magnitude of the row into [2^14, 2^15)
// Grid   one block for each row, of a batch for each that may count.
// Needs  COLS % 8 == 0, pointers aligned to 16 bytes.
// Maths  Exact, but NARROWED for what is below 2^-31 of the row's largest magnitude: that is rounded, by at most 2^-39 of it.
//        Infinities and NaN stay what they are; a row without a magnitude of 2^-111 has the factor of one that has it.
// Why    The tiles of quantised weights multiply fp16 where a weight is a code times a scale, which has too many bits for bf16 and
//        almost none too many for fp16. Each token is turned and narrowed once, whatever the number of its slots: the tiles
//        gather (common/tiles/producer.cuh).
#include "common/async_copy.cuh"

#if !defined(SCALAR) || !defined(COLS) || !defined(NARROWED) || !defined(BLOCK_THREADS)
#error "define SCALAR, COLS, NARROWED and BLOCK_THREADS"
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
operand_rows(const SCALAR* source, const int* row_of_slot, const int* num_slots, operand_t* rows, float* factors) {
    wait_for_previous_grid();
    release_next_grid();
    if (num_slots && (int)blockIdx.x >= *num_slots) return;
    u64 row = row_of_slot ? row_of_slot[blockIdx.x] : blockIdx.x;
    Pack<SCALAR, 8> packs[PACKS] = {};
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            u32 column = turned((i * BLOCK_THREADS + threadIdx.x) * 8 + j);
            if (column >= COLS) continue;
            Pack<SCALAR, 2> pair = load_pack<SCALAR, 2>(source + row * COLS + column);
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
    if (NARROWED && threadIdx.x == 0) factors[row] = __uint_as_float((exponent - 14) << 23);
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        u32 place = (i * BLOCK_THREADS + threadIdx.x) * 8;
        if (place < kPlaces) store_pack(rows + row * kPlaces + place, outputs[i]);
    }
}
