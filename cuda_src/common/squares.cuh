// Tensor-core products of squares of 16 x 16 elements in shared memory, fp32 sums, and a ring that copies fill; sm_80 and newer.
//
// A square is 16 rows of 32 bytes, `pitch` bytes apart. ldmatrix reads it as four matrices of 8 x 8: lane 8 m + r says where row
// r of matrix m begins, and gets of each matrix one word. With q = lane % 4 that is elements 2 q and 2 q + 1 of row lane / 4, or
// transposed, of column lane / 4. No two rows of a matrix share a bank where the pitch is an odd number of 16 bytes.
#pragma once
#include "async_copy.cuh"

// Rows of so many elements, with 16 bytes between them.
#define PITCH(elements) ((elements) * 2 + 16)
static_assert(sizeof(SCALAR) == 2, "squares are of bf16 or fp16");

struct Square {
    u32 words[4];
};

// kLeft: as the left operand of a product, [m][k] in memory or, kTransposed, [k][m]; else as the right one, [n][k] or [k][n].
template <bool kLeft, bool kTransposed> __device__ __forceinline__ Square load_square(u32 address, u32 pitch) {
    // Words 1 and 2 of a left operand are its second eight of m and of k; of a right one, its second eight of k and of n.
    constexpr bool kRowsFirst = kLeft != kTransposed;
    u32 lane = threadIdx.x % 32;
    u32 row = kRowsFirst ? lane % 16 : lane / 16 * 8 + lane % 8, pack = kRowsFirst ? lane / 16 : lane / 8 % 2;
    Square square;
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(square.words[0]), "=r"(square.words[1]), "=r"(square.words[2]), "=r"(square.words[3])
                     : "r"(address + row * pitch + pack * 16) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(square.words[0]), "=r"(square.words[1]), "=r"(square.words[2]), "=r"(square.words[3])
                     : "r"(address + row * pitch + pack * 16) : "memory");
    }
    return square;
}

// values[n][i]: row lane / 4 (+ 8 for i >= 2), column 8 n + 2 q + i % 2.
struct SquareSums {
    float values[2][4];
};

#define MULTIPLY_HALF(TYPE, N)                                                                                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(sums.values[N][0]), "+f"(sums.values[N][1]), "+f"(sums.values[N][2]), "+f"(sums.values[N][3])                          \
        : "r"(left.words[0]), "r"(left.words[1]), "r"(left.words[2]), "r"(left.words[3]), "r"(right.words[2 * N]),                    \
          "r"(right.words[2 * N + 1]))

// sums += left right^T over 16 k.
__device__ __forceinline__ void multiply_squares(SquareSums& sums, const Square& left, const Square& right, bf16) {
    MULTIPLY_HALF("bf16", 0);
    MULTIPLY_HALF("bf16", 1);
}

__device__ __forceinline__ void multiply_squares(SquareSums& sums, const Square& left, const Square& right, fp16) {
    MULTIPLY_HALF("f16", 0);
    MULTIPLY_HALF("f16", 1);
}

// For each step, load(step, stage) orders its copies into a stage of the ring, and multiply(stage) takes what is there. Loads are
// STAGES - 1 steps ahead. All threads of the block.
template <class Load, class Multiply> __device__ __forceinline__ void run_ring(u32 steps, Load load, Multiply multiply) {
    auto load_ahead = [&](u32 step) {
        if (step < steps) load(step, step % STAGES);
        asm volatile("cp.async.commit_group;" ::: "memory");  // also an empty one, so that groups count steps
    };
#pragma unroll 1
    for (u32 step = 0; step < STAGES - 1; step++) load_ahead(step);
#pragma unroll 1
    for (u32 step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads();  // everyone's copies are there, and nobody still reads the stage that is filled next
        load_ahead(step + STAGES - 1);
        multiply(step % STAGES);
    }
}
