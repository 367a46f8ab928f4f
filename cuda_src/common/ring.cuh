// A ring of STAGES stages in shared memory, each behind a barrier for filled and one for emptied.
#pragma once
#include "async_copy.cuh"

// The stages of the ring in turn, and the parity to wait for. A fresh barrier counts as past its phase of parity 1.
struct Turn {
    u32 stage, parity;

    __device__ __forceinline__ void next() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
