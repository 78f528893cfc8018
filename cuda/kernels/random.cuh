// Random numbers that depend on their place and a seed alone.
#pragma once

#include "ptx.cuh"

DEVICE uint32_t scramble(uint64_t place, uint32_t seed) {
    uint32_t x = static_cast<uint32_t>(place) * 0x9e3779b1u ^ static_cast<uint32_t>(place >> 32) * 0x85ebca77u ^ seed * 0xc2b2ae3du;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}
