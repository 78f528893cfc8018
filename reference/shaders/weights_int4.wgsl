// After `product.wgsl`: packed INT4 weights, `(q - z) * scale`.

override SCALE: u32 = BF16;
override ZEROS: bool = false;
// Groups are whole chunks of eight columns.
override WHOLE: bool = true;
// Of `one`: vectors of 32 columns of a group.
override GROUP_QUADS: u32 = 1u;

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

// The products of a word of weights without their scale, each times its place, added to `sums`; `zero` is that of each place with `INTEGER`.
fn products(word: u32, zero: vec4<f32>, v: Eight, sums: vec4<f32>) -> vec4<f32> {
    let low = bitcast<vec4<f32>>((vec4(word) & MASKS) | vec4(0x4b000000u)) - zero;
    let high = bitcast<vec4<f32>>((vec4(word >> 16u) & MASKS) | vec4(0x4b000000u)) - zero;
    return fma(low, v.low, fma(high, v.high, sums));
}

// Those of 32 columns, with their scale.
fn products_of_quad(words: vec4<u32>, scale: f32, zero_point: f32, v: array<Eight, 4>) -> f32 {
    let zero = INTEGER + zero_point * PLACES;
    var four = products(words.x, zero, v[0], vec4(0.0));
    four = products(words.y, zero, v[1], four);
    four = products(words.z, zero, v[2], four);
    four = products(words.w, zero, v[3], four);
    return scale * dot(four, 1.0 / PLACES);
}

fn scale_at(i: u32) -> f32 {
    return weight_of(SCALE, scales[weight_word(SCALE, i)], i);
}

// One token, and groups of whole vectors of four words: all lanes go over the columns of four features, 32 at a time.
@compute @workgroup_size(WORKGROUP)
fn one(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    // Those behind the last are the last.
    let features = min(vec4(4u * group.x) + vec4(0u, 1u, 2u, 3u), vec4(params.features - 1u));
    let quads = params.columns / 32u;
    let starts = (features + params.row) * quads;
    let rows = features + params.row + params.scale_row;
    let scale_starts = rows * params.groups;
    // Four rows have their zero points in two words at most.
    let zero_starts = vec2(rows.x / 8u, rows.w / 8u) * params.groups;
    let in_first = rows / 8u == vec4(rows.x / 8u);
    let shifts = 4u * (rows & vec4(7u));
    var sums = vec4(0.0);
    for (var step = 0u; step < STEPS; step++) {
        let quad = step * WORKGROUP + lane.index;
        if EVEN || quad < quads {
            let first = weight[starts.x + quad];
            let second = weight[starts.y + quad];
            let third = weight[starts.z + quad];
            let fourth = weight[starts.w + quad];
            let v = array(
                act_eight(x[4u * quad]),
                act_eight(x[4u * quad + 1u]),
                act_eight(x[4u * quad + 2u]),
                act_eight(x[4u * quad + 3u]),
            );
            let at = quad / GROUP_QUADS;
            var zeros = vec4(8.0);
            if ZEROS {
                let words = select(vec4(zero_points[zero_starts.y + at]), vec4(zero_points[zero_starts.x + at]), in_first);
                zeros = vec4<f32>((words >> shifts) & vec4(15u));
            }
            sums += vec4(
                products_of_quad(first, scale_at(scale_starts.x + at), zeros.x, v),
                products_of_quad(second, scale_at(scale_starts.y + at), zeros.y, v),
                products_of_quad(third, scale_at(scale_starts.z + at), zeros.z, v),
                products_of_quad(fourth, scale_at(scale_starts.w + at), zeros.w, v),
            );
        }
    }
    let sum = workgroup_sum_of_four(sums, lane);
    if lane.index == 0u {
        store(0u, 0u, 4u * group.x, sum.xy);
        store(0u, 0u, 4u * group.x + 2u, sum.zw);
    }
}
