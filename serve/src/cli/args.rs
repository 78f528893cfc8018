//! Options that `serve`, `generate` and `eval` share.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, ValueEnum};
use dsa80_model::distributed::Place;
use dsa80_model::launch::{Collectives, Device, Dtype, KvCacheDtype, LaunchOptions, LoadFormat};

use super::size;

/// Which model to run, and how.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// The checkpoint's folder; without it, the small model inside this binary.
    #[arg(long, value_name = "DIR", env = "DSA80_MODEL")]
    pub(super) model: Option<PathBuf>,

    /// Where to run it: auto (cuda, else a GPU by wgpu, else the CPU, and says why), cpu, wgpu (Vulkan, Metal or DX12; an adapter of several
    /// by a part of its name in DSA80_WGPU_ADAPTER) or cuda.
    #[arg(long, default_value = "auto")]
    pub(super) device: Device,

    /// Tensor-parallel ranks; by default 1, or as many as a launcher has started (WORLD_SIZE).
    #[arg(long, value_name = "N", visible_alias = "tensor-parallel-size")]
    tp: Option<usize>,

    /// What activations, and caches of them, are: auto (bf16 on a GPU, f32 on the CPU), bf16, or f32 (on the CPU, or with --device wgpu: not
    /// rounded to bf16 anywhere, in twice the memory).
    #[arg(long, default_value = "auto")]
    dtype: Dtype,

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

    /// What the caches are stored in: auto (what --dtype is), bf16 or fp8.
    #[arg(long, default_value = "auto")]
    pub(super) kv_cache_dtype: KvCacheDtype,

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

    /// What sums over the ranks of GPUs: auto (the kernels of dsa80 in one process, NCCL between several), peer or nccl.
    #[arg(long, default_value = "auto")]
    collectives: Collectives,

    /// Seconds that a step may take: a rank that hangs stops all of them then, with an error to every request.
    #[arg(long, value_name = "SECONDS", default_value_t = 120, value_parser = clap::value_parser!(u64).range(1..=YEAR))]
    step_timeout: u64,

    /// Seconds that the ranks of several processes wait for each other at the start.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=YEAR))]
    join_timeout: u64,

    /// Seconds that a start may go without any rank getting on (reading a piece of the weights, ending a first step): then it ends with the
    /// reason. A slow one that gets on may take any time.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=YEAR))]
    start_timeout: u64,
}

/// Seconds of the longest wait that can be asked for.
pub(super) const YEAR: u64 = 31_536_000;

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
            tp: self.tp.unwrap_or(default.tp),
            dtype: self.dtype,
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
            collectives: self.collectives,
            step_timeout: Duration::from_secs(self.step_timeout),
            join_timeout: Duration::from_secs(self.join_timeout),
            start_timeout: Duration::from_secs(self.start_timeout),
        }
    }

    /// [`launch_options`](Self::launch_options) of a rank of several processes, if this is one: of as many as the launcher says.
    pub(super) fn launch_options_at(&self, place: Option<&Place>) -> anyhow::Result<LaunchOptions> {
        let options = self.launch_options();
        let Some(place) = place else { return Ok(options) };
        match self.tp {
            Some(tp) if tp != place.world_size => {
                bail!(
                    "--tp is {tp}, but WORLD_SIZE is {}: leave --tp out, or start {tp} ranks",
                    place.world_size
                )
            }
            _ => Ok(LaunchOptions { tp: place.world_size, ..options }),
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

    #[test]
    fn activations_have_the_type_that_is_asked_for() {
        let dtype = |args: &[&str]| {
            let cli = Cli::try_parse_from([&["dsa80"], args].concat()).map_err(|error| error.to_string())?;
            Ok::<_, String>(cli.model.launch_options().dtype)
        };
        let f32 = || Ok(Dtype::F32);
        assert_eq!((dtype(&[]), dtype(&["--dtype", "bfloat16"])), (Ok(Dtype::Auto), Ok(Dtype::Bf16)));
        assert_eq!((dtype(&["--dtype", "f32"]), dtype(&["--dtype", "float32"])), (f32(), f32()));
        let error = dtype(&["--dtype", "f16"]).unwrap_err();
        assert!(error.contains("unknown type `f16`; expected auto, bf16 or f32"), "{error}");
    }

    #[test]
    fn a_launcher_says_how_many_ranks_there_are() {
        let place = Place { rank: 1, world_size: 4, local_rank: 1, master: "node0".into(), port: 29500 };
        let options = |args: &[&str]| {
            let cli = Cli::try_parse_from([&["dsa80"], args].concat()).unwrap();
            cli.model.launch_options_at(Some(&place)).map_err(|error| error.to_string())
        };
        assert_eq!(options(&[]).unwrap().tp, 4);
        assert_eq!(options(&["--tp", "4"]).unwrap().tp, 4);
        assert!(options(&["--tp", "2"]).unwrap_err().contains("--tp is 2, but WORLD_SIZE is 4"));
    }
}
