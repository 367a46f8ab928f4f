// What the architecture that is compiled for can do; cupymoe/kernels/arch.py tells the host the same.
//
// Each is 0 or 1. A header that can't do without says so in a static_assert. What only makes a kernel faster is left out
// where it is 0; what another thread would wait for has no function there, so that nobody waits for ever.
#pragma once

#define HAS_PDL (__CUDA_ARCH__ >= 900)        // programmatic dependent launch
#define HAS_BULK_COPY (__CUDA_ARCH__ >= 900)  // the copy engine, and barriers that count bytes and suspend who waits
#define HAS_CLUSTERS (__CUDA_ARCH__ >= 900)   // blocks that reach into each other's shared memory
#ifdef __CUDA_ARCH_FEAT_SM90_ALL              // of sm_90a, not of sm_90
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif
