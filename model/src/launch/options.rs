//! Where and how a model is launched.

use std::str::FromStr;
use std::time::Duration;

use dsa80_reference::DType;

/// Where the model runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// A GPU where there is one that the kernels run on, CUDA's before those in WGSL, else the CPU.
    #[default]
    Auto,
    /// The oracle in f32.
    Cpu,
    /// WGSL shaders.
    Wgpu,
    /// Hand-written CUDA kernels.
    Cuda,
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "wgpu" => Ok(Device::Wgpu),
            "cuda" => Ok(Device::Cuda),
            _ => Err(format!("unknown device `{name}`; expected auto, cpu, wgpu or cuda")),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Device::Auto => "auto",
            Device::Cpu => "cpu",
            Device::Wgpu => "wgpu",
            Device::Cuda => "cuda",
        })
    }
}

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// As the checkpoint's folder has them: safetensors.
    #[default]
    Auto,
    /// Safetensors, one file or shards with an index.
    Safetensors,
    /// Random numbers in the shapes and formats that config.json describes: no weights file is opened.
    Dummy,
}

impl FromStr for LoadFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(LoadFormat::Auto),
            "safetensors" => Ok(LoadFormat::Safetensors),
            "dummy" => Ok(LoadFormat::Dummy),
            _ => Err(format!("unknown load format `{name}`; expected auto, safetensors or dummy")),
        }
    }
}

impl std::fmt::Display for LoadFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LoadFormat::Auto => "auto",
            LoadFormat::Safetensors => "safetensors",
            LoadFormat::Dummy => "dummy",
        })
    }
}

/// What activations are, and caches that are not of 8 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dtype {
    /// bf16 on a GPU, f32 on the CPU.
    #[default]
    Auto,
    /// bf16, on a GPU: rounded where the contract says so.
    Bf16,
    /// f32, on the CPU or with the kernels in WGSL: never rounded to bf16.
    F32,
}

impl FromStr for Dtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Dtype::Auto),
            "bf16" | "bfloat16" => Ok(Dtype::Bf16),
            "f32" | "float32" => Ok(Dtype::F32),
            _ => Err(format!("unknown type `{name}`; expected auto, bf16 or f32")),
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::Auto => "auto",
            Dtype::Bf16 => "bf16",
            Dtype::F32 => "f32",
        })
    }
}

/// What the caches are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvCacheDtype {
    /// What the backend computes in: [`Dtype`].
    #[default]
    Auto,
    /// bf16, on a GPU that computes in it.
    Bf16,
    /// 8 bits with scales: a little over half of bf16's memory.
    Fp8,
}

impl KvCacheDtype {
    /// The element type of the caches.
    pub(super) fn dtype(self) -> DType {
        if self == KvCacheDtype::Fp8 { DType::Fp8 } else { DType::Act }
    }
}

impl FromStr for KvCacheDtype {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(KvCacheDtype::Auto),
            "bf16" | "bfloat16" => Ok(KvCacheDtype::Bf16),
            "fp8" | "fp8_e4m3" => Ok(KvCacheDtype::Fp8),
            _ => Err(format!("unknown cache type `{name}`; expected auto, bf16 or fp8")),
        }
    }
}

impl std::fmt::Display for KvCacheDtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            KvCacheDtype::Auto => "auto",
            KvCacheDtype::Bf16 => "bf16",
            KvCacheDtype::Fp8 => "fp8",
        })
    }
}

/// What sums over the ranks of GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Collectives {
    /// Our own kernels between the GPUs of one process, NCCL between processes.
    #[default]
    Auto,
    /// Our own kernels, which reach into the other GPUs' memory: in one process.
    Peer,
    /// NVIDIA's library.
    Nccl,
}

impl FromStr for Collectives {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Collectives::Auto),
            "peer" => Ok(Collectives::Peer),
            "nccl" => Ok(Collectives::Nccl),
            _ => Err(format!("unknown collectives `{name}`; expected auto, peer or nccl")),
        }
    }
}

impl std::fmt::Display for Collectives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Collectives::Auto => "auto",
            Collectives::Peer => "peer",
            Collectives::Nccl => "nccl",
        })
    }
}

/// How a model is launched.
#[derive(Debug, Clone, PartialEq)]
pub struct LaunchOptions {
    /// Where it runs.
    pub device: Device,
    /// Tensor-parallel ranks.
    pub tp: usize,
    /// What activations are.
    pub dtype: Dtype,
    /// The longest context served; by default the config's `max_position_embeddings`, or what the cache
    /// memory holds if that is less.
    pub max_model_len: Option<usize>,
    /// Sequences in a step at most.
    pub max_num_seqs: usize,
    /// Tokens in a step at most: the chunk that a prompt is cut into.
    pub max_num_batched_tokens: usize,
    /// Tokens a page of the caches holds.
    pub page_size: usize,
    /// Pages of the caches; by default what `max_num_seqs` full contexts need, within `kv_cache_bytes`.
    pub num_pages: Option<usize>,
    /// Memory for the caches of all ranks, in bytes, where `num_pages` is not given; by default 256 MiB in host memory, and on a GPU
    /// what weights and workspace leave of `gpu_memory_utilization`.
    pub kv_cache_bytes: Option<usize>,
    /// What the caches are stored in.
    pub kv_cache_dtype: KvCacheDtype,
    /// The share of a GPU's memory that is used, with everything that is on it already; above 0, at most 1.
    pub gpu_memory_utilization: f64,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Reuse the cache rows of equal prompt beginnings.
    pub enable_prefix_caching: bool,
    /// On a GPU, record decode steps as CUDA graphs when the model is launched, and replay those.
    pub cuda_graphs: bool,
    /// What sums over the ranks of GPUs.
    pub collectives: Collectives,
    /// A step that takes longer stops the engine, and with it all ranks.
    pub step_timeout: Duration,
    /// How long the ranks of several processes wait for each other at the start.
    pub join_timeout: Duration,
    /// How long a start goes on in which no rank gets on: reads or copies no piece of the weights, and ends no first step.
    pub start_timeout: Duration,
}

impl Default for LaunchOptions {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            tp: 1,
            dtype: Dtype::Auto,
            max_model_len: None,
            max_num_seqs: 32,
            max_num_batched_tokens: 512,
            page_size: 64,
            num_pages: None,
            kv_cache_bytes: None,
            kv_cache_dtype: KvCacheDtype::Auto,
            gpu_memory_utilization: 0.9,
            max_waiting: 256,
            enable_prefix_caching: true,
            cuda_graphs: true,
            collectives: Collectives::Auto,
            step_timeout: Duration::from_secs(120),
            join_timeout: Duration::from_secs(300),
            // Longer than a first step compiles.
            start_timeout: Duration::from_secs(600),
        }
    }
}
