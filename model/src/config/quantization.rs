//! `quantization_config`: which linear layers the checkpoint claims to hold packed, and how.
//!
//! Two methods are read: compressed-tensors `pack-quantized` (matching rules of its 0.17 `utils/match.py`)
//! and AutoAWQ `gemm`. The tensors themselves decide how a layer is loaded; this is what they are held
//! against.

use std::collections::BTreeSet;

use regex::RegexSet;
use serde_json::{Map, Value};

use super::ConfigError;
use super::fields::Fields;

/// How the tensors of a packed layer are named and laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantizationMethod {
    /// `weight_packed`, `weight_scale`, `weight_zero_point`, `weight_shape`.
    CompressedTensors,
    /// `qweight`, `qzeros`, `scales`.
    AutoAwq,
}

/// How a packed layer is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Int4Scheme {
    /// Input features that share a scale; `None`: one scale a row.
    pub group_size: Option<usize>,
    /// No zero points: 8 stands for zero.
    pub symmetric: bool,
}

impl Int4Scheme {
    /// The group size for a layer of `in_features`.
    pub fn group_size_of(&self, in_features: usize) -> usize {
        self.group_size.unwrap_or(in_features)
    }
}

/// What the config says about one module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expectation {
    /// It has a plain `.weight`.
    Dense,
    /// It is packed.
    Int4(Int4Scheme),
    /// Readers of this config disagree, so the tensors decide; packed, it follows the scheme.
    Either(Int4Scheme),
}

/// A parsed `quantization_config`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizationConfig {
    /// The layout of the packed layers.
    pub method: QuantizationMethod,
    groups: Vec<Group>,
    ignore: ModuleNames,
}

#[derive(Debug, Clone, PartialEq)]
struct Group {
    targets: ModuleNames,
    scheme: Int4Scheme,
}

impl QuantizationConfig {
    pub(super) fn parse(object: &Map<String, Value>) -> Result<Self, ConfigError> {
        let fields = Fields::new(object, "quantization_config");
        match fields.string("quant_method")? {
            Some("compressed-tensors") => compressed_tensors(fields),
            Some("awq") => auto_awq(fields),
            Some(other) => {
                Err(fields.invalid("quant_method", &Value::from(other), "\"compressed-tensors\" or \"awq\""))
            }
            None => Err(fields.missing("quant_method", "\"compressed-tensors\" or \"awq\"")),
        }
    }

    /// What the config says about `module` (a full name without `.weight`). `linear`: whether transformers
    /// implements it as a `Linear`, which class targets select; the router of a sparse layer, for one, is
    /// not.
    pub fn expectation(&self, module: &str, linear: bool) -> Expectation {
        match self.method {
            QuantizationMethod::CompressedTensors => self.expect_compressed_tensors(module, linear),
            QuantizationMethod::AutoAwq => self.expect_auto_awq(module, linear),
        }
    }

    fn expect_compressed_tensors(&self, module: &str, linear: bool) -> Expectation {
        if self.ignore.names(module) || (linear && self.ignore.linear_class) {
            return Expectation::Dense;
        }
        // A name is more specific than a class, whichever group comes first.
        if let Some(group) = self.groups.iter().find(|g| g.targets.names(module)) {
            return Expectation::Int4(group.scheme);
        }
        match self.groups.iter().find(|g| g.targets.linear_class) {
            Some(group) if linear => Expectation::Int4(group.scheme),
            Some(group) => Expectation::Either(group.scheme),
            None => Expectation::Dense,
        }
    }

    /// Readers match `modules_to_not_convert` as a substring or by whole dotted components; where these
    /// differ (`mlp.gate` in `mlp.gate_proj`) nothing is asserted.
    fn expect_auto_awq(&self, module: &str, linear: bool) -> Expectation {
        let Some(Group { scheme, .. }) = self.groups.first() else { return Expectation::Dense };
        let dotted = format!(".{module}.");
        if self.ignore.exact.iter().any(|entry| dotted.contains(&format!(".{entry}."))) {
            Expectation::Dense
        } else if !linear || self.ignore.exact.iter().any(|entry| module.contains(entry.as_str())) {
            Expectation::Either(*scheme)
        } else {
            Expectation::Int4(*scheme)
        }
    }
}

fn compressed_tensors(fields: Fields<'_>) -> Result<QuantizationConfig, ConfigError> {
    let format = fields.string("format")?;
    refuse_filled(fields, "kv_cache_scheme")?;
    refuse_filled(fields, "transform_config")?;
    if let Some(sparsity) = fields.object("sparsity_config")? {
        Fields::new(sparsity, "quantization_config.sparsity_config").only("format", "dense")?;
    }
    let Some(config_groups) = fields.object("config_groups")? else {
        return Err(fields.missing("config_groups", "an object of schemes"));
    };
    let mut groups = Vec::new();
    for (name, value) in config_groups {
        let path = format!("{}.{name}", fields.name("config_groups"));
        let Value::Object(group) = value else {
            return Err(Fields::new(config_groups, &fields.name("config_groups")).invalid(
                name,
                value,
                "an object",
            ));
        };
        groups.push(compressed_tensors_group(Fields::new(group, &path), format)?);
    }
    let ignore = ModuleNames::parse(fields, "ignore", &fields.strings("ignore")?.unwrap_or_default())?;
    Ok(QuantizationConfig { method: QuantizationMethod::CompressedTensors, groups, ignore })
}

fn compressed_tensors_group(fields: Fields<'_>, outer_format: Option<&str>) -> Result<Group, ConfigError> {
    const FORMAT: &str = "pack-quantized";
    match fields.string("format")?.or(outer_format) {
        Some(FORMAT) => {}
        Some(other) => return Err(fields.invalid("format", &Value::from(other), format!("\"{FORMAT}\""))),
        None => return Err(fields.missing("format", format!("\"{FORMAT}\""))),
    }
    refuse_filled(fields, "input_activations")?;
    refuse_filled(fields, "output_activations")?;
    let targets = fields.strings("targets")?.ok_or_else(|| fields.missing("targets", "a list of names"))?;
    let targets = ModuleNames::parse(fields, "targets", &targets)?;

    let Some(weights) = fields.object("weights")? else {
        return Err(fields.missing("weights", "the scheme of the weights"));
    };
    let path = fields.name("weights");
    let weights = Fields::new(weights, &path);
    weights.only("num_bits", 4)?;
    weights.only("type", "int")?;
    weights.only("dynamic", false)?;
    if weights.value("num_bits").is_none() {
        return Err(weights.missing("num_bits", "4"));
    }
    let group_size = group_size(weights, "group_size")?;
    let group_size = match (weights.string("strategy")?, group_size) {
        (Some("group") | None, Some(size)) => Some(size),
        (Some("channel") | None, None) => None,
        (Some("group"), None) => {
            return Err(weights.missing("group_size", "a positive integer: the strategy is `group`"));
        }
        (Some("channel"), Some(size)) => {
            return Err(ConfigError::Contradiction {
                field: weights.name("group_size"),
                found: size.to_string(),
                other: "the strategy `channel`".to_owned(),
                expected: "null".to_owned(),
            });
        }
        (Some(other), _) => {
            return Err(weights.invalid("strategy", &Value::from(other), "\"group\" or \"channel\""));
        }
    };
    Ok(Group { targets, scheme: Int4Scheme { group_size, symmetric: weights.boolean("symmetric", true)? } })
}

fn auto_awq(fields: Fields<'_>) -> Result<QuantizationConfig, ConfigError> {
    let bits = if fields.value("w_bit").is_some() { "w_bit" } else { "bits" };
    fields.only(bits, 4)?;
    if fields.value(bits).is_none() {
        return Err(fields.missing("bits", "4"));
    }
    if let Some(version) = fields.string("version")?
        && !version.eq_ignore_ascii_case("gemm")
    {
        return Err(fields.invalid(
            "version",
            &Value::from(version),
            "\"gemm\", the only layout that is read",
        ));
    }
    fields.only("zero_point", true)?;
    let size_field = if fields.value("q_group_size").is_some() { "q_group_size" } else { "group_size" };
    if fields.value(size_field).is_none() {
        return Err(fields.missing("group_size", "a positive integer, or -1 for one scale a row"));
    }
    let scheme = Int4Scheme { group_size: group_size(fields, size_field)?, symmetric: false };
    let skipped = fields.strings("modules_to_not_convert")?.unwrap_or_default();
    let mut ignore = ModuleNames::default();
    ignore.exact.extend(skipped.into_iter().map(str::to_owned));
    let groups = vec![Group { targets: ModuleNames::default(), scheme }];
    Ok(QuantizationConfig { method: QuantizationMethod::AutoAwq, groups, ignore })
}

/// A positive integer; null and -1 mean one group a row.
fn group_size(fields: Fields<'_>, field: &str) -> Result<Option<usize>, ConfigError> {
    match fields.value(field) {
        Some(value) if value.as_i64() == Some(-1) => Ok(None),
        _ => fields.size(field),
    }
}

/// Refuses anything but null and an empty object.
fn refuse_filled(fields: Fields<'_>, field: &str) -> Result<(), ConfigError> {
    match fields.value(field) {
        Some(Value::Object(object)) if object.is_empty() => Ok(()),
        Some(other) => Err(fields.invalid(field, other, "null: only weights may be quantised")),
        None => Ok(()),
    }
}

/// A list of module names as compressed-tensors writes it: exact names, `re:` patterns anchored at the start,
/// classes.
#[derive(Debug, Clone)]
struct ModuleNames {
    exact: BTreeSet<String>,
    patterns: RegexSet,
    linear_class: bool,
}

impl Default for ModuleNames {
    fn default() -> Self {
        Self { exact: BTreeSet::new(), patterns: RegexSet::empty(), linear_class: false }
    }
}

impl PartialEq for ModuleNames {
    fn eq(&self, other: &Self) -> bool {
        self.exact == other.exact
            && self.patterns.patterns() == other.patterns.patterns()
            && self.linear_class == other.linear_class
    }
}

impl ModuleNames {
    fn parse(fields: Fields<'_>, field: &str, entries: &[&str]) -> Result<Self, ConfigError> {
        let mut exact = BTreeSet::new();
        let mut patterns = Vec::new();
        let mut linear_class = false;
        for &entry in entries {
            match entry.strip_prefix("re:") {
                // Python's `re.match`: anchored at the start only.
                Some(pattern) => patterns.push(format!("^(?:{pattern})")),
                None if entry == "Linear" => linear_class = true,
                None => _ = exact.insert(entry.to_owned()),
            }
        }
        let patterns = RegexSet::new(&patterns).map_err(|e| ConfigError::Invalid {
            field: fields.name(field),
            found: e.to_string(),
            expected: "`re:` patterns without look-around and back-references".to_owned(),
        })?;
        Ok(Self { exact, patterns, linear_class })
    }

    /// Whether `module` itself is named.
    fn names(&self, module: &str) -> bool {
        self.exact.contains(module) || self.patterns.is_match(module)
    }
}
