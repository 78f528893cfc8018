//! Every kernel that has tiles, for what treats them alike: tile files, the compile check, sweeps.

use dsa80_reference::{Result, RopeLayout};

use crate::absorb::{self, AbsorbTile, AbsorbTokens};
use crate::all_reduce::{self, AllReduceTile, Shots};
use crate::all_reduce_norm::{self, AllReduceNormDims, AllReduceNormTile};
use crate::device::{Limits, ProgramEntry};
use crate::embed::{self, EmbedDims, EmbedTile};
use crate::expanded_mla::{self, ExpandedMlaDims, ExpandedMlaTile};
use crate::indexer_logits::{self, IndexerLogitsDims, IndexerLogitsTile};
use crate::latent_rope::{self, LatentRopeDims, LatentRopeTile};
use crate::layer_norm_rope::{self, LayerNormRopeDims, LayerNormRopeTile};
use crate::linear::LinearTokens;
use crate::linear_few::{self, LinearFewSize, LinearFewTile};
use crate::linear_int4::{self, LinearInt4Tile, LinearInt4Tokens};
use crate::linear_int4_wide::{self, LinearInt4WideTile};
use crate::linear_many::{self, LinearTile};
use crate::moe_int4::{self, MoeInt4Dims, MoeInt4Tile, MoeLoad};
use crate::moe_int4_pairs::{self, MoeInt4PairsTile};
use crate::qkv_norm_rope::{self, QkvNormRopeDims, QkvNormRopeTile};
use crate::repack_int4::{self, RepackInt4Tile};
use crate::rms_norm::{self, RmsNormDims, RmsNormTile};
use crate::rope::{self, RopeDims, RopeTile};
use crate::rope_table::{self, RopeTableTile};
use crate::router::{self, RouterDims, RouterTile};
use crate::sample::{self, SampleTile};
use crate::silu_mul::{self, SiluMulTile};
use crate::sparse_mla::{self, SparseMlaDims, SparseMlaTile};
use crate::sparse_mla_union::{self, SparseMlaUnionTile};
use crate::sparse_mla_wide::{self, SparseMlaWideTile};
use crate::tile::Tile;
use crate::top_k::{self, TopKRows, TopKTile};

/// A tile that tile files can hold.
pub trait PinnedTile: Tile {
    /// The classes of shapes that have a tile of their own.
    const CLASSES: &'static [&'static str];

    /// GLM-5.2's dims, as a class has them.
    fn glm_dims(class: &str) -> Self::Dims;

    /// Every program that the launcher may launch with this tile.
    fn programs(&self, dims: Self::Dims) -> Vec<ProgramEntry>;
}

impl PinnedTile for EmbedTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> EmbedDims {
        EmbedDims { width: 6144 }
    }

    fn programs(&self, dims: EmbedDims) -> Vec<ProgramEntry> {
        embed::programs(self, dims)
    }
}

impl PinnedTile for RopeTableTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) {}

    fn programs(&self, (): ()) -> Vec<ProgramEntry> {
        rope_table::programs(self)
    }
}

impl PinnedTile for RmsNormTile {
    const CLASSES: &'static [&'static str] = &["few", "many"];

    fn glm_dims(_class: &str) -> RmsNormDims {
        RmsNormDims { width: 6144 }
    }

    fn programs(&self, dims: RmsNormDims) -> Vec<ProgramEntry> {
        rms_norm::programs(self, dims)
    }
}

impl PinnedTile for RopeTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> RopeDims {
        RopeDims { heads: 8, width: 256, offset: 192, rope: 64, layout: RopeLayout::Interleaved }
    }

    fn programs(&self, dims: RopeDims) -> Vec<ProgramEntry> {
        rope::programs(self, dims)
    }
}

impl PinnedTile for RouterTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> RouterDims {
        RouterDims { experts: 256, groups: 1 }
    }

    fn programs(&self, dims: RouterDims) -> Vec<ProgramEntry> {
        router::programs(self, dims)
    }
}

impl PinnedTile for SampleTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) {}

    fn programs(&self, (): ()) -> Vec<ProgramEntry> {
        sample::programs(self)
    }
}

impl PinnedTile for SiluMulTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) {}

    fn programs(&self, (): ()) -> Vec<ProgramEntry> {
        silu_mul::programs(self)
    }
}

impl PinnedTile for LayerNormRopeTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> LayerNormRopeDims {
        LayerNormRopeDims { width: 128, rope: 64 }
    }

    fn programs(&self, dims: LayerNormRopeDims) -> Vec<ProgramEntry> {
        layer_norm_rope::programs(self, dims)
    }
}

impl PinnedTile for QkvNormRopeTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(class: &str) -> QkvNormRopeDims {
        let key = LayerNormRopeTile::glm_dims(class).width;
        QkvNormRopeDims { q_lora_rank: 2048, latent: LatentRopeTile::glm_dims(class), key: Some(key) }
    }

    fn programs(&self, dims: QkvNormRopeDims) -> Vec<ProgramEntry> {
        qkv_norm_rope::programs(self, dims)
    }
}

impl PinnedTile for LatentRopeTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> LatentRopeDims {
        LatentRopeDims { kv_lora_rank: 512, rope: 64 }
    }

    fn programs(&self, dims: LatentRopeDims) -> Vec<ProgramEntry> {
        latent_rope::programs(self, dims)
    }
}

impl PinnedTile for IndexerLogitsTile {
    const CLASSES: &'static [&'static str] = &["decode_bf16", "decode_fp8", "prefill_bf16", "prefill_fp8"];

    fn glm_dims(_class: &str) -> IndexerLogitsDims {
        IndexerLogitsDims { heads: 32, dims: 128 }
    }

    fn programs(&self, dims: IndexerLogitsDims) -> Vec<ProgramEntry> {
        indexer_logits::programs(self, dims)
    }
}

impl PinnedTile for TopKTile {
    const CLASSES: &'static [&'static str] = &["few", "many"];

    fn glm_dims(class: &str) -> TopKRows {
        if class == "few" { TopKRows::Few } else { TopKRows::Many }
    }

    fn programs(&self, _rows: TopKRows) -> Vec<ProgramEntry> {
        top_k::programs(self)
    }
}

impl PinnedTile for SparseMlaTile {
    const CLASSES: &'static [&'static str] = &["decode", "prefill"];

    fn glm_dims(_class: &str) -> SparseMlaDims {
        SparseMlaDims { kv_lora_rank: 512, rope: 64 }
    }

    fn programs(&self, dims: SparseMlaDims) -> Vec<ProgramEntry> {
        sparse_mla::programs(self, dims)
    }
}

impl PinnedTile for SparseMlaWideTile {
    const CLASSES: &'static [&'static str] = &["decode", "prefill"];

    fn glm_dims(_class: &str) -> SparseMlaDims {
        SparseMlaDims { kv_lora_rank: 512, rope: 64 }
    }

    fn programs(&self, dims: SparseMlaDims) -> Vec<ProgramEntry> {
        sparse_mla_wide::programs(self, dims)
    }
}

impl PinnedTile for SparseMlaUnionTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) {}

    fn programs(&self, (): ()) -> Vec<ProgramEntry> {
        sparse_mla_union::programs(self)
    }
}

impl PinnedTile for ExpandedMlaTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> ExpandedMlaDims {
        ExpandedMlaDims { nope: 192, rope: 64, v: 256, kv_lora_rank: 512 }
    }

    fn programs(&self, dims: ExpandedMlaDims) -> Vec<ProgramEntry> {
        expanded_mla::programs(self, dims)
    }
}

impl PinnedTile for LinearFewTile {
    const CLASSES: &'static [&'static str] = linear_few::CLASSES;

    fn glm_dims(class: &str) -> LinearFewSize {
        LinearFewSize::named(class)
    }

    fn programs(&self, size: LinearFewSize) -> Vec<ProgramEntry> {
        linear_few::programs(self, size)
    }
}

impl PinnedTile for LinearTile {
    const CLASSES: &'static [&'static str] = &["middle", "many"];

    fn glm_dims(class: &str) -> LinearTokens {
        LinearTokens::named(class)
    }

    fn programs(&self, _tokens: LinearTokens) -> Vec<ProgramEntry> {
        linear_many::programs(self)
    }
}

impl PinnedTile for AbsorbTile {
    const CLASSES: &'static [&'static str] = &["few", "many"];

    fn glm_dims(class: &str) -> AbsorbTokens {
        if class == "few" { AbsorbTokens::Few } else { AbsorbTokens::Many }
    }

    fn programs(&self, _tokens: AbsorbTokens) -> Vec<ProgramEntry> {
        absorb::programs(self)
    }
}

impl PinnedTile for RepackInt4Tile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) {}

    fn programs(&self, (): ()) -> Vec<ProgramEntry> {
        repack_int4::programs(self)
    }
}

impl PinnedTile for LinearInt4Tile {
    const CLASSES: &'static [&'static str] = &["tokens_8", "tokens_16", "tokens_32"];

    fn glm_dims(class: &str) -> LinearInt4Tokens {
        match class {
            "tokens_8" => LinearInt4Tokens::UpTo8,
            "tokens_16" => LinearInt4Tokens::UpTo16,
            _ => LinearInt4Tokens::UpTo32,
        }
    }

    fn programs(&self, _tokens: LinearInt4Tokens) -> Vec<ProgramEntry> {
        linear_int4::programs(self)
    }
}

impl PinnedTile for LinearInt4WideTile {
    const CLASSES: &'static [&'static str] = &["medium", "many"];

    fn glm_dims(_class: &str) {}

    fn programs(&self, (): ()) -> Vec<ProgramEntry> {
        linear_int4_wide::programs(self)
    }
}

impl PinnedTile for MoeInt4Tile {
    const CLASSES: &'static [&'static str] = &["few", "some", "many"];

    fn glm_dims(class: &str) -> MoeInt4Dims {
        MoeInt4Dims::glm(match class {
            "few" => MoeLoad::Few,
            "some" => MoeLoad::Some,
            _ => MoeLoad::Many,
        })
    }

    fn programs(&self, dims: MoeInt4Dims) -> Vec<ProgramEntry> {
        moe_int4::programs(self, dims)
    }
}

impl PinnedTile for MoeInt4PairsTile {
    const CLASSES: &'static [&'static str] = &["any"];

    fn glm_dims(_class: &str) -> MoeInt4Dims {
        MoeInt4Dims::glm(MoeLoad::Few)
    }

    fn programs(&self, dims: MoeInt4Dims) -> Vec<ProgramEntry> {
        moe_int4_pairs::programs(self, dims)
    }
}

impl PinnedTile for AllReduceTile {
    const CLASSES: &'static [&'static str] = &["one_shot", "two_shots"];

    fn glm_dims(class: &str) -> Shots {
        if class == "one_shot" { Shots::One } else { Shots::Two }
    }

    fn programs(&self, shots: Shots) -> Vec<ProgramEntry> {
        all_reduce::programs(self, shots)
    }
}

impl PinnedTile for AllReduceNormTile {
    const CLASSES: &'static [&'static str] = AllReduceTile::CLASSES;

    fn glm_dims(class: &str) -> AllReduceNormDims {
        AllReduceNormDims { width: 6144, shots: AllReduceTile::glm_dims(class) }
    }

    fn programs(&self, dims: AllReduceNormDims) -> Vec<ProgramEntry> {
        all_reduce_norm::programs(self, dims)
    }
}

/// A [`PinnedTile`] without its type: tiles are what a tile file holds.
#[derive(Debug, Clone, Copy)]
pub struct Registered {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Its classes of shapes.
    pub classes: &'static [&'static str],
    safe: fn(&str) -> Result<toml::Table, String>,
    candidates: fn(&str, &Limits) -> Result<Vec<toml::Table>, String>,
    validate: fn(&str, &toml::Table, &Limits) -> Result<(), String>,
    programs: fn(&str, &toml::Table) -> Result<Vec<ProgramEntry>, String>,
}

/// The kernels, in the order of a model's layer.
pub const KERNELS: &[Registered] = &[
    Registered::of::<LinearFewTile>(),
    Registered::of::<LinearTile>(),
    Registered::of::<AbsorbTile>(),
    Registered::of::<EmbedTile>(),
    Registered::of::<RopeTableTile>(),
    Registered::of::<RmsNormTile>(),
    Registered::of::<RopeTile>(),
    Registered::of::<RouterTile>(),
    Registered::of::<SiluMulTile>(),
    Registered::of::<SampleTile>(),
    Registered::of::<LayerNormRopeTile>(),
    Registered::of::<LatentRopeTile>(),
    Registered::of::<QkvNormRopeTile>(),
    Registered::of::<IndexerLogitsTile>(),
    Registered::of::<TopKTile>(),
    Registered::of::<SparseMlaTile>(),
    Registered::of::<SparseMlaWideTile>(),
    Registered::of::<SparseMlaUnionTile>(),
    Registered::of::<ExpandedMlaTile>(),
    Registered::of::<MoeInt4PairsTile>(),
    Registered::of::<MoeInt4Tile>(),
    Registered::of::<RepackInt4Tile>(),
    Registered::of::<LinearInt4Tile>(),
    Registered::of::<LinearInt4WideTile>(),
    Registered::of::<AllReduceTile>(),
    Registered::of::<AllReduceNormTile>(),
];

/// The kernel of that name.
pub fn find(kernel: &str) -> Option<&'static Registered> {
    KERNELS.iter().find(|registered| registered.kernel == kernel)
}

impl Registered {
    const fn of<T: PinnedTile>() -> Self {
        Self {
            kernel: T::KERNEL,
            classes: T::CLASSES,
            safe: |class| to_table(&T::safe(T::glm_dims(class))),
            candidates: |class, limits| {
                T::candidates(T::glm_dims(class), limits).iter().map(to_table).collect()
            },
            validate: |class, tile, limits| {
                let tile: T = from_table(tile)?;
                tile.validate(T::glm_dims(class), limits).map_err(|error| error.to_string())
            },
            programs: |class, tile| {
                let tile: T = from_table(tile)?;
                Ok(tile.programs(T::glm_dims(class)))
            },
        }
    }

    /// The tile that fits any device.
    ///
    /// # Errors
    /// The tile cannot be written as TOML.
    pub fn safe(&self, class: &str) -> Result<toml::Table, String> {
        (self.safe)(class)
    }

    /// The tiles of a sweep.
    ///
    /// # Errors
    /// A tile cannot be written as TOML.
    pub fn candidates(&self, class: &str, limits: &Limits) -> Result<Vec<toml::Table>, String> {
        (self.candidates)(class, limits)
    }

    /// Says why the kernel cannot run with this tile, if it cannot.
    ///
    /// # Errors
    /// The reason.
    pub fn validate(&self, class: &str, tile: &toml::Table, limits: &Limits) -> Result<(), String> {
        (self.validate)(class, tile, limits)
    }

    /// Every program that the launcher may launch with this tile.
    ///
    /// # Errors
    /// It is no tile of this kernel.
    pub fn programs(&self, class: &str, tile: &toml::Table) -> Result<Vec<ProgramEntry>, String> {
        (self.programs)(class, tile)
    }
}

/// A tile as a tile file holds it.
pub(crate) fn to_table<T: Tile>(tile: &T) -> Result<toml::Table, String> {
    toml::Table::try_from(tile).map_err(|error| error.to_string())
}

/// A tile out of a tile file.
///
/// # Errors
/// A key is missing, unknown or of the wrong type.
pub fn from_table<T: Tile>(table: &toml::Table) -> Result<T, String> {
    let tile: T = table.clone().try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
    // Not every tile denies unknown keys itself.
    match to_table(&tile)? {
        known if known == *table => Ok(tile),
        known => Err(format!("it has the keys {}, expected {}", keys(table), keys(&known))),
    }
}

fn keys(table: &toml::Table) -> String {
    let mut all = Vec::new();
    for (key, value) in table {
        match value {
            toml::Value::Table(inner) => all.push(format!("{key} {{ {} }}", keys(inner))),
            _ => all.push(key.clone()),
        }
    }
    all.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_safe_and_every_candidate_tile_fits_and_comes_back_from_toml() {
        let limits = Limits::a100();
        for kernel in KERNELS {
            for class in kernel.classes {
                let candidates = kernel.candidates(class, &limits).unwrap();
                assert!(!candidates.is_empty(), "{} {class} has no candidates", kernel.kernel);
                for tile in candidates.into_iter().chain([kernel.safe(class).unwrap()]) {
                    let text = toml::to_string(&tile).unwrap();
                    let tile: toml::Table = toml::from_str(&text).unwrap();
                    kernel.validate(class, &tile, &limits).unwrap();
                    for entry in kernel.programs(class, &tile).unwrap() {
                        assert!(entry.shared_bytes <= limits.shared_per_block, "{entry:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn names_are_the_sources_names_and_appear_once() {
        for (i, kernel) in KERNELS.iter().enumerate() {
            assert!(KERNELS[..i].iter().all(|other| other.kernel != kernel.kernel));
            assert!(std::ptr::eq(find(kernel.kernel).unwrap(), kernel) || find(kernel.kernel).is_some());
            for class in kernel.classes {
                for entry in kernel.programs(class, &kernel.safe(class).unwrap()).unwrap() {
                    crate::Sources::Embedded.read(entry.program.source).unwrap();
                }
            }
        }
    }
}
