//! What collectives add to a step.

use crate::cli::bench::collectives::{GroupReport, SizeReport};
use crate::cli::bench::step::{CaseReport, StepSettings};

/// Measured sums, and the model that takes them.
pub(super) struct CollectiveCosts<'a> {
    pub(super) group: &'a GroupReport,
    pub(super) hidden: usize,
    /// Columns of what was gathered.
    pub(super) gathered: &'a [usize],
    pub(super) settings: &'a StepSettings,
}

/// Bytes of an element: of what layers sum, and of the residual stream and the logits.
const ACT: f64 = 2.0;
const FLOAT: f64 = 4.0;

impl CollectiveCosts<'_> {
    /// Milliseconds of all of a step's: two sums a layer and a gathering, a sum of the embedding, and the logits of one row for every sequence.
    pub(super) fn of_step(&self, case: &CaseReport) -> f64 {
        let rows = case.tokens as f64;
        let layers = self.settings.num_hidden_layers as f64 * (2.0 * self.us(rows) + self.gathering(rows));
        let embedding = self.us(rows * FLOAT / ACT);
        let logits = case.sequences as f64 * self.settings.vocab_size as f64 * FLOAT;
        let logits = self.us(logits / (self.hidden as f64 * ACT));
        (layers + embedding + logits) / 1e3
    }

    /// Whether what a layer gathers was measured, or stands for a sum of as many bytes.
    pub(super) fn gatherings_measured(&self) -> bool {
        !self.group.all_gather.is_empty() && self.gathered == self.settings.gathered
    }

    /// Microseconds of what a layer gathers of so many rows.
    fn gathering(&self, rows: f64) -> f64 {
        let columns: usize = self.settings.gathered.iter().sum();
        match columns {
            0 => 0.0,
            _ if self.gatherings_measured() => between(&self.group.all_gather, rows),
            _ => self.us(rows * columns as f64 / self.hidden as f64),
        }
    }

    /// Microseconds of a sum of so many rows.
    fn us(&self, rows: f64) -> f64 {
        between(&self.group.all_reduce, rows)
    }
}

/// Microseconds of so many rows: on the line between its neighbours, and beyond the largest in proportion.
fn between(sizes: &[SizeReport], rows: f64) -> f64 {
    let mut sizes: Vec<(f64, f64)> = sizes.iter().map(|size| (size.rows as f64, size.us.median)).collect();
    sizes.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (Some(&smallest), Some(&largest)) = (sizes.first(), sizes.last()) else { return f64::NAN };
    if rows <= smallest.0 {
        return smallest.1;
    }
    if rows >= largest.0 {
        return largest.1 * rows / largest.0;
    }
    let above = sizes.iter().position(|size| size.0 >= rows).unwrap_or(0).max(1);
    let ((x0, y0), (x1, y1)) = (sizes[above - 1], sizes[above]);
    y0 + (y1 - y0) * (rows - x0) / (x1 - x0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::spread::Spread;

    #[test]
    fn sums_between_sizes_lie_on_a_line_and_a_step_has_two_a_layer() {
        let size = |rows, median| SizeReport {
            rows,
            bytes: 0,
            us: Spread { median, p10: median, p90: median, runs: 1 },
            in_a_graph: true,
            fused: false,
            bus_gb_s: 0.0,
            check: None,
        };
        let group = GroupReport {
            name: "peer".into(),
            placement: String::new(),
            measures_a_link: true,
            all_reduce: vec![size(8, 10.0), size(2, 4.0), size(16, 30.0)],
            all_reduce_norm: Vec::new(),
            all_gather: vec![size(4, 5.0)],
        };
        let mut settings = StepSettings {
            model: String::new(),
            tp: 8,
            rank: 0,
            live: 1,
            between: String::new(),
            expand_from: None,
            num_hidden_layers: 3,
            hidden_size: 64,
            vocab_size: 320,
            gathered: Vec::new(),
            dtype: String::new(),
            kv_cache_dtype: String::new(),
            page_size: 64,
            num_pages: 1,
            weight_bytes: 0,
            cache_bytes_per_token: 0,
        };
        let costs = CollectiveCosts { group: &group, hidden: 64, gathered: &[48, 16], settings: &settings };
        assert_eq!(
            [1.0, 2.0, 5.0, 8.0, 12.0, 16.0, 32.0].map(|rows| costs.us(rows)),
            [4.0, 4.0, 7.0, 10.0, 20.0, 30.0, 60.0]
        );
        // Six sums of 4 rows, one of 8, and logits of 4 x 320 floats: 40 rows.
        let case = CaseReport { tokens: 4, sequences: 4, ..CaseReport::default() };
        assert_eq!(costs.of_step(&case), (6.0 * 6.0 + 10.0 + 75.0) / 1e3);
        // Three gatherings of 4 rows too: as measured, or where others were, sums of as many bytes.
        for (columns, gatherings) in [(vec![48, 16], 15.0), (vec![128], 30.0)] {
            settings.gathered = columns;
            let costs =
                CollectiveCosts { group: &group, hidden: 64, gathered: &[48, 16], settings: &settings };
            assert_eq!(costs.of_step(&case), (36.0 + gatherings + 10.0 + 75.0) / 1e3);
        }
    }
}
