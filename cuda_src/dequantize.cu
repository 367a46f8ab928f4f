// dequantize: rows of codes to the weights that they stand for.
//
// Reads  codes      [rows, ROW_WORDS] u32          BITS a code; FIELDS says where in a word its bits lie
//        values     [2^BITS] f32                   what each code stands for
//        scales     [rows, scale_pitch] SCALE      one for GROUP codes; nothing if GROUP is 0
//        zeros      [rows, zero_pitch] u8          one for GROUP codes; nothing unless HAS_ZEROS
//        row_scales [rows] f32                     nothing unless HAS_ROW_SCALES
// Writes output     [rows, DEPTH] OUT_SCALAR       (value - zero) * scale * row_scale
// Grid   a thread takes WORDS_OF_THREAD words, which lie BLOCK_THREADS apart, so that neighbours read and write neighbours.
// Needs  output aligned to 16 bytes. Any DEPTH is right; where it is no multiple of a word's codes, elements are stored one by one.
// Smem   the values.
// Maths  fp32, product by product in the order above, rounded once to OUT_SCALAR; subnormals are kept.
#include "common/dtypes.cuh"

#if !defined(OUT_SCALAR) || !defined(DEPTH) || !defined(BITS) || !defined(FIELDS) || !defined(ROW_WORDS) || !defined(GROUP) ||  \
    !defined(SCALE) || !defined(HAS_ZEROS) || !defined(HAS_ROW_SCALES) || !defined(WORDS_OF_THREAD) || !defined(BLOCK_THREADS)
#error "define OUT_SCALAR, DEPTH, BITS, FIELDS, ROW_WORDS, GROUP, SCALE, HAS_ZEROS, HAS_ROW_SCALES, WORDS_OF_THREAD and BLOCK_THREADS"
#endif

struct e4m3 { unsigned char bits; };
struct e8m0 { unsigned char bits; };

// A scale is not negative and no NaN: its highest bit is not read.
__device__ __forceinline__ float to_float(e4m3 scale) {
    u32 bits = scale.bits & 127u;
    return bits < 8 ? (float)bits * 0x1p-9f : __uint_as_float((bits << 20) + (120u << 23));
}

__device__ __forceinline__ float to_float(e8m0 scale) {
    return __uint_as_float(scale.bits ? (u32)scale.bits << 23 : 1u << 22);  // the last is 2^-127, a subnormal
}

// `bits` bits of a code, from first_bit on, which lie at `place` of its word.
struct Field { u32 code, first_bit, bits, place; };
constexpr Field kFields[] = {FIELDS};
constexpr u32 kNumFields = sizeof(kFields) / sizeof(Field);
constexpr u32 kCodes = 32 / BITS;                           // of a word
constexpr u32 kWords = (DEPTH + kCodes - 1) / kCodes;       // of a row that hold codes of it; the others are padding
constexpr u32 kGroup = GROUP ? GROUP : ROW_WORDS * kCodes;
constexpr u32 kPack = 16 / sizeof(OUT_SCALAR) < kCodes ? 16 / sizeof(OUT_SCALAR) : kCodes;  // elements of a store
static_assert(kGroup % kCodes == 0, "the codes of a word share a scale");

__device__ __forceinline__ u32 code_of(u32 word, u32 index) {
    u32 code = 0;
#pragma unroll
    for (u32 i = 0; i < kNumFields; i++) {
        if (kFields[i].code == index) code |= (word >> kFields[i].place & ((1u << kFields[i].bits) - 1)) << kFields[i].first_bit;
    }
    return code;
}

// The weights of a word, to where its row has them.
__device__ __forceinline__ void store_weights(OUT_SCALAR* address, u32 column, const OUT_SCALAR (&weights)[kCodes]) {
    if constexpr (DEPTH % kCodes == 0) {
#pragma unroll
        for (u32 i = 0; i < kCodes; i += kPack) {
            Pack<OUT_SCALAR, kPack> pack;
#pragma unroll
            for (u32 j = 0; j < kPack; j++) pack.values[j] = weights[i + j];
            store_pack(address + i, pack);
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < kCodes; i++)
            if (column + i < DEPTH) address[i] = weights[i];
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
dequantize(const u32* __restrict__ codes, const float* __restrict__ values, const SCALE* __restrict__ scales,
           const unsigned char* __restrict__ zeros, const float* __restrict__ row_scales, OUT_SCALAR* __restrict__ output,
           u64 rows, u64 scale_pitch, u64 zero_pitch) {
    __shared__ float value_of[1 << BITS];
    for (u32 code = threadIdx.x; code < 1u << BITS; code += BLOCK_THREADS) value_of[code] = values[code];
    __syncthreads();
    u64 first = (u64)blockIdx.x * BLOCK_THREADS * WORDS_OF_THREAD + threadIdx.x;
#pragma unroll
    for (u32 step = 0; step < WORDS_OF_THREAD; step++) {
        u64 index = first + step * BLOCK_THREADS;
        if (index < rows * kWords) {
            u64 row = index / kWords;
            u32 word_of_row = (u32)(index - row * kWords), column = word_of_row * kCodes;
            u32 word = codes[row * ROW_WORDS + word_of_row];
            float zero = 0, scale = 1, row_scale = 1;
            if constexpr (HAS_ZEROS) zero = (float)zeros[row * zero_pitch + column / kGroup];
            if constexpr (GROUP != 0) scale = to_float(scales[row * scale_pitch + column / kGroup]);
            if constexpr (HAS_ROW_SCALES) row_scale = row_scales[row];
            OUT_SCALAR weights[kCodes];
#pragma unroll
            for (u32 i = 0; i < kCodes; i++) {
                float value = value_of[code_of(word, i)];
                if constexpr (HAS_ZEROS) value -= zero;
                if constexpr (GROUP != 0) value = mul_rn(value, scale);
                if constexpr (HAS_ROW_SCALES) value = mul_rn(value, row_scale);
                weights[i] = from_float<OUT_SCALAR>(value);
            }
            store_weights(output + row * DEPTH + column, column, weights);
        }
    }
}
