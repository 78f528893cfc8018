// RMSNorm by itself: rows are dealt to the blocks in turns.
//
// Constants and tile: those of rms_norm.cuh.
#include "rms_norm.cuh"

static_assert(sizeof(rms::Shared) == TILE_SHARED_BYTES, "the launcher's sum");

KERNEL void __launch_bounds__(rms::THREADS, 1)
rms_norm(const void* __restrict__ x,      // [rows, WIDTH] bf16 or f32
         float* __restrict__ residual,    // [rows, WIDTH], where RESIDUAL
         const void* __restrict__ weight, // [WIDTH]
         uint16_t* __restrict__ out,      // [rows, WIDTH] bf16
         int rows, float eps) {
    rms::norm_rows(shared_memory<rms::Shared>(), x, residual, weight, out, blockIdx.x, gridDim.x, rows, eps);
}
