// Where the rows of a stream's tile lie in an expert's weight. A unit is two rows whose sums one thread stores together.
//
// kUnits        of an expert: its weight has 2 * kUnits rows
// kSecondRows   a thread stores two neighbouring units: first_row_of_unit(unit) and the row after it, and the two rows that are
//               kSecondRows further
// kUnitsOfPack  units of 8 neighbouring rows, which are 16 bytes of a transposed weight; kUnits is a multiple of it there
// row_of        where a tile's row is among the rows of all experts' weights. Of a + b it is row_of(expert, first_unit, a) +
//               row_of(0, 0, b) where a and b have no binary digit in common.
#pragma once
#include "dtypes.cuh"

// Rows u and kUnits + u are unit u: gate and up, concatenated. Rows 0..7 of a 16-row block of a tile are the first rows of
// 8 units, rows 8..15 their second.
template <u32 kUnitsOfExpert> struct SplitRows {
    static constexpr u32 kUnits = kUnitsOfExpert, kSecondRows = 8, kUnitsOfPack = 8;

    static __device__ __forceinline__ u32 unit_of_row(u32 row) { return row / 16 * 8 + row % 8; }

    static __device__ __forceinline__ u32 first_row_of_unit(u32 unit) { return unit / 8 * 16 + unit % 8; }

    static __device__ __forceinline__ u64 row_of(int expert, u32 first_unit, u32 row) {
        u32 half = row / 8 % 2;
        return (u64)(expert * 2 + half) * kUnits + first_unit + unit_of_row(row);
    }
};

// Rows 2u and 2u + 1 are unit u, in a tile as in the weight: gate and up, interleaved, or any two neighbouring outputs.
template <u32 kUnitsOfExpert> struct NeighbouringRows {
    static constexpr u32 kUnits = kUnitsOfExpert, kSecondRows = 2, kUnitsOfPack = 4;

    static __device__ __forceinline__ u32 unit_of_row(u32 row) { return row / 2; }

    static __device__ __forceinline__ u32 first_row_of_unit(u32 unit) { return unit * 2; }

    static __device__ __forceinline__ u64 row_of(int expert, u32 first_unit, u32 row) {
        return (u64)expert * (2 * kUnits) + 2 * first_unit + row;
    }
};
