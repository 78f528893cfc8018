//! The kernel sources: embedded in the binary, or read from a folder so that an edit needs no rebuild.

use std::borrow::Cow;
use std::path::PathBuf;

use dsa80_reference::{Error, Result};

/// Every file of `kernels/`, by name.
const EMBEDDED: &[(&str, &str)] = &[
    ("absorb.cu", include_str!("../kernels/absorb.cu")),
    ("absorb_merged.cu", include_str!("../kernels/absorb_merged.cu")),
    ("all_gather.cu", include_str!("../kernels/all_gather.cu")),
    ("all_reduce.cu", include_str!("../kernels/all_reduce.cu")),
    ("all_reduce_norm.cu", include_str!("../kernels/all_reduce_norm.cu")),
    ("bench_fill.cu", include_str!("../kernels/bench_fill.cu")),
    ("ceilings.cu", include_str!("../kernels/ceilings.cu")),
    ("embed.cu", include_str!("../kernels/embed.cu")),
    ("exchange.cuh", include_str!("../kernels/exchange.cuh")),
    ("expanded_mla.cu", include_str!("../kernels/expanded_mla.cu")),
    ("expanded_mla_rows.cu", include_str!("../kernels/expanded_mla_rows.cu")),
    ("fp8.cuh", include_str!("../kernels/fp8.cuh")),
    ("indexer_logits.cu", include_str!("../kernels/indexer_logits.cu")),
    ("indexer_logits.cuh", include_str!("../kernels/indexer_logits.cuh")),
    ("indexer_logits_decode.cu", include_str!("../kernels/indexer_logits_decode.cu")),
    ("int4.cuh", include_str!("../kernels/int4.cuh")),
    ("latent_rope.cu", include_str!("../kernels/latent_rope.cu")),
    ("latent_rope.cuh", include_str!("../kernels/latent_rope.cuh")),
    ("layer_norm_rope.cu", include_str!("../kernels/layer_norm_rope.cu")),
    ("layer_norm_rope.cuh", include_str!("../kernels/layer_norm_rope.cuh")),
    ("linear.cu", include_str!("../kernels/linear.cu")),
    ("linear.cuh", include_str!("../kernels/linear.cuh")),
    ("linear_few.cu", include_str!("../kernels/linear_few.cu")),
    ("linear_tiles.cuh", include_str!("../kernels/linear_tiles.cuh")),
    ("philox.cuh", include_str!("../kernels/philox.cuh")),
    ("linear_int4.cu", include_str!("../kernels/linear_int4.cu")),
    ("linear_int4.cuh", include_str!("../kernels/linear_int4.cuh")),
    ("linear_int4_wide.cu", include_str!("../kernels/linear_int4_wide.cu")),
    ("moe.cu", include_str!("../kernels/moe.cu")),
    ("moe_int4.cu", include_str!("../kernels/moe_int4.cu")),
    ("moe_int4_down.cu", include_str!("../kernels/moe_int4_down.cu")),
    ("moe_next.cuh", include_str!("../kernels/moe_next.cuh")),
    ("moe_parts.cuh", include_str!("../kernels/moe_parts.cuh")),
    ("moe_sort.cu", include_str!("../kernels/moe_sort.cu")),
    ("moe_sum.cu", include_str!("../kernels/moe_sum.cu")),
    ("ptx.cuh", include_str!("../kernels/ptx.cuh")),
    ("random.cuh", include_str!("../kernels/random.cuh")),
    ("random_fill.cu", include_str!("../kernels/random_fill.cu")),
    ("repack_int4.cu", include_str!("../kernels/repack_int4.cu")),
    ("qkv_norm_rope.cu", include_str!("../kernels/qkv_norm_rope.cu")),
    ("rms_norm.cu", include_str!("../kernels/rms_norm.cu")),
    ("rms_norm.cuh", include_str!("../kernels/rms_norm.cuh")),
    ("rope.cu", include_str!("../kernels/rope.cu")),
    ("rope_table.cu", include_str!("../kernels/rope_table.cu")),
    ("router.cu", include_str!("../kernels/router.cu")),
    ("router.cuh", include_str!("../kernels/router.cuh")),
    ("rows.cuh", include_str!("../kernels/rows.cuh")),
    ("silu.cuh", include_str!("../kernels/silu.cuh")),
    ("sample.cu", include_str!("../kernels/sample.cu")),
    ("sample.cuh", include_str!("../kernels/sample.cuh")),
    ("sample_bins.cuh", include_str!("../kernels/sample_bins.cuh")),
    ("sample_filter.cu", include_str!("../kernels/sample_filter.cu")),
    ("sample_pick.cu", include_str!("../kernels/sample_pick.cu")),
    ("silu_mul.cu", include_str!("../kernels/silu_mul.cu")),
    ("sparse_mla.cu", include_str!("../kernels/sparse_mla.cu")),
    ("sparse_mla.cuh", include_str!("../kernels/sparse_mla.cuh")),
    ("sparse_mla_merge.cu", include_str!("../kernels/sparse_mla_merge.cu")),
    ("sparse_mla_union.cu", include_str!("../kernels/sparse_mla_union.cu")),
    ("sparse_mla_wide.cu", include_str!("../kernels/sparse_mla_wide.cu")),
    ("top_k.cu", include_str!("../kernels/top_k.cu")),
    ("top_k_filtered.cu", include_str!("../kernels/top_k_filtered.cu")),
    ("top_k_row.cuh", include_str!("../kernels/top_k_row.cuh")),
    ("top_k_select.cuh", include_str!("../kernels/top_k_select.cuh")),
    ("unstack.cu", include_str!("../kernels/unstack.cu")),
];

/// Where kernel sources come from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Sources {
    /// The binary itself.
    #[default]
    Embedded,
    /// A folder that looks like `cuda/kernels`.
    Folder(PathBuf),
}

impl Sources {
    /// The text of one file.
    ///
    /// # Errors
    /// The file does not exist or cannot be read.
    pub fn read(&self, name: &str) -> Result<Cow<'static, str>> {
        match self {
            Sources::Embedded => EMBEDDED.iter().find(|(file, _)| *file == name).map_or_else(
                || Err(refuse(format!("no kernel source is called {name}"))),
                |(_, text)| Ok(Cow::Borrowed(*text)),
            ),
            Sources::Folder(folder) => {
                let path = folder.join(name);
                std::fs::read_to_string(&path)
                    .map(Cow::Owned)
                    .map_err(|error| refuse(format!("{}: {error}", path.display())))
            }
        }
    }

    /// Every header (`*.cuh`) with its text, in the order of their names: what any source may include.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn headers(&self) -> Result<Vec<(String, Cow<'static, str>)>> {
        let mut names: Vec<String> = match self {
            Sources::Embedded => EMBEDDED.iter().map(|(name, _)| (*name).to_owned()).collect(),
            Sources::Folder(folder) => std::fs::read_dir(folder)
                .map_err(|error| refuse(format!("{}: {error}", folder.display())))?
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
        };
        names.retain(|name| name.ends_with(".cuh"));
        names.sort();
        names.into_iter().map(|name| self.read(&name).map(|text| (name.clone(), text))).collect()
    }
}

fn refuse(message: String) -> Error {
    Error::Backend { backend: "cuda", message }
}
