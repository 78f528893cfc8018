//! IndexShare: which layers select keys themselves, in any of its three spellings.

use serde_json::Value;

use super::fields::{Fields, shorten};
use super::{ConfigError, IndexerType};

/// One entry a layer, from `indexer_types`, else `index_topk_pattern`, else `index_topk_freq` and
/// `index_skip_topk_offset`. Where several are given they must agree.
pub(super) fn indexer_types(fields: Fields<'_>, layers: usize) -> Result<Vec<IndexerType>, ConfigError> {
    let by_list = listed(fields, "indexer_types", layers)?;
    let by_pattern = pattern(fields, layers)?;
    let by_frequency = frequency(fields, layers)?;

    let spellings =
        [("indexer_types", by_list), ("index_topk_pattern", by_pattern), ("index_topk_freq", by_frequency)];
    let mut given = spellings.into_iter().filter_map(|(name, types)| Some((name, types?)));
    let Some((name, types)) = given.next() else {
        return Ok(vec![IndexerType::Full; layers]);
    };
    for (other, others) in given {
        if let Some(layer) = (0..layers).find(|&i| types[i] != others[i]) {
            return Err(ConfigError::Contradiction {
                field: other.to_owned(),
                found: format!("`{}` for layer {layer}", word(others[layer])),
                other: format!("`{name}`"),
                expected: format!("`{}` there, or only one of the two fields", word(types[layer])),
            });
        }
    }
    if types[0] != IndexerType::Full {
        return Err(ConfigError::Invalid {
            field: name.to_owned(),
            found: "`shared` for layer 0".to_owned(),
            expected: "`full` there: no layer before it has indices to share".to_owned(),
        });
    }
    Ok(types)
}

/// A list of words.
fn listed(fields: Fields<'_>, field: &str, layers: usize) -> Result<Option<Vec<IndexerType>>, ConfigError> {
    let Some(words) = fields.strings(field)? else { return Ok(None) };
    let types = words.iter().map(|word| match *word {
        "full" | "F" => Ok(IndexerType::Full),
        "shared" | "S" => Ok(IndexerType::Shared),
        other => Err(fields.invalid(field, &Value::from(other), "`full` or `shared` for every layer")),
    });
    let types = types.collect::<Result<Vec<_>, _>>()?;
    checked_length(fields, field, types, layers).map(Some)
}

/// A string of F and S, or a list.
fn pattern(fields: Fields<'_>, layers: usize) -> Result<Option<Vec<IndexerType>>, ConfigError> {
    const FIELD: &str = "index_topk_pattern";
    let letters = match fields.value(FIELD) {
        None => return Ok(None),
        Some(Value::String(letters)) => letters,
        Some(Value::Array(_)) => return listed(fields, FIELD, layers),
        Some(other) => return Err(fields.invalid(FIELD, other, "a string of F and S")),
    };
    let types = letters.chars().map(|letter| match letter {
        'F' => Ok(IndexerType::Full),
        'S' => Ok(IndexerType::Shared),
        _ => Err(fields.invalid(FIELD, &Value::from(letters.as_str()), "F or S for every layer")),
    });
    let types = types.collect::<Result<Vec<_>, _>>()?;
    checked_length(fields, FIELD, types, layers).map(Some)
}

/// Layer `i` is full when `max(i - offset + 1, 0)` is a multiple of the frequency (transformers 5.17,
/// `configuration_glm_moe_dsa.py`; defaults 1 and 2).
fn frequency(fields: Fields<'_>, layers: usize) -> Result<Option<Vec<IndexerType>>, ConfigError> {
    let Some(frequency) = fields.integer("index_topk_freq", 0, layers.max(1 << 16))? else { return Ok(None) };
    let frequency = frequency.max(1);
    let offset = fields.integer("index_skip_topk_offset", 0, layers.max(1 << 16))?.unwrap_or(2);
    let types = (0..layers).map(|layer| match (layer + 1).saturating_sub(offset) % frequency {
        0 => IndexerType::Full,
        _ => IndexerType::Shared,
    });
    Ok(Some(types.collect()))
}

fn checked_length(
    fields: Fields<'_>,
    field: &str,
    types: Vec<IndexerType>,
    layers: usize,
) -> Result<Vec<IndexerType>, ConfigError> {
    if types.len() == layers {
        return Ok(types);
    }
    let found = fields.value(field).map(shorten).unwrap_or_default();
    Err(ConfigError::Contradiction {
        field: fields.name(field),
        found: format!("{} layers long ({found})", types.len()),
        other: format!("`num_hidden_layers` = {layers}"),
        expected: format!("{layers} entries"),
    })
}

fn word(kind: IndexerType) -> &'static str {
    match kind {
        IndexerType::Full => "full",
        IndexerType::Shared => "shared",
    }
}
