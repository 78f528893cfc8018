// SwiGLU of one pair: silu(gate) * up, silu(x) = x / (1 + exp(-x)).
//
// With u = 2^-24: the exponent is off by 2 u |gate|, the exponential by that and 4 u relatively, the reciprocal of the sum, and the two
// products, by 5 u more. Where 1 + exp(-gate) exceeds 2^126 the result is zero, and the right one less than 2^-119 |up|.
#pragma once

#include "rows.cuh"

DEVICE float swiglu(float gate, float up) { return gate * reciprocal_approx(1.0f + exp2_approx(gate * -1.4426950408889634f)) * up; }
