// The codec that WEIGHTS names: how a quantised weight becomes an operand of 16 bits, exactly. Each codec says
//   kBits        of a code
//   kOfRowScale  what sums lack beside the scale of their row
//   pair         pair j of a word, two neighbouring codes of a row, as two numbers
//   of_group     what pair() wants to know of a group, from its zero, which is 8 where there are none of their own
//   lane_factors of e2m1 alone, with GROUP 16: the same for two groups, from the bytes of the scales of four
//   scaled_pair  of int4 alone, and of_scale for it: pair() times the scale of a group, as fp16, in one instruction less
//   converted_pair  of e4m3 alone: pair j of a word as fp16, by an instruction of sm_89
//   fragment     the pairs of 8 neighbouring codes, which are one word or two, from what of_group() takes
#pragma once

#define PLAIN 1
#define INT4 2
#define INT8 3
#define E4M3 4
#define E2M1 5

#if !defined(HAS_ROW_SCALES) || WEIGHTS != PLAIN && (!defined(GROUP) || !defined(SCALE_SCALAR) || !defined(HAS_ZEROS))
#error "define HAS_ROW_SCALES, and but for PLAIN weights GROUP (0: none), SCALE_SCALAR and HAS_ZEROS"
#endif

#if WEIGHTS == INT4
#include "int4.cuh"
#elif WEIGHTS == INT8
#include "int8.cuh"
#elif WEIGHTS == E4M3
#include "e4m3.cuh"
#elif WEIGHTS == E2M1
#include "e2m1.cuh"
#elif WEIGHTS != PLAIN
#error "define WEIGHTS as one of PLAIN, INT4, INT8, E4M3 and E2M1"
#endif
