// The random numbers of `sample`: Philox4x32-10 with the seed as its key, and the draw's noise made of them.
#pragma once

#include "ptx.cuh"

struct Words {
    uint32_t of[4];
};

// Ten rounds of the counter [group, position, 0, 0]: a word for each of the tokens 4 * group to 4 * group + 3.
DEVICE Words philox(uint32_t group, uint32_t position, uint32_t seed_low, uint32_t seed_high) {
    uint32_t c[4] = {group, position, 0, 0};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = static_cast<uint64_t>(c[0]) * 0xd2511f53u, b = static_cast<uint64_t>(c[2]) * 0xcd9e8d57u;
        const uint32_t first = static_cast<uint32_t>(b >> 32) ^ c[1] ^ seed_low;
        const uint32_t third = static_cast<uint32_t>(a >> 32) ^ c[3] ^ seed_high;
        c[0] = first, c[1] = static_cast<uint32_t>(b), c[2] = third, c[3] = static_cast<uint32_t>(a);
        seed_low += 0x9e3779b9u, seed_high += 0xbb67ae85u;
    }
    return {{c[0], c[1], c[2], c[3]}};
}

// A word as a number in (0, 1): its top 23 bits and a half, which a float holds.
DEVICE float open_unit(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

// -ln(-ln(uniform)), between -2.82 and 16.64; in f32 to 6e-6, log2f being right to 2 units in the last place.
DEVICE double noise(uint32_t word) { return -log(-log(static_cast<double>(open_unit(word)))); }
DEVICE float rough_noise(uint32_t word) { return -0.693147181f * log2f(-0.693147181f * log2f(open_unit(word))); }
