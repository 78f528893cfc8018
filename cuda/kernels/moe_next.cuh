// Weights that the next launch reads, brought to the L2 while the memory has nothing else to do.
#pragma once

#include "ptx.cuh"

// Words, scales and zero points (or null) of experts, so many bytes each.
struct Next {
    const uint8_t* data[3];
    int bytes[3];

    // `part` of `parts` blocks bring `share` 256ths of what an expert has, the first of it.
    template <int THREADS>
    DEVICE void prefetch(int expert, int share, int part, int parts) const {
        constexpr int LINE = 32;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const uint8_t* first = data[i] + static_cast<int64_t>(expert) * bytes[i];
            const int end = static_cast<int>(static_cast<int64_t>(bytes[i]) * share / 256);
            for (int at = (part * THREADS + threadIdx.x) * LINE; at < end; at += parts * THREADS * LINE) prefetch_l2(first + at);
        }
    }
};
