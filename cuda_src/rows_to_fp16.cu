// rows_to_fp16: bf16 rows as fp16 ones times a power of two each, so that products with fp16 weights can be taken of them.
//
// Reads  rows     [T, COLS] bf16, which the grid before this one may have written
//        expert_num_tokens [T / max_tokens] i32   with HAS_COUNTS: of the max_tokens rows of each expert only so many are there
// Writes narrowed [T, COLS] fp16   row / factor
//        factors  [T] fp32         a power of two that puts the largest magnitude of the row into [2^14, 2^15)
// Grid   ceil(T / (BLOCK_THREADS / 32)) blocks; a warp a row.
// Needs  COLS % 8 == 0, pointers aligned to 16 bytes.
// Maths  Exact, but for what is below 2^-31 of the row's largest magnitude: that is rounded, by at most 2^-39 of it. Infinities and
//        NaN stay what they are; a row without a magnitude of 2^-111 has the factor of one that has it.
// Why    A weight that is a 4-bit code times a 16-bit scale has too many bits for bf16, and almost none too many for fp16. A row's
//        largest magnitude comes first, so each row is read twice, the second time from the caches.
#include "common/async_copy.cuh"

#if !defined(COLS) || !defined(BLOCK_THREADS)
#error "define COLS and BLOCK_THREADS"
#endif
#ifndef HAS_COUNTS
#define HAS_COUNTS 0
#endif
#include "common/warp.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
rows_to_fp16(const bf16* rows, fp16* narrowed, float* factors, u64 num_rows, const int* expert_num_tokens, u64 max_tokens) {
    wait_for_previous_grid();
    release_next_grid();
    u64 row = (u64)blockIdx.x * (BLOCK_THREADS / 32) + threadIdx.x / 32;
    u32 lane = threadIdx.x % 32, largest = 0;
    if (row >= num_rows) return;
    if (HAS_COUNTS && (int)((u32)row % (u32)max_tokens) >= expert_num_tokens[(u32)row / (u32)max_tokens]) return;
    const bf16* from = rows + row * COLS;
#pragma unroll 4
    for (u32 column = lane * 8; column < COLS; column += 256) {
        Pack<bf16, 8> pack = load_pack<bf16, 8>(from + column);
#pragma unroll
        for (int i = 0; i < 8; i++) largest = max(largest, pack.values[i].bits & 0x7fffu);
    }
    // Exponents with their bias of 127: the row's, that of the factor, and that of what multiplies.
    u32 exponent = min(max(warp_max(largest) >> 7, 16u), 254u);
    float multiplier = __uint_as_float((268 - exponent) << 23);
    if (lane == 0) factors[row] = __uint_as_float((exponent - 14) << 23);
#pragma unroll 4
    for (u32 column = lane * 8; column < COLS; column += 256) {
        Pack<bf16, 8> pack = load_pack<bf16, 8>(from + column);
        Pack<fp16, 8> output;
#pragma unroll
        for (int i = 0; i < 8; i++) output.values[i] = from_float<fp16>(mul_rn(to_float(pack.values[i]), multiplier));
        store_pack(narrowed + row * COLS + column, output);
    }
}
