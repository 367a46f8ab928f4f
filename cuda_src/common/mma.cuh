// Tensor-core products of 16 weight rows with 8 tokens, fp32 accumulators, sm_80 and newer.
//
// The order of k inside a product is free as long as both operands agree, so a lane takes 8 neighbouring elements of
// its row (one 16-byte load) and spends them on two products: k 8q..8q+3, then 8q+4..8q+7 (q = lane % 4). Rows of
// weights: lane / 4 and lane / 4 + 8. Token: lane / 4. Results 0, 1: row lane / 4, tokens 2q, 2q+1; 2, 3: row + 8.
#pragma once
#include "dtypes.cuh"

struct alignas(16) Fragment {
    u32 words[4];
};

__device__ __forceinline__ Fragment load_fragment(u32 address) {
    Fragment f;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(f.words[0]), "=r"(f.words[1]), "=r"(f.words[2]), "=r"(f.words[3]) : "r"(address) : "memory");
    return f;
}

// Four matrices of 8 rows of 16 bytes. Lane 8m + r says where row r of matrix m begins, and every lane gets of each matrix word
// lane % 4 of row lane / 4.
__device__ __forceinline__ void load_matrices(u32 (&words)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(address) : "memory");
}

// The same two fragments, low and high, of weights that lie in shared memory as k rows: 16 bytes are 8 weights of one k.
//
// ldmatrix reads four 8 x 8 matrices. Lane 8m + r says where row r of matrix m begins; .trans gives each lane the elements of
// rows 2q and 2q + 1 in column lane / 4. So a matrix row is a k, a column is a weight row, and since rows may lie anywhere,
// they are put where a lane gets the k that load_fragment would have given it: matrix rows 2q, 2q + 1 are k 8q, 8q + 1, which
// are a fragment's first word. Matrices 2 and 3 are its second word, 2 further; 1 and 3 are weight rows 8..15. The two words of
// the second product are 4 further.
__device__ __forceinline__ u32 k_of_matrix_row(u32 lane) { return lane % 8 / 2 * 8 + lane % 2 + lane / 16 * 2; }

// 32 k of 16 rows. address: 8 weights of k k_of_matrix_row(lane), of rows 0..7, or 8..15 where lane / 8 is odd.
__device__ __forceinline__ void load_transposed_fragments(Fragment& low, Fragment& high, u32 address, u32 k_row_bytes) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(low.words[i]), "=r"(high.words[i]), "=r"(low.words[i + 1]), "=r"(high.words[i + 1])
                     : "r"(address + i * 2 * k_row_bytes) : "memory");
    }
}

#define MMA_16x8x16(TYPE)                                                                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, " \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                      \
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                       \
                 : "r"(low.words[i]), "r"(high.words[i]), "r"(low.words[i + 1]), "r"(high.words[i + 1]),            \
                   "r"(tokens.words[i]), "r"(tokens.words[i + 1]))

// sums += 32 k of 16 rows (low: row lane / 4, high: + 8) x 8 tokens.
__device__ __forceinline__ void multiply(float (&sums)[4], Fragment low, Fragment high, Fragment tokens, bf16) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) MMA_16x8x16("bf16");
}

__device__ __forceinline__ void multiply(float (&sums)[4], Fragment low, Fragment high, Fragment tokens, fp16) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) MMA_16x8x16("f16");
}
