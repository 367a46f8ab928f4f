// The codec that WEIGHTS names: how the weights are stored that a stream reads.
#pragma once

#define PLAIN 1
#define INT4 2

#if WEIGHTS == PLAIN
#include "plain.cuh"
#elif WEIGHTS == INT4
#include "int4.cuh"
#else
#error "define WEIGHTS as one of PLAIN and INT4; INT4 with GROUP, SCALE_SCALAR and HAS_ZEROS"
#endif
