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
