//! The tile of every launch, by the class and dims of its shape.

use dsa80_reference::RopeLayout;

use super::scratch::Memo;
use crate::absorb::AbsorbTile;
use crate::device::Limits;
use crate::embed::{EmbedDims, EmbedTile};
use crate::expanded_mla::{ExpandedMlaDims, ExpandedMlaTile};
use crate::indexer_logits::{IndexerLogitsDims, IndexerLogitsTile};
use crate::latent_rope::{LatentRopeDims, LatentRopeTile};
use crate::layer_norm_rope::{LayerNormRopeDims, LayerNormRopeTile};
use crate::linear::LinearTiles;
use crate::linear_int4::LinearInt4Tiles;
use crate::moe_int4::{MoeInt4Dims, MoeInt4Tiles};
use crate::qkv_norm_rope::{QkvNormRopeDims, QkvNormRopeTile};
use crate::registry::PinnedTile;
use crate::repack_int4::RepackInt4Tile;
use crate::rms_norm::{RmsNormDims, RmsNormTile};
use crate::rope::{RopeDims, RopeTile};
use crate::rope_table::RopeTableTile;
use crate::router::{RouterDims, RouterTile};
use crate::sample::SampleTile;
use crate::silu_mul::SiluMulTile;
use crate::sparse_mla::{SparseMlaDims, SparseMlaTiles};
use crate::tile::Tile;
use crate::tiles::Tiles;
use crate::top_k::{TopKRows, TopKTile};

/// Looks tiles up, each once.
#[derive(Debug)]
pub(super) struct Chosen {
    tiles: Tiles,
    limits: Limits,
    embed: Looked<EmbedTile>,
    rope_table: Looked<RopeTableTile>,
    rms_norm: Looked<RmsNormTile>,
    rope: Looked<RopeTile>,
    silu_mul: Looked<SiluMulTile>,
    layer_norm_rope: Looked<LayerNormRopeTile>,
    latent_rope: Looked<LatentRopeTile>,
    qkv_norm_rope: Looked<QkvNormRopeTile>,
    indexer_logits: Memo<(IndexerLogitsDims, bool), IndexerLogitsTile>,
    top_k: Looked<TopKTile>,
    sparse_mla: Memo<SparseMlaDims, SparseMlaTiles>,
    expanded_mla: Looked<ExpandedMlaTile>,
    linear: Memo<(), LinearTiles>,
    absorb: Memo<(), AbsorbTile>,
    repack_int4: Looked<RepackInt4Tile>,
    linear_int4: Memo<(), LinearInt4Tiles>,
    moe_int4: Memo<MoeInt4Dims, MoeInt4Tiles>,
    router: Looked<RouterTile>,
    sample: Looked<SampleTile>,
}

type Looked<T> = Memo<(&'static str, <T as Tile>::Dims), T>;

impl Chosen {
    /// `tiles` where they run, safe ones elsewhere.
    pub(super) fn new(tiles: Tiles, limits: Limits) -> Self {
        Self {
            tiles,
            limits,
            embed: Memo::default(),
            rope_table: Memo::default(),
            rms_norm: Memo::default(),
            rope: Memo::default(),
            silu_mul: Memo::default(),
            layer_norm_rope: Memo::default(),
            latent_rope: Memo::default(),
            qkv_norm_rope: Memo::default(),
            indexer_logits: Memo::default(),
            top_k: Memo::default(),
            sparse_mla: Memo::default(),
            expanded_mla: Memo::default(),
            linear: Memo::default(),
            absorb: Memo::default(),
            repack_int4: Memo::default(),
            linear_int4: Memo::default(),
            moe_int4: Memo::default(),
            router: Memo::default(),
            sample: Memo::default(),
        }
    }

    fn look<T: PinnedTile>(&self, looked: &Looked<T>, class: &'static str, dims: T::Dims) -> T {
        looked.get((class, dims), || self.tiles.tile(class, dims, &self.limits))
    }

    pub(super) fn embed(&self, width: usize) -> EmbedTile {
        self.look(&self.embed, "any", EmbedDims { width })
    }

    pub(super) fn rope_table(&self) -> RopeTableTile {
        self.look(&self.rope_table, "any", ())
    }

    pub(super) fn rms_norm(&self, rows: usize, width: usize) -> RmsNormTile {
        self.look(&self.rms_norm, RmsNormTile::class(rows, &self.limits), RmsNormDims { width })
    }

    pub(super) fn rope(
        &self,
        [heads, width]: [usize; 2],
        offset: usize,
        rope: usize,
        layout: RopeLayout,
    ) -> RopeTile {
        self.look(&self.rope, "any", RopeDims { heads, width, offset, rope, layout })
    }

    pub(super) fn silu_mul(&self) -> SiluMulTile {
        self.look(&self.silu_mul, "any", ())
    }

    pub(super) fn layer_norm_rope(&self, width: usize, rope: usize) -> LayerNormRopeTile {
        self.look(&self.layer_norm_rope, "any", LayerNormRopeDims { width, rope })
    }

    pub(super) fn latent_rope(&self, kv_lora_rank: usize, rope: usize) -> LatentRopeTile {
        self.look(&self.latent_rope, "any", LatentRopeDims { kv_lora_rank, rope })
    }

    pub(super) fn qkv_norm_rope(&self, dims: QkvNormRopeDims) -> QkvNormRopeTile {
        self.look(&self.qkv_norm_rope, "any", dims)
    }

    pub(super) fn indexer_logits(&self, heads: usize, dims: usize, fp8: bool) -> IndexerLogitsTile {
        let dims = IndexerLogitsDims { heads, dims };
        self.indexer_logits.get((dims, fp8), || self.tiles.indexer_logits(dims, fp8, &self.limits))
    }

    /// The tile for `rows` rows, and those for any number.
    pub(super) fn top_k(&self, rows: usize) -> (TopKTile, [TopKTile; 2]) {
        let all = [("few", TopKRows::Few), ("many", TopKRows::Many)]
            .map(|(class, dims)| self.look(&self.top_k, class, dims));
        let few = TopKRows::of(rows, &self.limits) == TopKRows::Few;
        (all[usize::from(!few)], all)
    }

    pub(super) fn sparse_mla(&self, dims: SparseMlaDims) -> SparseMlaTiles {
        self.sparse_mla.get(dims, || self.tiles.sparse_mla(dims, &self.limits))
    }

    pub(super) fn expanded_mla(&self, dims: ExpandedMlaDims) -> ExpandedMlaTile {
        self.look(&self.expanded_mla, "any", dims)
    }

    /// The tile, if there is one that runs with these dims.
    pub(super) fn expanded_mla_fits(&self, dims: ExpandedMlaDims) -> bool {
        self.expanded_mla(dims).validate(dims, &self.limits).is_ok()
    }

    pub(super) fn linear(&self) -> LinearTiles {
        self.linear.get((), || self.tiles.linear(&self.limits))
    }

    pub(super) fn absorb(&self) -> AbsorbTile {
        self.absorb.get((), || self.tiles.absorb(&self.limits))
    }

    pub(super) fn repack_int4(&self) -> RepackInt4Tile {
        self.look(&self.repack_int4, "any", ())
    }

    pub(super) fn linear_int4(&self) -> LinearInt4Tiles {
        self.linear_int4.get((), || self.tiles.linear_int4(&self.limits))
    }

    pub(super) fn moe_int4(&self, dims: MoeInt4Dims) -> MoeInt4Tiles {
        self.moe_int4.get(dims, || self.tiles.moe_int4(dims, &self.limits))
    }

    pub(super) fn router(&self, experts: usize, groups: usize) -> RouterTile {
        self.look(&self.router, "any", RouterDims { experts, groups })
    }

    pub(super) fn sample(&self) -> SampleTile {
        self.look(&self.sample, "any", ())
    }
}
