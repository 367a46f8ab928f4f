// Hopper's warpgroup products with the first operand in registers: 64 rows of A, which each lane has made, times kSlots rows of B in
// shared memory, 16 k at a time.
//
// A     Warp w has rows 16 w.. of it, lane l words (0) row l / 4 and k 2 q, 2 q + 1, (1) row l / 4 + 8, (2, 3) the same 8 k further,
//       where q is l % 4.
// B     A tile of warpgroup.cuh.
// sums[4 j + i] of lane l of warp w: row 16 w + l / 4 (+ 8 for i >= 2) of A, row 8 j + l % 4 * 2 + i % 2 of B.
#pragma once
#include "mma.cuh"
#include "warpgroup.cuh"

#define SUMS (TILE_SLOTS / 2)

// Waits for all products but those that were committed last: what the others read may then be written over.
__device__ __forceinline__ void wait_for_all_but_last_products() { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }

#define EIGHT(I) "+f"(sums[I]), "+f"(sums[I + 1]), "+f"(sums[I + 2]), "+f"(sums[I + 3]), "+f"(sums[I + 4]), "+f"(sums[I + 5]), "+f"(sums[I + 6]), "+f"(sums[I + 7])
#define SUMS_16 EIGHT(0), EIGHT(8)
#define SUMS_32 SUMS_16, EIGHT(16), EIGHT(24)
#define SUMS_48 SUMS_32, EIGHT(32), EIGHT(40)
#define SUMS_64 SUMS_48, EIGHT(48), EIGHT(56)
#define SUMS_80 SUMS_64, EIGHT(64), EIGHT(72)
#define NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_32 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_48 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_64 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_80 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define PRODUCT(SHAPE, TYPE, OUTPUTS, NAMES, A, B, ADD)                                                               \
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, " ADD ", 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" NAMES "}, {" A "}, " B ", p, 1, 1, 0;\n}" \
                 : OUTPUTS : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "l"(b), "r"((u32)add) : "memory")
#define PRODUCTS_OF(TYPE) \
    if constexpr (kSlots == 32) PRODUCT("m64n32k16", TYPE, SUMS_16, NAMES_16, "%16, %17, %18, %19", "%20", "%21"); \
    else if constexpr (kSlots == 64) PRODUCT("m64n64k16", TYPE, SUMS_32, NAMES_32, "%32, %33, %34, %35", "%36", "%37"); \
    else if constexpr (kSlots == 96) PRODUCT("m64n96k16", TYPE, SUMS_48, NAMES_48, "%48, %49, %50, %51", "%52", "%53"); \
    else if constexpr (kSlots == 128) PRODUCT("m64n128k16", TYPE, SUMS_64, NAMES_64, "%64, %65, %66, %67", "%68", "%69"); \
    else PRODUCT("m64n160k16", TYPE, SUMS_80, NAMES_80, "%80, %81, %82, %83", "%84", "%85");

// sums = (add ? sums : 0) + A B^T over 16 k.
template <u32 kSlots> __device__ __forceinline__ void multiply_fragment(float (&sums)[SUMS], Fragment a, u64 b, bool add, bf16) {
    static_assert(kSlots % 32 == 0 && kSlots <= TILE_SLOTS, "kSlots");
    PRODUCTS_OF("bf16")
}

template <u32 kSlots> __device__ __forceinline__ void multiply_fragment(float (&sums)[SUMS], Fragment a, u64 b, bool add, fp16) {
    static_assert(kSlots % 32 == 0 && kSlots <= TILE_SLOTS, "kSlots");
    PRODUCTS_OF("f16")
}
