// One tile of a matrix product on the CUDA cores: any strides, any alignment, fp32 sums.
//
// out[line, column] = sum over k of left[line, k] * right[column, k], k = 0, 1, ... in one chain of fused multiply-adds, so
// that an element's bits depend on its two operands alone: not on the tile, the other lines, or how memory is aligned.
// A block of BLOCK_THREADS owns up to TILE x TILE elements of the output, each thread 4 x 4 of them. Both operands pass through
// shared memory as fp32, STEP of k at a time, loaded one element at a time; what lies outside of an operand is loaded as zero.
// Smem   2 * STEP * (TILE + 4) floats. A row ends in 4 unused ones, which keep it aligned to 16 bytes and spread the banks.
// Why    What this serves has no alignment to build wide loads on, and often few lines for an expert: then one line a thread
//        leaves out the sums that a full tile would make for nothing.
#pragma once
#include "dtypes.cuh"

#if !defined(TILE) || !defined(BLOCK_THREADS)
#error "define TILE and BLOCK_THREADS"
#endif
static_assert(BLOCK_THREADS == TILE * TILE / 16, "4 x 4 elements a thread");
#define BLOCKS_AT_ONCE 2  // on a multiprocessor, so that some load while others multiply
#define STEP 32
#define FEW_LINES (TILE / 4)  // a tile of no more needs one line a thread

// `count` lines of k, from `first` on; strides in elements.
template <typename T> struct Operand {
    const T* first;
    u64 line_stride;
    u64 k_stride;
    u64 count;
};

struct Stage {
    alignas(16) float values[STEP][TILE + 4];
};

// Lines [0, kCount) and k [from, from + STEP) of an operand. Neighbouring threads read along what lies closer together.
template <int kCount, typename T>
__device__ __forceinline__ void load_stage(Stage& stage, const Operand<T>& operand, u64 from, u64 depth) {
    bool along_k = operand.k_stride <= operand.line_stride;
    u32 line = along_k ? threadIdx.x / STEP : threadIdx.x % kCount, line_step = along_k ? BLOCK_THREADS / STEP : 0;
    u32 k = along_k ? threadIdx.x % STEP : threadIdx.x / kCount, k_step = along_k ? 0 : BLOCK_THREADS / kCount;
    const T* element = operand.first + line * operand.line_stride + (from + k) * operand.k_stride;
    u64 element_step = line_step * operand.line_stride + k_step * operand.k_stride;
#pragma unroll
    for (int i = 0; i < kCount * STEP / BLOCK_THREADS; i++) {
        bool inside = line < operand.count && from + k < depth;
        stage.values[k][line] = inside ? to_float(*element) : 0.0f;
        line += line_step, k += k_step, element += element_step;
    }
}

// kLines neighbouring lines and 4 neighbouring columns for each thread. `out` is the tile's first element.
template <int kLines, typename Left, typename Right, typename Out>
__device__ __forceinline__ void multiply(Stage& lefts, Stage& rights, const Operand<Left>& left, const Operand<Right>& right,
                                         u64 depth, Out* out, u64 out_stride) {
    u32 line = threadIdx.x / (TILE / 4) * kLines, column = threadIdx.x % (TILE / 4) * 4;
    float sums[kLines][4] = {};
    for (u64 from = 0; from < depth; from += STEP) {
        load_stage<FEW_LINES * kLines>(lefts, left, from, depth);
        load_stage<TILE>(rights, right, from, depth);
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < STEP; k++) {
            Pack<float, kLines> a = load_pack<float, kLines>(&lefts.values[k][line]);
            Pack<float, 4> b = load_pack<float, 4>(&rights.values[k][column]);
#pragma unroll
            for (int i = 0; i < kLines; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = fma_rn(a.values[i], b.values[j], sums[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kLines; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            bool inside = line + i < left.count && column + j < right.count;
            if (inside) out[(line + i) * out_stride + column + j] = from_float<Out>(sums[i][j]);
        }
    }
}

// The tile of the first TILE lines of both operands, which have at least one each; every thread of the block calls it.
template <typename Left, typename Right, typename Out>
__device__ __forceinline__ void multiply_tile(const Operand<Left>& left, const Operand<Right>& right, u64 depth, Out* out,
                                              u64 out_stride) {
    __shared__ Stage lefts, rights;
    if (left.count <= FEW_LINES) {
        multiply<1>(lefts, rights, left, right, depth, out, out_stride);
    } else {
        multiply<4>(lefts, rights, left, right, depth, out, out_stride);
    }
}
