// What the kernels of a dense weight share: vectors on their way to shared memory, a weight's exact bf16 pieces, outputs.
//
// A weight is never rounded: a bf16 is one piece, an f16 is the sum of two bf16 numbers, an f32 of three. Each piece is the upper half of
// what is left, so the rest is exact and no piece overflows; only bits of an f32 below 2^-133 are lost. One bf16 MMA for every piece.
//
// Constants: WEIGHT_TYPE; VECTORS (rows of x and of the weight are whole and aligned vectors of 16 bytes, or elements are copied one by
// one); SWIGLU (what the outputs are).
#pragma once

#include "silu.cuh"

constexpr int PIECES = WEIGHT_TYPE == BF16 ? 1 : WEIGHT_TYPE == F16 ? 2 : 3;
constexpr int WEIGHT_BYTES = WEIGHT_TYPE == F32 ? 4 : 2;

template <int BYTES>
struct Bits {
    using type = uint16_t;
};
template <>
struct Bits<4> {
    using type = uint32_t;
};

// The elements of BYTES bytes that 16 bytes hold, of which the first `left` are there and the others are zeros. One at a time: this is for
// odd widths, which are small.
template <int BYTES>
DEVICE void copy_elements(void* shared, const void* from, int left) {
    using Element = typename Bits<BYTES>::type;
#pragma unroll 1
    for (int i = 0; i < 16 / BYTES; ++i) {
        static_cast<Element*>(shared)[i] = i < left ? static_cast<const Element*>(from)[i] : Element(0);
    }
}

// 16 bytes of a row of `columns` elements of BYTES bytes, from `column` on, to shared memory; zeros beyond its end and where not `valid`.
template <int BYTES>
DEVICE void copy_vector(void* shared, const void* row, int column, int columns, bool valid) {
    const uint8_t* from = static_cast<const uint8_t*>(row);
    if constexpr (VECTORS) {
        const bool inside = valid && column < columns;
        cp_async_16_or_zero(shared, from + (inside ? column * BYTES : 0), inside);
    } else {
        copy_elements<BYTES>(shared, from + column * BYTES, valid ? columns - column : 0);
    }
}

// The pieces of two numbers, each pair of pieces in a register.
DEVICE void split(float low, float high, uint32_t (&pieces)[PIECES]) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
        pieces[i] = __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
        low -= bf16_low(pieces[i]);
        high -= bf16_high(pieces[i]);
    }
}

// The pieces of two neighbouring 16-bit elements.
DEVICE void split(uint32_t pair, uint32_t (&pieces)[PIECES]) {
    if constexpr (WEIGHT_TYPE == BF16) {
        pieces[0] = pair;
    } else {
        split(f16_to_float(pair & 0xffffu), f16_to_float(pair >> 16), pieces);
    }
}

// COUNT neighbouring outputs of a row of `features`, from `feature` on: rounded to bf16, or floats.
template <int COUNT>
DEVICE void store_outputs(void* row, int feature, int features, bool floats, bool aligned, const float (&values)[COUNT]) {
    if (floats) {
        float* to = static_cast<float*>(row) + feature;
        if (aligned && feature + COUNT <= features) {
            uint32_t words[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) words[i] = __float_as_uint(values[i]);
            store_words(to, words);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (feature + i < features) to[i] = values[i];
        }
    } else {
        uint16_t* to = static_cast<uint16_t*>(row) + feature;
        if (aligned && feature + COUNT <= features) {
            uint32_t words[(COUNT + 1) / 2];
            narrow_to_bf16(values, words);
            store_bf16<COUNT>(to, words);
        } else {
#pragma unroll
            for (int i = 0; i < COUNT; ++i)
                if (feature + i < features) to[i] = float_to_bf16(values[i]);
        }
    }
}

// The rows `begin` to `end` of a weight, and their outputs: [tokens, end - begin] bf16, or floats.
struct Output {
    uint8_t* to;
    int begin, end;
    bool floats;

    DEVICE uint8_t* row_of(int token) const { return to + static_cast<int64_t>(token) * (end - begin) * (floats ? 4 : 2); }
};

// Where the outputs of `features` rows of a weight go: matrix after matrix, of which the last that are not there end where `features` do.
// Of SWIGLU, rows are eight of a gate and the same eight of its up projection in turns, and the first matrix gets silu(gate) * up.
struct Outputs {
    uint8_t *first, *second, *third, *fourth;
    int first_end, second_end, third_end, features;
    // A bit for each that holds floats.
    int floats;

    DEVICE Output of(int row) const {
        if (row < first_end) return {first, 0, first_end, (floats & 1) != 0};
        if (row < second_end) return {second, first_end, second_end, (floats & 2) != 0};
        if (row < third_end) return {third, second_end, third_end, (floats & 4) != 0};
        return {fourth, third_end, features, (floats & 8) != 0};
    }

    // COUNT outputs of rows from `row` on.
    template <int COUNT>
    DEVICE void store(int token, int row, const float (&values)[COUNT]) const {
        const Output own = of(row);
        if (row + COUNT > own.end) {
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
                if (row + i < features) store_one(token, row + i, values[i]);
            }
            return;
        }
        const int width = own.end - own.begin, column = row - own.begin;
        store_outputs(own.row_of(token), column, width, own.floats, width % COUNT == 0 && column % COUNT == 0, values);
    }

    DEVICE void store_one(int token, int row, float value) const {
        const Output own = of(row);
        const float values[1] = {value};
        store_outputs(own.row_of(token), row - own.begin, own.end - own.begin, own.floats, false, values);
    }

    // COUNT features of a SwiGLU from `feature` on.
    template <int COUNT>
    DEVICE void store_swiglu(int token, int feature, const float (&gate)[COUNT], const float (&up)[COUNT]) const {
        float values[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] = swiglu(gate[i], up[i]);
        const Output own = {first, 0, first_end, (floats & 1) != 0};
        store_outputs(own.row_of(token), feature, first_end, own.floats, first_end % COUNT == 0, values);
    }
};

// What a block that shares an output with others does once its part is written: true in the last of `blocks` to arrive, which then sees
// every part; `arrivals` is left zero.
DEVICE bool arrive_last(uint32_t* arrivals, uint32_t blocks, uint32_t& flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // One thread's fences serve the block: what the others wrote is before the barrier, what they read is behind the next.
        __threadfence();
        flag = atomicAdd(arrivals, 1u) + 1 == blocks;
        if (flag) *arrivals = 0;
        __threadfence();
    }
    __syncthreads();
    return flag != 0;
}
