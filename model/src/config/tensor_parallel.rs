//! Which tensor-parallel degrees divide a model.

use super::{ConfigError, Expectation, MlpLayerType, ModelConfig};

/// Words of packed weights hold this many columns; a shard cannot start inside one.
const COLUMNS_PER_WORD: usize = 8;

/// Something of which every rank takes an equal part, in whole multiples of `unit`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Divided {
    what: String,
    size: usize,
    unit: usize,
}

impl Divided {
    fn refusal(&self, world_size: usize) -> Option<String> {
        let Self { what, size, unit } = self;
        if world_size == 0 || !size.is_multiple_of(world_size) {
            return Some(format!("{what} = {size} is not a multiple of {world_size}"));
        }
        let shard = size / world_size;
        // A single rank takes everything, padding included.
        (world_size > 1 && !shard.is_multiple_of(*unit)).then(|| {
            format!(
                "{what} = {size} gives shards of {shard}, which is not a multiple of {unit} (quantisation \
                 groups and packed words must stay whole)"
            )
        })
    }
}

impl ModelConfig {
    /// Checks that `world_size` ranks can share this model: heads, vocabulary and intermediate sizes divide,
    /// and no shard of a packed layer's columns cuts a quantisation group or a packed word.
    ///
    /// # Errors
    /// [`ConfigError::TensorParallel`] says what does not divide and lists the degrees that would.
    pub fn check_tp(&self, world_size: usize) -> Result<(), ConfigError> {
        let divided = self.divided();
        match divided.iter().find_map(|d| d.refusal(world_size)) {
            None => Ok(()),
            Some(reason) => {
                let valid = self.valid_degrees(&divided);
                Err(ConfigError::TensorParallel { world_size, reason, valid })
            }
        }
    }

    /// All degrees that [`check_tp`](Self::check_tp) accepts, ascending; 1 is always among them.
    pub fn valid_tp(&self) -> Vec<usize> {
        self.valid_degrees(&self.divided())
    }

    fn valid_degrees(&self, divided: &[Divided]) -> Vec<usize> {
        let possible = (1..=self.num_attention_heads).filter(|n| self.num_attention_heads.is_multiple_of(*n));
        possible.filter(|&n| divided.iter().all(|d| d.refusal(n).is_none())).collect()
    }

    fn divided(&self) -> Vec<Divided> {
        let mut all = Vec::new();
        let mut add = |what: &str, size: usize, unit: usize| {
            let divided = Divided { what: what.to_owned(), size, unit };
            if !all.contains(&divided) {
                all.push(divided);
            }
        };
        add("`num_attention_heads`", self.num_attention_heads, 1);
        add("`vocab_size`", self.vocab_size, 1);
        for kind in &self.mlp_layer_types {
            match kind {
                MlpLayerType::Dense => add("`intermediate_size`", self.intermediate_size, 1),
                MlpLayerType::Sparse => add("`moe_intermediate_size`", self.moe_intermediate_size, 1),
            }
        }
        if self.quantization.is_none() {
            return all;
        }

        let heads = self.num_attention_heads * self.v_head_dim;
        for (layer, kind) in self.mlp_layer_types.iter().enumerate() {
            let prefix = format!("model.layers.{layer}");
            let mut columns = |what: &str, module: String, size: usize| {
                if let Some(unit) = self.column_unit(&module, size) {
                    add(what, size, unit);
                }
            };
            columns("`num_attention_heads` * `v_head_dim`", format!("{prefix}.self_attn.o_proj"), heads);
            match kind {
                MlpLayerType::Dense => {
                    columns("`intermediate_size`", format!("{prefix}.mlp.down_proj"), self.intermediate_size);
                }
                MlpLayerType::Sparse => {
                    for expert in 0..self.n_routed_experts {
                        let module = format!("{prefix}.mlp.experts.{expert}.down_proj");
                        columns("`moe_intermediate_size`", module, self.moe_intermediate_size);
                    }
                    if self.n_shared_experts > 0 {
                        let module = format!("{prefix}.mlp.shared_experts.down_proj");
                        let size = self.shared_intermediate_size();
                        columns("`moe_intermediate_size` * `n_shared_experts`", module, size);
                    }
                }
            }
        }
        all
    }

    /// Columns that must stay together in a packed layer; `None` for a dense one.
    fn column_unit(&self, module: &str, in_features: usize) -> Option<usize> {
        let scheme = match self.quantization.as_ref()?.expectation(module, true) {
            Expectation::Dense => return None,
            Expectation::Int4(scheme) | Expectation::Either(scheme) => scheme,
        };
        // One scale a row belongs to every shard of it.
        let group = scheme.group_size.filter(|&g| g < in_features).unwrap_or(1);
        Some(lcm(group, COLUMNS_PER_WORD))
    }
}

fn lcm(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}
