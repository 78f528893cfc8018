// After `product.wgsl`: packed INT4 weights, `(q - z) * scale`.

override SCALE: u32 = BF16;
override ZEROS: bool = false;
// Groups are whole chunks of eight columns.
override WHOLE: bool = true;

@group(0) @binding(4) var<storage, read> scales: array<u32>;
@group(0) @binding(5) var<storage, read> zero_points: array<u32>;

// The scale and the zero point of a group.
fn of_group(row: u32, group: u32) -> vec2<f32> {
    let g = min(group, params.groups - 1u);
    let i = row * params.groups + g;
    let scale = weight_of(SCALE, scales[weight_word(SCALE, i)], i);
    if ZEROS {
        return vec2(scale, f32(nibble(zero_points[(row / 8u) * params.groups + g], row & 7u)));
    }
    return vec2(scale, 8.0);
}

fn weights(row: u32, chunk: u32) -> Eight {
    // Beyond the last column x is zero, and the numbers here are finite.
    let words = (params.columns + 7u) / 8u;
    let i = row * words + min(chunk, words - 1u);
    let word = weight[i / 4u][i & 3u];
    let low = vec4<f32>((vec4(word) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u));
    let high = vec4<f32>((vec4(word) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u));
    let scale_row = row + params.scale_row;
    if WHOLE {
        let group = of_group(scale_row, 8u * chunk / params.group_size);
        return Eight((low - group.y) * group.x, (high - group.y) * group.x);
    }
    var eight = Eight(low, high);
    for (var j = 0u; j < 4u; j++) {
        let a = of_group(scale_row, (8u * chunk + j) / params.group_size);
        eight.low[j] = (low[j] - a.y) * a.x;
        let b = of_group(scale_row, (8u * chunk + j + 4u) / params.group_size);
        eight.high[j] = (high[j] - b.y) * b.x;
    }
    return eight;
}

// What nibbles become that lie in place in the fraction of 2^23: `2^23 + q * PLACES`, exactly.
const MASKS = vec4(0xfu, 0xf0u, 0xf00u, 0xf000u);
const PLACES = vec4(1.0, 16.0, 256.0, 4096.0);
const INTEGER = 8388608.0;

// The products of a word of weights without their scale, each times its place; `zero` is that of each place with `INTEGER`.
fn products(word: u32, zero: vec4<f32>, v: Eight) -> vec4<f32> {
    let low = bitcast<vec4<f32>>((vec4(word) & MASKS) | vec4(0x4b000000u)) - zero;
    let high = bitcast<vec4<f32>>((vec4(word >> 16u) & MASKS) | vec4(0x4b000000u)) - zero;
    return fma(low, v.low, high * v.high);
}

// Those of 32 columns, with their scale.
fn products_of_quad(words: vec4<u32>, of_group: vec2<f32>, a: Eight, b: Eight, c: Eight, d: Eight) -> f32 {
    let zero = INTEGER + of_group.y * PLACES;
    let four = (products(words.x, zero, a) + products(words.y, zero, b))
        + (products(words.z, zero, c) + products(words.w, zero, d));
    return of_group.x * dot(four, 1.0 / PLACES);
}

// One token, and groups of whole vectors of four words: all lanes go over the columns of four features, 32 at a time.
@compute @workgroup_size(WORKGROUP)
fn one(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    // Those behind the last are the last.
    let features = min(vec4(4u * group.x) + vec4(0u, 1u, 2u, 3u), vec4(params.features - 1u));
    let rows = features + params.row;
    let scale_rows = rows + params.scale_row;
    let quads = params.columns / 32u;
    var sums = vec4(0.0);
    for (var quad = lane.index; quad < quads; quad += WORKGROUP) {
        let first = weight[rows.x * quads + quad];
        let second = weight[rows.y * quads + quad];
        let third = weight[rows.z * quads + quad];
        let fourth = weight[rows.w * quads + quad];
        let a = eight_bf16(x[4u * quad]);
        let b = eight_bf16(x[4u * quad + 1u]);
        let c = eight_bf16(x[4u * quad + 2u]);
        let d = eight_bf16(x[4u * quad + 3u]);
        let at = 32u * quad / params.group_size;
        sums.x += products_of_quad(first, of_group(scale_rows.x, at), a, b, c, d);
        sums.y += products_of_quad(second, of_group(scale_rows.y, at), a, b, c, d);
        sums.z += products_of_quad(third, of_group(scale_rows.z, at), a, b, c, d);
        sums.w += products_of_quad(fourth, of_group(scale_rows.w, at), a, b, c, d);
    }
    let sum = workgroup_sum_of_four(sums, lane);
    if lane.index == 0u {
        store(0u, 0u, 4u * group.x, sum.xy);
        store(0u, 0u, 4u * group.x + 2u, sum.zw);
    }
}
