//! From a rank's slices of a packed layer to [`HostInt4`], without unpacking.

use bytemuck::Pod;
use dsa80_reference::{HostArray, HostData, HostInt4, HostTensor, buffers};

use super::slices::Int4Slices;

/// compressed-tensors stores the canonical form; only zero points may need to move, when a rank's first row
/// is not the first of a word.
pub(super) fn from_compressed_tensors(
    slices: &Int4Slices,
    words: HostArray<u32>,
    scales: HostTensor,
    zero_points: Option<HostArray<u32>>,
) -> HostInt4 {
    let groups = slices.scales.columns.len();
    HostInt4 {
        out_features: slices.out_features,
        in_features: slices.in_features,
        group_size: slices.group_size,
        weight_packed: words,
        scales,
        zero_points: zero_points.map(|words| realign(words, groups, slices.skip, slices.out_features)),
    }
}

/// AutoAWQ stores everything transposed, with the eight output features of a word in another order.
pub(super) fn from_auto_awq(
    slices: &Int4Slices,
    words: &[u32],
    scales: HostTensor,
    zero_points: Option<HostArray<u32>>,
) -> HostInt4 {
    let (rows, skip, columns) = (slices.out_features, slices.skip, slices.in_features);
    let groups = slices.scales.rows.len();
    let word_columns = slices.words.columns.len();
    let words_per_row = columns.div_ceil(8);

    let mut weight_packed = buffers::take(rows * words_per_row);
    weight_packed.fill(0);
    for word_column in 0..word_columns {
        for block in 0..words_per_row {
            // Eight input features (fewer in the last block) of eight output features.
            let mut tile = [0; 8];
            for (i, word) in tile.iter_mut().enumerate().take(columns - block * 8) {
                *word = in_order(words[(block * 8 + i) * word_columns + word_column]);
            }
            let tile = transpose(tile);
            for (j, word) in tile.into_iter().enumerate() {
                let row = (word_column * 8 + j).wrapping_sub(skip);
                if row < rows {
                    weight_packed[row * words_per_row + block] = word;
                }
            }
        }
    }

    let zero_points = zero_points.map(|words| {
        let words = words.iter().copied().map(in_order).collect::<Vec<_>>();
        realign(transposed(&words, groups, word_columns), groups, skip, rows)
    });
    let data = match scales.data {
        HostData::Bf16(data) => HostData::Bf16(transposed(&data, groups, rows)),
        HostData::F16(data) => HostData::F16(transposed(&data, groups, rows)),
        HostData::F32(data) => HostData::F32(transposed(&data, groups, rows)),
    };
    HostInt4 {
        out_features: rows,
        in_features: columns,
        group_size: slices.group_size,
        weight_packed,
        scales: HostTensor { shape: vec![rows, groups], data },
        zero_points,
    }
}

/// AutoAWQ's nibble `i` holds output feature 0, 2, 4, 6, 1, 3, 5, 7 of its eight; brings them into order.
fn in_order(word: u32) -> u32 {
    const ORDER: [u32; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
    ORDER
        .iter()
        .enumerate()
        .fold(0, |sorted, (i, feature)| sorted | ((word >> (4 * i)) & 0xf) << (4 * feature))
}

/// Nibble `j` of word `i` becomes nibble `i` of word `j`.
fn transpose(tile: [u32; 8]) -> [u32; 8] {
    std::array::from_fn(|j| {
        tile.iter().enumerate().fold(0, |word, (i, row)| word | ((row >> (4 * j)) & 0xf) << (4 * i))
    })
}

/// A `[rows, columns]` matrix as `[columns, rows]`.
fn transposed<T: Pod>(matrix: &[T], rows: usize, columns: usize) -> HostArray<T> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| matrix[r * columns + c])).collect()
}

/// Zero points `[words, groups]`, eight rows a word, without the first `skip` rows and those after the next
/// `rows`.
fn realign(words: HostArray<u32>, groups: usize, skip: usize, rows: usize) -> HostArray<u32> {
    if skip == 0 {
        // The unused nibbles of the last word are ignored by contract.
        return words;
    }
    let zero_point = |row: usize, group: usize| (words[row / 8 * groups + group] >> (4 * (row % 8))) & 0xf;
    let mut aligned = vec![0; rows.div_ceil(8) * groups];
    for row in 0..rows {
        for group in 0..groups {
            aligned[row / 8 * groups + group] |= zero_point(row + skip, group) << (4 * (row % 8));
        }
    }
    aligned.into()
}
