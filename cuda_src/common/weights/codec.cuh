// The codec that WEIGHTS names: how the weights are stored that a stream reads.
#pragma once

#define PLAIN 1
#define INT4 2
#define INT8 3
#define E4M3 4
#define E2M1 5

#if !defined(HAS_ROW_SCALES) || WEIGHTS != PLAIN && (!defined(GROUP) || !defined(SCALE_SCALAR) || !defined(HAS_ZEROS))
#error "define HAS_ROW_SCALES, and but for PLAIN weights GROUP (0: none), SCALE_SCALAR and HAS_ZEROS"
#endif

#if WEIGHTS == PLAIN
#include "plain.cuh"
#elif WEIGHTS == INT4
#include "int4.cuh"
#elif WEIGHTS == INT8
#include "int8.cuh"
#elif WEIGHTS == E4M3
#include "e4m3.cuh"
#elif WEIGHTS == E2M1
#include "e2m1.cuh"
#else
#error "define WEIGHTS as one of PLAIN, INT4, INT8, E4M3 and E2M1"
#endif
#if WEIGHTS != PLAIN
#include "codes.cuh"
#endif
