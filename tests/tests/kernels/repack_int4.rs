//! `repack_int4` against the host's packing, to the bit.

use dsa80_cuda::repack_int4::{CanonicalInt4, RepackInt4Tile, repack_int4};
use dsa80_cuda::{HostPackedInt4, Int4Shape, Limits, PackedInt4, Tile};
use dsa80_reference::{DType, HostInt4};
use dsa80_tests::emulator::Fault;
use dsa80_tests::parity::{self, TestDevice};
use proptest::prelude::*;
use proptest::sample::select;

use crate::cache_rows::expect;
use crate::int4_weights::{Format, int4};

#[derive(Debug, Clone)]
struct Case {
    out: usize,
    inner: usize,
    format: Format,
    /// A gate and its up projection, of which the second has no zero points if `mixed`.
    gate_up: bool,
    mixed: bool,
    /// The place of how many.
    index: usize,
    count: usize,
    tile: RepackInt4Tile,
    seed: u64,
}

fn cases(max_out: usize, max_inner: usize, tiles: Vec<RepackInt4Tile>) -> impl Strategy<Value = Case> {
    let format =
        (select(vec![DType::Bf16, DType::F16, DType::F32]), select(vec![32, 64, 96, 128, 0]), any::<bool>());
    (1..=max_out, 1..=max_inner, format, any::<[bool; 2]>(), 1..=3_usize, select(tiles), any::<u64>())
        .prop_map(|(out, inner, (scales, group_size, zero_points), [gate_up, mixed], count, tile, seed)| {
            let group_size = if group_size == 0 { inner } else { group_size };
            let format = Format { scales, group_size, zero_points };
            Case { out, inner, format, gate_up, mixed, index: seed as usize % count, count, tile, seed }
        })
}

fn run(device: &TestDevice, case: Case) {
    let Case { out, inner, format, gate_up, mixed, index, count, tile, seed } = case;
    let gate = int4(out, inner, format, seed);
    let up = int4(out, inner, Format { zero_points: format.zero_points && !mixed, ..format }, seed ^ 1);
    let weights: Vec<&HostInt4> = if gate_up { vec![&gate, &up] } else { vec![&gate] };
    let shape = Int4Shape::of(&weights).unwrap();
    let expected = shape.pack(&weights).unwrap();
    let mut poison = expected.clone();
    poison.weight.fill(u32::MAX);
    poison.scales.fill(0xff);
    poison.zeros.iter_mut().for_each(|zeros| zeros.fill(0xff));
    let found = parity::twice(device, || {
        let mut packed = PackedInt4::alloc(device, "packed", shape, count).unwrap();
        (0..count).for_each(|i| packed.write(device, i, &poison).unwrap());
        let mut staging: Vec<_> =
            weights.iter().map(|_| CanonicalInt4::alloc(device, shape).unwrap()).collect();
        packed.upload_at(device, &tile, &mut staging, index, &weights).unwrap();
        for i in (0..count).filter(|&i| i != index) {
            assert!(packed.read(device, i).unwrap() == poison, "place {i} of {count} was written");
        }
        bytes(&packed.read(device, index).unwrap())
    });
    parity::assert_same("packed", 512, &found, &bytes(&expected));
}

fn bytes(packed: &HostPackedInt4) -> Vec<u8> {
    let words = packed.weight.iter().flat_map(|word| word.to_le_bytes());
    words.chain(packed.scales.iter().copied()).chain(packed.zeros.iter().flatten().copied()).collect()
}

fn small() -> impl Strategy<Value = Case> {
    cases(40, 150, vec![RepackInt4Tile { warps: 2 }])
}

#[test]
fn agrees_with_the_host_to_the_bit() {
    parity::check("repack_int4", small(), run);
}

#[test]
fn agrees_with_the_host_at_size_with_every_tile() {
    let tiles = RepackInt4Tile::candidates((), &Limits::a100());
    parity::check_on_gpu("repack_int4_at_size", cases(1000, 2100, tiles), run);
}

#[test]
fn planted_faults_are_seen() {
    for (find, replace) in [
        // Two nibbles change places.
        ("const int place = 2 * (k / 2) + 4 * (k % 2);", "const int place = 2 * (k / 2) + 4 * (1 - k % 2);"),
        // Zero points of the neighbouring feature.
        (">> (4 * (feature % 8)) & 0xfu;", ">> (4 * (feature % 8 ^ 1)) & 0xfu;"),
        // What a padded last word holds beyond the inputs gets in.
        (" & (0xffffffffu >> (32 - 4 * used))", ""),
        // The group after the last one.
        ("if (pair >= pairs) return;", "if (pair > pairs) return;"),
        // The second half of a tile's inputs is the first again.
        ("eight(first, row, word + 4 * h,", "eight(first, row, word,"),
    ] {
        parity::catches(Fault { file: "repack_int4.cu", find, replace }, small(), run);
    }
}

#[test]
fn misfits_are_named() {
    parity::small_cases(|device| {
        let format = Format { scales: DType::Bf16, group_size: 32, zero_points: true };
        let weight = int4(16, 64, format, 1);
        let shape = Int4Shape::of(&[&weight]).unwrap();
        let tile = RepackInt4Tile { warps: 2 };
        let mut packed = PackedInt4::alloc(device, "packed", shape, 2).unwrap();
        let mut staging = [CanonicalInt4::alloc(device, shape).unwrap()];
        let mut upload = |index, weight: &HostInt4| {
            packed.upload_at(device, &tile, &mut staging, index, &[weight]).unwrap_err().to_string()
        };
        expect(upload(2, &weight), &["repack_int4", "`index` is 2", "below 2"]);
        expect(upload(0, &int4(32, 64, format, 1)), &["upload_int4", "`out_features` is 32", "16"]);
        let other = Int4Shape { out_features: 8, ..shape };
        let from = [CanonicalInt4::alloc(device, other).unwrap()];
        expect(repack_int4(device, &tile, &from, &mut packed, 0).unwrap_err().to_string(), &["`from`"]);
        let groups = int4(16, 64, Format { group_size: 16, ..format }, 1);
        let error = PackedInt4::upload(device, &tile, &groups).unwrap_err().to_string();
        expect(error, &["`group_size` is 16", "multiple of 32"]);
    });
}
