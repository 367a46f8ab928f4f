// How the weights are stored that a stream reads: struct Weights, of plain ones or of codes.
#pragma once
#include "codec.cuh"
#if WEIGHTS == PLAIN
#include "plain.cuh"
#else
#include "codes.cuh"
#endif
