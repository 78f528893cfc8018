//! Every accepted spelling, and every refusal by the name of its field.

use serde_json::{Value, json};

use super::*;

/// The published config of GLM-5.2, without a quantisation.
fn glm_5_2() -> Value {
    let full = |layer: usize| layer < 3 || (layer >= 6 && (layer - 6).is_multiple_of(4));
    let text = r#"{
        "architectures": ["GlmMoeDsaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": [154820, 154827, 154829],
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "head_dim": 192,
        "hidden_size": 6144,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_share_for_mtp_iteration": true,
        "index_topk": 2048,
        "index_topk_freq": 4,
        "index_skip_topk_offset": 3,
        "indexer_rope_interleave": true,
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "max_position_embeddings": 1048576,
        "model_type": "glm_moe_dsa",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": true,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 78,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 2048,
        "qk_head_dim": 256,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_interleave": true,
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": false,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 256,
        "vocab_size": 154880
    }"#;
    let mut config: Value = serde_json::from_str(text).unwrap();
    config["indexer_types"] = (0..78).map(|layer| if full(layer) { "full" } else { "shared" }).collect();
    config
}

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_json(&config.to_string())
}

/// GLM-5.2 with some fields replaced; null takes a field away.
fn with(changes: Value) -> Value {
    let mut config = glm_5_2();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

/// The message that refuses GLM-5.2 with these changes.
fn refusal(changes: Value) -> String {
    parse(&with(changes)).unwrap_err().to_string()
}

fn full_layers(config: &ModelConfig) -> Vec<usize> {
    (0..config.num_hidden_layers).filter(|&i| config.indexer_types[i] == IndexerType::Full).collect()
}

#[test]
fn glm_5_2_as_published() {
    let config = parse(&glm_5_2()).unwrap();
    assert_eq!(config.qk_head_dim(), 256);
    assert_eq!(config.latent_dim(), 576);
    assert_eq!(config.num_full_layers(), 21);
    assert_eq!(config.num_sparse_layers(), 75);
    assert_eq!(
        config.mlp_layer_types[..4],
        [MlpLayerType::Dense, MlpLayerType::Dense, MlpLayerType::Dense, MlpLayerType::Sparse]
    );
    assert_eq!(config.eos_token_ids, [154820, 154827, 154829]);
    assert_eq!(config.rope_theta, 8e6);
    assert_eq!(config.latent_norm_eps, 1e-5);
    assert!(config.indexer_rope_interleave && config.index_share_for_mtp_iteration);
    assert_eq!(config.quantization, None);
    assert_eq!(config.valid_tp(), [1, 2, 4, 8, 16, 32, 64]);
}

/// Layers 0, 1, 2, then every fourth from 6 to 74.
#[test]
fn the_three_spellings_of_index_share_agree() {
    let published: Vec<usize> = [0, 1, 2].into_iter().chain((6..78).step_by(4)).collect();
    assert_eq!(published.len(), 21);
    assert_eq!(published.last(), Some(&74));

    let none = json!({"indexer_types": null, "index_topk_freq": null, "index_skip_topk_offset": null});
    let mut by_list = with(none.clone());
    by_list["indexer_types"] = glm_5_2()["indexer_types"].clone();
    let mut by_pattern = with(none.clone());
    let letter = |layer| if published.contains(&layer) { 'F' } else { 'S' };
    by_pattern["index_topk_pattern"] = (0..78).map(letter).collect::<String>().into();
    let by_frequency = with(json!({"indexer_types": null}));
    for config in [by_list, by_pattern, by_frequency] {
        assert_eq!(full_layers(&parse(&config).unwrap()), published);
    }
    // DeepSeek-V3.2 and GLM-5 have none of the fields: every layer selects for itself.
    assert_eq!(parse(&with(none)).unwrap().num_full_layers(), 78);
}

#[test]
fn the_default_offset_is_two() {
    let changes = json!({"indexer_types": null, "index_topk_freq": 4, "index_skip_topk_offset": null});
    let config = parse(&with(changes)).unwrap();
    assert_eq!(full_layers(&config)[..4], [0, 1, 5, 9]);
}

#[test]
fn older_and_optional_spellings() {
    let theta = with(json!({"rope_parameters": null, "rope_theta": 10000}));
    assert_eq!(parse(&theta).unwrap().rope_theta, 10000.0);
    let scaling =
        with(json!({"rope_parameters": null, "rope_theta": 1e4, "rope_scaling": {"type": "default"}}));
    assert_eq!(parse(&scaling).unwrap().rope_theta, 10000.0);
    let eos = with(json!({"eos_token_id": 7}));
    assert_eq!(parse(&eos).unwrap().eos_token_ids, [7]);
    let eps = with(json!({"latent_norm_eps": 1e-6}));
    assert_eq!(parse(&eps).unwrap().latent_norm_eps, 1e-6);
    let half = with(json!({"indexer_rope_interleave": false}));
    assert!(!parse(&half).unwrap().indexer_rope_interleave);
    let types: Vec<_> = (0..78).map(|i| if i < 3 { "dense" } else { "sparse" }).collect();
    let listed = with(json!({"mlp_layer_types": types, "first_k_dense_replace": null}));
    assert_eq!(parse(&listed).unwrap(), parse(&glm_5_2()).unwrap());
    let unshared = with(json!({"n_shared_experts": null}));
    assert_eq!(parse(&unshared).unwrap().shared_intermediate_size(), 0);
    let tied = with(json!({"tie_word_embeddings": true}));
    assert!(parse(&tied).unwrap().tie_word_embeddings);
}

#[test]
fn a_missing_field_is_named() {
    for field in [
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "vocab_size",
        "num_attention_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "intermediate_size",
        "routed_scaling_factor",
        "first_k_dense_replace",
        "rms_norm_eps",
        "max_position_embeddings",
    ] {
        let message = refusal(json!({field: null}));
        assert!(message.starts_with(&format!("`{field}` is missing; expected ")), "{message}");
    }
    let message = refusal(json!({"rope_parameters": null}));
    assert!(message.starts_with("`rope_parameters.rope_theta` is missing"), "{message}");
}

#[test]
fn a_wrong_type_or_range_is_named_with_what_was_found() {
    for (field, value) in [
        ("hidden_size", json!("6144")),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-1)),
        ("hidden_size", json!(6144.5)),
        ("hidden_size", json!(4294967296_u64)),
        ("num_hidden_layers", json!(100_000)),
        ("n_routed_experts", json!([256])),
        ("rms_norm_eps", json!(0)),
        ("routed_scaling_factor", json!("2.5")),
        ("norm_topk_prob", json!(1)),
        ("tie_word_embeddings", json!("false")),
        ("indexer_rope_interleave", json!("true")),
        ("eos_token_id", json!("</s>")),
        ("eos_token_id", json!([154880])),
        ("indexer_types", json!("full")),
        ("rope_parameters", json!(8000000)),
        ("first_k_dense_replace", json!(true)),
        ("quantization_config", json!("awq")),
    ] {
        let shown = match &value {
            Value::Array(items) if field == "eos_token_id" => items[0].to_string(),
            other => other.to_string(),
        };
        let message = refusal(json!({field: value}));
        assert!(message.starts_with(&format!("`{field}` is {shown}; expected ")), "{message}");
    }
}

#[test]
fn what_no_kernel_computes_is_refused() {
    for (field, value) in [
        ("model_type", json!("deepseek_v32")),
        ("hidden_act", json!("gelu")),
        ("scoring_func", json!("softmax")),
        ("topk_method", json!("greedy")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("rope_interleave", json!(false)),
        ("moe_layer_freq", json!(2)),
    ] {
        let message = refusal(json!({field: value}));
        assert!(message.starts_with(&format!("`{field}` is {value}; expected ")), "{message}");
    }
    let message =
        refusal(json!({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}));
    assert!(
        message.starts_with("`rope_parameters.rope_type` is \"yarn\"; expected \"default\""),
        "{message}"
    );
    let message = refusal(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    assert!(message.starts_with("`rope_scaling.type` is \"linear\""), "{message}");
    let message = refusal(json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}));
    assert!(message.starts_with("`rope_parameters.partial_rotary_factor` is 0.5"), "{message}");
    let message = refusal(json!({"layer_types": vec!["full_attention"; 78]}));
    assert!(message.starts_with("`layer_types` is \"full_attention\""), "{message}");
}

#[test]
fn contradictions_name_both_sides() {
    let list = |n: usize, first: &str| {
        std::iter::once(first)
            .chain(std::iter::repeat_n("shared", n - 1))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let alone = |field: &str, value: Value| {
        let mut changes = json!({"indexer_types": null, "index_topk_freq": null});
        changes[field] = value;
        changes
    };
    for (changes, names) in [
        (
            alone("indexer_types", json!(list(77, "full"))),
            ["`indexer_types` is 77 layers long", "`num_hidden_layers` = 78"],
        ),
        (alone("index_topk_pattern", json!("FFS")), ["`index_topk_pattern` is 3 layers long", "78"]),
        (
            alone("indexer_types", json!(list(78, "shared"))),
            ["`indexer_types` is `shared` for layer 0", "`full`"],
        ),
        (json!({"index_topk_freq": 2}), ["`index_topk_freq` is `full` for layer 4", "`indexer_types`"]),
        (
            json!({"index_topk_pattern": "F".repeat(78)}),
            ["`index_topk_pattern` is `full` for layer 3", "`indexer_types`"],
        ),
        (json!({"rope_theta": 10000}), ["`rope_theta` is 10000", "`rope_parameters.rope_theta` = 8000000"]),
        (json!({"num_key_value_heads": 8}), ["`num_key_value_heads` is 8", "`num_attention_heads` = 64"]),
        (json!({"qk_head_dim": 192}), ["`qk_head_dim` is 192", "192 + 64"]),
        (json!({"qk_rope_head_dim": 63, "qk_head_dim": null}), ["`qk_rope_head_dim` is 63", "even"]),
        (json!({"index_head_dim": 32}), ["`index_head_dim` is 32", "`qk_rope_head_dim` = 64"]),
        (json!({"n_group": 3}), ["`n_group` is 3", "`n_routed_experts` = 256"]),
        (json!({"n_group": 256, "topk_group": 8}), ["`n_group` is 256", "two experts"]),
        (json!({"topk_group": 2}), ["`topk_group` is 2", "`n_group` = 1"]),
        (json!({"num_experts_per_tok": 257}), ["`num_experts_per_tok` is 257", "256 experts"]),
        (json!({"n_group": 64, "topk_group": 1}), ["`num_experts_per_tok` is 8", "the 4 experts"]),
        (
            json!({"mlp_layer_types": vec!["sparse"; 78]}),
            ["`first_k_dense_replace` is 3", "`mlp_layer_types`"],
        ),
        (
            json!({"mlp_layer_types": vec!["dense"; 3]}),
            ["`mlp_layer_types` is 3 layers long", "`num_hidden_layers` = 78"],
        ),
        (json!({"mlp_layer_types": vec!["moe"; 78]}), ["`mlp_layer_types` is \"moe\"", "`sparse`"]),
    ] {
        let message = refusal(changes);
        assert!(names.iter().all(|name| message.contains(name)), "{message}\nlacks one of {names:?}");
    }
}

#[test]
fn not_a_json_object() {
    for text in ["", "{", "[]", "null", "{\"hidden_size\": }"] {
        assert!(matches!(ModelConfig::from_json(text), Err(ConfigError::Json(_))), "{text:?}");
    }
    let nested = "[".repeat(100_000);
    assert!(matches!(ModelConfig::from_json(&nested), Err(ConfigError::Json(_))));
}

/// The layout of a published checkpoint: group size 32, asymmetric, experts only.
fn compressed_tensors() -> Value {
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["re:.*self_attn.*", "re:.*shared_experts.*", "re:model[.]layers[.][0-2][.]mlp.*", "lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"],
            "input_activations": null,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": false, "group_size": 32, "strategy": "group", "dynamic": false
            },
        }},
    })
}

fn quantized(quantization: Value) -> Result<ModelConfig, ConfigError> {
    parse(&with(json!({"quantization_config": quantization})))
}

#[test]
fn compressed_tensors_targets_and_ignores() {
    let config = quantized(compressed_tensors()).unwrap();
    let quantization = config.quantization.as_ref().unwrap();
    assert_eq!(quantization.method, QuantizationMethod::CompressedTensors);
    let scheme = Int4Scheme { group_size: Some(32), symmetric: false };
    let expect = |module: &str| quantization.expectation(module, true);
    assert_eq!(expect("model.layers.3.mlp.experts.0.up_proj"), Expectation::Int4(scheme));
    assert_eq!(expect("model.layers.10.mlp.down_proj"), Expectation::Int4(scheme));
    assert_eq!(expect("model.layers.0.mlp.down_proj"), Expectation::Dense);
    assert_eq!(expect("model.layers.3.self_attn.o_proj"), Expectation::Dense);
    assert_eq!(expect("model.layers.3.mlp.shared_experts.up_proj"), Expectation::Dense);
    assert_eq!(expect("lm_head"), Expectation::Dense);
    // Exact names are exact, patterns are anchored at the start alone.
    assert_eq!(expect("lm_head2"), Expectation::Int4(scheme));
    assert_eq!(expect("x.model.layers.0.mlp.down_proj"), Expectation::Int4(scheme));
    // The router is no `Linear` in transformers.
    assert_eq!(quantization.expectation("model.layers.3.mlp.gate", false), Expectation::Either(scheme));
}

#[test]
fn a_name_is_more_specific_than_a_class() {
    let mut quantization = compressed_tensors();
    quantization["config_groups"]["group_1"] = json!({
        "targets": ["re:.*down_proj$"],
        "weights": {"num_bits": 4, "symmetric": true, "group_size": null, "strategy": "channel"},
    });
    let config = quantized(quantization).unwrap();
    let quantization = config.quantization.unwrap();
    let channel = Int4Scheme { group_size: None, symmetric: true };
    assert_eq!(
        quantization.expectation("model.layers.3.mlp.experts.0.down_proj", true),
        Expectation::Int4(channel)
    );
    assert_eq!(channel.group_size_of(2048), 2048);
    let group = Int4Scheme { group_size: Some(32), symmetric: false };
    assert_eq!(
        quantization.expectation("model.layers.3.mlp.experts.0.up_proj", true),
        Expectation::Int4(group)
    );
}

#[test]
fn auto_awq_names() {
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
        "zero_point": true,
        "modules_to_not_convert": ["mlp.gate", "model.layers.1", "lm_head"]});
    let quantization = quantized(awq).unwrap().quantization.unwrap();
    assert_eq!(quantization.method, QuantizationMethod::AutoAwq);
    let scheme = Int4Scheme { group_size: Some(128), symmetric: false };
    let expect = |module: &str| quantization.expectation(module, true);
    assert_eq!(expect("model.layers.1.mlp.up_proj"), Expectation::Dense);
    assert_eq!(expect("model.layers.5.mlp.gate"), Expectation::Dense);
    assert_eq!(expect("model.layers.5.mlp.up_proj"), Expectation::Int4(scheme));
    // A substring here, another component there.
    assert_eq!(expect("model.layers.5.mlp.gate_proj"), Expectation::Either(scheme));
    assert_eq!(expect("model.layers.11.mlp.up_proj"), Expectation::Either(scheme));
}

#[test]
fn quantisations_that_are_not_read() {
    let weights = "quantization_config.config_groups.group_0.weights";
    let at = |pointer: &str, value: Value| {
        let mut quantization = compressed_tensors();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        quantization.pointer_mut(parent).unwrap()[field] = value;
        quantization
    };
    for (quantization, expected) in [
        (json!({}), "`quantization_config.quant_method` is missing".to_owned()),
        (json!({"quant_method": "gptq"}), "`quantization_config.quant_method` is \"gptq\"".to_owned()),
        (
            json!({"quant_method": "compressed-tensors"}),
            "`quantization_config.config_groups` is missing".to_owned(),
        ),
        (
            at("/format", json!("nvfp4-pack-quantized")),
            "`quantization_config.config_groups.group_0.format` is \"nvfp4".to_owned(),
        ),
        (
            at("/kv_cache_scheme", json!({"num_bits": 8})),
            "`quantization_config.kv_cache_scheme` is".to_owned(),
        ),
        (at("/ignore", json!(["re:("])), "`quantization_config.ignore` is".to_owned()),
        (at("/ignore", json!(["re:(?!mlp)"])), "`quantization_config.ignore` is".to_owned()),
        (at("/ignore", json!([1])), "`quantization_config.ignore` is 1".to_owned()),
        (
            at("/config_groups/group_0", json!(3)),
            "`quantization_config.config_groups.group_0` is 3".to_owned(),
        ),
        (
            at("/config_groups/group_0/targets", json!(null)),
            "`quantization_config.config_groups.group_0.targets` is missing".to_owned(),
        ),
        (
            at("/config_groups/group_0/input_activations", json!({"num_bits": 8})),
            "`quantization_config.config_groups.group_0.input_activations` is".to_owned(),
        ),
        (
            at("/config_groups/group_0/weights/num_bits", json!(8)),
            format!("`{weights}.num_bits` is 8; expected 4"),
        ),
        (
            at("/config_groups/group_0/weights/num_bits", json!(null)),
            format!("`{weights}.num_bits` is missing"),
        ),
        (at("/config_groups/group_0/weights/type", json!("float")), format!("`{weights}.type` is \"float\"")),
        (
            at("/config_groups/group_0/weights/group_size", json!(null)),
            format!("`{weights}.group_size` is missing"),
        ),
        (
            at("/config_groups/group_0/weights/strategy", json!("channel")),
            format!("`{weights}.group_size` is 32"),
        ),
        (
            at("/config_groups/group_0/weights/strategy", json!("block")),
            format!("`{weights}.strategy` is \"block\""),
        ),
        (
            json!({"quant_method": "awq", "bits": 8, "group_size": 128}),
            "`quantization_config.bits` is 8".to_owned(),
        ),
        (json!({"quant_method": "awq", "bits": 4}), "`quantization_config.group_size` is missing".to_owned()),
        (
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}),
            "`quantization_config.version` is \"gemv\"".to_owned(),
        ),
        (
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": false}),
            "`quantization_config.zero_point` is false".to_owned(),
        ),
    ] {
        let message = quantized(quantization).unwrap_err().to_string();
        assert!(message.starts_with(&expected), "{message}\nexpected {expected}");
    }
}

#[test]
fn degrees_respect_quantisation_groups() {
    // 2048 / 64 = 32: whole groups up to 64 ranks.
    let config = quantized(compressed_tensors()).unwrap();
    assert_eq!(config.valid_tp(), [1, 2, 4, 8, 16, 32, 64]);
    let mut g128 = compressed_tensors();
    g128["config_groups"]["group_0"]["weights"]["group_size"] = json!(128);
    let config = quantized(g128).unwrap();
    assert_eq!(config.valid_tp(), [1, 2, 4, 8, 16]);
    let message = config.check_tp(32).unwrap_err().to_string();
    assert!(message.contains("32 ranks") && message.contains("`moe_intermediate_size` = 2048"), "{message}");
    assert!(message.contains("shards of 64") && message.contains("multiple of 128"), "{message}");
    assert!(message.ends_with("divide this model: 1, 2, 4, 8, 16"), "{message}");

    let message = config.check_tp(3).unwrap_err().to_string();
    assert!(message.contains("`num_attention_heads` = 64 is not a multiple of 3"), "{message}");
    assert!(config.check_tp(0).is_err());
    // A vocabulary that only two divide.
    let config = parse(&with(json!({"vocab_size": 154882}))).unwrap();
    assert_eq!(config.valid_tp(), [1, 2]);
}
