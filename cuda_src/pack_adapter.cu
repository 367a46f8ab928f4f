// pack_adapter: factors of low-rank adapters, or their gradients, copied into another order and dtype; up to COPIES at once.
//
// Reads  source [experts, rows, columns] IN_SCALAR, by strides in elements
// Writes output [experts, padded_rows, padded_columns] OUT_SCALAR, by strides in elements: scale * source, and zeros past it
// Grid   the tiles of all copies, one after the other. A copy says by which of the tilings it goes: WIDE and NARROW, of one expert,
//        FROM_INNERMOST and TO_INNERMOST, of several. Neighbouring blocks differ in the columns, then the experts, then the rows.
// Needs  WIDE, ... as EXPERTS,ROWS,COLUMNS,SOURCE_EXPERTS_INNERMOST,OUTPUT_EXPERTS_INNERMOST, the first three and BLOCK_THREADS
//        powers of two. Any sizes and any strides are right. No copy reads what another one writes. OLD_SOURCES: the grid before
//        this one writes no source, and neither reads nor writes what lies where the outputs do.
// Smem   the largest tile, of OUT_SCALAR.
// Maths  fp32, rounded once to OUT_SCALAR.
// Why    PEFT keeps a factor with its experts innermost, and the products want its rows. Neighbouring threads read what lies
//        together in source and write what lies together in output, and a tile in shared memory is what they meet in. A call has
//        four factors: in one launch no copy waits for the last blocks of another. Old sources are packed while the grid before
//        still runs; one block waits for that, so that this grid, as any, ends after it.
#include "common/async_copy.cuh"

#if !defined(IN_SCALAR) || !defined(OUT_SCALAR) || !defined(COPIES) || !defined(WIDE) || !defined(NARROW) ||                  \
    !defined(FROM_INNERMOST) || !defined(TO_INNERMOST) || !defined(OLD_SOURCES) || !defined(BLOCK_THREADS)
#error "define IN_SCALAR, OUT_SCALAR, COPIES, WIDE, NARROW, FROM_INNERMOST, TO_INNERMOST, OLD_SOURCES and BLOCK_THREADS"
#endif
#if OLD_SOURCES
#define LOAD "ld.relaxed.gpu.global"  // from L2: see empty_l1
#else
#define LOAD "ld.global"
#endif

// One element where wanted, else nothing and zero: a predicate and no branch, so that the loads of a thread stay in a row.
__device__ __forceinline__ float load_where(bool wanted, const float* address) {
    float value;
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %1, 0;\nmov.f32 %0, 0f00000000;\n@wanted " LOAD ".f32 %0, [%2];\n}"
                 : "=f"(value) : "r"((u32)wanted), "l"(address) : "memory");
    return value;
}

template <typename T> __device__ __forceinline__ float load_where(bool wanted, const T* address) {
    T value;
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %1, 0;\nmov.u16 %0, 0;\n@wanted " LOAD ".u16 %0, [%2];\n}"
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

// Every member is a parameter of the launch.
struct Copy {
    const IN_SCALAR* source;
    OUT_SCALAR* output;
    u64 scale_bits, tiles, tiling, experts, rows, columns, padded_rows, padded_columns;
    Strides of_source, of_output;
};

struct Copies {
    Copy of[COPIES];
};

template <int kExperts, int kRows, int kColumns, bool kSourceExpertsInnermost, bool kOutputExpertsInnermost> struct Tile {
    static constexpr int kOfExpert = kRows * kColumns;
    static constexpr int kOfThread = kExperts * kOfExpert / BLOCK_THREADS;
    // An odd number of words, so that a column of experts has all banks.
    static constexpr int kExpertPitch = kOfExpert + 4 / sizeof(OUT_SCALAR);
    static constexpr int kSize = kExperts * kExpertPitch;

    // Where the index-th element is. The three parts are bits of the index: those of a thread's first element and of the steps
    // from there to its others add up, and the steps are known to the compiler.
    template <bool kExpertsInnermost> static __device__ __forceinline__ Place place_of(u32 index) {
        u32 expert = kExpertsInnermost ? index % kExperts : index / kOfExpert;
        u32 of_expert = kExpertsInnermost ? index / kExperts : index % kOfExpert;
        return {expert, of_expert / kColumns, of_expert % kColumns};
    }

    static __device__ __forceinline__ void pack(Copy copy, u32 index, OUT_SCALAR* tile) {
        const Strides of_tile = {kExpertPitch, kColumns, 1};
        u32 column_tiles = ((u32)copy.padded_columns + kColumns - 1) / kColumns, others = index / column_tiles;
        u32 expert_tiles = ((u32)copy.experts + kExperts - 1) / kExperts;
        Place first = {others % expert_tiles * kExperts, others / expert_tiles * kRows, index % column_tiles * kColumns};

        Place own = place_of<kSourceExpertsInnermost>(threadIdx.x);
        Place end = {(u32)copy.experts, (u32)copy.rows, (u32)copy.columns};
        const IN_SCALAR* source = copy.source + copy.of_source * (first + own);
        float values[kOfThread];
#pragma unroll
        for (int i = 0; i < kOfThread; i++) {
            Place step = place_of<kSourceExpertsInnermost>(i * BLOCK_THREADS);
            values[i] = load_where(first + own + step < end, source + copy.of_source * step);
        }
        float scale = __uint_as_float((u32)copy.scale_bits);
#pragma unroll
        for (int i = 0; i < kOfThread; i++) {
            Place step = place_of<kSourceExpertsInnermost>(i * BLOCK_THREADS);
            tile[of_tile * own + of_tile * step] = from_float<OUT_SCALAR>(mul_rn(scale, values[i]));
        }
        __syncthreads();

        own = place_of<kOutputExpertsInnermost>(threadIdx.x);
        end = {(u32)copy.experts, (u32)copy.padded_rows, (u32)copy.padded_columns};
        OUT_SCALAR* output = copy.output + copy.of_output * (first + own);
#pragma unroll
        for (int i = 0; i < kOfThread; i++) {
            Place step = place_of<kOutputExpertsInnermost>(i * BLOCK_THREADS);
            store_where(first + own + step < end, output + copy.of_output * step, tile[of_tile * own + of_tile * step]);
        }
    }
};

__device__ constexpr int largest(int a, int b) { return a > b ? a : b; }

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS) pack_adapter(const __grid_constant__ Copies copies) {
    if (!OLD_SOURCES) wait_for_previous_grid(), release_next_grid();
    __shared__ OUT_SCALAR tile[largest(largest(Tile<WIDE>::kSize, Tile<NARROW>::kSize),
                                       largest(Tile<FROM_INNERMOST>::kSize, Tile<TO_INNERMOST>::kSize))];
    u32 index = blockIdx.x, which = 0;
    while (index >= copies.of[which].tiles) index -= (u32)copies.of[which++].tiles;
    Copy copy = copies.of[which];
    switch (copy.tiling) {
        case 0: Tile<WIDE>::pack(copy, index, tile); break;
        case 1: Tile<NARROW>::pack(copy, index, tile); break;
        case 2: Tile<FROM_INNERMOST>::pack(copy, index, tile); break;
        default: Tile<TO_INNERMOST>::pack(copy, index, tile);
    }
    if (OLD_SOURCES && blockIdx.x == 0) wait_for_previous_grid(), release_next_grid();
}
