// After `product.wgsl`: dense weights.

override WEIGHT: u32 = BF16;

fn dense_at(i: u32) -> f32 {
    let word = weight_word(WEIGHT, i);
    return weight_of(WEIGHT, weight[word / 4u][word & 3u], i);
}

fn weights(row: u32, chunk: u32) -> Eight {
    let start = row * params.columns + 8u * chunk;
    let left = params.columns - min(8u * chunk, params.columns);
    if left >= 8u && (start & 7u) == 0u {
        if WEIGHT == F32 {
            return Eight(bitcast<vec4<f32>>(weight[start / 4u]), bitcast<vec4<f32>>(weight[start / 4u + 1u]));
        }
        let words = weight[start / 8u];
        if WEIGHT == BF16 {
            return eight_bf16(words);
        }
        return eight_f16(words);
    }
    var eight = Eight(vec4(0.0), vec4(0.0));
    for (var j = 0u; j < min(left, 4u); j++) {
        eight.low[j] = dense_at(start + j);
    }
    for (var j = 4u; j < min(left, 8u); j++) {
        eight.high[j - 4u] = dense_at(start + j);
    }
    return eight;
}
