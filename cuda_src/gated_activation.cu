// gated_activation: act(gate) * up, or act(x) for the ungated members of MoEActivation.
//
// Reads  input     [rows, 2 * COLS] SCALAR  [gate | up]; INTERLEAVED: gate, up, gate, up, ...; not GATED: [rows, COLS]
//        num_rows  i32 or null              rows that hold data, on the device; null: all of them
// Writes output    [rows, COLS] SCALAR      rows from *num_rows on stay as they are
// Grid   ceil(rows * COLS / VEC / BLOCK_THREADS). One thread owns VEC neighbouring outputs.
// Needs  COLS % VEC == 0, pointers aligned to VEC elements.
// Maths  fp32, rounded once; common/activations.cuh. Source: vLLM's MoEActivation for names and layouts.
#include "common/activations.cuh"

#if !defined(SCALAR) || !defined(ACTIVATION) || !defined(GATED) || !defined(INTERLEAVED) || !defined(COLS) || !defined(VEC) || \
    !defined(BLOCK_THREADS)
#error "define SCALAR, ACTIVATION, GATED, INTERLEAVED, COLS, VEC and BLOCK_THREADS"
#endif

typedef SCALAR scalar_t;
typedef Pack<scalar_t, VEC> pack_t;

extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)
gated_activation(const scalar_t* __restrict__ input, const int* __restrict__ num_rows, scalar_t* __restrict__ output, u64 rows) {
    const u32 packs_per_row = COLS / VEC;
    u64 index = (u64)blockIdx.x * BLOCK_THREADS + threadIdx.x;
    u64 row = index / packs_per_row;
    if (row >= (num_rows ? (u64)*num_rows : rows)) return;
    u32 col = (u32)(index - row * packs_per_row) * VEC;

    pack_t first, second, result;
    if (GATED) {
        const scalar_t* base = input + row * (2 * COLS);
        first = load_pack<scalar_t, VEC>(base + (INTERLEAVED ? 2 * col : col));
        second = load_pack<scalar_t, VEC>(base + (INTERLEAVED ? 2 * col + VEC : COLS + col));
    } else {
        first = load_pack<scalar_t, VEC>(input + row * COLS + col);
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        float gate, up;
        if (INTERLEAVED) {
            gate = to_float(2 * i < VEC ? first.values[2 * i % VEC] : second.values[2 * i % VEC]);
            up = to_float(2 * i + 1 < VEC ? first.values[(2 * i + 1) % VEC] : second.values[(2 * i + 1) % VEC]);
        } else {
            gate = to_float(first.values[i]);
            up = GATED ? to_float(second.values[i]) : 1.0f;
        }
        result.values[i] = from_float<scalar_t>(activate<ACTIVATION, sizeof(scalar_t) == 4>(gate, up));
    }
    store_pack(output + row * COLS + col, result);
}
