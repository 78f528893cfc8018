//! From the text of `config.json` to a [`ModelConfig`].

use serde_json::Value;

use super::fields::{Fields, shorten};
use super::index_share::indexer_types;
use super::quantization::QuantizationConfig;
use super::{ConfigError, MlpLayerType, ModelConfig};

/// Deeper models do not exist; the bound keeps per-layer lists small whatever a hostile file claims.
const MAX_LAYERS: usize = 4096;

/// As [`MAX_LAYERS`], for the experts of a layer.
const MAX_EXPERTS: usize = 1 << 16;

pub(super) fn model_config(text: &str) -> Result<ModelConfig, ConfigError> {
    let root: Value = serde_json::from_str(text).map_err(|e| ConfigError::Json(e.to_string()))?;
    let Value::Object(root) = &root else {
        return Err(ConfigError::Json(format!("found {}", shorten(&root))));
    };
    let fields = Fields::new(root, "");
    refuse_other_architectures(fields)?;

    let num_hidden_layers = fields
        .integer("num_hidden_layers", 1, MAX_LAYERS)?
        .ok_or_else(|| fields.missing("num_hidden_layers", format!("an integer from 1 to {MAX_LAYERS}")))?;
    let n_routed_experts = fields
        .integer("n_routed_experts", 1, MAX_EXPERTS)?
        .ok_or_else(|| fields.missing("n_routed_experts", format!("an integer from 1 to {MAX_EXPERTS}")))?;
    let rms_norm_eps = fields.required_positive("rms_norm_eps")?;
    let vocab_size = fields.required_size("vocab_size")?;

    let config = ModelConfig {
        hidden_size: fields.required_size("hidden_size")?,
        num_hidden_layers,
        vocab_size,
        num_attention_heads: fields.required_size("num_attention_heads")?,
        q_lora_rank: fields.required_size("q_lora_rank")?,
        kv_lora_rank: fields.required_size("kv_lora_rank")?,
        qk_nope_head_dim: fields.required_size("qk_nope_head_dim")?,
        qk_rope_head_dim: fields.required_size("qk_rope_head_dim")?,
        v_head_dim: fields.required_size("v_head_dim")?,
        index_n_heads: fields.required_size("index_n_heads")?,
        index_head_dim: fields.required_size("index_head_dim")?,
        index_topk: fields.required_size("index_topk")?,
        indexer_types: indexer_types(fields, num_hidden_layers)?,
        index_share_for_mtp_iteration: fields.boolean("index_share_for_mtp_iteration", true)?,
        rope_interleave: true,
        indexer_rope_interleave: fields.boolean("indexer_rope_interleave", true)?,
        rope_theta: rope_theta(fields)?,
        n_routed_experts,
        num_experts_per_tok: fields.required_size("num_experts_per_tok")?,
        n_shared_experts: fields.integer("n_shared_experts", 0, MAX_EXPERTS)?.unwrap_or(0),
        moe_intermediate_size: fields.required_size("moe_intermediate_size")?,
        intermediate_size: fields.required_size("intermediate_size")?,
        n_group: fields.size("n_group")?.unwrap_or(1),
        topk_group: fields.size("topk_group")?.unwrap_or(1),
        norm_topk_prob: fields.boolean("norm_topk_prob", true)?,
        routed_scaling_factor: fields.required_positive("routed_scaling_factor")?,
        mlp_layer_types: mlp_layer_types(fields, num_hidden_layers)?,
        rms_norm_eps,
        latent_norm_eps: fields.positive("latent_norm_eps")?.unwrap_or(rms_norm_eps),
        max_position_embeddings: fields.required_size("max_position_embeddings")?,
        eos_token_ids: eos_token_ids(fields, vocab_size)?,
        num_nextn_predict_layers: fields.integer("num_nextn_predict_layers", 0, MAX_LAYERS)?.unwrap_or(0),
        draft_layer: false,
        tie_word_embeddings: fields.boolean("tie_word_embeddings", false)?,
        quantization: fields.object("quantization_config")?.map(QuantizationConfig::parse).transpose()?,
    };
    check_heads(fields, &config)?;
    check_router(fields, &config)?;
    Ok(config)
}

/// Everything that would change the output and that no kernel here computes.
fn refuse_other_architectures(fields: Fields<'_>) -> Result<(), ConfigError> {
    if fields.value("model_type").is_none() {
        return Err(fields.missing("model_type", "\"glm_moe_dsa\""));
    }
    fields.only("model_type", "glm_moe_dsa")?;
    fields.only("hidden_act", "silu")?;
    fields.only("scoring_func", "sigmoid")?;
    fields.only("topk_method", "noaux_tc")?;
    fields.only("attention_bias", false)?;
    fields.only("mlp_bias", false)?;
    fields.only("rope_interleave", true)?;
    fields.only("moe_layer_freq", 1)?;
    for kind in fields.strings("layer_types")?.unwrap_or_default() {
        if kind != "deepseek_sparse_attention" {
            return Err(fields.invalid(
                "layer_types",
                &Value::from(kind),
                "`deepseek_sparse_attention` for every layer",
            ));
        }
    }
    Ok(())
}

/// `rope_parameters.rope_theta`, or the older `rope_theta` at the top.
fn rope_theta(fields: Fields<'_>) -> Result<f64, ConfigError> {
    let top = fields.positive("rope_theta")?;
    let mut nested = None;
    for name in ["rope_parameters", "rope_scaling"] {
        let Some(object) = fields.object(name)? else { continue };
        let rope = Fields::new(object, name);
        for type_field in ["rope_type", "type"] {
            rope.only(type_field, "default")?;
        }
        if let Some(factor) = rope.positive("partial_rotary_factor")?
            && factor != 1.0
        {
            return Err(rope.invalid(
                "partial_rotary_factor",
                &Value::from(factor),
                "1 (nothing else is supported)",
            ));
        }
        if let Some(theta) = rope.positive("rope_theta")? {
            nested = Some((format!("{name}.rope_theta"), theta));
        }
    }
    match (top, nested) {
        (Some(top), Some((field, theta))) if top != theta => Err(ConfigError::Contradiction {
            field: "rope_theta".to_owned(),
            found: top.to_string(),
            other: format!("`{field}` = {theta}"),
            expected: "the same value, or only one of the two fields".to_owned(),
        }),
        (_, Some((_, theta))) | (Some(theta), None) => Ok(theta),
        (None, None) => Err(fields.missing("rope_parameters.rope_theta", "a number above 0")),
    }
}

/// `mlp_layer_types`, or `first_k_dense_replace` dense layers and sparse ones after them; both may be given
/// if they agree.
fn mlp_layer_types(fields: Fields<'_>, layers: usize) -> Result<Vec<MlpLayerType>, ConfigError> {
    const LIST: &str = "mlp_layer_types";
    const COUNT: &str = "first_k_dense_replace";
    let counted = fields.integer(COUNT, 0, MAX_LAYERS)?.map(|dense| {
        let kind = |layer| if layer < dense { MlpLayerType::Dense } else { MlpLayerType::Sparse };
        (dense, (0..layers).map(kind).collect::<Vec<_>>())
    });
    let Some(words) = fields.strings(LIST)? else {
        return counted
            .map(|(_, types)| types)
            .ok_or_else(|| fields.missing(COUNT, format!("it, or `{LIST}` with one entry a layer")));
    };
    let types = words.iter().map(|word| match *word {
        "dense" => Ok(MlpLayerType::Dense),
        "sparse" => Ok(MlpLayerType::Sparse),
        other => Err(fields.invalid(LIST, &Value::from(other), "`dense` or `sparse` for every layer")),
    });
    let types = types.collect::<Result<Vec<_>, _>>()?;
    if types.len() != layers {
        return Err(ConfigError::Contradiction {
            field: LIST.to_owned(),
            found: format!("{} layers long", types.len()),
            other: format!("`num_hidden_layers` = {layers}"),
            expected: format!("{layers} entries"),
        });
    }
    match counted {
        Some((dense, by_count)) if by_count != types => Err(ConfigError::Contradiction {
            field: COUNT.to_owned(),
            found: dense.to_string(),
            other: format!("`{LIST}`"),
            expected: "the number of leading dense layers in it, or only one of the two fields".to_owned(),
        }),
        _ => Ok(types),
    }
}

/// One id or a list of ids.
fn eos_token_ids(fields: Fields<'_>, vocab_size: usize) -> Result<Vec<u32>, ConfigError> {
    const FIELD: &str = "eos_token_id";
    let values = match fields.value(FIELD) {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values.as_slice(),
        Some(value) => std::slice::from_ref(value),
    };
    let ids = values.iter().map(|value| {
        let id = value.as_u64().filter(|id| *id < vocab_size as u64).and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| fields.invalid(FIELD, value, format!("token ids below `vocab_size` = {vocab_size}")))
    });
    ids.collect()
}

fn check_heads(fields: Fields<'_>, config: &ModelConfig) -> Result<(), ConfigError> {
    if let Some(heads) = fields.size("num_key_value_heads")?
        && heads != config.num_attention_heads
    {
        return Err(ConfigError::Contradiction {
            field: "num_key_value_heads".to_owned(),
            found: heads.to_string(),
            other: format!("`num_attention_heads` = {}", config.num_attention_heads),
            expected: "the same value: latent attention has no grouped heads".to_owned(),
        });
    }
    let (nope, rope) = (config.qk_nope_head_dim, config.qk_rope_head_dim);
    if let Some(dim) = fields.size("qk_head_dim")?
        && dim != nope + rope
    {
        return Err(ConfigError::Contradiction {
            field: "qk_head_dim".to_owned(),
            found: dim.to_string(),
            other: format!("`qk_nope_head_dim` + `qk_rope_head_dim` = {nope} + {rope}"),
            expected: (nope + rope).to_string(),
        });
    }
    if !rope.is_multiple_of(2) {
        return Err(fields.invalid("qk_rope_head_dim", &Value::from(rope), "an even number: rotary pairs"));
    }
    if config.index_head_dim < rope {
        return Err(ConfigError::Contradiction {
            field: "index_head_dim".to_owned(),
            found: config.index_head_dim.to_string(),
            other: format!("`qk_rope_head_dim` = {rope}"),
            expected: "at least as much: the indexer rotates the first part of its heads".to_owned(),
        });
    }
    Ok(())
}

fn check_router(fields: Fields<'_>, config: &ModelConfig) -> Result<(), ConfigError> {
    let (experts, groups) = (config.n_routed_experts, config.n_group);
    let contradiction = |field: &str, found: usize, other: String, expected: String| {
        Err(ConfigError::Contradiction {
            field: fields.name(field),
            found: found.to_string(),
            other,
            expected,
        })
    };
    if !experts.is_multiple_of(groups) {
        let other = format!("`n_routed_experts` = {experts}");
        return contradiction("n_group", groups, other, "a divisor of it".to_owned());
    }
    if groups > 1 && experts / groups < 2 {
        let other = format!("`n_routed_experts` = {experts}");
        let expected =
            "groups of at least two experts: a group's score is the sum of its two best".to_owned();
        return contradiction("n_group", groups, other, expected);
    }
    if config.topk_group > groups {
        let other = format!("`n_group` = {groups}");
        return contradiction("topk_group", config.topk_group, other, "at most as many".to_owned());
    }
    let reachable = config.topk_group * (experts / groups);
    if config.num_experts_per_tok > reachable {
        let other =
            format!("the {reachable} experts in the {} groups that the router keeps", config.topk_group);
        return contradiction(
            "num_experts_per_tok",
            config.num_experts_per_tok,
            other,
            "at most as many".to_owned(),
        );
    }
    Ok(())
}
