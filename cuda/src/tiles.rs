//! The tiles that were chosen for a GPU: `tiles/<gpu>.toml`, built in or read from a folder.

use std::collections::BTreeMap;
use std::path::Path;

use dsa80_reference::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::absorb::{AbsorbTile, AbsorbTokens};
use crate::all_reduce::{AllReduceTiles, Shots};
use crate::all_reduce_norm::{AllReduceNormTile, AllReduceNormTiles};
use crate::crossover::Crossover;
use crate::device::Limits;
use crate::exchange::MAX_RANKS;
use crate::indexer_logits::{IndexerLogitsDims, IndexerLogitsTile};
use crate::linear::{LinearTiles, LinearTokens};
use crate::linear_int4::{LinearInt4Tiles, LinearInt4Tokens};
use crate::moe_int4::{MoeInt4Dims, MoeInt4Tiles, MoeLoad};
use crate::registry::{self, PinnedTile, from_table};
use crate::sparse_mla::{SparseMlaDims, SparseMlaTiles};

/// Every file of `tiles/`, by the GPU's short name.
const EMBEDDED: &[(&str, &str)] = &[
    ("a100", include_str!("../tiles/a100.toml")),
    ("h100", include_str!("../tiles/h100.toml")),
    ("h200", include_str!("../tiles/h200.toml")),
];

/// The tiles of one GPU. Where none is pinned, the kernel's safe tile serves.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tiles {
    /// Where they were read: `"a100.toml"`.
    pub file: String,
    /// What the file says about itself.
    pub about: About,
    /// By number of ranks, `"ranks_2"`.
    crossovers: BTreeMap<String, PinnedCrossover>,
    kernels: BTreeMap<String, BTreeMap<String, Pinned>>,
}

/// Up to which size one shot of `all_reduce` serves, between GPUs as they were linked where it was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedCrossover {
    /// How it was chosen.
    pub chosen: String,
    /// The sizes.
    pub sizes: Crossover,
}

/// What a file says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The GPU's marketing name.
    pub gpu: String,
    /// How the tiles were chosen.
    pub note: String,
}

/// One kernel's tile for one class of shapes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pinned {
    /// How it was chosen.
    pub chosen: String,
    /// The geometric mean of the cases' medians, in microseconds, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub median_us: Option<f64>,
    /// How much slower the runner-up is, in percent, where it was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin_percent: Option<f64>,
    /// The tile, in its kernel's own terms.
    pub tile: toml::Table,
}

/// `"NVIDIA A100-SXM4-80GB"` is `"a100"`: the first word, or part of one, that has both letters and digits and is no size.
pub fn short_name(marketing_name: &str) -> String {
    let lower = marketing_name.to_lowercase();
    let words: Vec<&str> = lower.split(|c: char| !c.is_ascii_alphanumeric()).collect();
    let is_model = |word: &&&str| {
        let starts_with_letter = word.starts_with(|c: char| c.is_ascii_alphabetic());
        starts_with_letter && word.contains(|c: char| c.is_ascii_digit())
    };
    words.iter().find(is_model).map_or_else(|| words.join("-"), |word| (*word).to_owned())
}

impl Tiles {
    /// The tiles of the GPU with this marketing name, from `folder` where one is given; none for an unknown GPU.
    ///
    /// # Errors
    /// The file is not one of tiles: which kernel, and why.
    pub fn for_gpu(marketing_name: &str, folder: Option<&Path>) -> Result<Self> {
        let gpu = short_name(marketing_name);
        let text = match folder {
            None => EMBEDDED.iter().find(|(name, _)| *name == gpu).map(|(_, text)| (*text).to_owned()),
            Some(folder) => {
                let path = folder.join(format!("{gpu}.toml"));
                match std::fs::read_to_string(&path) {
                    Ok(text) => Some(text),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                    Err(error) => return Err(refuse(format!("{}: {error}", path.display()))),
                }
            }
        };
        text.map_or_else(
            || Ok(Self { file: format!("{gpu}.toml"), ..Self::default() }),
            |text| Self::parse(&format!("{gpu}.toml"), &text),
        )
    }

    /// Every file: those of `folder`, or the ones built in.
    ///
    /// # Errors
    /// As for [`for_gpu`](Self::for_gpu).
    pub fn all(folder: Option<&Path>) -> Result<Vec<Self>> {
        let Some(folder) = folder else {
            return EMBEDDED.iter().map(|(gpu, text)| Self::parse(&format!("{gpu}.toml"), text)).collect();
        };
        let unreadable = |error: std::io::Error| refuse(format!("{}: {error}", folder.display()));
        let mut paths: Vec<_> = std::fs::read_dir(folder)
            .map_err(unreadable)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
            .collect();
        paths.sort();
        let parse = |path: &std::path::PathBuf| {
            let text = std::fs::read_to_string(path).map_err(unreadable)?;
            Self::parse(&path.file_name().unwrap_or_default().to_string_lossy(), &text)
        };
        paths.iter().map(parse).collect()
    }

    /// Reads the text of a file.
    ///
    /// # Errors
    /// An unknown kernel, class or key, or a tile that its kernel refuses: with the file, the kernel and the reason.
    pub fn parse(file: &str, text: &str) -> Result<Self> {
        let failed = |what: &str, reason: &str| refuse(format!("{file}: {what}{reason}"));
        let mut table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| failed("", &error.to_string()))?;
        let about = table.remove("about").ok_or_else(|| failed("", "there is no [about] table"))?;
        let about: About =
            about.try_into().map_err(|error: toml::de::Error| failed("about: ", error.message()))?;
        let crossovers = table.remove("crossover").unwrap_or_else(|| toml::Table::new().into());
        let crossovers: BTreeMap<String, PinnedCrossover> =
            crossovers.try_into().map_err(|error: toml::de::Error| failed("crossover: ", error.message()))?;
        let known: Vec<String> = (2..=MAX_RANKS).map(crossover_key).collect();
        if let Some(key) = crossovers.keys().find(|key| !known.contains(key)) {
            let place = format!("crossover.{key}: ");
            return Err(failed(
                &place,
                &format!("unknown number of ranks, expected one of {}", known.join(", ")),
            ));
        }
        let mut tiles = Self { file: file.to_owned(), about, crossovers, kernels: BTreeMap::new() };
        for (kernel, classes) in table {
            let registered = registry::find(&kernel)
                .ok_or_else(|| failed(&format!("{kernel}: "), "there is no kernel of this name"))?;
            let toml::Value::Table(classes) = classes else {
                return Err(failed(&format!("{kernel}: "), "expected a table for each class of shapes"));
            };
            for (class, pinned) in classes {
                let place = format!("{kernel}.{class}: ");
                if !registered.classes.contains(&class.as_str()) {
                    let known = registered.classes.join(", ");
                    return Err(failed(&place, &format!("unknown class of shapes, expected one of {known}")));
                }
                let pinned: Pinned =
                    pinned.try_into().map_err(|error: toml::de::Error| failed(&place, error.message()))?;
                // Pinned for whatever GPU, a tile fits an A100.
                registered
                    .validate(&class, &pinned.tile, &Limits::a100())
                    .map_err(|reason| failed(&place, &reason))?;
                tiles.kernels.entry(kernel.clone()).or_default().insert(class, pinned);
            }
        }
        Ok(tiles)
    }

    /// The file's text.
    ///
    /// # Errors
    /// The tiles cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        #[derive(Serialize)]
        struct File<'a> {
            about: &'a About,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            crossover: &'a BTreeMap<String, PinnedCrossover>,
            #[serde(flatten)]
            kernels: &'a BTreeMap<String, BTreeMap<String, Pinned>>,
        }
        toml::to_string(&File { about: &self.about, crossover: &self.crossovers, kernels: &self.kernels })
            .map_err(|error| refuse(format!("{}: {error}", self.file)))
    }

    /// What is pinned for a kernel's class of shapes.
    pub fn pinned(&self, kernel: &str, class: &str) -> Option<&Pinned> {
        self.kernels.get(kernel)?.get(class)
    }

    /// What is pinned for the collectives of so many ranks.
    pub fn crossover(&self, ranks: usize) -> Option<Crossover> {
        self.crossovers.get(&crossover_key(ranks)).map(|pinned| pinned.sizes)
    }

    /// Replaces it.
    pub fn pin_crossover(&mut self, ranks: usize, pinned: PinnedCrossover) {
        self.crossovers.insert(crossover_key(ranks), pinned);
    }

    /// Every kernel, class and tile.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str, &Pinned)> {
        self.kernels.iter().flat_map(|(kernel, classes)| {
            classes.iter().map(move |(class, pinned)| (kernel.as_str(), class.as_str(), pinned))
        })
    }

    /// Replaces what is pinned for a kernel's class of shapes.
    pub fn pin(&mut self, kernel: &str, class: &str, pinned: Pinned) {
        self.kernels.entry(kernel.to_owned()).or_default().insert(class.to_owned(), pinned);
    }

    /// The tile to launch with: the pinned one where it runs with these dims, which need not be those that it was chosen for, or the
    /// safe one.
    pub fn tile<T: PinnedTile>(&self, class: &str, dims: T::Dims, limits: &Limits) -> T {
        self.pinned(T::KERNEL, class)
            .and_then(|pinned| from_table::<T>(&pinned.tile).ok())
            .filter(|tile| tile.validate(dims, limits).is_ok())
            .unwrap_or_else(|| T::safe(dims))
    }
}

impl Tiles {
    /// The tile of both kernels of `indexer_logits`, for keys in bf16 or in 8 bits.
    pub fn indexer_logits(&self, dims: IndexerLogitsDims, fp8: bool, limits: &Limits) -> IndexerLogitsTile {
        let (decode, prefill) =
            if fp8 { ("decode_fp8", "prefill_fp8") } else { ("decode_bf16", "prefill_bf16") };
        let decode: IndexerLogitsTile = self.tile(decode, dims, limits);
        let prefill: IndexerLogitsTile = self.tile(prefill, dims, limits);
        IndexerLogitsTile { general: prefill.general, decode: decode.decode }
    }

    /// The tiles of `linear` and `lm_head`, for every number of tokens.
    pub fn linear(&self, limits: &Limits) -> LinearTiles {
        let [up_to_8, up_to_32] = [LinearTokens::UpTo8, LinearTokens::UpTo32]
            .map(|tokens| tokens.by_width().map(|size| self.tile(size.class(), size, limits)));
        let middle = self.tile("middle", LinearTokens::Middle, limits);
        let many = self.tile("many", LinearTokens::Many, limits);
        LinearTiles { up_to_8, up_to_32, middle, many, ..LinearTiles::safe() }
    }

    /// The tile of `absorb_query` and `absorb_output`, for few tokens and for many.
    pub fn absorb(&self, limits: &Limits) -> AbsorbTile {
        let few: AbsorbTile = self.tile("few", AbsorbTokens::Few, limits);
        let many: AbsorbTile = self.tile("many", AbsorbTokens::Many, limits);
        AbsorbTile { few: few.few, many: many.many }
    }

    /// The tiles of `all_reduce` and `all_reduce_norm`, for any number of ranks.
    pub fn all_reduce(&self, limits: &Limits) -> AllReduceTiles {
        AllReduceTiles {
            one_shot: self.tile("one_shot", Shots::One, limits),
            two_shots: self.tile("two_shots", Shots::Two, limits),
            norm: AllReduceNormTiles {
                one_shot: self.tile("one_shot", AllReduceNormTile::glm_dims("one_shot"), limits),
                two_shots: self.tile("two_shots", AllReduceNormTile::glm_dims("two_shots"), limits),
            },
            crossover: None,
        }
    }

    /// The tiles of both ways through `linear_int4`.
    pub fn linear_int4(&self, limits: &Limits) -> LinearInt4Tiles {
        LinearInt4Tiles {
            few_8: self.tile("tokens_8", LinearInt4Tokens::UpTo8, limits),
            few_16: self.tile("tokens_16", LinearInt4Tokens::UpTo16, limits),
            few_32: self.tile("tokens_32", LinearInt4Tokens::UpTo32, limits),
            medium: self.tile("medium", (), limits),
            many: self.tile("many", (), limits),
            ..LinearInt4Tiles::safe()
        }
    }

    /// The tiles of all ways through `moe_int4`.
    pub fn moe_int4(&self, dims: MoeInt4Dims, limits: &Limits) -> MoeInt4Tiles {
        let of = |load| MoeInt4Dims { load, ..dims };
        MoeInt4Tiles {
            pairs: self.tile("any", dims, limits),
            few: self.tile("few", of(MoeLoad::Few), limits),
            some: self.tile("some", of(MoeLoad::Some), limits),
            many: self.tile("many", of(MoeLoad::Many), limits),
        }
    }

    /// The tiles of all ways through `sparse_mla`.
    pub fn sparse_mla(&self, dims: SparseMlaDims, limits: &Limits) -> SparseMlaTiles {
        SparseMlaTiles {
            decode: self.tile("decode", dims, limits),
            prefill: self.tile("prefill", dims, limits),
            wide_decode: self.tile("decode", dims, limits),
            wide_prefill: self.tile("prefill", dims, limits),
            union: self.tile("any", (), limits),
            ..SparseMlaTiles::safe(dims)
        }
    }
}

fn crossover_key(ranks: usize) -> String {
    format!("ranks_{ranks}")
}

fn refuse(message: String) -> Error {
    Error::Backend { backend: "cuda", message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer_norm_rope::{LayerNormRopeDims, LayerNormRopeTile};
    use crate::tile::Tile;

    const GOOD: &str = "[about]\ngpu = \"NVIDIA A100\"\nnote = \"made up\"\n\n\
        [layer_norm_rope.any]\nchosen = \"sweep\"\nmedian_us = 1.5\nmargin_percent = 2.0\n\n\
        [layer_norm_rope.any.tile]\nwarps = 2\nvector = 4\n";

    const DIMS: LayerNormRopeDims = LayerNormRopeDims { width: 128, rope: 64 };

    #[test]
    fn marketing_names_become_file_names() {
        for (name, short) in [
            ("NVIDIA A100-SXM4-80GB", "a100"),
            ("NVIDIA A100 80GB PCIe", "a100"),
            ("A100-PCIE-40GB", "a100"),
            ("NVIDIA H100 80GB HBM3", "h100"),
            ("NVIDIA H200", "h200"),
            ("NVIDIA A800-SXM4-80GB", "a800"),
            ("NVIDIA GeForce RTX 3090", "nvidia-geforce-rtx-3090"),
            ("NVIDIA L40S", "l40s"),
            ("", ""),
        ] {
            assert_eq!(short_name(name), short, "{name}");
        }
    }

    #[test]
    fn a_pinned_tile_is_found_and_written_back() {
        let tiles = Tiles::parse("a100.toml", GOOD).unwrap();
        let expected = LayerNormRopeTile { warps: 2, vector: 4 };
        assert_eq!(tiles.tile::<LayerNormRopeTile>("any", DIMS, &Limits::a100()), expected);
        let pinned = tiles.pinned("layer_norm_rope", "any").unwrap();
        assert_eq!((pinned.median_us, pinned.margin_percent), (Some(1.5), Some(2.0)));
        assert_eq!(Tiles::parse("a100.toml", &tiles.to_toml().unwrap()).unwrap(), tiles);
        assert_eq!(tiles.iter().count(), 1);
    }

    #[test]
    fn a_crossover_is_pinned_for_a_number_of_ranks() {
        let mut tiles = Tiles::parse("a100.toml", GOOD).unwrap();
        assert_eq!(tiles.crossover(2), None);
        let sizes = Crossover { all_reduce_bytes: 1000, all_reduce_norm_bytes: 10 };
        tiles.pin_crossover(2, PinnedCrossover { chosen: "measured".into(), sizes });
        let text = tiles.to_toml().unwrap();
        let read = Tiles::parse("a100.toml", &text).unwrap();
        assert_eq!(read, tiles);
        assert_eq!((read.crossover(2), read.crossover(4)), (Some(sizes), None));
        for (from, to, words) in [
            (
                "ranks_2",
                "ranks_9",
                "a100.toml: crossover.ranks_9: unknown number of ranks, expected one of ranks_2",
            ),
            ("all_reduce_bytes", "bytes", "a100.toml: crossover: unknown field `bytes`"),
        ] {
            let error = Tiles::parse("a100.toml", &text.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn an_unknown_gpu_gets_safe_tiles() {
        let tiles = Tiles::for_gpu("NVIDIA Z999", None).unwrap();
        let tile = tiles.tile::<LayerNormRopeTile>("any", DIMS, &Limits::a100());
        assert_eq!(tile, LayerNormRopeTile::safe(DIMS));
    }

    #[test]
    fn a_bad_file_says_which_kernel_and_why() {
        for (from, to, words) in [
            ("[about]", "[abuot]", "a100.toml: there is no [about] table"),
            ("note", "remark", "a100.toml: about: unknown field `remark`"),
            ("layer_norm_rope", "layer_norm", "a100.toml: layer_norm: there is no kernel of this name"),
            (
                ".any",
                ".decode",
                "a100.toml: layer_norm_rope.decode: unknown class of shapes, expected one of any",
            ),
            ("median_us", "median", "a100.toml: layer_norm_rope.any: unknown field `median`"),
            ("warps = 2", "warps = 2\nstages = 3", "a100.toml: layer_norm_rope.any: "),
            ("warps = 2\n", "", "a100.toml: layer_norm_rope.any: missing field `warps`"),
            ("warps = 2", "warps = 99", "a block has 1 to 8 warps"),
            ("warps = 2", "warps = -1", "a100.toml: layer_norm_rope.any: "),
            ("warps = 2", "warps = 2.5", "a100.toml: layer_norm_rope.any: "),
            ("warps = 2", "warps =", "a100.toml: "),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = Tiles::parse("a100.toml", &GOOD.replace(from, to)).unwrap_err().to_string();
            assert!(error.contains(words), "{from} -> {to}: {error}");
        }
    }

    #[test]
    fn the_files_built_in_are_good_and_cover_every_class() {
        for tiles in Tiles::all(None).unwrap() {
            assert_eq!(format!("{}.toml", short_name(&tiles.about.gpu)), tiles.file);
            for kernel in registry::KERNELS {
                for class in kernel.classes {
                    let pinned = tiles.pinned(kernel.kernel, class);
                    assert!(pinned.is_some(), "{}: {} {class} is missing", tiles.file, kernel.kernel);
                }
            }
        }
    }

    #[test]
    fn the_indexers_kernels_have_a_tile_each() {
        let (dims, limits) = (IndexerLogitsTile::glm_dims("decode_fp8"), Limits::a100());
        let safe = IndexerLogitsTile::safe(dims);
        let candidates = IndexerLogitsTile::candidates(dims, &limits);
        let decode = candidates.iter().find(|tile| tile.decode != safe.decode).unwrap();
        let prefill = candidates.iter().find(|tile| tile.general != safe.general).unwrap();
        let mut tiles = Tiles::default();
        for (class, tile) in [("decode_fp8", decode), ("prefill_fp8", prefill)] {
            let tile = registry::to_table(tile).unwrap();
            let pinned = Pinned { chosen: "by hand".into(), median_us: None, margin_percent: None, tile };
            tiles.pin("indexer_logits", class, pinned);
        }
        let both = IndexerLogitsTile { general: prefill.general, decode: decode.decode };
        assert_eq!(tiles.indexer_logits(dims, true, &limits), both);
        assert_eq!(tiles.indexer_logits(dims, false, &limits), safe);
    }

    #[test]
    fn a_folder_is_read_instead_of_what_is_built_in() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a100.toml"), GOOD).unwrap();
        std::fs::write(folder.path().join("notes.txt"), "").unwrap();
        let tiles = Tiles::for_gpu("NVIDIA A100-SXM4-80GB", Some(folder.path())).unwrap();
        assert_eq!(tiles, Tiles::all(Some(folder.path())).unwrap()[0]);
        assert_eq!(Tiles::for_gpu("NVIDIA H100", Some(folder.path())).unwrap().iter().count(), 0);
        std::fs::write(folder.path().join("h100.toml"), "x").unwrap();
        assert!(
            Tiles::for_gpu("NVIDIA H100", Some(folder.path())).unwrap_err().to_string().contains("h100.toml")
        );
        assert!(Tiles::all(Some(&folder.path().join("none"))).is_err());
    }
}
