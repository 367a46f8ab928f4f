// In which order of k the tiles of quantised weights take token rows.
//
// A lane decodes whole words: of each 32 k the 8 codes from 8 q on, where q is its place among the four lanes of a weight row. Of
// 16 k a product wants of it pairs q and 4 + q. Therefore each 32 columns of a token row lie turned: their 16 pairs are 4 lines
// of 4, and the lines become columns.
//
//      0  1  2  3                    0  4  8 12
//      4  5  6  7    lie in memory   1  5  9 13
//      8  9 10 11    as              2  6 10 14
//     12 13 14 15                    3  7 11 15
//
// So a product has pair 2 s of each lane's four and then pair 2 s + 1, s being 0 and 1 for the two products of 32 k. A turned row
// is whole 32s, with zeros past its last column: there codes are padded with zeros, too.
#pragma once
#include "dtypes.cuh"

__device__ __forceinline__ constexpr u32 turned_columns(u32 columns) { return (columns + 31) / 32 * 32; }

// Where in its turned row a column lies; and of a place, which column lies there.
__device__ __forceinline__ constexpr u32 turned(u32 column) {
    return column / 32 * 32 + column / 2 % 4 * 8 + column / 8 % 4 * 2 + column % 2;
}
