// After `product.wgsl`: packed INT4 weights, `(q - z) * scale`.

override SCALE: u32 = BF16;
override ZEROS: bool = false;
// Groups are whole chunks of eight columns.
override WHOLE: bool = true;
// Of `one`: vectors of 32 columns of a group, and whether a row has an even number of groups.
override GROUP_QUADS: u32 = 1u;
override EVEN_GROUPS: bool = false;

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

// The bits of INTEGER, by way of a register: a mask and an addition of what is known to a compiler, or to all lanes, are two instructions of
// NVIDIA's, and one with this. They are half of the kernel's.
var<private> integer: u32;

// Nibbles in place as numbers, `INTEGER` and all.
fn in_place(word: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>((vec4(word) & MASKS) | vec4(integer));
}

// The products of a word of weights without their scale, each times its place, added to `sums`; `zero` is that of each place with `INTEGER`.
fn products(word: u32, zero: vec4<f32>, v: Eight, sums: vec4<f32>) -> vec4<f32> {
    return fma(in_place(word) - zero, v.low, fma(in_place(word >> 16u) - zero, v.high, sums));
}

// Those of 32 columns, with their scale; places are relative to that of the zero point.
fn products_of_quad(words: vec4<u32>, scale: f32, zero_point: f32, places: vec4<f32>, v: array<Eight, 4>) -> f32 {
    let zero = fma(vec4(zero_point), places, vec4(INTEGER));
    var four = products(words.x, zero, v[0], vec4(0.0));
    four = products(words.y, zero, v[1], four);
    four = products(words.z, zero, v[2], four);
    four = products(words.w, zero, v[3], four);
    return scale * dot(four, 1.0 / PLACES);
}

// The scale of group `group` of the row that begins at `start`.
fn scale_at(start: u32, group: u32) -> f32 {
    let i = start + group;
    if SCALE == BF16 && EVEN_GROUPS {
        // Which half of a word it is, is the same in every row.
        return bitcast<f32>((scales[i / 2u] << (16u - 16u * (group & 1u))) & 0xffff0000u);
    }
    return weight_of(SCALE, scales[weight_word(SCALE, i)], i);
}

// Of four features: where their words, scales and zero points begin.
struct Four {
    words: vec4<u32>,
    scales: vec4<u32>,
    zeros: u32,
    zero_shift: u32,
}

struct Quads {
    first: vec4<u32>,
    second: vec4<u32>,
    third: vec4<u32>,
    fourth: vec4<u32>,
}

fn quads_of(four: Four, quad: u32) -> Quads {
    let at = four.words + quad;
    return Quads(weight[at.x], weight[at.y], weight[at.z], weight[at.w]);
}

// What 32 columns add to four features.
fn products_of_four(four: Four, own: Quads, quad: u32) -> vec4<f32> {
    let v = array(
        act_eight(x[4u * quad]),
        act_eight(x[4u * quad + 1u]),
        act_eight(x[4u * quad + 2u]),
        act_eight(x[4u * quad + 3u]),
    );
    let group = quad / GROUP_QUADS;
    var zeros = 8.0 * PLACES;
    if ZEROS {
        zeros = in_place(zero_points[four.zeros + group] >> four.zero_shift) - INTEGER;
    }
    return vec4(
        products_of_quad(own.first, scale_at(four.scales.x, group), zeros.x, PLACES, v),
        products_of_quad(own.second, scale_at(four.scales.y, group), zeros.y, PLACES / 16.0, v),
        products_of_quad(own.third, scale_at(four.scales.z, group), zeros.z, PLACES / 256.0, v),
        products_of_quad(own.fourth, scale_at(four.scales.w, group), zeros.w, PLACES / 4096.0, v),
    );
}

// One token, and groups of whole vectors of four words: all lanes go over the columns of four features, 32 at a time.
@compute @workgroup_size(WORKGROUP)
fn one(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    integer = params.integer[lane.index & 1u];
    // Those behind the last are the last.
    let features = min(vec4(4u * group.x) + vec4(0u, 1u, 2u, 3u), vec4(params.features - 1u));
    let quads = params.columns / 32u;
    // Four rows have their zero points in one word: the first of a window is a multiple of eight.
    let rows = features + params.row + params.scale_row;
    let zeros = rows.x / 8u * params.groups;
    let four = Four((features + params.row) * quads, rows * params.groups, zeros, 4u * (rows.x & 7u));
    var sums = vec4(0.0);
    // Two rounds at a time: the words of the second are on their way while the first is worked on.
    for (var step = 0u; step < STEPS; step += 2u) {
        let first = step * WORKGROUP + lane.index;
        let second = first + WORKGROUP;
        let of_first = quads_of(four, min(first, quads - 1u));
        let of_second = quads_of(four, min(second, quads - 1u));
        if EVEN || first < quads {
            sums += products_of_four(four, of_first, first);
        }
        if second < quads {
            sums += products_of_four(four, of_second, second);
        }
    }
    let sum = workgroup_sum_of_four(sums, lane);
    if lane.index == 0u {
        store(0u, 0u, 4u * group.x, sum.xy);
        store(0u, 0u, 4u * group.x + 2u, sum.zw);
    }
}
