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

// Vector `i` of the weight: eight columns of rows that are whole vectors.
fn eight_of(i: u32) -> Eight {
    if WEIGHT == F32 {
        return Eight(bitcast<vec4<f32>>(weight[2u * i]), bitcast<vec4<f32>>(weight[2u * i + 1u]));
    }
    if WEIGHT == BF16 {
        return eight_bf16(weight[i]);
    }
    return eight_f16(weight[i]);
}

fn product_of(a: Eight, b: Eight) -> f32 {
    return dot(a.low, b.low) + dot(a.high, b.high);
}

// One token, and rows of whole vectors: all lanes go over the columns of four features, eight at a time.
@compute @workgroup_size(WORKGROUP)
fn one(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let vectors = params.columns / 8u;
    // Those behind the last are the last.
    let features = min(vec4(4u * group.x) + vec4(0u, 1u, 2u, 3u), vec4(params.features - 1u));
    let starts = (features + group.z * params.rows_of_head + params.row) * vectors;
    let first = start_of(0u, group.z) / 8u;
    var sums = vec4(0.0);
    for (var step = 0u; step < STEPS; step++) {
        let chunk = step * WORKGROUP + lane.index;
        if EVEN || chunk < vectors {
            let a = eight_of(starts.x + chunk);
            let b = eight_of(starts.y + chunk);
            let c = eight_of(starts.z + chunk);
            let d = eight_of(starts.w + chunk);
            let v = act_eight(x[first + chunk]);
            sums += vec4(product_of(a, v), product_of(b, v), product_of(c, v), product_of(d, v));
        }
    }
    let sum = workgroup_sum_of_four(sums, lane);
    if lane.index == 0u {
        store(0u, group.z, 4u * group.x, sum.xy);
        store(0u, group.z, 4u * group.x + 2u, sum.zw);
    }
}
