// pack_adapter: a factor of a low-rank adapter, or its gradient, copied into another order and dtype.
//
// Reads  source [experts, rows, columns] IN_SCALAR, by strides in elements
// Writes output [experts, padded_rows, padded_columns] OUT_SCALAR, by strides in elements: scale * source, and zeros past it
// Grid   tiles of EXPERTS x ROWS x COLUMNS elements; neighbouring blocks differ in the columns, then the experts, then the rows.
// Needs  EXPERTS, ROWS, COLUMNS and BLOCK_THREADS powers of two. Any sizes and any strides are right.
// Smem   the tile, of OUT_SCALAR.
// Maths  fp32, rounded once to OUT_SCALAR.
// Why    PEFT keeps a factor with its experts innermost, and the products want its rows. Neighbouring threads read what lies
//        together in source and write what lies together in output, and a tile in shared memory is what they meet in.
#include "common/async_copy.cuh"

#if !defined(IN_SCALAR) || !defined(OUT_SCALAR) || !defined(EXPERTS) || !defined(ROWS) || !defined(COLUMNS) ||                \
    !defined(SOURCE_EXPERTS_INNERMOST) || !defined(OUTPUT_EXPERTS_INNERMOST) || !defined(BLOCK_THREADS)
#error "define IN_SCALAR, OUT_SCALAR, EXPERTS, ROWS, COLUMNS, SOURCE_EXPERTS_INNERMOST, OUTPUT_EXPERTS_INNERMOST and BLOCK_THREADS"
#endif
#define OF_EXPERT (ROWS * COLUMNS)
#define OF_THREAD (EXPERTS * OF_EXPERT / BLOCK_THREADS)
#define EXPERT_PITCH (OF_EXPERT + 4 / sizeof(OUT_SCALAR))  // an odd number of words, so that a column of experts has all banks

// One element where wanted, else nothing and zero: a predicate and no branch, so that the loads of a thread stay in a row.
__device__ __forceinline__ float load_where(bool wanted, const float* address) {
    float value;
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %1, 0;\nmov.f32 %0, 0f00000000;\n@wanted ld.global.f32 %0, [%2];\n}"
                 : "=f"(value) : "r"((u32)wanted), "l"(address) : "memory");
    return value;
}

template <typename T> __device__ __forceinline__ float load_where(bool wanted, const T* address) {
    T value;
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %1, 0;\nmov.u16 %0, 0;\n@wanted ld.global.u16 %0, [%2];\n}"
                 : "=h"(value.bits) : "r"((u32)wanted), "l"(address) : "memory");
    return to_float(value);
}

__device__ __forceinline__ void store_where(bool wanted, float* address, float value) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %0, 0;\n@wanted st.global.f32 [%1], %2;\n}"
                 ::"r"((u32)wanted), "l"(address), "f"(value) : "memory");
}

template <typename T> __device__ __forceinline__ void store_where(bool wanted, T* address, T value) {
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %0, 0;\n@wanted st.global.u16 [%1], %2;\n}"
                 ::"r"((u32)wanted), "l"(address), "h"(value.bits) : "memory");
}

struct Place {
    u32 expert, row, column;
};

__device__ __forceinline__ Place operator+(Place a, Place b) { return {a.expert + b.expert, a.row + b.row, a.column + b.column}; }

__device__ __forceinline__ bool operator<(Place a, Place end) {
    return a.expert < end.expert && a.row < end.row && a.column < end.column;
}

struct Strides {
    u64 expert, row, column;

    __device__ __forceinline__ u64 operator*(Place a) const { return a.expert * expert + a.row * row + a.column * column; }
};

// Where the index-th element of a tile is. The three parts are bits of the index: those of a thread's first element and of the
// steps from there to its others add up, and the steps are known to the compiler.
template <bool kExpertsInnermost> __device__ __forceinline__ Place place_of(u32 index) {
    u32 expert = kExpertsInnermost ? index % EXPERTS : index / OF_EXPERT;
    u32 of_expert = kExpertsInnermost ? index / EXPERTS : index % OF_EXPERT;
    return {expert, of_expert / COLUMNS, of_expert % COLUMNS};
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
pack_adapter(const IN_SCALAR* source, OUT_SCALAR* output, u64 scale_bits, u64 experts, u64 rows, u64 columns, u64 padded_rows,
             u64 padded_columns, u64 source_expert, u64 source_row, u64 source_column, u64 output_expert, u64 output_row,
             u64 output_column) {
    wait_for_previous_grid();
    release_next_grid();
    __shared__ OUT_SCALAR tile[EXPERTS * EXPERT_PITCH];
    const Strides of_source = {source_expert, source_row, source_column}, of_tile = {EXPERT_PITCH, COLUMNS, 1};
    const Strides of_output = {output_expert, output_row, output_column};
    u32 column_tiles = ((u32)padded_columns + COLUMNS - 1) / COLUMNS, expert_tiles = ((u32)experts + EXPERTS - 1) / EXPERTS;
    u32 tile_of_columns = blockIdx.x % column_tiles, others = blockIdx.x / column_tiles;
    Place first = {others % expert_tiles * EXPERTS, others / expert_tiles * ROWS, tile_of_columns * COLUMNS};

    Place own = place_of<SOURCE_EXPERTS_INNERMOST>(threadIdx.x), end = {(u32)experts, (u32)rows, (u32)columns};
    source += of_source * (first + own);
    float values[OF_THREAD];
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
        Place step = place_of<SOURCE_EXPERTS_INNERMOST>(i * BLOCK_THREADS);
        values[i] = load_where(first + own + step < end, source + of_source * step);
    }
    float scale = __uint_as_float((u32)scale_bits);
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
        Place step = place_of<SOURCE_EXPERTS_INNERMOST>(i * BLOCK_THREADS);
        tile[of_tile * own + of_tile * step] = from_float<OUT_SCALAR>(mul_rn(scale, values[i]));
    }
    __syncthreads();

    own = place_of<OUTPUT_EXPERTS_INNERMOST>(threadIdx.x);
    end = {(u32)experts, (u32)padded_rows, (u32)padded_columns};
    output += of_output * (first + own);
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
        Place step = place_of<OUTPUT_EXPERTS_INNERMOST>(i * BLOCK_THREADS);
        store_where(first + own + step < end, output + of_output * step, tile[of_tile * own + of_tile * step]);
    }
}
