// Hopper's warpgroup products: a warpgroup multiplies 64 rows of A with BLOCK_N rows of B, 16 k at a time, both operands in
// shared memory, sums in registers. Includers define SCALAR, BLOCK_N, BLOCK_K, TRANSPOSED, which is of B, and where A is
// transposed TRANSPOSED_A.
//
// A transposed tile: groups of 64 rows. A group has a line of 128 bytes for each of BLOCK_K k: its 64 rows at that k, the eight
// packs of line k at pack ^ (k % 8). The last group of B may be needed, and be there, in part.
// sums[4 j + i] of lane l of warp w: row 16 w + l / 4 (+ 8 for i >= 2) of A, row 8 j + l % 4 * 2 + i % 2 of B.
#pragma once
#include "warpgroup.cuh"

#define SUMS (BLOCK_N / 2)

#define GROUP_BYTES (BLOCK_K * ROW_BYTES)    // of a transposed tile
#define NEXT_16_LINES (16 * ROW_BYTES / 16)  // what leads to its next 16 k

// Of a transposed tile: address, 1024 bytes from eight lines to the next, GROUP_BYTES from a group to the next, 128-byte swizzle.
// The address in a block of a cluster has the block's rank above its 18 bits, which would change the distance of the groups.
__device__ __forceinline__ u64 transposed_descriptor(u32 address) {
    return (1ull << 62) | (64ull << 32) | ((u64)(GROUP_BYTES / 16) << 16) | (address & 0x3ffff) >> 4;
}

#ifndef TRANSPOSED_A
#define TRANSPOSED_A 0
#endif
#if TRANSPOSED_A
#define TRANSPOSE_A "1"
#else
#define TRANSPOSE_A "0"
#endif

// Of a tile of B, and what leads to its next 16 k.
#if TRANSPOSED
#define TRANSPOSE_B "1"
#define NEXT_16_K_OF_B NEXT_16_LINES

__device__ __forceinline__ u64 tile_descriptor_of_b(u32 address) { return transposed_descriptor(address); }
#else
#define TRANSPOSE_B "0"
#define NEXT_16_K_OF_B 2

__device__ __forceinline__ u64 tile_descriptor_of_b(u32 address) { return tile_descriptor(address); }
#endif

#define EIGHT(I) "+f"(sums[I]), "+f"(sums[I + 1]), "+f"(sums[I + 2]), "+f"(sums[I + 3]), "+f"(sums[I + 4]), "+f"(sums[I + 5]), "+f"(sums[I + 6]), "+f"(sums[I + 7])
#define SUMS_48 EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40)
#define SUMS_64 SUMS_48, EIGHT(48), EIGHT(56)
#define SUMS_72 SUMS_64, EIGHT(64)
#define SUMS_80 SUMS_72, EIGHT(72)
#define SUMS_88 SUMS_80, EIGHT(80)
#define SUMS_96 SUMS_88, EIGHT(88)
#define NAMES_48 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 \
    NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_72 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_80 NAMES_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_88 NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_96 NAMES_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PRODUCT(SHAPE, TYPE, OUTPUTS, NAMES, A, B, ADD)                                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, " ADD ", 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" NAMES "}, " A ", " B ", p, 1, 1, " TRANSPOSE_A ", " TRANSPOSE_B ";\n}" \
                 : OUTPUTS : "l"(a), "l"(b), "r"((u32)add) : "memory")
#if BLOCK_N == 96
#define WGMMA(TYPE) PRODUCT("m64n96k16", TYPE, SUMS_48, NAMES_48, "%48", "%49", "%50")
#elif BLOCK_N == 128
#define WGMMA(TYPE) PRODUCT("m64n128k16", TYPE, SUMS_64, NAMES_64, "%64", "%65", "%66")
#elif BLOCK_N == 144
#define WGMMA(TYPE) PRODUCT("m64n144k16", TYPE, SUMS_72, NAMES_72, "%72", "%73", "%74")
#elif BLOCK_N == 160
#define WGMMA(TYPE) PRODUCT("m64n160k16", TYPE, SUMS_80, NAMES_80, "%80", "%81", "%82")
#elif BLOCK_N == 176
#define WGMMA(TYPE) PRODUCT("m64n176k16", TYPE, SUMS_88, NAMES_88, "%88", "%89", "%90")
#elif BLOCK_N == 192
#define WGMMA(TYPE) PRODUCT("m64n192k16", TYPE, SUMS_96, NAMES_96, "%96", "%97", "%98")
#else
#error "BLOCK_N must be 96, 128, 144, 160, 176 or 192"
#endif

// sums = (add ? sums : 0) + A B^T over 16 k.
__device__ __forceinline__ void multiply_tiles(float (&sums)[SUMS], u64 a, u64 b, bool add, bf16) { WGMMA("bf16"); }

__device__ __forceinline__ void multiply_tiles(float (&sums)[SUMS], u64 a, u64 b, bool add, fp16) { WGMMA("f16"); }
