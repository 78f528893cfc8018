// Shards that lie one below the other, side by side in rows: what a library leaves that gathers whole buffers. Of two tensors a row of
// blocks each (blockIdx.y).
//
// Constants: ELEMENT_BYTES, 2 or 4; VECTOR elements of a load, 16 bytes or one; THREADS.
#include "rows.cuh"

static_assert(VECTOR == 1 || VECTOR * ELEMENT_BYTES == 16, "16 bytes or one element");

template <int BYTES>
struct Of {
    using Cell = uint4;
};
template <>
struct Of<4> {
    using Cell = uint32_t;
};
template <>
struct Of<2> {
    using Cell = uint16_t;
};
using Cell = Of<VECTOR * ELEMENT_BYTES>::Cell;

KERNEL void __launch_bounds__(THREADS)
unstack(const Cell* __restrict__ stacked, // [ranks, rows, columns], and behind it [ranks, rows, next_columns]
        Cell* __restrict__ out,           // [.., ranks * columns]
        Cell* __restrict__ next_out,      // [.., ranks * next_columns]
        int64_t first_row,                // of out, that the first goes to
        int ranks, int rows, int columns, int next_columns /* in cells */) {
    const bool next = blockIdx.y == 1;
    const int width = next ? next_columns : columns;
    const int64_t cells = static_cast<int64_t>(ranks) * rows * width;
    const Cell* from = stacked + (next ? static_cast<int64_t>(ranks) * rows * columns : 0);
    Cell* to = next ? next_out : out;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < cells; i += static_cast<int64_t>(gridDim.x) * THREADS) {
        const int64_t of_all = i / width, rank = of_all / rows, row = of_all % rows;
        to[((first_row + row) * ranks + rank) * width + i % width] = from[i];
    }
}
