//! Options that `serve` and `generate` share.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use dsa80_model::launch::{Device, KvCacheDtype, LaunchOptions, LoadFormat};

use super::size;

/// Which model to run, and how.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// The checkpoint's folder; without it, the small model inside this binary.
    #[arg(long, value_name = "DIR", env = "DSA80_MODEL")]
    pub(super) model: Option<PathBuf>,

    /// Where to run it: auto (a GPU that the kernels run on, else the CPU, and says why), cpu, wgpu or cuda.
    #[arg(long, default_value = "auto")]
    device: Device,

    /// Tensor-parallel ranks.
    #[arg(long, value_name = "N", default_value_t = 1, visible_alias = "tensor-parallel-size")]
    pub(super) tp: usize,

    /// Where the weights come from: auto or safetensors (the checkpoint's files), or dummy (random numbers, from config.json and the
    /// tokenizer's files alone).
    #[arg(long, default_value = "auto")]
    pub(super) load_format: LoadFormat,

    /// The longest context, prompt and output together; by default what the model was made for, or what the
    /// caches hold.
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<usize>,

    /// Sequences in a step at most.
    #[arg(long, value_name = "N")]
    max_num_seqs: Option<usize>,

    /// Tokens in a step at most: the chunk that long prompts are cut into.
    #[arg(long, value_name = "TOKENS")]
    max_num_batched_tokens: Option<usize>,

    /// Tokens in a page of the caches.
    #[arg(long, value_name = "TOKENS", visible_alias = "block-size")]
    page_size: Option<usize>,

    /// Pages of the caches; instead of --kv-cache-memory.
    #[arg(long, value_name = "N", conflicts_with = "kv_cache_memory")]
    num_pages: Option<usize>,

    /// What the caches are stored in: auto (bf16 on a GPU, f32 on the CPU), bf16 or fp8.
    #[arg(long, default_value = "auto")]
    kv_cache_dtype: KvCacheDtype,

    /// The share of a GPU's memory to use, for weights, workspace and caches together.
    #[arg(long, value_name = "SHARE", default_value_t = 0.9)]
    gpu_memory_utilization: f64,

    /// Memory for the caches of all ranks, such as 512M or 4G; by default 256M, and on a GPU what weights and
    /// workspace leave of --gpu-memory-utilization.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    kv_cache_memory: Option<usize>,

    /// Requests that may wait; more get a 429.
    #[arg(long, value_name = "N")]
    max_queued_requests: Option<usize>,

    /// Do not reuse the cache rows of equal prompt beginnings.
    #[arg(long)]
    no_prefix_caching: bool,

    /// On a GPU: decode steps are recorded as CUDA graphs at the start and replayed (on), or every kernel is launched by itself (off).
    #[arg(long, value_enum, value_name = "on|off", default_value = "on")]
    cuda_graphs: Switch,
}

/// Something that is done or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

impl ModelArgs {
    /// The same for the engine, whose defaults fill what is not given.
    pub(super) fn launch_options(&self) -> LaunchOptions {
        let default = LaunchOptions::default();
        LaunchOptions {
            device: self.device,
            tp: self.tp,
            max_model_len: self.max_model_len,
            max_num_seqs: self.max_num_seqs.unwrap_or(default.max_num_seqs),
            max_num_batched_tokens: self.max_num_batched_tokens.unwrap_or(default.max_num_batched_tokens),
            page_size: self.page_size.unwrap_or(default.page_size),
            num_pages: self.num_pages,
            kv_cache_bytes: self.kv_cache_memory,
            kv_cache_dtype: self.kv_cache_dtype,
            gpu_memory_utilization: self.gpu_memory_utilization,
            max_waiting: self.max_queued_requests.unwrap_or(default.max_waiting),
            enable_prefix_caching: !self.no_prefix_caching,
            cuda_graphs: self.cuda_graphs == Switch::On,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        model: ModelArgs,
    }

    #[test]
    fn graphs_are_on_unless_they_are_switched_off() {
        let parse = |args: &[&str]| Cli::try_parse_from([&["dsa80"], args].concat());
        let graphs = |args: &[&str]| parse(args).unwrap().model.launch_options().cuda_graphs;
        assert!(graphs(&[]) && graphs(&["--cuda-graphs", "on"]) && !graphs(&["--cuda-graphs", "off"]));
        let error = parse(&["--cuda-graphs", "maybe"]).unwrap_err().to_string();
        assert!(error.contains("[possible values: on, off]"), "{error}");
    }
}
