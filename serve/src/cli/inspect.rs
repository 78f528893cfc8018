//! `dsa80 inspect`

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use dsa80_model::checkpoint::{Checkpoint, LinearFormat};
use dsa80_model::config::{ModelConfig, QuantizationMethod};
use dsa80_model::plan::Plan;
use serde_json::{Value as Json, json};

use super::{load, size};

const GIB: f64 = (1_u64 << 30) as f64;

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// The checkpoint's folder, or one with only its config.json; without it, the small model inside this
    /// binary.
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Tensor-parallel ranks to share it.
    #[arg(long, value_name = "N", default_value_t = 1, visible_alias = "tensor-parallel-size")]
    tp: usize,

    /// Memory of a rank, in GiB: the longest context that fits beside the weights is worked out.
    #[arg(long, value_name = "GIB", default_value_t = 80.0)]
    memory: f64,

    /// JSON instead of a table; sizes in bytes.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    if !(args.memory.is_finite() && args.memory > 0.0) {
        bail!("--memory must be a positive number of GiB, found {}", args.memory);
    }
    let report = Report::new(args)?;
    let text =
        if args.json { serde_json::to_string_pretty(&report.json(args))? + "\n" } else { report.table(args) };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// A checkpoint, or what its config says where there are no weights.
struct Report {
    name: String,
    config: ModelConfig,
    plan: Plan,
    checkpoint: Option<Checkpoint>,
}

impl Report {
    fn new(args: &InspectArgs) -> anyhow::Result<Self> {
        if let Some(dir) = args.dir.as_deref().filter(|dir| !has_weights(dir)) {
            let path = dir.join("config.json");
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let config = ModelConfig::from_json(&text).with_context(|| format!("in {}", path.display()))?;
            let plan = Plan::from_config(&config, args.tp)?;
            return Ok(Self { name: dir.display().to_string(), config, plan, checkpoint: None });
        }
        let checkpoint = load::open(args.dir.as_deref())?;
        let plan = Plan::from_checkpoint(&checkpoint, args.tp)?;
        let config = checkpoint.config().clone();
        Ok(Self { name: checkpoint.name().to_owned(), config, plan, checkpoint: Some(checkpoint) })
    }

    fn memory(args: &InspectArgs) -> u64 {
        (args.memory * GIB) as u64
    }

    /// The parts of the weights: name, bytes on a rank, and a module that stands for them.
    fn parts(&self) -> Vec<(&'static str, u64, String)> {
        let weights = &self.plan.weights;
        let layer = |is: &dyn Fn(usize) -> bool| (0..self.config.num_hidden_layers).find(|&layer| is(layer));
        let module = |layer: Option<usize>, name: &str| {
            layer.map_or_else(String::new, |layer| format!("model.layers.{layer}.{name}"))
        };
        let sparse = layer(&|i| self.config.mlp_layer_types[i] == dsa80_model::config::MlpLayerType::Sparse);
        let dense = layer(&|i| self.config.mlp_layer_types[i] == dsa80_model::config::MlpLayerType::Dense);
        vec![
            ("attention", weights.attention, module(Some(0), "self_attn.q_b_proj")),
            ("indexer", weights.indexer, module(Some(0), "self_attn.indexer.wq_b")),
            ("routed_experts", weights.experts, module(sparse, "mlp.experts.0.gate_proj")),
            ("shared_experts", weights.shared_experts, module(sparse, "mlp.shared_experts.gate_proj")),
            ("routers", weights.router, String::new()),
            ("dense_mlp", weights.dense_mlp, module(dense, "mlp.gate_proj")),
            ("embeddings", weights.embeddings, "lm_head".to_owned()),
            ("norms", weights.norms, String::new()),
        ]
    }

    fn stored_as(&self, module: &str) -> Option<String> {
        Some(match self.checkpoint.as_ref()?.linear_format(module)? {
            LinearFormat::Dense(dtype) => format!("{dtype:?}").to_lowercase(),
            LinearFormat::Int4(format) => {
                let method = match format.method {
                    QuantizationMethod::CompressedTensors => "compressed-tensors",
                    QuantizationMethod::AutoAwq => "AutoAWQ",
                };
                let symmetry = if format.symmetric { "symmetric" } else { "asymmetric" };
                format!("int4, groups of {}, {symmetry}, {method}", format.group_size)
            }
        })
    }

    fn json(&self, args: &InspectArgs) -> Json {
        let (config, plan) = (&self.config, &self.plan);
        let memory = Self::memory(args);
        let weights: serde_json::Map<String, Json> =
            self.parts().into_iter().map(|(name, bytes, _)| (name.to_owned(), json!(bytes))).collect();
        let stored: serde_json::Map<String, Json> = self
            .parts()
            .into_iter()
            .filter_map(|(name, _, module)| Some((name.to_owned(), json!(self.stored_as(&module)?))))
            .collect();
        json!({
            "checkpoint": self.name,
            "file_bytes": self.checkpoint.as_ref().map(Checkpoint::file_bytes),
            "stored_as": stored,
            "model": {
                "parameters": plan.parameters.total, "active_parameters": plan.parameters.active,
                "num_hidden_layers": config.num_hidden_layers, "sparse_layers": config.num_sparse_layers(),
                "full_indexer_layers": config.num_full_layers(), "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads, "kv_lora_rank": config.kv_lora_rank,
                "qk_rope_head_dim": config.qk_rope_head_dim, "index_n_heads": config.index_n_heads,
                "index_head_dim": config.index_head_dim, "index_topk": config.index_topk,
                "n_routed_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok,
                "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings,
            },
            "tp": plan.world_size,
            "valid_tp": config.valid_tp(),
            "rank": {
                "weights": weights, "weight_bytes": plan.weights.total(),
                "kv_bytes_per_token": {"mla": plan.kv.mla, "indexer": plan.kv.indexer, "total": plan.kv.total()},
                "memory_bytes": memory, "fits": plan.weights.total() < memory,
                "cache_tokens": plan.cache_tokens(memory), "longest_context": plan.longest_context(memory),
            },
        })
    }

    fn table(&self, args: &InspectArgs) -> String {
        let (config, plan) = (&self.config, &self.plan);
        let mut out = String::new();
        let mut line = |name: &str, text: String| out.push_str(&format!("{name:<18}{text}\n"));
        let files = match &self.checkpoint {
            Some(checkpoint) => format!("{} in weights files, complete", size::show(checkpoint.file_bytes())),
            None => "config.json only: sizes as it describes them".to_owned(),
        };
        line("checkpoint", format!("{} ({files})", self.name));
        line(
            "parameters",
            format!("{}, {} active a token", count(plan.parameters.total), count(plan.parameters.active)),
        );
        let sparse = config.num_sparse_layers();
        line(
            "layers",
            format!(
                "{} ({} dense, {sparse} of {} experts, {} a token)",
                config.num_hidden_layers,
                config.num_hidden_layers - sparse,
                config.n_routed_experts,
                config.num_experts_per_tok
            ),
        );
        line(
            "attention",
            format!(
                "{} heads, cache row {} + {}, hidden {}",
                config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, config.hidden_size
            ),
        );
        line(
            "indexer",
            format!(
                "{} of the layers, {} heads of {}, the best {} keys",
                config.num_full_layers(),
                config.index_n_heads,
                config.index_head_dim,
                config.index_topk
            ),
        );
        line(
            "context",
            format!("{} tokens, vocabulary {}", config.max_position_embeddings, config.vocab_size),
        );
        let degrees: Vec<String> = config.valid_tp().iter().map(usize::to_string).collect();
        line("valid --tp", degrees.join(", "));
        out.push_str(&match plan.world_size {
            1 => "\nMemory of the one rank\n".to_owned(),
            ranks => format!("\nMemory of each of {ranks} ranks\n"),
        });
        for (name, bytes, module) in self.parts().into_iter().filter(|(_, bytes, _)| *bytes > 0) {
            let stored = self.stored_as(&module).unwrap_or_default();
            let row = format!("  {:<16}{:>12}  {stored}", name.replace('_', " "), size::show(bytes));
            out.push_str(row.trim_end());
            out.push('\n');
        }
        out.push_str(&format!("  {:<16}{:>12}\n", "weights", size::show(plan.weights.total())));
        out.push_str(&format!(
            "  {:<16}{:>12}  {} of latent rows, {} of indexer keys, in bf16\n",
            "cache a token",
            size::show(plan.kv.total()),
            size::show(plan.kv.mla),
            size::show(plan.kv.indexer)
        ));
        let memory = Self::memory(args);
        let weights = plan.weights.total();
        out.push_str(&if weights >= memory {
            format!("\n{} GiB do not hold the weights; a rank needs {}.\n", args.memory, size::show(weights))
        } else {
            format!(
                "\nWith {} GiB: {} tokens of cache; the longest context is {} tokens.\n",
                args.memory,
                plan.cache_tokens(memory),
                plan.longest_context(memory)
            )
        });
        out
    }
}

/// Whether the folder holds any safetensors file, or the index of some.
fn has_weights(dir: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(dir) else { return true };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains(".safetensors"))
}

/// `743.2 B`.
fn count(parameters: u64) -> String {
    let parameters = parameters as f64;
    match parameters {
        p if p >= 1e9 => format!("{:.1} B", p / 1e9),
        p if p >= 1e6 => format!("{:.1} M", p / 1e6),
        p => format!("{:.1} k", p / 1e3),
    }
}
